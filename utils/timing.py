"""The clock and its statistics: warm-up, sampling, trimmed mean, percentiles, 95 % intervals.

A run is one call of a backend on one batch that already lies on the device.  Its host time ends when the
device has finished (`perf_counter` around the call and a synchronise); its GPU time lies between two CUDA
events on the same stream.
"""

import dataclasses
import gc
import time
from collections.abc import Callable

import numpy as np

TRIM = 0.1  # share of the runs dropped at either end
CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclasses.dataclass
class Samples:
    """Milliseconds of each run: host clock, time until the call returned, GPU events (none on a CPU)."""

    host_ms: list[float]
    enqueue_ms: list[float]
    gpu_ms: list[float]


def warm_up(call: Callable, synchronize: Callable, calls: int, seconds: float, at_most: float) -> int:
    """Call at least `calls` times and for `seconds`, but stop after `at_most` seconds; the calls made."""
    start, made = time.perf_counter(), 0
    while True:
        call()
        synchronize()
        made += 1
        elapsed = time.perf_counter() - start
        if (made >= calls and elapsed >= seconds) or elapsed >= at_most:
            return made


def sample(
    call: Callable,
    synchronize: Callable,
    runs: int,
    min_seconds: float,
    max_seconds: float,
    new_event: Callable | None = None,
) -> Samples:
    """Time at least `runs` calls and at least `min_seconds` of them, but start none after `max_seconds`.

    `new_event` makes CUDA events with timing; None on a CPU.  Python's garbage collector is off meanwhile.
    """
    clock = time.perf_counter
    starts, enqueued, ends, events = [], [], [], []
    gc.collect()
    gc.disable()
    try:
        synchronize()
        begin = clock()
        elapsed = 0.0
        while (len(ends) < runs or elapsed < min_seconds) and (not ends or elapsed < max_seconds):
            if new_event:
                events.append((new_event(), new_event()))
                events[-1][0].record()
            starts.append(clock())
            call()
            enqueued.append(clock())
            if new_event:
                events[-1][1].record()
            synchronize()
            ends.append(clock())
            elapsed = ends[-1] - begin
    finally:
        gc.enable()
    start = np.array(starts)
    on_gpu = [round(before.elapsed_time(after), 4) for before, after in events]
    return Samples(_ms(np.array(ends) - start), _ms(np.array(enqueued) - start), on_gpu)


def _ms(seconds: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in seconds * 1000]


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
    kept = trimmed(runs)
    p50, p95, p99 = np.percentile(runs, [50, 95, 99])
    low, high = interval([rounds], lambda mean: batch_size / mean * 1000)
    return {
        "runs": len(runs),
        "rounds": len(rounds),
        "mean_ms": kept.mean(),
        "std_ms": kept.std(ddof=1) if len(kept) > 1 else None,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "min_ms": runs.min(),
        "fps": batch_size / kept.mean() * 1000,
        "fps_low": low,
        "fps_high": high,
    }


def interval(
    series: list[list[list[float]]], figure: Callable[..., float], paired: bool = True, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a positive figure formed from trimmed means, by resampling rounds, or the runs
    of a single one.

    `series` holds one or several measurements, each a list of rounds, each a list of run times in ms;
    `figure` takes one mean of each.  With `paired`, round k of every measurement was taken at about the
    same time, so rounds are drawn together and what drifted for all cancels.

    The runs of a round share their process, so whole rounds are drawn; what scatters within a round is in
    the spread between rounds already, and drawing runs too would count it twice (Davison and Hinkley,
    Bootstrap Methods, 1997, section 3.8).  With R rounds the bootstrap's variance is (R - 1) / R of the
    true one and the quantile is Student's with R - 1 degrees of freedom (section 2.3).  A single round can
    only have its runs drawn: variation between processes is not in that interval.
    """
    from scipy import stats

    rng = np.random.default_rng(seed)
    counts = [len(rounds) for rounds in series]
    drawn = [rng.integers(count, size=(RESAMPLES, count)) for count in counts]
    if paired:
        drawn = [drawn[0]] * len(series)
    means = []
    for rounds, chosen in zip(series, drawn, strict=True):
        if len(rounds) == 1:
            means.append(_resampled_means(rounds[0], rng))
        else:
            means.append(np.array([trimmed_mean(values) for values in rounds])[chosen].mean(axis=1))
    center = np.log(figure(*(np.mean([trimmed_mean(values) for values in rounds]) for rounds in series)))
    spread = np.log(figure(*means)).std()
    if (fewest := min(counts)) == 1:
        factor = stats.norm.ppf(0.5 + CONFIDENCE / 2)
    else:
        factor = stats.t.ppf(0.5 + CONFIDENCE / 2, fewest - 1) * np.sqrt(fewest / (fewest - 1))
    return float(np.exp(center - factor * spread)), float(np.exp(center + factor * spread))


def _resampled_means(values: list[float], rng: np.random.Generator) -> np.ndarray:
    """Trimmed means of one round's runs: normal about the mean with Tukey and McLaughlin's error."""
    from scipy import stats

    error = float(stats.mstats.trimmed_stde(values, limits=(TRIM, TRIM))) if len(values) > 1 else 0.0
    return np.maximum(rng.normal(trimmed_mean(values), error, RESAMPLES), 1e-9)
