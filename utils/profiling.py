"""What is seen apart from the timed runs: a sustained loop watched by the driver, and some calls by the profiler."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path

from utils import gpu

CALLS = 10  # under the profiler


def sustain(call: Callable, synchronize: Callable, seconds: float) -> dict:
    """Call for at least `seconds`, synchronising about 20 times a second only, while the driver is watched."""
    start = time.perf_counter()
    call()
    synchronize()
    group = max(1, int(0.05 / max(time.perf_counter() - start, 1e-5)))
    calls = 0
    with gpu.Watch() as watch:
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            for _ in range(group):
                call()
            synchronize()
            calls += group
    return {**watch.result, "calls": calls, "loop_s": elapsed}


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
    """Milliseconds of a call in which the GPU was at work: kernels and copies as CUPTI saw them, overlaps counted once.

    None where CUPTI sees nothing (no permission, another profiler at work).
    """
    import torch

    profiler = profiled(call, [torch.profiler.ProfilerActivity.CUDA])
    spans = [
        event.time_range for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    total = end = 0.0
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return total / 1000 / CALLS or None


def table_and_trace(call: Callable, device: str, path: Path) -> str:
    """torch.profiler's table by operator of some calls, in the order of the time they took; writes a Chrome trace to `path`."""
    import torch

    profiler = profiled(
        call,
        [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    averages = profiler.key_averages()
    on_gpu = (
        "self_device_time_total" if hasattr(averages[0], "self_device_time_total") else "self_cuda_time_total"
    )  # torch before 2.5
    return averages.table(
        sort_by=on_gpu if device == "cuda" else "self_cpu_time_total", row_limit=15, max_name_column_width=60
    )
