"""Commands killed at random, seeded moments: nothing finished is lost, no process and no file stays behind.

Each test kills one command by each signal, each time resuming what the last one left, and at last lets it run
to its end; `-m slow` kills it many times.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, run_script
from test_train import arguments
from test_train import folder as small  # noqa: F401  (a fixture)

import datasets
import model
from utils.sample_images import has_data
from utils.utils import checkpoint_path

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")
SIGKILL, SIGTERM, SIGINT = (getattr(signal, name, None) for name in ("SIGKILL", "SIGTERM", "SIGINT"))
CODES = {SIGKILL: -9, SIGTERM: 143, SIGINT: 130}
TIMES = [1, pytest.param(20, marks=pytest.mark.slow)]
PATIENCE = 20  # seconds for the processes of a killed one to notice


def moments(rng: random.Random, times: int) -> list:
    """SIGKILL, SIGTERM and SIGINT, each so many times, in random order."""
    found = times * [SIGKILL, SIGTERM, SIGINT]
    rng.shuffle(found)
    return found


def belongs(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def alive(session: int) -> list[psutil.Process]:
    """The processes that belong to a session and still run."""
    return [process for process in psutil.process_iter() if belongs(process, session)]


def has_server(session: int, *_) -> bool:
    """Whether the server of processes is there: imports, which start short-lived ones too, are over."""
    for process in alive(session):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "forkserver" in " ".join(process.cmdline()):
                return True
    return False


def strike(command: list, cwd: Path, has_begun, delay: float, number: int) -> str:
    """Start a script, signal it `delay` seconds after `has_begun(pid, when, what it said)`; what it said.

    Checks its exit code, that it was quiet and that no process of it is left.
    """
    log = cwd / "said.txt"
    with log.open("wb") as out:
        environment = {**os.environ, "PYTHONUTF8": "1"}
        started = [sys.executable, str(ROOT / command[0]), *map(str, command[1:])]
        process = subprocess.Popen(
            started, cwd=cwd, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    began = time.time()
    while process.poll() is None and not has_begun(process.pid, began, log.read_bytes()):
        time.sleep(0.05)  # looking takes time of its own
    time.sleep(delay)
    if number == SIGINT and process.poll() is None:
        os.killpg(process.pid, number)  # a terminal sends Ctrl-C to all
    else:
        process.send_signal(number)
    code = process.wait(60)
    said = log.read_text(encoding="utf-8")
    log.unlink()
    assert code in (0, CODES[number]), said  # 0: it was done before
    assert "Traceback" not in said, said
    end = time.monotonic() + PATIENCE
    while left := alive(process.pid):
        assert time.monotonic() < end, [process.cmdline() for process in left]
        time.sleep(0.05)
    return said


def temporary_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".tmp" in path.name or path.name == "sample.part"]


def epochs_kept(weights: Path, size: int) -> int:
    """How many epochs of a size are safe: in its finished network or in the interrupted state.

    A half-written checkpoint would raise UserError.
    """
    paths = [checkpoint_path(weights, size, which) for which in ("best", "last")]
    kept = [len(model.load_facts(path)["history"]) for path in paths if path.exists()]
    return max(kept, default=0)


@pytest.mark.parametrize("times", TIMES)
def test_training(small, times):  # noqa: F811
    rng = random.Random(11)
    epochs = 3 * times
    command = ["train.py", *arguments(small, "--image-sizes", 32, 40, "--epochs", epochs, "--workers", 1)]
    for number in moments(rng, times):
        said = strike(command, small, lambda pid, began, said: b"images" in said, rng.uniform(0, 1.5), number)
        for size, epoch in re.findall(r"(\d+) px, epoch (\d+)/", said):
            assert epochs_kept(small / "weights", int(size)) >= int(epoch)  # announced means saved
    run_script(*command, cwd=small)
    assert temporary_files(small) == []
    assert [epochs_kept(small / "weights", size) for size in (32, 40)] == 2 * [epochs]


@pytest.mark.parametrize("times", TIMES)
def test_drawing(tmp_path, times):
    rng, data = random.Random(12), tmp_path / "data"
    command = ["datasets.py", "--draw-sample"]

    def is_drawing(pid: int, began: float, said: bytes) -> bool:
        drawn = data / "sample.part" / "train"
        return drawn.exists() and drawn.stat().st_ctime > began

    for number in moments(rng, times):
        strike(command, tmp_path, is_drawing, rng.uniform(0, 0.8), number)
        if has_data(data):  # it was done, or nearly: the next one begins anew
            assert (data / "SAMPLE.txt").exists()
            shutil.rmtree(data)
    run_script(*command, cwd=tmp_path)
    datasets.check_images(data)
    assert len(datasets.all_images(data)) == 172 and temporary_files(tmp_path) == []


def rows_kept(out: Path) -> set[bytes]:
    """The whole rows of a list of labels, finished or not."""
    files = [out, *out.parent.glob(f"{out.name}.*.part*")]
    text = b"".join(path.read_bytes() for path in files if path.exists())
    return {line for line in text.split(b"\n")[:-1] if not line.startswith(b"path,")}


def measured(results: Path) -> dict[str, int]:
    """Record -> how many batch sizes in it were measured; every record is whole."""
    found = {}
    for path in results.glob("raw/main/*_round*.json"):
        batches = json.loads(path.read_text(encoding="utf-8"))["batches"]
        found[path.name] = sum(batch["status"] == "ok" for batch in batches)
    return found


@pytest.mark.parametrize("times", TIMES)
def test_benchmark(tiny, tmp_path, times):
    rng, results, weights = random.Random(13), tmp_path / "quick", tmp_path / "weights"
    weights.mkdir()
    shutil.copy(tiny / "weights" / "best_resnet18_64.pth", weights)  # alone: nothing is exported yet
    command = ["benchmark.py", "--quick", "--rounds", 2, "--device", "cpu", "--backends", "pytorch", "onnx"]
    command += ["--weights", weights, "--results", results]
    before = {}
    for number in moments(rng, times):
        strike(command, tiny, has_server, rng.uniform(0, 4), number)
        now = measured(results)
        assert all(now.get(name, 0) >= count for name, count in before.items())
        before = now
    run_script(*command, cwd=tiny)
    for folder in (weights, results):
        assert temporary_files(folder) == []
    assert len(measured(results)) == 4


@pytest.mark.parametrize("times", TIMES)
def test_predicting(tiny, tmp_path, times):
    rng, photos, out = random.Random(14), tmp_path / "photos", tmp_path / "labels.csv"
    for number in range(171 * times):
        shutil.copytree(tiny / "data" / "test", photos / str(number))
    command = ["predict.py", photos, "--out", out, "--weights", tiny / "weights", "--device", "cpu"]
    for number in moments(rng, times):
        before = rows_kept(out)
        strike(command, tmp_path, has_server, rng.uniform(0, 2), number)
        assert before <= rows_kept(out)
        out.unlink(missing_ok=True)  # where it was done before, the next one begins anew
    run_script(*command, cwd=tmp_path)
    assert len(rows_kept(out)) == 7 * 171 * times and list(tmp_path.glob("labels*")) == [out]
