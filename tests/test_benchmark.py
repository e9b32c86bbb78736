"""The real scripts from checkpoints to tables, at small sizes."""

import contextlib
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import ROOT, run_script
from filelock import FileLock

import benchmark
import compare
import model
import onnx_inference
import pytorch_inference
from utils import onnx_export, standalone
from utils.measure import jobs
from utils.measure.timing import trimmed_mean
from utils.report import tables
from utils.report.rows import read_rows
from utils.utils import run_main

SMALL = ["--device", "cpu", "--backends", "pytorch", "onnx", "--image-sizes", "64", "--runs", "6", "--quick"]


@pytest.fixture
def call(project, monkeypatch, capsys):
    """Run a script's main() in this process as a user does in the project's folder; what it printed."""

    def run(script, *arguments, code: int = 0):
        monkeypatch.chdir(project)
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        main = getattr(
            script, "main", lambda: standalone.main(script.__doc__, script.__name__, script.BACKENDS)
        )
        if code:
            with pytest.raises(SystemExit) as stopped:
                run_main(main)
            assert stopped.value.code == code
        else:
            main()
        return capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def results(project):
    """results/quick of one benchmark over PyTorch and ONNX Runtime in two rounds."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(project)
        patch.setattr(sys, "argv", ["benchmark.py", *SMALL, "--rounds", "2"])
        benchmark.main()
    assert "Which is fastest?" in said.getvalue()
    return project / "results" / "quick"


def test_every_row_is_ok_checked_and_complete(results):
    rows = tables.read_csv(results)
    assert len(rows) == 2 * 2 and set(rows.status) == {"ok"}
    assert (rows.runs >= 6).all() and set(rows.rounds) == {2}
    assert (rows.agreement >= 0.99).all() and (rows.max_abs_diff < 0.01).all()
    assert (abs(rows.fps - rows.batch_size / rows.mean_ms * 1000) < 1e-2 * rows.fps).all()
    onnx, base = (
        rows[rows.backend == name].set_index(["image_size", "batch_size"]) for name in ("onnx", "pytorch")
    )
    assert (onnx.speedup_low < onnx.speedup).all() and (onnx.speedup < onnx.speedup_high).all()
    assert base.speedup.eq(1).all()
    assert (rows.load_s > 0).all() and (rows.first_call_ms > 0).all()
    gpu_only = ["gpu_memory_mb", "gpu_ms", "busy_ms", "sustained_fps", "power_w", "pct_peak"]
    assert rows[gpu_only].isna().all(axis=None)  # no GPU: empty, not 0
    assert rows.tflops.to_numpy() == pytest.approx(
        rows.fps.to_numpy() * model.count_work(64, 4)["flops"] / 1e12, rel=1e-5
    )
    assert (rows.pct_measured_peak > 0).all() and rows.host_memory_mb.between(100, 5000).all()
    assert set(rows.limit) <= {"latency", "memory", "compute"}


def test_the_csv_can_be_recomputed_from_the_raw_samples(results):
    before = (results / "benchmark_results.csv").read_bytes()
    tables.write_csv(results)
    assert (results / "benchmark_results.csv").read_bytes() == before


def test_charts_log_and_environment_are_there(results):
    for name in (
        "fps_vs_image_size.png",
        "fps_vs_batch_size.png",
        "speedup_vs_image_size.png",
        "roofline.png",
    ):
        assert (results / name).read_bytes().startswith(b"\x89PNG")
    environment = json.loads((results / "environment.json").read_text(encoding="utf-8"))["main"]
    assert (
        environment["sample_data"] is True
        and environment["packages"]["torch"]
        and environment["threads"] >= 1
    )
    assert "batch 4" in (results / "benchmark.log").read_text(encoding="utf-8")


def test_a_second_run_measures_nothing_and_an_extended_one_only_what_is_new(project, results, call):
    stamp = {path: path.stat().st_mtime_ns for path in (results / "raw" / "main").glob("*_round*.json")}
    assert "everything is up to date" in call(benchmark, *SMALL, "--rounds", "2").out
    assert {path: path.stat().st_mtime_ns for path in stamp} == stamp
    record = json.loads((results / "raw/main/onnx_64_round0.json").read_text(encoding="utf-8"))
    call(benchmark, *SMALL, "--rounds", "2", "--backends", "onnx", "--batch-sizes", "1", "2")
    again = json.loads((results / "raw/main/onnx_64_round0.json").read_text(encoding="utf-8"))
    assert [batch["batch_size"] for batch in again["batches"]] == [1, 2, 4]
    assert again["batches"][0] == record["batches"][0]
    assert (
        len(pd.read_csv(results / "benchmark_results.csv")) == 3 + 2
    )  # batches 1, 2, 4 of ONNX Runtime, 1 and 4 of PyTorch


def test_other_settings_overwrite_nothing(results, call):
    raw = results / "raw" / "main"
    before = {path.name: path.read_bytes() for path in raw.glob("*_round*.json")}
    said = call(benchmark, *SMALL, "--rounds", "1", "--backends", "onnx", "--batch-sizes", "1").err
    assert f"{len(before)} records of other settings are kept in results" in said
    assert tables.read_csv(results).backend.tolist() == ["onnx"]
    assert "everything is up to date" in call(benchmark, *SMALL, "--rounds", "2").out
    assert {path.name: path.read_bytes() for path in raw.glob("*_round*.json")} == before
    assert len(tables.read_csv(results)) == 3 + 2


def test_a_second_benchmark_in_the_folder_waits_for_the_first_or_says_so(results, call, monkeypatch):
    monkeypatch.setattr(jobs, "file_lock", functools.partial(jobs.file_lock, patience=0.1))
    with FileLock(results / ".benchmark.lock"):
        for script in (benchmark, onnx_inference):
            said = call(script, "--device", "cpu", "--quick", "--results", results, code=2).err
            assert f"another process is measuring in {results}; wait for its end" in said


def test_other_programs_that_keep_the_processor_busy_are_told_of(capsys):
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        benchmark.print_busy()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert re.match(r"other programs use \d+ % of the processor: close them", capsys.readouterr().err)


def test_damaged_ceilings_are_measured_anew(results, call):
    path = results / "raw" / "main" / "ceilings.json"
    path.write_text(path.read_text(encoding="utf-8")[:50], encoding="utf-8")
    call(benchmark, *SMALL, "--rounds", "2")
    assert (tables.read_csv(results).pct_measured_peak > 0).all()


def test_an_interrupted_sweep_goes_on_where_it_was(project, results, tmp_path, call):
    command = [
        sys.executable,
        str(ROOT / "benchmark.py"),
        *SMALL,
        "--batch-sizes",
        "1",
        "--results",
        str(tmp_path / "quick"),
    ]
    process = subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = tmp_path / "quick" / "raw" / "main" / "pytorch_64_round0.json"
    deadline = time.monotonic() + 120
    while not first.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # into the next round
    process.send_signal(signal.SIGINT if sys.platform != "win32" else signal.SIGTERM)
    process.wait(60)
    kept = first.stat().st_mtime_ns
    call(benchmark, *SMALL, "--batch-sizes", "1", "--results", tmp_path / "quick")
    assert first.stat().st_mtime_ns == kept
    assert set(tables.read_csv(tmp_path / "quick").status) == {"ok"}


@pytest.mark.slow
def test_two_runs_one_after_the_other_agree(project, tmp_path):
    """Speedups of two full runs agree within their intervals in at least 90 % of the configurations at 64
    and 96 px."""
    run_script("train.py", "--quick", "--image-sizes", "64", "96", cwd=project)
    full = ["--device", "cpu", "--backends", "pytorch", "onnx", "--image-sizes", "64", "96"]
    full += ["--batch-sizes", "1", "4", "16", "--rounds", "3"]
    for name in ("first", "second"):
        run_script("benchmark.py", *full, "--results", tmp_path / name, cwd=project)
    said = run_script("compare.py", tmp_path / "first", tmp_path / "second").stdout
    agree, total = map(int, re.search(r"Speedup over PyTorch FP32 agrees in (\d+) of (\d+)", said).groups())
    assert total == 6 and agree >= 0.9 * total, said


def test_automatic_batch_sizes_double_until_they_saturate(project, tmp_path, call):
    arguments = [
        "--image-sizes",
        "64",
        "--batch-sizes",
        "auto",
        "--runs",
        "6",
        "--min-seconds",
        "0",
        "--max-seconds",
        "1",
    ]
    call(onnx_inference, *arguments, "--device", "cpu", "--results", tmp_path)
    rows = read_rows(tmp_path).sort_values("batch_size")
    batches = rows.batch_size.tolist()
    assert batches == [2**k for k in range(len(batches))] and len(batches) >= 2
    assert set(rows.status) == {"ok"}
    first = json.loads((tmp_path / "raw/main/onnx_64_round0.json").read_text(encoding="utf-8"))["batches"]
    fps = [batch["batch_size"] / trimmed_mean(batch["host_ms"]) for batch in first]
    assert batches[-1] == 256 or fps[-1] < 1.05 * fps[-2]
    assert all(after >= 1.05 * before for before, after in zip(fps[:-2], fps[1:-1], strict=True))


def test_a_backend_script_alone_leaves_the_same_kind_of_record(project, results, tmp_path, call):
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
    ]
    said = call(onnx_inference, *arguments, "--results", tmp_path)
    alone = json.loads((tmp_path / "raw/main/onnx_64_round0.json").read_text(encoding="utf-8"))
    swept = json.loads((results / "raw/main/onnx_64_round0.json").read_text(encoding="utf-8"))
    assert alone.keys() == swept.keys() and alone["batches"][1].keys() == swept["batches"][1].keys()
    assert "ONNX Runtime FP32" in said.out
    assert alone["wall"] is None and swept["wall"]["run"] > 0 and {"start", "open"} <= swept["wall"].keys()
    for batch in alone["batches"] + swept["batches"]:
        assert len(batch["core_ms"]) == len(batch["block_runs"]) and min(batch["core_ms"]) > 0


def test_a_profile_is_a_table_by_operator_and_a_trace(project, tmp_path, call):
    said = call(
        pytorch_inference,
        "--quick",
        "--profile",
        "--batch-sizes",
        "2",
        "--device",
        "cpu",
        "--results",
        tmp_path,
    ).out
    assert "convolution" in said and "Self CPU" in said
    trace = json.loads(
        (tmp_path / "quick" / "profile" / "pytorch_64_batch2.json").read_text(encoding="utf-8")
    )
    assert any("conv" in event.get("name", "") for event in trace["traceEvents"])


def test_the_export_is_used_again_until_its_checkpoint_changes(project, results):
    checkpoint = project / "weights" / "best_resnet18_64.pth"
    path, _, cached = onnx_export.export(checkpoint, 64, "FP32")
    assert cached
    path.write_bytes(path.read_bytes()[:-100])  # cut short
    assert onnx_export.export(checkpoint, 64, "FP32")[2] is False
    assert onnx_export.export(checkpoint, 64, "FP32")[2] is True


def test_an_onnx_runtime_that_does_not_load_costs_its_own_row(project, tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('its libraries are of another version')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = tmp_path / "quick"
    run_script("benchmark.py", *SMALL, "--batch-sizes", 1, "--results", results, cwd=project)
    rows = tables.read_csv(results).set_index("backend")
    assert rows.status.to_dict() == {"pytorch": "ok", "onnx": "unavailable"}
    assert "installed but does not load: ImportError: its libraries" in rows.reason["onnx"]


@pytest.mark.parametrize(
    "script, arguments, said",
    [
        (benchmark, ["--image-sizes", "128"], "python train.py --image-sizes 128"),
        (benchmark, ["--image-sizes", "64", "--batch-sizes", "0"], "batch sizes"),
        (benchmark, ["--image-sizes", "64", "--batch-sizes", "auto", "4"], "auto"),
        (benchmark, ["--sweep", "../x"], "--sweep"),
        (compare, ["nowhere"], "python benchmark.py"),
        (onnx_inference, ["--image-sizes", "64", "--weights", "broken"], "python train.py --force"),
        (onnx_inference, ["--image-sizes", "64", "--device", "cuda"], "--device cpu"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_2(project, call, script, arguments, said):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (project / "broken").mkdir(exist_ok=True)
    (project / "broken" / "best_resnet18_64.pth").write_bytes(b"not a checkpoint")
    error = call(script, *arguments, code=2).err
    assert said in error and error.count("\n") == 1
