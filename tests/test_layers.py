"""The house, read from the files themselves: who imports whom, and how large anything may grow."""

import ast
import functools
import subprocess
import sys

import pytest
from conftest import ROOT

# A file imports from its own floor and from those below: model, datasets and what lies directly in utils/;
# the backends and what builds engines for them; measuring; serving; reporting; the scripts.
BASE, BACKENDS, MEASURE, SERVE, REPORT, SCRIPT = range(6)
FLOORS = {"model": BASE, "datasets": BASE, "utils": BASE, "utils.plot_utils": REPORT}
FLOORS |= {"utils.measure": MEASURE, "utils.serve": SERVE, "utils.report": REPORT}
FLOORS |= dict.fromkeys(["train", "benchmark", "compare", "predict", "end_to_end", "install"], SCRIPT)
LONGEST_CHAIN = 9  # files
LONGEST_FILE = 380
MOST_LINES = 8000  # of Python that is no test


def floor(module: str) -> int:
    """By its own name, else by its folder's; the files beside the scripts that are none are backends."""
    return FLOORS.get(module, FLOORS.get(module.rpartition(".")[0], BACKENDS))


@functools.cache
def sources() -> dict[str, str]:
    """Module -> source, of every Python file that is no test."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name: path.read_text("utf-8") for name, path in named.items() if not name.endswith("__init__")}


def is_stand_alone(node: ast.AST) -> bool:
    """`if __name__ == "__main__":`, of which an import of the file runs nothing."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imported(source: str) -> set[str]:
    """The names of modules that a file's import statements, also those in functions, could mean."""
    names, waiting = set(), [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif not is_stand_alone(node):
            waiting += ast.iter_child_nodes(node)
    return names


@functools.cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules of this repo that it imports."""
    return {module: imported(source) & set(sources()) - {module} for module, source in sources().items()}


def longest_chain(of: dict[str, set[str]]) -> list[str]:
    """The longest chain, each file importing the next; ValueError with the circle if there is one."""
    known = {}

    def chain(module: str, above: tuple = ()) -> list[str]:
        if module in above:
            raise ValueError(" -> ".join([*above[above.index(module) :], module]))
        if module not in known:
            below = [chain(name, (*above, module)) for name in sorted(of[module])]
            known[module] = [module, *max(below, key=len, default=[])]
        return known[module]

    return max((chain(module) for module in sorted(of)), key=len)


def upward(of: dict[str, set[str]]) -> list[str]:
    return [f"{one} -> {other}" for one in of for other in sorted(of[one]) if floor(other) > floor(one)]


def test_there_is_no_circle_and_no_long_chain_of_imports():
    chain = longest_chain(graph())
    assert len(chain) <= LONGEST_CHAIN, f"{len(chain)} files: {' -> '.join(chain)}"


def test_no_file_imports_from_a_floor_above():
    assert upward(graph()) == []


def test_backends_and_engine_builders_import_none_of_each_other():
    builders = {"torch_trt", "trt"}
    siblings = builders | {name for name in graph() if name.endswith("_inference")}
    seen = {name: sorted(graph()[name] & siblings) for name in siblings}
    assert set(seen.pop("tensorrt_inference")) <= builders  # runs what both of them build
    assert not any(seen.values()), seen


def test_circles_chains_and_upward_imports_are_seen_wherever_they_stand():
    hidden = "def f():\n    from utils.report import words\nif __name__ == '__main__':\n    import train\n"
    assert imported(hidden) == {"utils.report", "utils.report.words"}
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"a"}}) == ["d", "a", "b", "c"]
    with pytest.raises(ValueError, match="a -> b -> a"):
        longest_chain({"a": {"b"}, "b": {"a"}})
    assert upward({"utils.measure.records": {"utils.report.words", "utils.utils"}, "compare": set()}) == [
        "utils.measure.records -> utils.report.words"
    ]
    assert not upward({"utils.report.words": {"utils.measure.records"}, "predict": {"backends"}})


def test_every_folder_can_be_taken_in_at_a_glance():
    assert len([name for name in sources() if name.count(".") == 1]) <= 9


def functions(source: str) -> dict[str, int]:
    """Name -> lines, of every function."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in found}


@pytest.mark.parametrize("module", sorted(sources()))
def test_files_functions_and_lines_stay_readable(module):
    lines = sources()[module].splitlines()
    assert len(lines) <= LONGEST_FILE
    assert not {name: size for name, size in functions(sources()[module]).items() if size > 60}
    assert not [line for line in lines if len(line) > 110]


def test_the_whole_stays_small():
    assert sum(len(source.splitlines()) for source in sources().values()) <= MOST_LINES


def test_importing_touches_no_gpu():
    """Processes are forked from one that has imported all: had it started CUDA, none of them could use it."""
    code = f"""
import ctypes
import torch
def started(*_):
    raise SystemExit("CUDA or NVML was started")
torch._C._cuda_init = torch._C._cuda_getDeviceCount = torch.cuda.is_available = started
import pynvml
pynvml.nvmlInit = started
class Library(ctypes.CDLL):
    def __init__(self, name, *arguments, **options):
        started() if "cuda" in str(name) else super().__init__(name, *arguments, **options)
ctypes.CDLL = Library
import {", ".join(sorted(sources()))}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
