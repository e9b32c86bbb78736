"""The statistics against hand-worked cases and simulated truths."""

import time

import numpy as np
import pytest

from utils import timing


def test_trimmed_mean_drops_a_tenth_at_either_end():
    runs = [100.0, *range(1, 19), 0.0]  # 20 runs: the two smallest (0, 1) and the two largest (100, 18) go
    assert timing.trimmed(runs).tolist() == list(range(2, 18))
    assert timing.trimmed_mean(runs) == 9.5
    assert timing.trimmed_mean([7.0]) == 7.0
    assert len(timing.trimmed(range(9))) == 9  # a tenth of 9 is less than one


def test_summary_against_hand_worked_figures():
    summary = timing.summarize([[2.0] * 5, [4.0] * 5], batch_size=8)  # ten runs; one 2 and one 4 are dropped
    assert summary["runs"] == 10 and summary["rounds"] == 2
    assert summary["mean_ms"] == 3.0 and summary["min_ms"] == 2.0 and summary["p50_ms"] == 3.0
    assert summary["std_ms"] == pytest.approx((8 / 7) ** 0.5)
    assert summary["fps"] == pytest.approx(8 / 0.003)
    assert summary["fps_low"] < summary["fps"] < summary["fps_high"]


def test_sample_takes_at_least_the_runs_and_the_time_and_stops_at_the_maximum():
    def nothing():
        return None

    assert len(timing.sample(nothing, nothing, runs=7, min_seconds=0, max_seconds=9).host_ms) == 7
    assert sum(timing.sample(nothing, nothing, runs=1, min_seconds=0.05, max_seconds=9).host_ms) <= 60
    assert len(timing.sample(nothing, nothing, runs=1, min_seconds=0.05, max_seconds=9).host_ms) > 100
    slow = timing.sample(lambda: time.sleep(0.02), nothing, runs=100, min_seconds=0, max_seconds=0.1)
    assert 1 <= len(slow.host_ms) < 10
    assert min(slow.host_ms) >= 20 and slow.gpu_ms == []


def test_the_clock_includes_what_the_device_still_does_after_the_call_returned():
    samples = timing.sample(lambda: None, lambda: time.sleep(0.01), runs=3, min_seconds=0, max_seconds=1)
    assert min(samples.host_ms) >= 10 and max(samples.enqueue_ms) < 10


def test_warm_up_makes_the_calls_and_lasts_the_time_but_not_longer_than_the_limit():
    calls = []
    assert (
        timing.warm_up(lambda: calls.append(1), lambda: None, calls=5, seconds=0, at_most=9)
        == len(calls)
        == 5
    )
    start = time.perf_counter()
    timing.warm_up(lambda: time.sleep(0.01), lambda: None, calls=1, seconds=0.1, at_most=9)
    assert time.perf_counter() - start >= 0.1
    assert timing.warm_up(lambda: time.sleep(0.05), lambda: None, calls=100, seconds=0, at_most=0.1) <= 3


def simulate(rng, truth: float, rounds: int, runs: int, drift: np.ndarray) -> list[list[float]]:
    """Runs of a backend whose true mean is `truth` ms: processes differ by 2 %, runs scatter by 5 % with a
    slow tail."""
    process = truth * drift * np.exp(rng.normal(0, 0.02, rounds))
    return [(mean * np.exp(rng.normal(0, 0.05, runs))).tolist() for mean in process]


@pytest.mark.parametrize("rounds", [3, 5])
def test_the_interval_on_the_speedup_covers_the_truth(rounds):
    """With drift that falls on both alike and processes that differ, 90 to 99 % of the intervals hold the
    true speedup of 2."""
    rng, covered, simulations = np.random.default_rng(1), 0, 400
    for _ in range(simulations):
        drift = np.exp(np.cumsum(rng.normal(0, 0.05, rounds)))
        slow, fast = simulate(rng, 2.0, rounds, 34, drift), simulate(rng, 1.0, rounds, 34, drift)
        low, high = timing.interval([slow, fast], lambda a, b: a / b)
        covered += low <= 2.0 <= high
    assert 0.90 <= covered / simulations <= 0.99


def test_unpaired_intervals_cover_too():
    """Two runs of the same thing, one after the other: 90 to 99 % of the intervals on their ratio hold 1."""
    rng, covered, simulations = np.random.default_rng(2), 0, 400
    for _ in range(simulations):
        a, b = (simulate(rng, 1.0, 3, 34, np.ones(3)) for _ in range(2))
        low, high = timing.interval([a, b], lambda x, y: x / y, paired=False)
        covered += low <= 1.0 <= high
    assert 0.90 <= covered / simulations <= 0.995
