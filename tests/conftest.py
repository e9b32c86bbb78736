"""What several tests share: the repo on the path, and one small project that the real scripts trained."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock  # PyTorch brings it along

# Tests run beside one another: threads that wait spinning would take each other's cores.
os.environ["OMP_NUM_THREADS"] = "1"
# What runs in the background ignores it, and so would the scripts started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


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


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A folder with the drawn sample as data/ and a checkpoint for 64 px in weights/, as train.py --quick
    makes them, for this process.

    It is made once: test processes beside this one wait for it and copy it.
    """
    made = tmp_path_factory.getbasetemp() / "project"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return train(made)
    shared = tmp_path_factory.getbasetemp().parent / "project"
    with FileLock(f"{shared}.lock"):
        if not (shared / "weights" / "best_resnet18_64.pth").is_file():
            train(shared)
    return Path(shutil.copytree(shared, made))


def train(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    run_script(
        "train.py", "--quick", "--workers", 0, "--device", "cpu", cwd=folder
    )  # the same everywhere, whatever GPU there is
    return folder
