"""What predict.py chooses before it classifies: images, checkpoint, backend and batch size."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

import model
from utils import environment
from utils.images import fingerprint
from utils.serve import choices, labels
from utils.utils import UserError


def test_a_folder_that_is_named_is_looked_into_however_it_is_called(tmp_path, monkeypatch):
    (tmp_path / ".hid" / "sub").mkdir(parents=True)
    Image.new("RGB", (9, 7), "red").save(tmp_path / ".hid" / "a.png")
    monkeypatch.chdir(tmp_path / ".hid" / "sub")
    assert choices.find_images(Path(".."))[0] == [str(Path("../a.png"))]
    assert choices.find_images(tmp_path / ".hid")[0] == [str(tmp_path / ".hid" / "a.png")]


def test_images_are_listed_folder_by_folder_under_the_names_by_which_they_are_reached(tmp_path, monkeypatch):
    for name in ("b/z.png", "b/a.png", "b.png", "b c.png", "b.d/a.png", "ы.PNG", "b/.x.png", "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images = [path for path in tmp_path.rglob("[!.]*") if path.suffix.lower() == ".png"]
    monkeypatch.chdir(tmp_path)
    for folder in (Path(), Path("..", tmp_path.name), tmp_path):
        wanted = sorted(folder / path.relative_to(tmp_path) for path in images)
        assert choices.find_images(folder)[0] == [str(path) for path in wanted] and len(wanted) == 6


def test_the_backend_is_the_fastest_measured_on_this_machine_and_no_other(measured, tmp_path):
    results = Path(shutil.copytree(measured / "results" / "quick", tmp_path / "quick"))
    rows = choices.measured_here(results, "cpu", 64)
    found = {(row["backend"], row["batch_size"]) for row in rows}
    assert found == set(itertools.product(("pytorch", "onnx"), (1, 4)))
    fastest = max(rows, key=lambda row: row["fps"])
    first, second = choices.choose_backends(None, rows, 10**9, "cpu")
    assert (first.backend, first.batch_size) == (fastest["backend"], fastest["batch_size"])
    assert first.batch_sizes == (1, 4) and first.measured
    assert {first.backend, second.backend} == {"pytorch", "onnx"}
    assert [one.backend for one in choices.choose_backends("pytorch", rows, 9, "cpu")] == ["pytorch"]
    path = results / "benchmark_results.csv"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    lost = [
        line.replace(",ok,", ",out_of_memory,") if ",onnx,FP32,cpu,64,4," in line else line for line in lines
    ]
    other = [line.replace(",cpu,64,1,", ",cpu,64,32,") for line in lines if ",pytorch,FP32,cpu,64,1," in line]
    path.write_text("".join(lost + other), encoding="utf-8")  # an engine is for all that were asked for
    rows = choices.measured_here(results, "cpu", 64)
    assert {row["backend"]: row["batch_sizes"] for row in rows} == {"onnx": {1, 4}, "pytorch": {1, 4, 32}}
    path = results / "environment.json"
    path.write_text(path.read_text("utf-8").replace('"torch": "', '"torch": "0.'), encoding="utf-8")
    assert choices.measured_here(results, "cpu", 64) == []  # measured by another version
    assert choices.measured_here(tmp_path, "cpu", 64) == []


def row(backend: str, batch_size: int, fps: float, load_s: float, first_call_ms: float) -> dict:
    figures = {"batch_size": batch_size, "fps": fps, "load_s": load_s, "first_call_ms": first_call_ms}
    return {"backend": backend, "batch_sizes": {batch_size, 16}, **figures}


ROWS = [  # what compiles is fastest, but only once it has compiled
    row("torch-compile", 256, 40_000.0, 3.0, 6_000.0),
    row("onnx", 256, 20_000.0, 1.0, 900.0),
    row("pytorch", 256, 5_000.0, 0.2, 100.0),
    row("pytorch", 16, 3_000.0, 0.2, 100.0),
]


@pytest.mark.parametrize(
    ("count", "first", "batch_size"),
    [(10, "pytorch", 16), (1_000, "pytorch", 256), (10**5, "onnx", 256), (10**7, "torch-compile", 256)],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_backend_is_the_one_that_is_done_first(device, count, first, batch_size):
    found = choices.choose_backends(None, ROWS, count, device)
    assert (found[0].backend, found[0].batch_size) == (first, batch_size)
    assert sorted(choice.backend for choice in found) == ["onnx", "pytorch", "torch-compile"]
    (only,) = choices.choose_backends("torch-compile", ROWS, count, device)
    assert only.backend == "torch-compile" and only.measured and only.batch_sizes == (16, 256)


def test_what_is_not_known_of_a_start_is_not_taken_for_nothing():
    rows = [row("onnx", 256, 5_001.0, float("inf"), float("inf")), *ROWS]
    assert choices.choose_backends(None, rows, 1_000, "cpu")[0].backend == "pytorch"


def table(results: Path, **fps: float) -> None:
    """A table of one row for each backend (images/s at 64 px, batch 4), as if measured here."""
    columns = [
        "sweep",
        "backend",
        "device",
        "image_size",
        "batch_size",
        "status",
        "fps",
        "load_s",
        "first_call_ms",
    ]
    rows = [["main", name, "cpu", "64", "4", "ok", str(value), "0.1", "9"] for name, value in fps.items()]
    labels.write_rows(results / "benchmark_results.csv", [columns, *rows])
    here = {"main": environment.environment("cpu")}
    (results / "environment.json").write_text(json.dumps(here), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(",", ";").encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace("9.0", "0").encode(),
        lambda text: text.replace("9.0", "fast").encode(),
        lambda text: text.replace(",4,", ",0,").encode(),
        lambda text: text.replace("first_call_ms", "first").encode(),
        lambda text: text.replace("main,pytorch", 'main,"pytorch\0').encode(),
    ],
    ids=["semicolons", "UTF-16", "0 images/s", "text", "batch of 0", "no such column", "cut"],
)
def test_a_table_that_somebody_saved_otherwise_is_one_sentence(tmp_path, change):
    table(tmp_path, pytorch=9.0)
    path = tmp_path / "benchmark_results.csv"
    assert len(choices.measured_here(tmp_path, "cpu", 64)) == 1
    path.write_bytes(change(path.read_text("utf-8")))
    with contextlib.suppress(UserError):
        assert choices.measured_here(tmp_path, "cpu", 64) == []
    (tmp_path / "environment.json").write_text('{"main": [1]}', encoding="utf-8")
    with pytest.raises(UserError, match="is no table of python benchmark.py .*; make it anew"):
        choices.measured_here(tmp_path, "cpu", 64)


def test_without_a_table_batches_are_of_one_size():
    (only,) = choices.choose_backends(None, [], 100, "cpu")
    assert (only.backend, only.batch_size, only.measured) == ("pytorch", 15, False)


def checkpoint(tiny: Path, folder: Path, size: int, classes: list[str], accuracy: float, trained_on: str):
    """A checkpoint of random weights that says so of itself."""
    facts = model.load_facts(tiny / "weights" / "best_resnet18_64.pth")
    facts |= {"classes": classes, "image_size": size, "accuracy": accuracy}
    facts["data"] = {**facts["data"], "fingerprint": trained_on}
    path = folder / f"best_resnet18_{size}.pth"
    model.save(path, model.build(len(classes)), **facts)
    return path


def test_a_checkpoint_is_chosen_among_those_of_one_data_set_only(tiny, tmp_path):
    pets, fruit, data = ["cat", "dog"], ["apple", "pear"], tmp_path / "data"
    checkpoint(tiny, tmp_path, 64, pets, 1.0, "pets")
    newer = checkpoint(tiny, tmp_path, 96, fruit, 0.33, fingerprint(tiny / "data"))
    assert choices.choose_checkpoint(tmp_path, None, tiny / "data")[0] == newer  # though less accurate
    assert choices.choose_checkpoint(tmp_path, 64, tiny / "data")[1]["classes"] == pets
    with pytest.raises(UserError, match="different classes.*--image-size SIZE") as error:
        choices.choose_checkpoint(tmp_path, None, data)
    assert "best_resnet18_64.pth: classes cat, dog; trained 20" in str(error.value)
    newer = checkpoint(tiny, tmp_path, 96, pets, 0.33, "more pets")
    os.utime(newer, (time.time() + 9, time.time() + 9))
    assert choices.choose_checkpoint(tmp_path, None, data)[0] == newer


def test_copies_beside_a_checkpoint_are_none_and_it_may_be_of_any_time(project, tmp_path):
    path = checkpoint(project, tmp_path, 64, ["cat", "dog"], 1.0, "pets")
    for name in ("64 (1)", "64 copy", "64.sync-conflict"):
        (tmp_path / f"best_resnet18_{name}.pth").write_bytes(b"cut short")
    found, facts = choices.choose_checkpoint(tmp_path, None, tmp_path)
    assert found == path and choices.described(path, facts).startswith("classes cat, dog; trained 20")
    stat = types.SimpleNamespace(st_mtime=1e12)
    told = choices.described(types.SimpleNamespace(stat=lambda: stat), facts)
    assert told == "classes cat, dog; trained at an unknown time"


def test_facts_are_read_without_pytorch_and_what_is_odd_is_said(tiny, tmp_path):
    path = tiny / "weights" / "best_resnet18_64.pth"
    expected = model.load_facts(path)
    assert choices.load_facts(path) == expected
    code = f"from utils.serve import choices; import sys; choices.load_facts(choices.Path({str(path)!r}))"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    for name, content in {"64": path.read_bytes()[:9000], "96": path.read_bytes(), "32": b"no zip"}.items():
        odd = tmp_path / f"best_resnet18_{name}.pth"
        odd.write_bytes(content)
        with pytest.raises(UserError, match="python train.py --force"):
            choices.load_facts(odd)
