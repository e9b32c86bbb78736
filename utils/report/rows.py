"""Records -> rows: the CSV is a pure function of results/raw/."""

import types
from pathlib import Path

import numpy as np
import pandas as pd

from utils.measure import accuracy, roofline, timing
from utils.measure.records import read_sweep, sweeps_of
from utils.measure.schema import BASELINE, Record

TARGET_PCT = 3.0  # half-width of an interval, where the sweep says no other
SHARED_CORE = 1.3  # slowest tenth of a core's checks / quickest tenth: more means that others use the core
HELD_BACK_S = 0.05  # by a limit on processor time, while a row was measured: less is not worth a word
CPU_BOUND = 0.80  # time until the call returned / time on the GPU
WARNINGS = {  # what makes a row less sure than the others, and what to do about it
    "noisy": "close other programs, or raise --budget",
    "shared core": "something else used the processor's cores for moments, close other programs "
    "(on a rented machine its neighbours may be the cause)",
    "throttled": "the GPU slowed itself down, cool it or raise its power limit",
    "CPU-bound": "launching takes over 80 % of the time on the GPU, take a larger batch or a CUDA graph",
    "device memory": "the driver tells only the whole device's memory, whose rise is given, "
    "close what else uses the GPU",
    "CPU limit": "a limit on processor time (docker --cpus) held the measurement back, raise it",
    "one round": "a single round has no interval, use --rounds 3",
}

COLUMNS = ["sweep", "backend", "precision", "device", "image_size", "batch_size", "status", "reason"]
COLUMNS += ["runs", "rounds", "mean_ms", "std_ms", "p50_ms", "p95_ms", "p99_ms", "min_ms"]
COLUMNS += ["gpu_ms", "busy_ms", "fps", "fps_low", "fps_high", "sustained_fps"]
COLUMNS += ["speedup", "speedup_low", "speedup_high"]
COLUMNS += ["build_s", "load_s", "first_call_ms", "gpu_memory_mb", "torch_memory_mb", "host_memory_mb"]
COLUMNS += ["gpu_util_pct", "power_w", "mj_per_image", "sm_clock_mhz", "temperature_c", "throttled"]
COLUMNS += ["tflops", "pct_peak", "pct_measured_peak", "flops_per_byte", "limit"]
COLUMNS += ["max_abs_diff", "agreement", "accuracy", "adds", "notes"]


class Row(types.SimpleNamespace):
    """One line of benchmark_results.csv; its fields are COLUMNS, None what is not known."""


def read_rows(results: Path) -> pd.DataFrame:
    """The rows of every sweep under results/raw/, sorted; empty where there are none."""
    rows = [row for folder in sweeps_of(results).values() for row in rows_of(*read_sweep(folder))]
    return pd.DataFrame([vars(row) for row in rows], columns=COLUMNS)


def rows_of(found: list[Record], note: dict, limits: dict | None = None) -> list[Row]:
    """The rows of one sweep, against PyTorch FP32 and against what its machine can do at most; the backends
    in the order of measuring."""
    order = list(dict.fromkeys(record.backend for record in found))
    groups: dict[tuple, dict[int, Record]] = {}  # (backend, image size) -> round -> record
    for record in sorted(found, key=lambda one: (order.index(one.backend), one.image_size, one.round)):
        groups.setdefault((record.backend, record.image_size), {})[record.round] = record
    rows = []
    for (_, size), rounds in groups.items():
        baseline = groups.get((BASELINE, size), {})
        asked = {batch_size for record in rounds.values() for batch_size in record.batch_sizes}
        tried = {batch["batch_size"] for record in rounds.values() for batch in record.batches}
        for batch_size in sorted(asked | tried):
            row = row_of(rounds, baseline, batch_size, note.get("precision_pct", TARGET_PCT))
            if row.fps:
                add_roofline(row, rounds, note.get("environment", {}), limits)
            rows.append(row)
    return rows


def row_of(rounds: dict[int, Record], baseline: dict[int, Record], batch_size: int, target: float) -> Row:
    """The row of one configuration from its records, and the baseline's, by round.  `target`: the half-width
    of the interval that the sweep aimed at, in percent."""
    first = next(iter(rounds.values()))
    known = ("sweep", "backend", "precision", "device", "image_size", "adds")
    row = Row(**dict.fromkeys(COLUMNS) | {name: getattr(first, name) for name in known})
    row.batch_size, (row.status, row.reason), row.notes = batch_size, status_of(rounds, batch_size), []
    batches = {k: batch for k, record in rounds.items() if (batch := record.batch(batch_size))}
    add_accuracy(row, rounds, batches)
    builds = [record.build for record in rounds.values() if record.build]
    if builds:  # how long building took, or, where it was never built, finding it in the cache
        row.build_s = max(builds, key=lambda build: not build["from_cache"])["seconds"]
        loads = [build for build in builds if build["from_cache"] or not build["seconds"]]
        row.load_s = min((build["load_s"] for build in loads if "load_s" in build), default=None)
    timed = {k: batch for k, batch in batches.items() if "host_ms" in batch}
    if not timed:
        return row
    results = list(timed.values())
    vars(row).update(timing.summarize([batch["host_ms"] for batch in results], batch_size))
    row.first_call_ms = results[:2][-1].get("first_call_ms")  # round 0 has classified the test set before
    cached = [batch for k, batch in timed.items() if (rounds[k].build or {})["from_cache"]]
    row.gpu_memory_mb = largest(cached or results, "gpu_memory_mb")  # building takes its own
    row.torch_memory_mb = largest(results, "torch_memory_mb")
    row.host_memory_mb = largest(results, "host_memory_mb")
    add_gpu(row, results)
    if row.status == "ok":
        add_speedup(row, timed, baseline)
    row.notes = warnings_of(row, results, target) + build_notes(builds)
    return row


def largest(results: list[dict], name: str) -> float | None:
    """The largest of what was read, or None where nothing was: what can't be read is empty, never 0."""
    return max((batch[name] for batch in results if batch[name]), default=None)


def add_accuracy(row: Row, rounds: dict[int, Record], batches: dict[int, dict]) -> None:
    """What the pass over the test set gave, and the largest difference seen there and before timing."""
    differences = [batch["max_abs_diff"] for batch in batches.values() if "max_abs_diff" in batch]
    for check in (record.check for record in rounds.values() if record.check):
        row.accuracy = check["correct"] / check["images"]
        row.agreement = 1 - check["different"] / check["images"]
        differences.append(check["max_abs_diff"])
    row.max_abs_diff = float(np.max(differences)) if differences else None  # NaN if one is


def add_gpu(row: Row, results: list[dict]) -> None:
    """The time on the GPU, and what the driver said beside the sustained loop, if there was one."""
    on_gpu = [ms for batch in results for ms in batch["gpu_ms"]]
    row.gpu_ms = timing.trimmed_mean(on_gpu) if on_gpu else None
    row.busy_ms = next((batch["busy_ms"] for batch in results if batch.get("busy_ms")), None)
    seen = next((batch["sustained"] for batch in results if batch["sustained"]), None)
    if seen:
        read = ("gpu_util_pct", "power_w", "sm_clock_mhz", "temperature_c", "throttled")
        vars(row).update({name: seen[name] for name in read})
        images = seen["calls"] * row.batch_size
        row.sustained_fps = images / seen["loop_s"]
        row.mj_per_image = seen["energy_j"] * 1000 / images if seen["energy_j"] else None


def add_speedup(row: Row, timed: dict[int, dict], baseline: dict[int, Record]) -> None:
    """How many times as fast as the baseline: the geometric mean over the rounds, each formed block by block
    or, where the baseline had none beside it, between the means of the round."""
    ratios = []
    for round_, batch in timed.items():
        base = baseline[round_].batch(row.batch_size) if round_ in baseline else None
        if row.backend == BASELINE:
            ratios.append(1.0)
        elif batch.get("baseline_ms"):
            ratios.append(timing.speedup(batch["baseline_ms"], batch["host_ms"], batch["block_runs"]))
        elif base and base.get("host_ms"):
            ratios.append(timing.trimmed_mean(base["host_ms"]) / timing.trimmed_mean(batch["host_ms"]))
    if ratios:
        row.speedup = float(np.exp(np.mean(np.log(ratios))))
        row.speedup_low, row.speedup_high = timing.interval(row.speedup, ratios)


def add_roofline(row: Row, rounds: dict[int, Record], environment: dict, limits: dict | None) -> None:
    """The rate of operations, its shares of the theoretical and the measured peak, and the bottleneck."""
    work = next((record.work for record in rounds.values() if record.work), None)
    if not work:
        return
    row.tflops = tflops = float((row.fps or 0) * work["flops"] / 1e12)
    intensity = work["flops"] / roofline.bytes_per_image(work, row.precision, row.batch_size)
    row.flops_per_byte = intensity
    peak = roofline.peak_tflops(environment, row.precision) if row.device == "cuda" else None
    row.pct_peak = peak and tflops / peak * 100
    product = limits["tflops"].get(row.precision) if limits else None
    if limits and product:
        row.pct_measured_peak = tflops / product * 100
        idle = row.busy_ms and row.mean_ms and 1 - row.busy_ms / row.mean_ms
        row.limit = roofline.limit(idle, tflops, intensity, product, limits["gb_per_s"])


def status_of(rounds: dict[int, Record], batch_size: int) -> tuple[str, str]:
    """Status and reason of a configuration: ok only where every round is and the test set has been passed."""
    interrupted = "failed", "was interrupted; run python benchmark.py again"
    for record in rounds.values():
        if record.further:
            continue
        if record.status != "ok":
            return record.status, record.reason
        if record.check and (reason := accuracy.mismatch(record.check)):
            return "mismatch", reason
        batch = record.batch(batch_size)
        if batch is None:
            return interrupted
        if batch["status"] != "ok":
            return batch["status"], batch["reason"]
    return ("ok", "") if 0 in rounds else interrupted


def width_pct(row) -> float:
    """Half the width of a row's interval in percent: the speedup's, or of the baseline the throughput's."""
    if row.backend == BASELINE or pd.isna(row.speedup):
        return timing.half_width_pct(row.fps_low, row.fps_high)
    return timing.half_width_pct(row.speedup_low, row.speedup_high)


def percent_width(row) -> str:
    """ "±2.1 %" """
    width = width_pct(row)
    return f"±{width:.2g} %" if width < 99.5 else f"±{width:.0f} %"


def warnings_of(row: Row, results: list[dict], target: float) -> list[str]:
    """What makes a row less sure (see WARNINGS), each with its figures and its remedy: "noisy: ..., ..."."""
    throttled = [batch["sustained"]["throttled"] for batch in results if batch["sustained"]]
    enqueue = np.concatenate([batch["enqueue_ms"] for batch in results])
    on_gpu = np.concatenate([batch["gpu_ms"] for batch in results])
    core_ms = [ms for batch in results for ms in batch.get("core_ms") or []]  # what older records lack
    slower = np.quantile(core_ms, 0.9) / np.quantile(core_ms, 0.1) if core_ms else 1.0
    held_back_s = sum(batch.get("held_back_s") or 0.0 for batch in results)
    wide = len(results) > 1 and width_pct(row) > target
    figure = "throughput" if row.backend == BASELINE or row.speedup is None else "speedup"
    found = {
        "noisy": wide and f"{figure} {percent_width(row)}, target {target:g} %, ",
        "throttled": any(words not in (None, "no") for words in throttled),
        "shared core": wide and slower > SHARED_CORE and f"a core was {slower:.2g} times as slow at times, ",
        "CPU-bound": len(on_gpu) > 0 and np.median(enqueue) / np.median(on_gpu) > CPU_BOUND,
        "device memory": any(batch["memory_of"] == "device" for batch in results),
        "CPU limit": held_back_s > HELD_BACK_S and f"for {held_back_s:.1f} s, ",
        "one round": len(results) == 1,
    }
    figures = {name: said if isinstance(said, str) else "" for name, said in found.items() if said}
    return [f"{name}: {said}{WARNINGS[name]}" for name, said in figures.items()]


def build_notes(builds: list[dict]) -> list[str]:
    """Facts about the artefact: its size, and how long building it and finding it in the cache took."""
    size = [f"{build['artefact_mb']} MB" for build in builds[:1] if build["artefact_mb"]]
    built = [f"built in {build['seconds']:.1f} s" for build in builds if not build["from_cache"]]
    cached = [f"from the cache in {build['seconds']:.2f} s" for build in builds if build["from_cache"]]
    return size + built[:1] + cached[:1] if size else []
