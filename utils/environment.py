"""The machine as measured: device, driver, packages, threads and what limits them, commit and command."""

import contextlib
import ctypes
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import typing
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # so that the driver's GPU 0 is CUDA's
MB = 2**20
PACKAGES = ["torch", "numpy", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime"]
PACKAGES += ["torch-tensorrt", "tensorrt", "tensorrt-cu13", "tensorrt-cu12", "openvino"]
PACKAGES += ["pandas", "pillow", "nvidia-ml-py"]
MADE = [":(top,exclude)results", ":(top,exclude)README.md"]  # by runs: with it the tree is still clean
# Variables that change threads, arithmetic, kernels or allocators, unless they only name a file or a log.
DECIDING = re.compile(
    r"(OMP|GOMP|KMP|MKL|OPENBLAS|VECLIB|BLIS|DNNL|ONEDNN|ATEN|CUBLAS|CUDNN|TORCHINDUCTOR|TORCHDYNAMO"
    r"|TORCH_CUDNN|TORCH_COMPILE|TORCH_CUDA|PYTORCH|TRITON|ORT|OPENVINO|OV|TRT|MALLOC)_.+"
    r"|NVIDIA_TF32_OVERRIDE|CUDA_LAUNCH_BLOCKING|CUDA_DEVICE_MAX_CONNECTIONS|CUDA_MODULE_LOADING"
    r"|CUDA_FORCE_PTX_JIT|CUDA_MPS_ACTIVE_THREAD_PERCENTAGE|PYTORCH_ALLOC_CONF|LD_PRELOAD"
)
IDLE = re.compile(r"CACHE|LOG|VERBOSE|DEBUG|DISPLAY|_DIR|_PATH|_HOME|TELEMETRY|PYTORCH_VERSION|BUILD")


def package_version(name: str) -> str | None:
    """Its version, or None; torch's with its build (2.14.1+cu130), without the seconds of importing it."""
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    source = _text(Path(str(package.locate_file("torch/version.py")))) if name == "torch" else ""
    found = re.search(r"__version__ = ['\"]([^'\"]+)", source)
    return found[1] if found else package.version


def torch_is_at_least(major: int, minor: int) -> bool:
    """Whether the installed PyTorch is of this version or a later one."""
    installed = (package_version("torch") or "0.0").split(".")[:2]
    return tuple(map(int, installed)) >= (major, minor)


# ---- the processor


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def affinity() -> str | None:
    """Which cores those are, as "0-3,8"; None where the system doesn't tell (it does on Linux)."""
    found = re.search(r"Cpus_allowed_list:\s*(\S+)", _text(Path("/proc/self/status")))
    return found and found[1]


@functools.cache
def cpu_groups(root: Path = Path("/")) -> list[Path]:
    """Folders of the Linux control groups, v1 or v2, that may limit this process, and all above."""
    folders = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            folders += [top / path.strip("/"), *(top / path.strip("/")).parents]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The cores' time that a limit (docker --cpus) leaves this process; None without a limit."""
    quotas = []
    for folder in cpu_groups(root):
        old = (_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        told = _text(folder / "cpu.max") or " ".join(old)
        if found := re.match(r"(\d+)\s+(\d+)", told):  # "max" or -1: no limit
            quotas.append(int(found[1]) / int(found[2]))
    return min(quotas, default=None)


def throttled_s(root: Path = Path("/")) -> float:
    """Seconds for which such a limit has held this process's group back so far."""
    texts = [_text(folder / "cpu.stat") for folder in cpu_groups(root)]
    told = [re.search(r"throttled_(usec|time) (\d+)", text) for text in texts]
    return max((int(found[2]) / (1e6 if found[1] == "usec" else 1e9) for found in told if found), default=0.0)


def _text(path: Path) -> str:
    """What a file of the system says, or "" where it has none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def deciding_variables() -> dict[str, str]:
    """The environment variables that change how fast, or to what last digit, the same code computes."""
    names = (name for name in os.environ if DECIDING.fullmatch(name) and not IDLE.search(name))
    return {name: os.environ[name] for name in sorted(names)}


def keep_to_share(index: int, of: int) -> None:
    """Have this process, and those that it starts, run on its share of the cores; on Linux only."""
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cpus[len(cpus) * index // of : len(cpus) * (index + 1) // of] or cpus)


def cpu_name() -> str:
    """The processor's name as its maker writes it, as far as the system tells."""
    if sys.platform == "darwin":
        return _said_by("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    if sys.platform == "win32":
        import winreg

        where = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, where) as key:
            return winreg.QueryValueEx(key, "ProcessorNameString")[0].strip()
    found = re.search(r"model name\s*:\s*(.+)", _text(Path("/proc/cpuinfo")))
    return found[1].strip() if found else platform.machine()


def _said_by(*command: str) -> str | None:
    """What a command printed, or None where it isn't there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ---- the GPU, by NVIDIA's driver (NVML)


@functools.cache
def nvml():
    """pynvml, initialised, or None where there is no NVIDIA driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no permission: all mean that nothing can be read
        return None
    return pynvml


@functools.cache
def gpu_handle():
    """The GPU that CUDA calls device 0 when CUDA_DEVICE_ORDER is PCI_BUS_ID, or None."""
    pynvml = nvml()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if pynvml is None or visible in ("", "-1"):
        return None
    with contextlib.suppress(pynvml.NVMLError, ValueError):  # ValueError: no number
        if visible.startswith(("GPU-", "MIG-")):
            return pynvml.nvmlDeviceGetHandleByUUID(visible)
        return pynvml.nvmlDeviceGetHandleByIndex(int(visible))
    return None


def read_driver(name: str, *arguments) -> typing.Any:
    """One NVML reading of the GPU, or None where the driver doesn't give it."""
    pynvml, handle = nvml(), gpu_handle()
    if pynvml is None or handle is None:
        return None
    with contextlib.suppress(pynvml.NVMLError, AttributeError):
        return getattr(pynvml, name)(handle, *arguments)
    return None


def _attribute(number: int) -> int | None:
    """A fact about CUDA's device 0 by its CUdevice_attribute in cuda.h, or None; makes no CUDA context."""
    with contextlib.suppress(OSError):
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        device, value = ctypes.c_int(), ctypes.c_int()
        failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
        if not failed and not cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device):
            return value.value
    return None


def describe() -> dict:
    """Name, driver, memory, power limit, compute capability, SMs and boost clock; {} without one."""
    pynvml, name = nvml(), read_driver("nvmlDeviceGetName")
    if pynvml is None or name is None:
        return {}
    power, memory = read_driver("nvmlDeviceGetPowerManagementLimit"), read_driver("nvmlDeviceGetMemoryInfo")
    clock_khz, sm_count, major, minor = (_attribute(number) for number in (13, 16, 75, 76))
    return {
        "gpu": name,
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "gpu_memory_mb": memory and round(memory.total / MB),
        "power_limit_w": power and power / 1000,
        "compute_capability": major and [major, minor],
        "sm_count": sm_count,
        "boost_clock_mhz": clock_khz and clock_khz / 1000,
    }


def environment(device: str) -> dict:
    """What a figure made on "cuda" or "cpu" depends on besides the code: on "cpu" on no GPU."""
    git = "git", "-C", str(Path(__file__).parent)
    return {
        "gpu": None,
        **(describe() if device == "cuda" else {}),
        "cpu": cpu_name(),
        "cores": cores(),
        "affinity": affinity(),
        "cpu_quota": cpu_quota(),
        "variables": deciding_variables(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "commit": _said_by(*git, "rev-parse", "--short=12", "HEAD"),
        "clean": _said_by(*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", *MADE) == "",
        "date": str(datetime.date.today()),
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


# ---- want of memory, in every runtime's words

OUT_OF_MEMORY = re.compile(
    "out ?of ?memory"  # PyTorch, CUDA; "OutOfMemory": TensorRT
    "|can't allocate memory|not enough memory|bad.?alloc"  # a CPU's: PyTorch on Linux and on Windows, C++
    "|alloc(ation)?_failed"  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_..._ALLOCATION_FAILED
    "|failed to allocate memory|bfcarena|cudaerrormemoryallocation|cuda (error|failure) 2:"  # ONNX Runtime
    "|could not be allocated|insufficient memory",  # TensorRT, OpenVINO
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException | str) -> bool:
    """Whether an error, or the whole message of one, says that a GPU or this machine ran out of memory."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))
