"""The real scripts from checkpoints to tables, at small sizes."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MEASURED, ROOT, run_here, run_script
from filelock import FileLock

import benchmark
import model
from utils import onnx_export
from utils.measure import jobs, sweep, worker
from utils.measure.schema import Problem
from utils.report import tables
from utils.report.rows import read_rows
from utils.utils import UserError

ALONE = ["--device", "cpu", "--image-sizes", 64, "--runs", 6, "--min-seconds", 0]


@pytest.fixture(scope="module")
def folder(measured, tmp_path_factory) -> Path:
    """A copy of the measured project, in which these tests go on."""
    return Path(shutil.copytree(measured, tmp_path_factory.mktemp("benchmark") / "project"))


@pytest.fixture
def results(folder) -> Path:
    return folder / "results" / "quick"


@pytest.fixture
def call(folder, quick_benchmark):
    """Run a script's main() in this process as a user does in the project's folder."""

    def run(script: str, *arguments, code: int = 0, cwd: Path = folder):
        done = run_here(script, *arguments, cwd=cwd, ok=False)
        assert done.returncode == code, done.stderr
        return done

    return run


def raw(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "raw" / "main").glob("*_round*.json")}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_row_is_ok_checked_and_complete(results):
    rows = tables.read_table(results)[0]
    assert len(rows) == 2 * 2 and set(rows.status) == {"ok"}
    assert (rows.runs >= 6).all() and set(rows.rounds) == {2}
    assert (rows.agreement >= 0.99).all() and (rows.max_abs_diff < 0.01).all()
    assert (abs(rows.fps - rows.batch_size / rows.mean_ms * 1000) < 1e-2 * rows.fps).all()
    onnx, base = (rows[rows.backend == name].set_index("batch_size") for name in ("onnx", "pytorch"))
    assert (onnx.speedup_low < onnx.speedup).all() and (onnx.speedup < onnx.speedup_high).all()
    assert base.speedup.eq(1).all()
    assert (rows.load_s > 0).all() and (rows.first_call_ms > 0).all()
    gpu_only = ["gpu_memory_mb", "gpu_ms", "busy_ms", "sustained_fps", "power_w", "pct_peak"]
    assert rows[gpu_only].isna().all(axis=None)  # no GPU: empty, not 0
    flops = model.count_work(64, 4)["flops"]
    assert rows.tflops.to_numpy() == pytest.approx(rows.fps.to_numpy() * flops / 1e12, rel=1e-5)
    assert (rows.pct_measured_peak > 0).all() and rows.host_memory_mb.between(100, 5000).all()
    assert set(rows.limit) <= {"latency", "memory", "compute"}


def test_charts_log_and_environment_are_there(results):
    for name in ("fps_vs_image_size", "fps_vs_batch_size", "speedup_vs_image_size", "roofline"):
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Which is fastest?" in (results.parent.parent / "said.txt").read_text(encoding="utf-8")
    environment = read(results / "environment.json")["main"]
    assert environment["sample_data"] is True and environment["packages"]["torch"] == torch.__version__
    assert environment["threads"] >= 1 and environment["gpu"] is None
    assert environment["variables"]["OMP_NUM_THREADS"] == "1"
    assert "batch 4" in (results / "benchmark.log").read_text(encoding="utf-8")
    assert (
        read(results / "raw/main/sweep.json")["last"]
        == read(results / "raw/main/onnx_64_round0.json")["settings_key"]
    )


def test_a_second_run_measures_nothing_and_an_extended_one_only_what_is_new(results, call):
    before = raw(results)
    assert "everything is up to date" in call("benchmark.py", *MEASURED).stdout
    assert raw(results) == before
    call("benchmark.py", *MEASURED, "--backends", "onnx", "--batch-sizes", "1", "2")
    again, earlier = read(results / "raw/main/onnx_64_round0.json"), json.loads(before["onnx_64_round0.json"])
    assert [batch["batch_size"] for batch in again["batches"]] == [1, 2, 4]
    assert again["batches"][0] == earlier["batches"][0] and again["check"]["images"] == 100


def test_other_settings_overwrite_nothing(results, call):
    before = raw(results)
    said = call("benchmark.py", *MEASURED, "--rounds", "1", "--backends", "onnx", "--batch-sizes", "1").stderr
    assert f"{len(before)} records of other settings or checkpoints are kept in results" in said
    assert list(raw(results)) == ["onnx_64_round0.json"]
    assert "everything is up to date" in call("benchmark.py", *MEASURED).stdout
    assert raw(results) == before


def test_a_limit_on_threads_makes_a_measurement_stale(results, folder, monkeypatch):
    monkeypatch.chdir(folder)
    known = jobs.environment_of(Path("data"), "cpu")
    assert known["threads"] == torch.get_num_threads()
    settings = jobs.Settings(6, 2, 10, 0.0, 30.0, 1.5, 0)
    key = jobs.staleness_key(settings, "cpu", known)
    assert key == read(results / "raw/main/sweep.json")["last"]
    for changed in ({"threads": 2}, {"cpu_quota": 0.5}, {"affinity": "0"}, {"variables": {}}):
        assert jobs.staleness_key(settings, "cpu", known | changed) != key


def contents(folder: Path) -> dict[Path, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log")
    return {path: path.read_bytes() for path in paths}


def test_a_network_whose_logits_are_not_finite_replaces_nothing(folder, results, call, tmp_path):
    checkpoint = tmp_path / "best_resnet18_64.pth"
    network, known = model.load(folder / "weights" / checkpoint.name)
    network.fc.bias.data.fill_(float("nan"))
    model.save(checkpoint, network, **known)
    before = contents(results)
    said = call("benchmark.py", *MEASURED, "--weights", tmp_path, code=2).stderr
    assert f"{checkpoint} gives logits that are not finite" in said
    assert "python train.py --force --image-sizes 64" in said
    assert contents(results) == before


ONCE = [*MEASURED, "--rounds", 1, "--batch-sizes", 1]


def test_a_backend_that_fails_says_what_mends_it_and_the_exit_code_is_1(tiny, call, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copy(tiny / "weights" / "best_resnet18_64.pth", weights)
    (weights / "resnet18_64_fp32.onnx").mkdir()
    folders = ["--weights", weights, "--results", tmp_path / "quick"]
    said = call("benchmark.py", *ONCE, *folders, code=1, cwd=tiny).stderr
    rows = tables.read_table(tmp_path / "quick")[0].set_index("backend")
    assert rows.status.to_dict() == {"pytorch": "ok", "onnx": "failed"}
    assert "resnet18_64_fp32.onnx" in rows.reason["onnx"] and "move it away" in rows.reason["onnx"]
    assert f"failed: onnx, 64 px, batch 1: {rows.reason['onnx']}" in said


def test_an_onnx_runtime_that_does_not_load_costs_its_own_row(tiny, call, tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('its libraries are of another version')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    call("benchmark.py", *ONCE, "--results", tmp_path / "quick", cwd=tiny)
    rows = tables.read_table(tmp_path / "quick")[0].set_index("backend")
    assert rows.status.to_dict() == {"pytorch": "ok", "onnx": "unavailable"}
    assert "installed but does not load: ImportError: its libraries" in rows.reason["onnx"]


def test_a_second_benchmark_in_the_folder_waits_for_the_first_or_says_so(results, call, monkeypatch):
    monkeypatch.setattr(benchmark, "file_lock", functools.partial(benchmark.file_lock, patience=0.1))
    with FileLock(results / ".benchmark.lock"):
        for script in ("benchmark.py", "onnx_inference.py"):
            said = call(script, "--device", "cpu", "--quick", "--results", results, code=2).stderr
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


def test_a_damaged_roofline_is_measured_anew(results, call):
    path = results / "raw" / "main" / "ceilings.json"
    path.write_text(path.read_text(encoding="utf-8")[:50], encoding="utf-8")
    call("benchmark.py", *MEASURED)
    assert (tables.read_table(results)[0].pct_measured_peak > 0).all()


def test_an_interrupted_sweep_goes_on_where_it_was(tiny, tmp_path, call, monkeypatch):
    arguments = [*MEASURED, "--batch-sizes", "1", "--results", tmp_path / "quick"]
    first = tmp_path / "quick" / "raw" / "main" / "pytorch_64_round0.json"
    measure_group = sweep.Sweep.measure_group

    def until_the_second_round(self, group):
        if group[0].round:
            raise KeyboardInterrupt
        measure_group(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(sweep.Sweep, "measure_group", until_the_second_round)
        assert "run the same command again" in call("benchmark.py", *arguments, code=130, cwd=tiny).stderr
    kept = first.stat().st_mtime_ns
    call("benchmark.py", *arguments, cwd=tiny)
    assert first.stat().st_mtime_ns == kept
    rows = tables.read_table(tmp_path / "quick")[0]
    assert set(rows.status) == {"ok"} and set(rows.rounds) == {2}


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
    agree, total = map(
        int, re.search(r"Speedup .* agrees within the 95 % intervals in (\d+) of (\d+)", said).groups()
    )
    assert total == 6 and agree >= 0.9 * total, said


def test_a_backend_script_alone_leaves_the_same_record(results, call, tmp_path):
    short = ["--batch-sizes", 1, 4, "--max-seconds", 0.3, "--results", tmp_path]
    assert "ONNX Runtime FP32" in call("onnx_inference.py", *ALONE, *short).stdout
    rows = read_rows(tmp_path)
    assert sorted(rows.batch_size) == [1, 4] and set(rows.status) == {"ok"}
    alone, swept = (read(folder / "raw/main/onnx_64_round0.json") for folder in (tmp_path, results))
    assert alone.keys() == swept.keys() and alone["batches"][1].keys() == swept["batches"][1].keys()
    assert all(one["wall"]["run"] > 0 and {"start", "open"} <= one["wall"].keys() for one in (alone, swept))
    for batch in alone["batches"] + swept["batches"]:
        assert len(batch["core_ms"]) == len(batch["block_runs"]) and min(batch["core_ms"]) > 0


def test_the_export_is_used_again_until_its_checkpoint_changes(folder):
    checkpoint = folder / "weights" / "best_resnet18_64.pth"
    path, _, cached = onnx_export.export(checkpoint, 64, "FP32")
    assert cached
    path.write_bytes(path.read_bytes()[:-100])  # cut short
    assert onnx_export.export(checkpoint, 64, "FP32")[2] is False
    assert onnx_export.export(checkpoint, 64, "FP32")[2] is True


@pytest.mark.parametrize(
    "script, arguments, said",
    [
        ("benchmark.py", ["--image-sizes", "128"], "python train.py --image-sizes 128"),
        ("benchmark.py", ["--batch-sizes", "1000000000"], "a whole number from 1 to 65536 is needed"),
        ("benchmark.py", ["--image-sizes", "100000"], "a whole number from 32 to 4096 is needed"),
        ("benchmark.py", ["--ci-width", "nan"], "a number from 0.001 to 1000 is needed"),
        ("benchmark.py", ["--precision", "0"], "argument --ci-width/--precision"),
        ("benchmark.py", ["--runs", "2", "--rounds", "3"], "--runs 3 or more"),
        ("benchmark.py", ["--sweep", "../x"], "--sweep"),
        ("benchmark.py", ["--sweep", "a."], "no dot at the end"),
        ("benchmark.py", ["--sweep", "con"], "Windows keeps this name"),
        ("benchmark.py", ["--sweep", "Main", "--quick"], "'main'; write it as it is there"),
        ("compare.py", ["nowhere"], "python benchmark.py"),
        ("onnx_inference.py", ["--image-sizes", "64", "--weights", "broken"], "python train.py --force"),
        ("onnx_inference.py", ["--image-sizes", "64", "--device", "cuda"], "--device cpu"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_2(folder, call, script, arguments, said):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "best_resnet18_64.pth").write_bytes(b"not a checkpoint")
    assert said in call(script, *arguments, code=2).stderr.splitlines()[-1]


def test_images_that_the_network_was_not_trained_on_are_told_of(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny)
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    classes = sorted(path for path in (data / "test").iterdir() if path.is_dir())
    parser = jobs.make_parser("", ["pytorch"])
    arguments = ["benchmark.py", "--quick", "--device", "cpu", "--data", str(data)]
    monkeypatch.setattr(sys, "argv", arguments)
    args = jobs.parse(parser)
    make = functools.partial(jobs.make_jobs, args, {"pytorch": "pytorch_inference"}, {"cpu": ["pytorch"]})
    make()
    assert not capsys.readouterr().err
    next(classes[0].iterdir()).unlink()
    make()
    told = capsys.readouterr().err
    assert (
        "does not hold the images that the networks of 64 px were trained on" in told
        and "--force --image-sizes 64" in told
    )
    for split in ("test", "train"):
        shutil.copytree(classes[1], data / split / "unknown")
    with pytest.raises(UserError, match="does not know the class unknown.*--force --image-sizes 64"):
        make()


def test_a_broken_readme_is_found_before_anything_is_measured(tmp_path, call, monkeypatch):
    (tmp_path / "README.md").write_text("<!-- begin poem results -->\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "sweep", lambda *_: pytest.fail("something was measured"))
    asked = ["--device", "cpu", "--backends", "pytorch", "--image-sizes", 64]
    said = call("benchmark.py", *asked, "--results", tmp_path / "results", code=2).stderr
    assert "README.md: <!-- begin poem results --> marks no generated part" in said


@pytest.mark.parametrize("stream", ["None", "open(os.devnull, 'r')", "io.StringIO()"])
def test_what_a_process_prints_goes_to_the_log_whatever_its_streams_were(tmp_path, stream):
    """In a Windows console sys.stdout stays bound to the console when its descriptor is replaced."""
    code = "import io, os, sys; from pathlib import Path; from utils.measure.worker import write_into\n"
    code += f"sys.stdout = sys.stderr = {stream}\nwrite_into(Path({str(tmp_path / 'log')!r}))\n"
    code += "print('Привет'); print('to stderr', file=sys.stderr); os.write(1, b'past Python')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert "Привет\n" in text and "to stderr\n" in text and "past Python" in text


def test_of_a_long_message_the_end_is_kept_where_the_cause_stands():
    error = RuntimeError(
        "/onnxruntime_src/" + "x" * 5000 + " CUBLAS failure 3: the resource could not be allocated"
    )
    assert worker.problem_of(error).reason.partition(";")[0].endswith("the resource could not be allocated")
    short = worker.problem_of(RuntimeError("x" * 5000 + " CUDNN_STATUS_ALLOC_FAILED"))
    assert short.status == "out_of_memory" and short.reason.endswith("CUDNN_STATUS_ALLOC_FAILED")
    assert worker.problem_of(Problem("mismatch", "wrong")).status == "mismatch"
    missing = worker.problem_of(ModuleNotFoundError("No module named 'onnxscript'"))
    assert missing.status == "failed" and "pip install -r requirements.txt" in missing.reason


def test_how_many_processes_live_together_follows_from_the_memory_that_is_free(monkeypatch):
    memory = type("Memory", (), {})
    monkeypatch.setattr(sweep.environment, "read_driver", lambda name: memory)

    def room(free_mb: float, image_size: int, batch_size: int) -> int:
        memory.free = free_mb * 2**20
        job = type("Job", (), {"device": "cuda", "image_size": image_size, "to_measure": (1, batch_size)})
        return sweep.room_for(job)

    assert room(3700, 224, 16) >= 2  # a GTX 1650 holds a backend and the baseline beside it
    assert room(3700, 512, 16) == 1  # but not here: each is measured alone
    assert room(140_000, 512, 16) > 20
    monkeypatch.setattr(sweep.environment, "read_driver", lambda name: None)
    assert room(0, 224, 16) == 2
