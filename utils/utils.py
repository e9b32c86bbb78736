"""What two or more scripts share: arguments, user errors, the result record, files, the environment."""

import argparse
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import subprocess
import sys
from pathlib import Path

IMAGE_SIZES = [224, 256, 384, 512]  # pixels, square
BATCH_SIZES = [1, 8, 16]
STATUSES = ["ok", "unavailable", "out_of_memory", "failed", "mismatch"]
PACKAGES = "torch torchvision numpy onnx onnxscript onnxruntime-gpu onnxruntime torch-tensorrt tensorrt pandas pillow nvidia-ml-py".split()


MADE = [
    ":(top,exclude)results",
    ":(top,exclude)README.md",
]  # what runs write: the tree is clean with any of it


class UserError(Exception):
    """Something the user can mend: one sentence with the path and the command that repairs it."""


@dataclasses.dataclass
class Row:
    """One configuration of one run; its fields are the columns of benchmark_results.csv.  Empty means not known."""

    run: str
    backend: str
    precision: str
    device: str
    image_size: int
    batch_size: int
    status: str
    reason: str = ""
    runs: int | None = None
    rounds: int | None = None
    mean_ms: float | None = None
    std_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    min_ms: float | None = None
    gpu_ms: float | None = None
    busy_ms: float | None = None
    fps: float | None = None
    fps_low: float | None = None
    fps_high: float | None = None
    sustained_fps: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    build_s: float | None = None
    gpu_memory_mb: float | None = None
    torch_memory_mb: float | None = None
    host_memory_mb: float | None = None
    gpu_util_pct: float | None = None
    power_w: float | None = None
    mj_per_image: float | None = None
    sm_clock_mhz: float | None = None
    temperature_c: float | None = None
    throttled: str | None = None
    tflops: float | None = None
    pct_peak: float | None = None
    pct_measured_peak: float | None = None
    flops_per_byte: float | None = None
    limit: str | None = None
    max_abs_diff: float | None = None
    agreement: float | None = None
    accuracy: float | None = None
    notes: str = ""


COLUMNS = [field.name for field in dataclasses.fields(Row)]


def run_main(main) -> None:
    """Run a script's main(): a UserError is one sentence on stderr and exit code 2, Ctrl-C is exit code 130."""
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

    On Linux they are forked from a server that has imported the large libraries and done nothing else, which saves each the
    seconds of importing them; elsewhere each starts from nothing.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torchvision", "torchvision.transforms.v2", "torch.utils.flop_counter", "pandas"]
    )
    return context


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder with train/<class>/ and test/<class>/"
    )
    parser.add_argument(
        "--weights", type=Path, default=Path("weights"), help="folder of checkpoints, exports and engines"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder of records, tables and charts"
    )


def read_json(path: Path):
    """The content of a JSON file, or None where it is missing or was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or none: a reader never sees half of it, an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def sha256(*parts: str | bytes | Path) -> str:
    """The hash of texts, bytes and files' contents in order, as 64 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        content = (
            part.read_bytes()
            if isinstance(part, Path)
            else part.encode("utf-8")
            if isinstance(part, str)
            else part
        )
        digest.update(str(len(content)).encode() + b":" + content)
    return digest.hexdigest()


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def checkpoint_path(weights: Path, image_size: int) -> Path:
    return weights / f"best_resnet18_{image_size}.pth"


def fingerprint_of_code() -> str:
    """Short hash of the files whose change makes an earlier measurement stale."""
    root = Path(__file__).resolve().parent.parent
    names = [
        "model.py",
        "datasets.py",
        "trt.py",
        "torch_trt.py",
        "utils/timing.py",
        "utils/request.py",
        "utils/measure.py",
        "utils/gpu.py",
    ]
    names += ["utils/profiling.py", "utils/ceilings.py"]
    paths = [root / name for name in names] + sorted(root.glob("*_inference.py"))
    return sha256(*(path for path in paths if path.is_file()))[:16]


def environment() -> dict:
    """What a figure depends on besides the code: machine, driver, packages; and the commit and command that made it."""
    from utils import gpu

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
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, encoding="utf-8"
        ).stdout.strip()
    if sys.platform == "win32":
        import winreg

        with winreg.OpenKey(
            winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        ) as key:
            return winreg.QueryValueEx(key, "ProcessorNameString")[0].strip()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _git(*arguments: str) -> str | None:
    """What git answers about this checkout, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, encoding="utf-8", cwd=Path(__file__).parent
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
