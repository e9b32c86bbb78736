"""The statistics against hand-worked cases and simulated truths."""

import threading
import time

import numpy as np
import pytest

from utils.measure import timing


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


def test_sample_times_just_the_runs_asked_for():
    slow = timing.sample(lambda: time.sleep(0.02), lambda: None, runs=3)
    assert len(slow["host_ms"]) == len(slow["enqueue_ms"]) == 3
    assert min(slow["host_ms"]) >= 20 and slow["gpu_ms"] == []


def test_the_clock_includes_what_the_device_still_does_after_the_call_returned():
    samples = timing.sample(lambda: None, lambda: time.sleep(0.01), runs=3)
    assert min(samples["host_ms"]) >= 10 and min(samples["enqueue_ms"]) < 10


def test_a_fixed_piece_of_python_tells_when_something_else_uses_the_core():
    alone = min(timing.core_ms() for _ in range(100))
    stop = threading.Event()
    busy = threading.Thread(
        target=lambda: [None for _ in iter(stop.is_set, True)]
    )  # Python's threads share one
    busy.start()
    try:
        beside = max(timing.core_ms() for _ in range(1000))
    finally:
        stop.set()
        busy.join()
    assert 0 < 1.5 * alone < beside


def test_warm_up_makes_the_calls_and_lasts_the_time_but_not_longer_than_the_limit():
    def wait():
        time.sleep(0.01)

    assert len(timing.warm_up(wait, wait, calls=5, seconds=0, at_most=9)) == 5
    start = time.perf_counter()
    assert min(timing.warm_up(wait, lambda: None, calls=1, seconds=0.1, at_most=9)) >= 10
    assert time.perf_counter() - start >= 0.1
    assert len(timing.warm_up(wait, wait, calls=100, seconds=0, at_most=0.05)) <= 3


def test_a_speedup_is_formed_block_by_block():
    own, runs = [1.0] * 4 + [2.0] * 4 + [4.0] * 2, [4, 4, 2]  # the machine halves its speed twice
    assert timing.speedup([3.0, 6.0, 12.0], own, runs) == pytest.approx(3)
    assert timing.speedup([3.0, 6.0, 12.0, 900.0], [*own, 4.0], [*runs, 1]) == pytest.approx(3)  # a hiccup
    assert timing.speedup([5.0], [2.0, 2.0], [2]) == pytest.approx(2.5)


def test_an_interval_is_students_on_logarithms():
    low, high = timing.interval(2.0, [1.0, 2.0, 4.0])  # a standard deviation of ln 2; t(0.975, 2) = 4.303
    assert (
        high / 2.0 == pytest.approx(2.0 / low) == pytest.approx(np.exp(4.3027 * np.log(2) / 3**0.5), rel=1e-4)
    )
    assert timing.half_width_pct(low, high) == pytest.approx((high / 2 - 1) * 100)
    assert timing.interval(2.0, [2.0]) == (None, None)  # one round has no interval
    assert timing.half_width_pct(None, None) == timing.half_width_pct(float("nan"), 1.0) == np.inf


@pytest.mark.parametrize("rounds", [3, 5, 8])
def test_the_interval_on_the_speedup_covers_the_truth(rounds):
    """Processes differ by 2 %, blocks by 3 %, the machine drifts by 20 % for both: 93 to 97 % of intervals
    hold the true speedup of 2."""
    rng, covered, simulations = np.random.default_rng(1), 0, 1000
    for _ in range(simulations):
        ratios = []
        for _ in range(rounds):
            drift = np.exp(np.cumsum(rng.normal(0, 0.05, 8)))
            slow, fast = (drift * np.exp(rng.normal(0, 0.02) + rng.normal(0, 0.03, 8)) for _ in range(2))
            ratios.append(timing.speedup(2 * slow, fast, [1] * 8))
        low, high = timing.interval(float(np.exp(np.mean(np.log(ratios)))), ratios)
        covered += low <= 2.0 <= high
    assert 0.93 <= covered / simulations <= 0.97
