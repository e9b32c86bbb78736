"""What several tests share: the repo on the path, and a small project, trained and measured for real."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


def run_script(script: str, *arguments, cwd: Path = ROOT, ok: bool = True) -> subprocess.CompletedProcess:
    """Run one of the repo's scripts as a user does."""
    environment = {**os.environ, "PYTHONUTF8": "1"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=600
    )
    assert not ok or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def load_test_images(data: Path, image_size: int, classes: list[str], num_workers: int = 0) -> tuple:
    """The whole test set: images float32 (N, 3, S, S) and labels (N,)."""
    import torch

    import datasets

    batches = list(datasets.make_test_loader(data, image_size, 16, classes, num_workers))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.fixture(autouse=True)
def signals_as_before():
    """A script that is tried in this process ignores Ctrl-C at its end, and so would those started later."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A folder with the drawn sample as data/ and a checkpoint for 64 px in weights/, as train.py --quick
    makes them.  It is made once; each test process has its own copy."""
    return shared_copy(tmp_path_factory, "project", train)


@pytest.fixture(scope="session")
def measured(tmp_path_factory, project) -> Path:
    """Another copy of the project, with exports and in results/quick the table of PyTorch and ONNX Runtime
    at 64 px, batch 1 and 4, in two rounds."""

    def make(folder: Path) -> None:
        shutil.copytree(project, folder)
        run_script("benchmark.py", *MEASURED, cwd=folder)

    return shared_copy(tmp_path_factory, "measured", make)


MEASURED = ["--quick", "--device", "cpu", "--backends", "pytorch", "onnx", "--rounds", "2", "--runs", "6"]


def train(folder: Path) -> None:
    folder.mkdir()  # the CPU, so that the network is the same everywhere, whatever GPU there is
    run_script("train.py", "--quick", "--workers", 0, "--device", "cpu", cwd=folder)


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


@pytest.fixture(scope="session")
def exported(project, tmp_path_factory) -> Path:
    """The FP32 export, beside its checkpoint, of a network sure enough of its answers for the gate."""
    from utils import onnx_export

    def make(folder: Path) -> None:
        paths = ["--data", project / "data", "--weights", folder, "--results", folder]
        run_script("train.py", "--image-sizes", 64, "--epochs", 10, "--workers", 0, "--device", "cpu", *paths)
        onnx_export.export(folder / "best_resnet18_64.pth", 64, "FP32")

    return shared_copy(tmp_path_factory, "exported", make) / "resnet18_64_fp32.onnx"


def paint(path: Path, colour=(200, 40, 40), size=(40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """Two classes with Cyrillic names and spaces, three training images and one test image each."""
    for number, name in enumerate(NAMES):
        for index in range(3):
            paint(tmp_path / "train" / name / f"фото {index}.png", (40 + 90 * number, 60 * index, 90))
        paint(tmp_path / "test" / name / "проба 1.jpg", (40 + 90 * number, 10, 90))
    return tmp_path
