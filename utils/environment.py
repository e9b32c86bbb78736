"""What a figure depends on besides the code: machine, driver, packages, commit and command."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from utils.measure import gpu

PACKAGES = ["torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime"]
PACKAGES += ["torch-tensorrt", "tensorrt", "tensorrt-cu13", "tensorrt-cu12"]
PACKAGES += ["pandas", "pillow", "nvidia-ml-py"]
MADE = [":(top,exclude)results", ":(top,exclude)README.md"]  # by runs: with it the tree is still clean


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def today() -> str:
    return datetime.date.today().isoformat()


def keep_to_share(index: int, of: int) -> None:
    """Have this process, and those that it starts, run on its share of the cores; on Linux only.

    Of a core's two threads Linux numbers the second right after the first, or by half of all later: by either
    they stay together.
    """
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        half = -(-len(cpus) // 2)
        together = [cpu for first in range(half) for cpu in cpus[first::half]]
        share = together[len(cpus) * index // of : len(cpus) * (index + 1) // of]
        os.sched_setaffinity(0, share or cpus)


def environment() -> dict:
    """What a figure depends on besides the code: machine, driver, packages; its commit and command."""
    return {
        "gpu": None,
        **gpu.describe(),
        "cpu": cpu_name(),
        "cores": cores(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "clean": _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *MADE) == "",
        "date": today(),
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def cpu_name() -> str:
    """The processor's name as its maker writes it, as far as the system tells."""
    if sys.platform == "darwin":
        return _said_by("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    if sys.platform == "win32":
        import winreg

        where = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, where) as key:
            return winreg.QueryValueEx(key, "ProcessorNameString")[0].strip()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _git(*arguments: str) -> str | None:
    return _said_by("git", "-C", str(Path(__file__).parent), *arguments)


def _said_by(*command: str) -> str | None:
    """What a command printed, or None where it isn't there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
