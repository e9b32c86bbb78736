"""Make .venv and install into it what this machine can use; a second time there is nothing to do.

NVIDIA's driver says which GPU there is and which CUDA it supports; that decides which build of PyTorch is
installed, from which index, and whether TensorRT is.  Reads requirements*.txt, needs Python 3.11 or 3.12.

    python install.py
"""

import hashlib
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
STAMP = VENV / "installed"
NVIDIA_INDEX = "https://pypi.nvidia.com/"  # TensorRT's libraries are here only
SMI = shutil.which("nvidia-smi") or r"C:\Windows\System32\nvidia-smi.exe"


def gpu_of_driver() -> dict | None:
    """Name, driver (its major version) and compute capability of the first GPU, or None without one."""
    for fields in ("name,driver_version,compute_cap", "name,driver_version"):  # old drivers lack the third
        try:
            command = [SMI, f"--query-gpu={fields}", "--format=csv,noheader"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if found := re.match(r"(.+?), (\d+)[\d.]*(?:, (\d+)\.(\d+))?\s", done.stdout):
            capability = (int(found[3]), int(found[4])) if found[3] else (7, 5)
            return {"name": found[1], "driver": int(found[2]), "capability": capability}
    return None


def choose(system: str, gpu: dict | None) -> tuple[str, bool, str]:
    """(requirements file, whether TensorRT runs here, why) for "Windows", "Linux" or "Darwin" and a GPU."""
    every, old = "requirements.txt", "requirements-cuda126.txt"
    if system == "Darwin" or not gpu:
        return every, False, "NVIDIA's driver lists no GPU here, so the CPU is what will be measured"
    newest = "requirements-windows-cuda.txt" if system == "Windows" else every
    name, driver, capability = gpu["name"], gpu["driver"], gpu["capability"]
    known = f"{name} (compute capability {capability[0]}.{capability[1]}, driver {driver})"
    if capability < (5, 0):
        return every, False, f"PyTorch supports {known} no more, so use --device cpu"
    if capability < (7, 5):  # CUDA 13 dropped these
        return old, False, f"{known} needs the build of PyTorch for CUDA 12.6"
    if driver >= 580:
        return newest, True, f"{known} takes the build of PyTorch for CUDA 13.0"
    update = "a driver from 580 on would run CUDA 13.0, and with it ONNX Runtime and TensorRT"
    if driver >= 525 and capability < (10, 0):
        return old, False, f"{known} takes PyTorch for CUDA 12.6; {update}"
    return newest, False, f"{known}: this driver is too old for every build of PyTorch; {update}"


def problem_of_python(version: tuple[int, int], bits: int) -> str | None:
    if version in ((3, 11), (3, 12)) and bits == 64:
        return None
    mend = "install one (python.org has it for Windows), then: python3.12 install.py, or py -3.12 install.py"
    return f"Python 3.11 or 3.12 (64 bits) is needed, this is {version[0]}.{version[1]} ({bits} bits); {mend}"


def pip(*arguments: str) -> bool:
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def fail(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def install(file: str, has_gpu: bool, with_tensorrt: bool) -> str:
    """Install the packages; the sentence about TensorRT."""
    if not PYTHON.exists():
        try:
            venv.create(VENV, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            mend = "install Python from python.org, or on Debian and Ubuntu: sudo apt install python3-venv"
            fail(f"{VENV} can't be made with this Python ({error}); {mend}, then: python install.py")
    print(f"installing {file} (PyTorch alone is about 3 GB) ...", flush=True)
    done = pip("-r", file)
    if done and has_gpu:
        ask = [PYTHON, "-c", "import torch; print(torch.version.cuda)"]
        if subprocess.run(ask, capture_output=True, text=True).stdout.strip() == "None":
            done = pip("--force-reinstall", "-r", file)  # a CPU build counts as the same version
    if not done:
        fail(f"pip could not install {file}, its reason stands above; mend that, then: python install.py")
    if not with_tensorrt:
        return "TensorRT is not installed, since it would not run here."
    again = f"to try again, remove {STAMP} and run: python install.py"
    try:
        urllib.request.urlopen(NVIDIA_INDEX, timeout=15).close()
    except OSError:
        return f"TensorRT is not installed, since {NVIDIA_INDEX} can't be reached; {again}"
    if not pip("-r", "requirements-tensorrt.txt", "-r", file):
        return f"TensorRT is not installed, since pip failed (its reason stands above); {again}"
    return "TensorRT is installed from NVIDIA's index."


def main() -> None:
    if problem := problem_of_python(sys.version_info[:2], 64 if sys.maxsize > 2**32 else 32):
        fail(problem)
    gpu = gpu_of_driver()
    file, with_tensorrt, why = choose(platform.system(), gpu)
    wanted = b"".join(path.read_bytes() for path in sorted(ROOT.glob("requirements*.txt")))
    state = f"{file} {hashlib.sha256(wanted).hexdigest()}\n"  # changes when what has to be installed does
    if PYTHON.exists() and STAMP.is_file() and STAMP.read_text("utf-8") == state:
        print(f"{VENV} is up to date.")
        STAMP.touch()  # newer than the files of requirements, as make wants it
        return
    about_tensorrt = install(file, bool(gpu), with_tensorrt)
    print(f"{why}.\n{file} is installed in {VENV}.\n{about_tensorrt}")
    STAMP.write_text(state, encoding="utf-8")


if __name__ == "__main__":
    main()
