"""A backend is added by the README's steps and by nothing else."""

import re
import shutil

import pandas as pd
from conftest import ROOT, run_script


def copy_of_the_repo(folder):
    for path in [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


def edit(path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path} has not exactly one {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_backend_is_added_by_the_steps_of_the_readme(tiny, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"## Adding a backend.*?```python\n(.*?)```", readme, re.DOTALL)[1]
    repo = copy_of_the_repo(tmp_path / "repo")
    (repo / "torchscript_inference.py").write_text(code, encoding="utf-8")
    first = '    "onnx_inference": '
    edit(repo / "backends.py", first, f'    "torchscript_inference": ["torchscript"],\n{first}')
    first = '    "pytorch": '
    colour = f'    "torchscript": ("TorchScript", YELLOW),\n{first}'
    edit(repo / "utils" / "report" / "names.py", first, colour)
    paths = ["--data", tiny / "data", "--weights", tiny / "weights", "--results", tmp_path]
    small = ["--backends", "pytorch", "torchscript", "--quick", "--rounds", 1, "--device", "cpu", *paths]
    said = run_script(repo / "benchmark.py", *small, cwd=repo).stdout
    rows = pd.read_csv(tmp_path / "quick" / "benchmark_results.csv").set_index("backend")
    assert set(rows.loc["torchscript"].status) == {"ok"} and (rows.loc["torchscript"].speedup > 0).all()
    assert "TorchScript FP32" in said
