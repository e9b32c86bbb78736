"""What the driver (NVML) and the profiler (CUPTI) say of the GPU: memory, utilisation, power, busy time.

Every reading that the driver does not give is None, never 0.  It is asked between timed runs, never within.
"""

import contextlib
import functools
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from utils.environment import MB, read_driver

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
    memory = read_driver("nvmlDeviceGetMemoryInfo")
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
    for process in read_driver("nvmlDeviceGetComputeRunningProcesses") or []:
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
                value = read_driver(*asked)
                if value is not None:
                    seen[name].append(getattr(value, "gpu", value))  # of the rates, that of the GPU

    energy, start = read_driver("nvmlDeviceGetTotalEnergyConsumption"), time.perf_counter()
    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        seconds, end = time.perf_counter() - start, read_driver("nvmlDeviceGetTotalEnergyConsumption")
        done.set()
        thread.join()
    throttled = seen.pop("throttled")
    result |= {name: sum(values) / len(values) if values else None for name, values in seen.items()}
    watts, joules = result.pop("power_mw"), None
    if energy is not None and end is not None:
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
    on_gpu = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]
    spans = [event.time_range for event in profiler.events() or [] if event.device_type == on_gpu]
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
