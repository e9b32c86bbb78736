# For the type checker: pandas finds the types of columns and rows at run time, so that nothing is checked of them.
from typing import Any

def __getattr__(name: str) -> Any: ...
