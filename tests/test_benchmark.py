"""The real scripts from checkpoints to tables, at small sizes."""

import json
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import ROOT, run_script

from utils import records

SMALL = ["--device", "cpu", "--backends", "pytorch", "onnx", "--rounds", "2", "--runs", "6", "--min-seconds", "0", "--quick"]


@pytest.fixture(scope="module")
def results(project):
    """results/quick of one benchmark over PyTorch and ONNX Runtime in two rounds."""
    done = run_script("benchmark.py", *SMALL, cwd=project)
    assert "Which is fastest?" in done.stdout
    return project / "results" / "quick"


def test_every_row_is_ok_checked_and_complete(results):
    rows = records.read_csv(results)
    assert len(rows) == 2 * 2 * 2 and set(rows.status) == {"ok"}
    assert (rows.runs >= 6).all() and set(rows.rounds) == {2}
    assert (rows.agreement >= 0.99).all() and (rows.max_abs_diff < 0.01).all()
    assert (abs(rows.fps - rows.batch_size / rows.mean_ms * 1000) < 1e-2 * rows.fps).all()
    onnx, base = (rows[rows.backend == name].set_index(["image_size", "batch_size"]) for name in ("onnx", "pytorch"))
    assert (abs(onnx.speedup - base.mean_ms / onnx.mean_ms) < 1e-3 * onnx.speedup).all()
    assert base.gpu_memory_mb.isna().all()  # no GPU: empty, not 0


def test_the_csv_can_be_recomputed_from_the_raw_samples(results):
    before = (results / "benchmark_results.csv").read_bytes()
    records.write_csv(results)
    assert (results / "benchmark_results.csv").read_bytes() == before


def test_charts_log_and_environment_are_there(results):
    for name in ("fps_vs_image_size.png", "fps_vs_batch_size.png", "speedup_vs_image_size.png"):
        assert (results / name).read_bytes().startswith(b"\x89PNG")
    environment = json.loads((results / "environment.json").read_text(encoding="utf-8"))["main"]
    assert environment["sample_data"] is True and environment["packages"]["torch"] and environment["threads"] >= 1
    assert "batch 4" in (results / "benchmark.log").read_text(encoding="utf-8")


def test_a_second_run_measures_nothing_and_an_extended_one_only_what_is_new(project, results):
    stamp = {path: path.stat().st_mtime_ns for path in (results / "raw" / "main").glob("*_round*.json")}
    assert "everything is up to date" in run_script("benchmark.py", *SMALL, cwd=project).stdout
    assert {path: path.stat().st_mtime_ns for path in stamp} == stamp
    record = json.loads((results / "raw/main/onnx_64_round0.json").read_text(encoding="utf-8"))
    run_script("benchmark.py", *SMALL, "--image-sizes", "64", "--batch-sizes", "1", "2", cwd=project)
    again = json.loads((results / "raw/main/onnx_64_round0.json").read_text(encoding="utf-8"))
    assert sorted(again["batches"]) == ["1", "2", "4"] and again["batches"]["1"] == record["batches"]["1"]
    rows = pd.read_csv(results / "benchmark_results.csv")
    assert len(rows) == 2 * (3 + 2)  # batches 1, 2, 4 at 64 px, 1 and 4 at 96 px


def test_an_interrupted_sweep_goes_on_where_it_was(project, results, tmp_path):
    command = [sys.executable, str(ROOT / "benchmark.py"), *SMALL, "--results", str(tmp_path / "quick")]
    process = subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = tmp_path / "quick" / "raw" / "main" / "pytorch_64_round0.json"
    deadline = time.monotonic() + 120
    while not first.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)  # into the next process
    process.send_signal(signal.SIGINT if sys.platform != "win32" else signal.SIGTERM)
    process.wait(60)
    kept = first.stat().st_mtime_ns
    run_script("benchmark.py", *SMALL, "--results", tmp_path / "quick", cwd=project)
    assert first.stat().st_mtime_ns == kept
    assert set(records.read_csv(tmp_path / "quick").status) == {"ok"}


def test_a_backend_script_alone_leaves_the_same_kind_of_record(project, results, tmp_path):
    arguments = [
        "--image-sizes",
        "64",
        "--batch-sizes",
        "1",
        "4",
        "--runs",
        "5",
        "--min-seconds",
        "0",
        "--device",
        "cpu",
        "--results",
        tmp_path,
    ]
    done = run_script("onnx_inference.py", *arguments, cwd=project)
    alone = json.loads((tmp_path / "raw/main/onnx_64_round0.json").read_text(encoding="utf-8"))
    swept = json.loads((results / "raw/main/onnx_64_round0.json").read_text(encoding="utf-8"))
    assert alone.keys() == swept.keys() and alone["batches"]["4"].keys() == swept["batches"]["4"].keys()
    assert "ONNX Runtime FP32" in done.stdout


def test_the_export_is_used_again_until_its_checkpoint_changes(project, results):
    import onnx_inference

    checkpoint = project / "weights" / "best_resnet18_64.pth"
    path, _, cached = onnx_inference.export(checkpoint, 64, "FP32")
    assert cached
    path.write_bytes(path.read_bytes()[:-100])  # cut short
    assert onnx_inference.export(checkpoint, 64, "FP32")[2] is False
    assert onnx_inference.export(checkpoint, 64, "FP32")[2] is True


@pytest.mark.parametrize(
    "script, arguments, said",
    [
        ("benchmark.py", ["--image-sizes", "128"], "python train.py --image-sizes 128"),
        ("benchmark.py", ["--batch-sizes", "0"], "batch sizes"),
        ("benchmark.py", ["--run", "../x"], "--run"),
        ("onnx_inference.py", ["--image-sizes", "64", "--device", "cuda"], "--device cpu"),
        ("compare.py", ["nowhere"], "python benchmark.py"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_2(project, script, arguments, said):
    if "cuda" in arguments and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run_script(script, *arguments, cwd=project, ok=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_named(project, tmp_path):
    (tmp_path / "best_resnet18_64.pth").write_bytes(b"not a checkpoint")
    done = run_script("onnx_inference.py", "--image-sizes", "64", "--weights", tmp_path, cwd=project, ok=False)
    assert done.returncode == 2 and "best_resnet18_64.pth" in done.stderr and "python train.py --force" in done.stderr
