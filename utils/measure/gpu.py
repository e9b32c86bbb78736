"""What the driver (NVML) and the profiler (CUPTI) say of the GPU: memory, utilisation, power, busy time.

Every reading that the driver does not give is None, never 0.  It is asked between timed runs, never within.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # so that the driver's GPU 0 is CUDA's
MB = 2**20
CALLS = 10  # under the profiler
POLL_S = 0.05
READINGS = {
    "gpu_util_pct": ("nvmlDeviceGetUtilizationRates",),
    "power_mw": ("nvmlDeviceGetPowerUsage",),
    "sm_clock_mhz": ("nvmlDeviceGetClockInfo", 1),
    "temperature_c": ("nvmlDeviceGetTemperature", 0),
    "throttled": ("nvmlDeviceGetCurrentClocksThrottleReasons",),
}
# nvml.h, nvmlClocksEventReasons; idle, application clocks and display settings slow nothing down unasked
THROTTLE = {4: "power cap", 8: "hardware slowdown", 0x20: "thermal (software)", 0x40: "thermal (hardware)"}
THROTTLE[0x80] = "power brake"


@functools.cache
def _nvml():
    """pynvml, initialised, or None where there is no NVIDIA driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no permission: all mean that nothing can be read
        return None
    return pynvml


@functools.cache
def _handle():
    """The GPU that CUDA calls device 0 when CUDA_DEVICE_ORDER is PCI_BUS_ID, or None."""
    nvml = _nvml()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if nvml is None or visible in ("", "-1"):
        return None
    with contextlib.suppress(nvml.NVMLError):
        if visible.startswith(("GPU-", "MIG-")):
            return nvml.nvmlDeviceGetHandleByUUID(visible)
        return nvml.nvmlDeviceGetHandleByIndex(int(visible))
    return None


def _read(name: str, *arguments):
    """One NVML reading of the GPU, or None where the driver doesn't give it."""
    nvml, handle = _nvml(), _handle()
    if handle is None:
        return None
    try:
        return getattr(nvml, name)(handle, *arguments)
    except (nvml.NVMLError, AttributeError):
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
    name = _read("nvmlDeviceGetName")
    if name is None:
        return {}
    driver = _nvml().nvmlSystemGetDriverVersion()  # str or, from older bindings, bytes
    power, memory = _read("nvmlDeviceGetPowerManagementLimit"), _read("nvmlDeviceGetMemoryInfo")
    clock_khz, sm_count, major, minor = (_attribute(number) for number in (13, 16, 75, 76))
    return {
        "gpu": name if isinstance(name, str) else name.decode(),
        "driver": driver if isinstance(driver, str) else driver.decode(),
        "gpu_memory_mb": memory and round(memory.total / MB),
        "power_limit_w": power and power / 1000,
        "compute_capability": major and [major, minor],
        "sm_count": sm_count,
        "boost_clock_mhz": clock_khz and clock_khz / 1000,
    }


_own = {"risen": 0, "began": None}  # bytes: what finished phases added; the level when this one began


@contextlib.contextmanager
def own_phase():
    """A time in which this process alone loads, warms up or measures, while others that share the GPU idle.

    Where the driver tells only the device's level, what rises in these phases is this process's memory.
    """
    _own["began"] = _level()
    try:
        yield
    finally:
        _own["risen"] += _rise()
        _own["began"] = None


def _level() -> int | None:
    """Bytes of GPU memory that everyone uses."""
    memory = _read("nvmlDeviceGetMemoryInfo")
    return memory and memory.used


def _rise() -> int:
    """Bytes by which the level has risen, or fallen, since the phase began; 0 outside of one."""
    level = _level()
    return 0 if None in (level, _own["began"]) else level - _own["began"]


def memory_mb() -> tuple[float | None, str | None]:
    """GPU memory of this process in MB (context, libraries, arenas and tensors), and whose reading it is.

    "process": what the driver counts for it.  "device", where the driver keeps that to itself (Windows, some
    containers): the rise of everyone's memory in this process's own phases, with what programs other than
    the benchmark took or gave back meanwhile.  (None, None): not known.
    """
    for process in _read("nvmlDeviceGetComputeRunningProcesses") or []:
        if process.pid == os.getpid() and process.usedGpuMemory:
            return process.usedGpuMemory / MB, "process"
    risen = _own["risen"] + _rise()
    return (risen / MB, "device") if risen > 0 else (None, None)


@functools.cache
def context_mb() -> float | None:
    """Make the CUDA context, a phase of its own; the MB that it takes, with PyTorch's kernels."""
    import torch

    with own_phase():
        torch.cuda.synchronize()
    return memory_mb()[0]


@contextlib.contextmanager
def watch():
    """What the GPU does beside the block: yields a dict that is filled in at the end."""
    seen, done, result = {name: [] for name in READINGS}, threading.Event(), {}

    def poll() -> None:
        while not done.wait(POLL_S):
            for name, asked in READINGS.items():
                value = _read(*asked)
                if value is not None:
                    seen[name].append(getattr(value, "gpu", value))  # of the rates, that of the GPU

    energy, start = _read("nvmlDeviceGetTotalEnergyConsumption"), time.perf_counter()
    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        seconds, end = time.perf_counter() - start, _read("nvmlDeviceGetTotalEnergyConsumption")
        done.set()
        thread.join()
    throttled = seen.pop("throttled")
    result |= {name: sum(values) / len(values) if values else None for name, values in seen.items()}
    watts, joules = result.pop("power_mw"), None
    if None not in (energy, end):
        joules = (end - energy) / 1000
    elif watts is not None:
        joules = watts / 1000 * seconds
    reasons = [text for bit, text in THROTTLE.items() if any(bits & bit for bits in throttled)]
    result["throttled"] = (", ".join(reasons) or "no") if throttled else None
    result |= {"seconds": seconds, "energy_j": joules, "power_w": joules and joules / seconds}


def sustain(call: Callable, synchronize: Callable, seconds: float) -> dict:
    """Call for at least `seconds`, waiting about 20 times a second only, while the driver is watched."""
    start = time.perf_counter()
    call()
    synchronize()
    group = max(1, int(0.05 / max(time.perf_counter() - start, 1e-5)))
    calls = 0
    with watch() as seen:
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            for _ in range(group):
                call()
            synchronize()
            calls += group
    return {**seen, "calls": calls, "loop_s": elapsed}


def profiled(call: Callable, activities: list):
    """torch.profiler's record of CALLS calls, after some that warm up."""
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    for _ in range(3):
        call()
    synchronize()
    with warnings.catch_warnings(), torch.profiler.profile(activities=activities) as profiler:
        warnings.simplefilter("ignore")  # that a second cycle would clear these events
        for _ in range(CALLS):
            call()
        synchronize()
    return profiler


def busy_ms(call: Callable) -> float | None:
    """Milliseconds of a call in which the GPU was at work by CUPTI's count, overlaps once; None: not seen."""
    import torch

    profiler = profiled(call, [torch.profiler.ProfilerActivity.CUDA])
    on_gpu = torch.autograd.DeviceType.CUDA
    spans = [event.time_range for event in profiler.events() if event.device_type == on_gpu]
    total = end = 0.0
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return total / 1000 / CALLS or None


def table_and_trace(call: Callable, device: str, path: Path) -> str:
    """torch.profiler's table by operator, the longest first; writes a Chrome trace to `path`."""
    import torch

    kinds = torch.profiler.ProfilerActivity
    profiler = profiled(call, [kinds.CPU, kinds.CUDA] if device == "cuda" else [kinds.CPU])
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    averages = profiler.key_averages()
    order = "self_cpu_time_total"
    if device == "cuda":  # named otherwise by torch before 2.5
        new = "self_device_time_total"
        order = new if hasattr(averages[0], new) else "self_cuda_time_total"
    return averages.table(sort_by=order, row_limit=15, max_name_column_width=60)
