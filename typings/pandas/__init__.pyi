# For the type checker, which checks nothing of pandas: the types of columns and rows are found at run time.
from typing import Any

def __getattr__(name: str) -> Any: ...
