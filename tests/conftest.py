"""What several tests share: the repo on the path, ways to run a script, and small projects, made once."""

import contextlib
import functools
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

# Tests run beside one another: threads that wait spinning would take each other's cores.
os.environ["OMP_NUM_THREADS"] = "1"
# What runs in the background ignores it, and so would the scripts started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NAMES = ["Ёж Герой", "Пудж"]  # of classes

MEASURED = ["--quick", "--device", "cpu", "--backends", "pytorch", "onnx", "--image-sizes", "64"]
MEASURED += ["--rounds", "2", "--runs", "6", "--max-seconds", "30"]


# ---- ways to run a script


def start_script(script: str, *arguments, **options) -> subprocess.Popen:
    """Start one of the repo's scripts in a process of its own, its output thrown away unless `options` (those
    of Popen) say otherwise."""
    environment = {**os.environ, "PYTHONUTF8": "1", **options.pop("env", {})}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, **{**quiet, **options}, env=environment)


def run_script(
    script: str, *arguments, cwd: Path = ROOT, ok: bool = True, **env
) -> subprocess.CompletedProcess:
    """Run one of the repo's scripts as a user does, in a process of its own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    started = start_script(script, *arguments, cwd=cwd, env=env, **pipes)
    said, wrong = started.communicate(timeout=600)
    return done(script, arguments, started.returncode, said, wrong, ok)


def run_here(script: str, *arguments, cwd: Path = ROOT, ok: bool = True):
    """The same in this process, which saves seconds of imports: for what does not need one of its own."""
    from benchmark import measure_script
    from utils.utils import run_main

    module = importlib.import_module(script.removesuffix(".py"))
    main = getattr(module, "main", lambda: measure_script(module.__doc__, module.__name__, module.BACKENDS))
    said, wrong, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(ROOT / script), *map(str, arguments)])
        with contextlib.redirect_stderr(wrong):
            try:
                run_main(main)
            except SystemExit as left:
                code = left.code
            finally:
                signal.signal(signal.SIGINT, signal.default_int_handler)
    return done(script, arguments, code, said.getvalue(), wrong.getvalue(), ok)


def done(script, arguments, code, said, wrong, ok) -> subprocess.CompletedProcess:
    assert not ok or code == 0, f"{script} {arguments}: exit code {code}\n{said}\n{wrong}"
    return subprocess.CompletedProcess([script, *arguments], code, said, wrong)


@pytest.fixture(autouse=True)
def signals_as_before():
    """A script that is tried in this process ignores Ctrl-C at its end, and so would those started later."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def quick_benchmark(monkeypatch):
    shorten_benchmark(monkeypatch)


@functools.cache
def start_server() -> None:
    from utils.measure.interleave import new_server

    new_server(["pytorch_inference", "onnx_inference"])


def shorten_benchmark(monkeypatch) -> None:
    """For benchmarks in this process: one server for all rounds of all tests, where the command starts one
    anew for each round; no second in which other programs are looked for, given rates, and no charts."""
    import benchmark
    from utils import plot_utils
    from utils.measure import roofline, sweep

    def in_fresh_process(function, *arguments):
        return (
            {"tflops": {"FP32": 0.1}, "gb_per_s": 5.0}
            if function is roofline.measure
            else function(*arguments)
        )

    start_server()
    monkeypatch.setattr(sweep, "new_server", lambda scripts: None)
    monkeypatch.setattr(benchmark, "in_fresh_process", in_fresh_process)
    monkeypatch.setattr(benchmark, "print_busy", lambda: None)
    monkeypatch.setattr(plot_utils, "draw_all", lambda *_: [])


# ---- projects


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A folder with the drawn sample as data/ and a checkpoint for 64 px in weights/, as train.py --quick
    makes them on the CPU, so that the network is the same everywhere."""

    def make(folder: Path) -> None:
        folder.mkdir()
        run_script("train.py", "--quick", "--workers", 0, "--device", "cpu", cwd=folder)

    return shared_copy(tmp_path_factory, "project", make)


@pytest.fixture(scope="session")
def measured(tmp_path_factory, project) -> Path:
    """Another copy of the project, with exports and in results/quick the table of PyTorch and ONNX Runtime
    at 64 px, batch 1 and 4, in two rounds; said.txt holds what the benchmark said."""

    def make(folder: Path) -> None:
        shutil.copytree(project, folder)
        said = run_script("benchmark.py", *MEASURED, cwd=folder).stdout
        (folder / "said.txt").write_text(said, encoding="utf-8")

    return shared_copy(tmp_path_factory, "measured", make)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A project of a few images of noise with a checkpoint for 64 px: for tests that need some network."""

    def make(folder: Path) -> None:
        write_noise(folder / "data")
        run_here("train.py", "--quick", "--workers", 0, "--device", "cpu", cwd=folder)

    return shared_copy(tmp_path_factory, "tiny", make)


@pytest.fixture(scope="session")
def exported(project, tmp_path_factory) -> Path:
    """The FP32 export, beside its checkpoint, of a network sure enough of its answers for the gate."""
    from utils import onnx_export

    def make(folder: Path) -> None:
        paths = ["--data", project / "data", "--weights", folder, "--results", folder]
        run_here("train.py", "--image-sizes", 64, "--epochs", 16, "--workers", 0, "--device", "cpu", *paths)
        onnx_export.export(folder / "best_resnet18_64.pth", 64, "FP32")

    return shared_copy(tmp_path_factory, "exported", make) / "resnet18_64_fp32.onnx"


def shared_copy(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A copy of the folder that `make(folder)` makes: the first test process does, those beside it wait."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / f"shared-{name}"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            unfinished = shared.with_name(f"unfinished-{name}-{os.getpid()}")
            make(unfinished)
            unfinished.rename(shared)
    return Path(shutil.copytree(shared, own / name))


@pytest.fixture
def data(tmp_path) -> Path:
    """Two classes with Cyrillic names and spaces, three training images and one test image each."""
    for number, name in enumerate(NAMES):
        for index in range(3):
            paint(tmp_path / "train" / name / f"фото {index}.png", (40 + 90 * number, 60 * index, 90))
        paint(tmp_path / "test" / name / "проба 1.jpg", (40 + 90 * number, 10, 90))
    return tmp_path


def write_noise(data: Path) -> None:
    """Two classes, light and dark noise: five training images each, and four and three test images."""
    numbers = np.random.default_rng(0)
    for name, low in (("светлый", 120), ("тёмный", 0)):
        for split, count in (("train", 5), ("test", 4 if low else 3)):
            for index in range(count):
                path = data / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(numbers.integers(low, low + 120, (40, 40, 3), dtype=np.uint8)).save(path)


# ---- images


def paint(path: Path, colour=(200, 40, 40), size=(40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def noise(width: int = 60, height: int = 40, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 255, (height, width, channels), dtype=np.uint8)


@pytest.fixture(scope="session")
def broken(tmp_path_factory) -> dict[str, Path]:
    """Files that can't be read, in ten ways."""
    folder = tmp_path_factory.mktemp("broken")
    image, whole, png = Image.fromarray(noise()), io.BytesIO(), io.BytesIO()
    image.save(whole, "JPEG")
    image.save(png, "PNG")
    whole, png = whole.getvalue(), png.getvalue()
    contents = {
        "empty.jpg": b"",
        "short.jpg": whole[:1],
        "text.jpg": b"this is no image at all",
        "truncated.jpg": whole[: len(whole) // 2],
        "header only.jpg": whole[:300],
        "truncated.png": png[: len(png) // 2],
        "signature.png": png[:8],
        "damaged.png": png[:100] + b"\0" * 200 + png[300:],
        "html.png": b"<html><body>404</body></html>",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    return {name: folder / name for name in [*contents, "folder.jpg"]}


def load_test_images(data: Path, image_size: int, classes: list[str], threads: int = 1) -> tuple:
    """The whole test set: images float32 (N, 3, S, S) and labels (N,)."""
    import torch

    import datasets

    batches = list(datasets.Loader(data, "test", classes, image_size, 16, threads))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.fixture
def photos(project, tmp_path) -> Path:
    """Every fourth of the test images."""
    for path in images_of(project / "data" / "test")[::4]:
        target = tmp_path / "photos" / path.relative_to(project / "data" / "test")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path / "photos"


def images_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
