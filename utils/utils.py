"""What scripts share: arguments, user errors, whole files, hashes, what is fresh, the environment."""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from utils import gpu

IMAGE_SIZES = [224, 256, 384, 512]  # pixels, square
BATCH_SIZES = [1, 8, 16]
PACKAGES = ["torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime"]
PACKAGES += [
    "torch-tensorrt",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-cu12",
    "pandas",
    "pillow",
    "nvidia-ml-py",
]
MADE = [":(top,exclude)results", ":(top,exclude)README.md"]  # by runs: with it the tree is still clean
LARGE = ["torch", "torchvision", "torchvision.transforms.v2", "torch.utils.flop_counter", "pandas"]


class UserError(Exception):
    """Something the user can mend: one sentence with the path and the command that repairs it."""


def run_main(main: Callable) -> None:
    """Run a script's main(): a UserError is one sentence and exit code 2, Ctrl-C is exit code 130."""
    for stream in (sys.stdout, sys.stderr):  # Windows consoles default to a code page without Cyrillic
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def fresh_processes():
    """multiprocessing's means to start clean processes.

    On Linux they are forked from a server that has only imported the large libraries, which saves each
    seconds; elsewhere each starts from nothing.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LARGE)
    return context


def end_with_parent() -> None:
    """Have this process end when the one that started it does, however that ends."""

    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    for name, holds in (
        ("data", "train/<class>/ and test/<class>/"),
        ("weights", "checkpoints, exports and engines"),
        ("results", "records, tables and charts"),
    ):
        parser.add_argument(f"--{name}", type=Path, default=Path(name), help=f"folder of {holds}")


def checkpoint_path(weights: Path, image_size: int) -> Path:
    return weights / f"best_resnet18_{image_size}.pth"


# ---- files


def read_json(path: Path):
    """The content of a JSON file, or None where it is missing or was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or none: a reader never sees half of it, an interruption leaves the old one."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write(temporary)` write a file of the same suffix beside `path`, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Indented, but for lists of numbers, which stay on one line."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    text = re.sub(r'\[\n([^\[\]{}"]*?)\n\s*\]', lambda found: f"[{' '.join(found[1].split())}]", text)
    write_atomic(path, text + "\n")


def is_fresh(path: Path, facts: dict) -> bool:
    """Whether `path` is whole and made from exactly `facts`; if it is there but not that, stderr says why."""
    if not path.is_file():
        return False
    try:
        record = read_json(path.with_name(path.name + ".json"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("made_from"), dict):
        wrong = "does not say what it was made from"
    elif others := sorted(name for name in facts if record["made_from"].get(name) != facts[name]):
        wrong = f"was made for another {', '.join(others)}"
    elif record.get("sha256") != sha256(path):
        wrong = "is damaged"
    else:
        return True
    print(f"{path} {wrong}; building it anew", file=sys.stderr, flush=True)
    return False


def store(path: Path, facts: dict, write: Callable[[Path], object]) -> None:
    """Have `write(path)` write the whole file, with a note beside it: from what, and in how many seconds."""
    start = time.perf_counter()
    write_whole(path, write)
    seconds = round(time.perf_counter() - start, 3)
    note = {"made_from": facts, "sha256": sha256(path), "build_s": seconds}
    write_json(path.with_name(path.name + ".json"), note)


def builds_ahead(artefacts: list[Path], checkpoint: Path) -> dict[Path, float | None]:
    """Those that are missing or of other weights, with the seconds that building took last time, if known.

    Nothing is loaded: what another version or GPU makes stale shows only when it is needed.
    """
    found, weights = {}, sha256(checkpoint)
    for path in artefacts:
        note = read_json(path.with_name(path.name + ".json")) or {}
        if not path.is_file() or note.get("made_from", {}).get("checkpoint") != weights:
            found[path] = note.get("build_s")
    return found


def sha256(*parts: str | bytes | Path) -> str:
    """The hash of texts, bytes and files' contents in order, as 64 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = part.read_bytes()
        content = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(str(len(content)).encode() + b":" + content)
    return digest.hexdigest()


# ---- the environment


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict:
    """What a figure depends on besides the code: machine, driver, packages; its commit and command."""
    return {
        "gpu": None,
        **gpu.describe(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "clean": _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *MADE) == "",
        "date": datetime.date.today().isoformat(),
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
