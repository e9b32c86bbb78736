"""The clock and its statistics: warm-up, sampling, trimmed mean, percentiles, 95 % intervals.

A run is one call of a backend on one batch that already lies on the device, until the device has finished.
"""

import gc
import math
import time
from collections.abc import Callable

import numpy as np

TRIM = 0.1  # share of the runs dropped at either end
CONFIDENCE = 0.95
RESOLUTION_MS = 1e-4  # of what is kept: a clock may give the same reading twice, but no run takes nothing
SATURATED = 0.05  # gain in images/s below which a doubling of the batch is no gain
CORE_LOOP = 1000  # passes of a Python loop that tells how fast the core is: 0.01 to 0.03 ms


def warm_up(call: Callable, synchronize: Callable, calls: int, seconds: float, at_most: float) -> list[float]:
    """Call at least `calls` times and for `seconds`, but stop after `at_most` seconds; the ms of each."""
    clock = time.perf_counter
    begin, took = clock(), []
    while True:
        start = clock()
        call()
        synchronize()
        end = clock()
        took.append((end - start) * 1000)
        if (len(took) >= calls and end - begin >= seconds) or end - begin >= at_most:
            return took


def sample(call: Callable, synchronize: Callable, runs: int, new_event: Callable | None = None) -> dict:
    """The milliseconds of `runs` calls one after another, Python's garbage collector off meanwhile: host_ms
    by the host's clock, enqueue_ms until the call returned, gpu_ms between CUDA events, if `new_event` makes
    some (with timing)."""
    clock = time.perf_counter
    events = [(new_event(), new_event()) for _ in range(runs)] if new_event else []
    starts, enqueued, ends = [], [], []
    gc.freeze()  # what has been loaded is not looked through again, which takes a third of a second
    gc.collect()
    gc.disable()
    try:
        synchronize()
        for k in range(runs):
            if events:
                events[k][0].record()
            starts.append(clock())
            call()
            enqueued.append(clock())
            if events:
                events[k][1].record()
            synchronize()
            ends.append(clock())
    finally:
        gc.enable()
    on_gpu = [round(before.elapsed_time(after), 4) for before, after in events]
    return {"host_ms": ms(starts, ends), "enqueue_ms": ms(starts, enqueued), "gpu_ms": on_gpu}


def ms(starts: list[float], ends: list[float]) -> list[float]:
    took = (np.array(ends) - np.array(starts)) * 1000
    return np.maximum(took.round(4), RESOLUTION_MS).tolist()


def core_ms() -> float:
    """Milliseconds of a fixed piece of Python: twice as long where another program uses the core."""
    start = time.perf_counter()
    for _ in range(CORE_LOOP):
        pass
    return (time.perf_counter() - start) * 1000


def trimmed(values) -> np.ndarray:
    """The values, sorted, without the smallest 10 % and the largest 10 % (rounded down)."""
    ordered = np.sort(np.asarray(values, dtype=float))
    cut = int(len(ordered) * TRIM)
    return ordered[cut : len(ordered) - cut]


def trimmed_mean(values) -> float:
    return float(trimmed(values).mean())


def summarize(rounds: list[list[float]], batch_size: int) -> dict:
    """The CSV's columns of time and throughput from the host times of each round in ms."""
    runs = np.concatenate([np.asarray(values, dtype=float) for values in rounds])
    kept, fps = trimmed(runs), batch_size / trimmed_mean(runs) * 1000
    found = {"runs": len(runs), "rounds": len(rounds), "mean_ms": kept.mean(), "min_ms": runs.min()}
    found["std_ms"] = kept.std(ddof=1) if len(kept) > 1 else None
    found |= zip(("p50_ms", "p95_ms", "p99_ms"), np.percentile(runs, [50, 95, 99]), strict=True)
    low, high = interval(fps, [trimmed_mean(values) for values in rounds])
    return found | {"fps": fps, "fps_low": low, "fps_high": high}


def speedup(baseline_ms: list[float], host_ms: list[float], block_runs: list[int]) -> float:
    """How many times as fast as the baseline a measurement is within one round: while its block k was timed,
    of block_runs[k] of the runs host_ms, the baseline's mean was baseline_ms[k].

    A quarter of the blocks at either end is left out, since something may have disturbed them.
    """
    ends = np.cumsum(block_runs)
    own = [trimmed_mean(block) for block in np.split(np.asarray(host_ms, dtype=float), ends[:-1])]
    ratios = np.sort(np.log(baseline_ms) - np.log(own))
    cut = len(ratios) // 4
    return float(np.exp(ratios[cut : len(ratios) - cut].mean()))


def gain(batch_sizes: list[int], fps: list[float], i: int, j: int) -> float:
    """What a doubling of the batch gains between two measured sizes, spread evenly over the doublings."""
    return (fps[j] / fps[i]) ** (1 / math.log2(batch_sizes[j] / batch_sizes[i])) - 1


def interval(figure: float, rounds: list[float]) -> tuple[float | None, float | None]:
    """The 95 % interval about a positive figure, given its value in each round; (None, None) for one round.

    The runs of a round share their process, so only rounds are independent: Student's t with R - 1 degrees of
    freedom on the logarithms of R values.
    """
    if len(rounds) < 2:
        return None, None
    from scipy import stats

    logs = np.log(rounds)
    quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, len(logs) - 1)
    half = float(quantile * logs.std(ddof=1) / np.sqrt(len(logs)))
    return figure * float(np.exp(-half)), figure * float(np.exp(half))


def half_width_pct(low: float | None, high: float | None) -> float:
    """Half the width of an interval in percent of its middle; infinite where there is none."""
    if low is None or high is None or not low > 0:
        return float("inf")
    return (float(np.sqrt(high / low)) - 1) * 100
