"""Every file imports only what lies below it: no circle, no arrow upwards, also not inside functions."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

LAYERS = [  # from the lowest; files in one layer do not import each other
    ["utils.environment", "utils.measure.timing", "utils.measure.roofline", "utils.measure.schema"],
    ["utils.utils", "utils.sample_images", "utils.measure.gpu"],
    ["utils.images", "utils.devices", "utils.report.training_log", "utils.serve.labels", "utils.backend"],
    ["model", "datasets", "backends"],
    ["utils.onnx_export", "utils.measure.accuracy", "utils.serve.pipeline"],
    ["pytorch_inference", "onnx_inference", "trt", "torch_trt", "utils.serve.dali", "utils.serve.load"],
    ["tensorrt_inference", "utils.measure.records"],
    ["utils.report.rows", "utils.report.analysis"],
    ["utils.report.tables"],
    ["utils.report.words", "utils.measure.worker"],
    [
        "utils.report.readme",
        "utils.report.chart_titles",
        "utils.report.chart_style",
        "utils.measure.interleave",
    ],
    ["utils.report.serving_plots", "utils.measure.jobs"],
    ["utils.plot_utils"],
    ["benchmark"],
    ["compare", "end_to_end", "predict", "train"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(source: str) -> set[str]:
    """The names of modules that a file's import statements, wherever they stand, could mean.

    What it does when it is run as a script is left out: nobody who imports it imports that.
    """
    names, tree = set(), ast.parse(source)
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if __name__ == '__main__'")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def upward(module: str, source: str) -> set[str]:
    return {name for name in imported(source) if LEVEL.get(name, -1) >= LEVEL[module]}


def modules() -> dict[str, str]:
    paths = [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("[!_]*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text("utf-8") for path in paths}


def test_every_file_has_its_layer():
    assert set(modules()) == set(LEVEL)


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_a_file_imports_only_what_lies_below_it(module):
    assert not upward(module, modules()[module])


def test_an_upward_import_is_seen_wherever_it_stands():
    hidden = "def f():\n    from utils.report import words\n"
    assert upward("utils.measure.records", hidden) == {"utils.report.words"}
    assert upward("compare", "import train\n") == {"train"}
    assert not upward("utils.report.words", "from utils.report import analysis\n")
    assert not upward("trt", 'if __name__ == "__main__":\n    import train\n')


@pytest.mark.parametrize("module", ["pytorch_inference", "onnx_inference", "tensorrt_inference", "backends"])
def test_importing_a_backend_imports_nothing_that_measures_or_reports(module):
    code = f"import sys, {module}; print(*[name for name in sys.modules if name.startswith('utils.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert not [name for name in found if name.startswith(("utils.measure", "utils.report"))]


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
import {", ".join(sorted(LEVEL))}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
