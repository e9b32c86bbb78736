"""install.py: what it chooses for which machine, that a second time costs nothing, and how it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import install

CUDA, OLD, ANY = "requirements-windows-cuda.txt", "requirements-cuda126.txt", "requirements.txt"


def gpu(driver: int, capability: tuple[int, int] = (7, 5)) -> dict:
    return {"name": "NVIDIA GeForce GTX 1650", "driver": driver, "capability": capability}


@pytest.mark.parametrize(
    "system, found, file, tensorrt, why",
    [
        ("Windows", gpu(581), CUDA, True, "CUDA 13.0"),
        ("Linux", gpu(580), ANY, True, "CUDA 13.0"),
        ("Windows", gpu(552), OLD, False, "from 580 on"),
        ("Linux", gpu(525), OLD, False, "from 580 on"),
        ("Linux", gpu(470), ANY, False, "too old for every build"),
        ("Windows", gpu(581, (6, 1)), OLD, False, "CUDA 12.6"),
        (
            "Linux",
            gpu(570, (12, 0)),
            ANY,
            False,
            "too old for every build",
        ),  # CUDA 12.6 has no kernels for it
        ("Linux", gpu(470, (3, 5)), ANY, False, "--device cpu"),
        ("Windows", None, ANY, False, "no GPU here"),
        ("Darwin", None, ANY, False, "no GPU here"),
    ],
)
def test_the_drivers_word_decides_what_is_installed(system, found, file, tensorrt, why):
    chosen = install.choose(system, found)
    assert chosen[:2] == (file, tensorrt) and why in chosen[2]
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("version, bits", [((3, 10), 64), ((3, 13), 64), ((3, 12), 32)])
def test_another_python_is_one_sentence(version, bits):
    assert "Python 3.11 or 3.12 (64 bits) is needed" in install.problem_of_python(version, bits)
    assert install.problem_of_python((3, 11), 64) is install.problem_of_python((3, 12), 64) is None


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.skipif(os.name != "posix", reason="shell scripts stand for pip and nvidia-smi")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="install.py wants Python 3.11 or 3.12, as the pins do")
def test_it_installs_once_and_then_only_what_has_changed(tmp_path):
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, tmp_path)
    shutil.copy(ROOT / "install.py", tmp_path)
    log, answer = tmp_path / "log", tmp_path / "bin" / "nvidia-smi"
    executable(tmp_path / ".venv" / "bin" / "python", f'echo "$*" >> {log}; echo 13.0')
    executable(answer, "echo 'NVIDIA GeForce GTX 1650, 550.40, 7.5'")

    def run() -> tuple[str, str]:
        log.write_text("")
        environment = {**os.environ, "PATH": f"{answer.parent}:{os.environ['PATH']}"}
        command = [sys.executable, tmp_path / "install.py"]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        return said, log.read_text()

    said, done = run()
    assert f"-r {OLD}" in done and "GTX 1650" in said and OLD in said and "TensorRT is not installed" in said
    said, done = run()
    assert done == "" and "is up to date" in said
    executable(answer, "exit 1")  # the GPU is gone
    assert f"-r {ANY}" in run()[1]
    (tmp_path / ANY).write_text("numpy\n", encoding="utf-8")
    assert f"-r {ANY}" in run()[1]
    executable(tmp_path / ".venv" / "bin" / "python", "echo no such version; exit 1")
    (tmp_path / ANY).write_text("torch\n", encoding="utf-8")
    with pytest.raises(subprocess.CalledProcessError) as raised:
        run()
    assert raised.value.returncode == 2
