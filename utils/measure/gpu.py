"""What the driver (NVML) and the profiler (CUPTI) say of the GPU, asked between timed runs, never within;
a reading that the driver does not give is None, never 0."""

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable

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

_risen = 0  # bytes by which everyone's GPU memory rose in this process's own phases


@contextlib.contextmanager
def own_phase():
    """A time in which this process alone loads or warms up, while others that share the GPU idle: where the
    driver tells only the device's level, what rises meanwhile is this process's memory."""
    global _risen
    before = read_driver("nvmlDeviceGetMemoryInfo")
    try:
        yield
    finally:
        after = read_driver("nvmlDeviceGetMemoryInfo")
        if before and after:
            _risen += after.used - before.used


def memory_mb() -> tuple[float | None, str | None]:
    """GPU memory of this process in MB and whose reading it is: "process", or, where the driver keeps that to
    itself (Windows, some containers), "device": what everyone's rose by in own_phase().  None: not known."""
    for process in read_driver("nvmlDeviceGetComputeRunningProcesses") or []:
        if process.pid == os.getpid() and process.usedGpuMemory:
            return process.usedGpuMemory / MB, "process"
    return (_risen / MB, "device") if _risen > 0 else (None, None)


def context_mb() -> float | None:
    """Make the CUDA context, a phase of its own; the MB that it takes, with PyTorch's kernels."""
    import torch

    with own_phase():
        torch.cuda.synchronize()
    return memory_mb()[0]


def sustain(call: Callable, synchronize: Callable, seconds: float) -> dict:
    """Call for at least `seconds`, waiting about 20 times a second only; what the driver says meanwhile."""
    start = time.perf_counter()
    call()
    synchronize()
    group = max(1, int(0.05 / max(time.perf_counter() - start, 1e-5)))
    seen, done, calls = {name: [] for name in READINGS}, threading.Event(), 0

    def poll() -> None:
        while not done.wait(POLL_S):
            for name, asked in READINGS.items():
                if (value := read_driver(*asked)) is not None:
                    seen[name].append(getattr(value, "gpu", value))  # of the rates, that of the GPU

    thread = threading.Thread(target=poll, daemon=True)
    energy, begin = read_driver("nvmlDeviceGetTotalEnergyConsumption"), time.perf_counter()
    thread.start()
    try:
        start = time.perf_counter()
        while (loop_s := time.perf_counter() - start) < seconds:
            for _ in range(group):
                call()
            synchronize()
            calls += group
        watched_s, end = time.perf_counter() - begin, read_driver("nvmlDeviceGetTotalEnergyConsumption")
    finally:
        done.set()
        thread.join()
    throttled = seen.pop("throttled")
    result: dict = {name: sum(values) / len(values) if values else None for name, values in seen.items()}
    power_mw = result.pop("power_mw")
    joules = power_mw and power_mw / 1000 * watched_s
    if energy is not None and end is not None:
        joules = (end - energy) / 1000
    reasons = [text for bit, text in THROTTLE.items() if any(bits & bit for bits in throttled)]
    result["throttled"] = (", ".join(reasons) or "no") if throttled else None
    result |= {"seconds": watched_s, "energy_j": joules, "power_w": joules and joules / watched_s}
    return result | {"calls": calls, "loop_s": loop_s}


def busy_ms(call: Callable) -> float | None:
    """Milliseconds of a call in which the GPU was at work by CUPTI's count, overlaps once; None: not seen."""
    import torch

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with warnings.catch_warnings(), torch.profiler.profile(activities=activities) as profiler:
        warnings.simplefilter("ignore")  # that a second cycle would clear these events
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA  # pyright: ignore[reportPrivateImportUsage]
    spans = [event.time_range for event in profiler.events() or [] if event.device_type == on_gpu]
    total = end = 0.0
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return total / 1000 / CALLS or None
