"""Raw records -> rows: the CSV is a pure function of results/raw/."""

from pathlib import Path

import numpy as np
import pandas as pd

from utils import ceilings, timing
from utils.utils import COLUMNS, Row, read_json, write_atomic, write_json

MIN_AGREEMENT = 0.99  # of the test images, or all but one on small sets
NOISY_RUNS, NOISY_ROUNDS = (
    0.10,
    0.05,
)  # interquartile range / median of the runs; largest / smallest mean of a round - 1
CPU_BOUND = 0.80  # time until the call returned / time on the GPU
VERDICTS = {  # what puts a row in doubt, and what to do about it
    "noisy": "runs scatter by over 10 % or rounds differ by over 5 %, close other programs or raise --runs and --rounds",
    "throttled": "the GPU slowed itself down, cool it or raise its power limit",
    "too short": "not all the runs asked for fitted into the time allowed, raise --max-seconds",
    "CPU-bound": "launching takes over 80 % of the time on the GPU, take a larger batch or a CUDA graph",
    "device memory": "the driver tells only the whole device's memory, whose rise is given, close what else uses the GPU",
    "one round": "the interval leaves out what differs from process to process, use --rounds 3",
}


def read_records(folder: Path) -> list[dict]:
    """One run's records that belong together: those of the newest settings and, at each image size, of its newest checkpoint."""
    records = sorted(
        filter(None, (read_json(path) for path in sorted(folder.glob("*_round*.json")))),
        key=lambda record: record["time"],
    )
    newest = {record["image_size"]: record["key"] for record in records}
    return [
        record
        for record in records
        if record["settings_key"] == records[-1]["settings_key"]
        and record["key"] == newest[record["image_size"]]
    ]


def read_rows(results: Path) -> pd.DataFrame:
    """The rows of every run under results/raw/, sorted; empty where there are none."""
    rows = []
    for folder in sorted(path for path in (results / "raw").glob("*") if path.is_dir()):
        records = read_records(folder)
        rows += rows_of(records, read_ceilings(folder, records))
    return pd.DataFrame([vars(row) for row in rows], columns=COLUMNS)


def read_ceilings(folder: Path, records: list[dict]) -> dict | None:
    """What benchmark.py measured of this machine under the same settings as the records, or None."""
    found = read_json(folder / "ceilings.json")
    return found if found and records and found["settings_key"] == records[-1]["settings_key"] else None


def rows_of(records: list[dict], limits: dict | None = None) -> list[Row]:
    """The rows of one run, each against the run's own baseline, PyTorch FP32, and the machine's measured ceilings."""
    groups = {}
    for record in records:
        groups.setdefault((record["backend"], record["image_size"]), {})[record["round"]] = record
    order = list(
        dict.fromkeys(name for record in records for name in record["request"].get("backends", []))
    ) or sorted({b for b, _ in groups})
    rows = []
    for backend, size in sorted(
        groups, key=lambda key: (order.index(key[0]) if key[0] in order else 99, key)
    ):
        rounds, baseline = groups[backend, size], groups.get(("pytorch", size), {})
        batch_sizes = {
            str(n)
            for record in rounds.values()
            for n in [*record["request"]["batch_sizes"], *record["batches"]]
        }
        rows += [row_of(rounds, baseline, limits, batch_size) for batch_size in sorted(batch_sizes, key=int)]
    return rows


def row_of(rounds: dict[int, dict], baseline: dict[int, dict], limits: dict | None, batch_size: str) -> Row:
    """The row of one configuration from its records by round and the baseline's, and the machine's ceilings."""
    first = rounds[min(rounds)]
    status, reason = verdict(rounds, batch_size)
    row = Row(
        **{name: first[name] for name in ("run", "backend", "precision", "device", "image_size")},
        **{"batch_size": int(batch_size), "status": status, "reason": reason},
    )
    build = [record["build"] for record in rounds.values() if "build" in record]
    if build:
        row.build_s = max(build, key=lambda entry: not entry["from_cache"])["seconds"]
    timed = {
        k: record["batches"][batch_size]
        for k, record in rounds.items()
        if "host_ms" in record["batches"].get(batch_size, {})
    }
    checks = [record["check"] for record in rounds.values() if "check" in record]
    if checks:
        row.accuracy, row.agreement = (
            checks[0]["correct"] / checks[0]["images"],
            1 - checks[0]["different"] / checks[0]["images"],
        )
    differences = [check["max_abs_diff"] for check in checks] + [
        record["batches"][batch_size]["max_abs_diff"]
        for record in rounds.values()
        if "max_abs_diff" in record["batches"].get(batch_size, {})
    ]
    row.max_abs_diff = max(differences, default=None)
    if not timed:
        return row
    vars(row).update(timing.summarize([result["host_ms"] for result in timed.values()], int(batch_size)))
    row.gpu_ms = none_or(timing.trimmed_mean, [ms for result in timed.values() for ms in result["gpu_ms"]])
    warm = {
        k: result for k, result in timed.items() if rounds[k]["build"]["from_cache"]
    } or timed  # building takes memory of its own
    row.gpu_memory_mb = none_or(
        max, [result["gpu_memory_mb"] for result in warm.values() if result["gpu_memory_mb"]]
    )
    row.torch_memory_mb = none_or(
        max, [result["torch_memory_mb"] for result in timed.values() if result["torch_memory_mb"]]
    )
    row.host_memory_mb = none_or(max, [result["host_memory_mb"] for result in timed.values()])
    row.busy_ms = next((result["busy_ms"] for result in timed.values() if result.get("busy_ms")), None)
    row.notes = notes(build, timed, first["request"]["runs"])
    sustained = next((result["sustained"] for result in timed.values() if result["sustained"]), None)
    if sustained:
        for name in ("gpu_util_pct", "power_w", "sm_clock_mhz", "temperature_c", "throttled"):
            setattr(row, name, sustained[name])
        row.sustained_fps = sustained["calls"] * int(batch_size) / sustained["loop_s"]
        if sustained["energy_j"]:
            row.mj_per_image = sustained["energy_j"] * 1000 / (sustained["calls"] * int(batch_size))
    work = next((record["work"] for record in rounds.values() if "work" in record), None)
    if work:
        compare_with_ceilings(row, work, first["request"]["environment"], limits)
    base = {k: baseline[k]["batches"].get(batch_size, {}).get("host_ms") for k in timed if k in baseline}
    together = [k for k in timed if base.get(k)]
    if together and status == "ok":
        pair = [[base[k] for k in together], [timed[k]["host_ms"] for k in together]]
        row.speedup = timing.trimmed_mean(np.concatenate(pair[0])) / row.mean_ms
        row.speedup_low, row.speedup_high = timing.interval(pair, lambda slow, fast: slow / fast)
    return row


def compare_with_ceilings(row: Row, work: dict, environment: dict, limits: dict | None) -> None:
    """Fill in the rate of operations, its shares of the theoretical and of the measured peak, and what limits the row."""
    traffic = ceilings.bytes_per_image(work, row.precision, row.batch_size)
    row.tflops = row.fps * work["flops"] / 1e12
    row.flops_per_byte = work["flops"] / traffic
    peak = ceilings.peak_tflops(environment, row.precision) if row.device == "cuda" else None
    row.pct_peak = peak and row.tflops / peak * 100
    if limits and limits["tflops"].get(row.precision):
        row.pct_measured_peak = row.tflops / limits["tflops"][row.precision] * 100
        idle = row.busy_ms and 1 - row.busy_ms / row.mean_ms
        row.limit = ceilings.limit(
            idle, row.tflops, row.flops_per_byte, limits["tflops"][row.precision], limits["gb_per_s"]
        )


def verdict(rounds: dict[int, dict], batch_size: str) -> tuple[str, str]:
    """Status and reason of a configuration: ok only where every round is and the accuracy pass has been passed."""
    for record in rounds.values():
        if record["status"] != "ok":
            return record["status"], record["reason"]
        check = record.get("check")
        if check and check["different"] > max(1, (1 - MIN_AGREEMENT) * check["images"]):
            return (
                "mismatch",
                f"another class than PyTorch FP32 on {check['different']} of {check['images']} test images",
            )
        if check and not check["max_abs_diff"] <= check["tolerance"]:
            return (
                "mismatch",
                f"logits differ from PyTorch FP32 by {check['max_abs_diff']:.3g}, more than {check['tolerance']:.3g}",
            )
        result = record["batches"].get(
            batch_size, {"status": "failed", "reason": "was interrupted; run python benchmark.py again"}
        )
        if result["status"] != "ok":
            return result["status"], result["reason"]
    if 0 not in rounds:
        return "failed", "the accuracy pass (round 0) is missing; run python benchmark.py again"
    return "ok", ""


def doubts(timed: dict[int, dict], asked: int) -> list[str]:
    """The names of the verdicts (see VERDICTS) on the runs of one configuration, by round."""
    rounds = [np.asarray(result["host_ms"]) for result in timed.values()]
    runs, means = np.concatenate(rounds), [timing.trimmed_mean(values) for values in rounds]
    low, median, high = np.percentile(runs, [25, 50, 75])
    throttled = [result["sustained"]["throttled"] for result in timed.values() if result["sustained"]]
    enqueue, on_gpu = (
        np.concatenate([result[name] for result in timed.values()]) for name in ("enqueue_ms", "gpu_ms")
    )
    found = {
        "noisy": (high - low) / median > NOISY_RUNS or max(means) / min(means) - 1 > NOISY_ROUNDS,
        "throttled": any(words not in (None, "no") for words in throttled),
        "too short": len(runs) < asked,
        "CPU-bound": len(on_gpu) > 0 and np.median(enqueue) / np.median(on_gpu) > CPU_BOUND,
        "device memory": any(result["memory_of"] == "device" for result in timed.values()),
        "one round": len(rounds) == 1,
    }
    return [name for name, is_so in found.items() if is_so]


def notes(build: list[dict], timed: dict[int, dict], asked: int) -> str:
    """Verdicts with their remedies ("noisy: ..."), then facts about the artefact, separated by "; "."""
    texts = [f"{name}: {VERDICTS[name]}" for name in doubts(timed, asked)]
    if build and build[0]["artefact_mb"]:
        cold = next((entry for entry in build if not entry["from_cache"]), None)
        cached = next((entry for entry in build if entry["from_cache"]), None)
        texts.append(f"{build[0]['artefact_mb']} MB")
        texts += [f"built in {cold['seconds']:.1f} s"] if cold else []
        texts += [f"from the cache in {cached['seconds']:.2f} s"] if cached else []
    return "; ".join(texts)


def level(a, b) -> bool:
    """Whether this run can show no difference in throughput between two rows of one table: their 95 % intervals overlap.

    At the same image and batch size their speedups must overlap too, where known: in these, what drifted for all cancels.
    """

    def interval(row, figure: str) -> tuple[float, float]:
        if figure == "speedup" and row.backend == "pytorch":
            return 1.0, 1.0
        low, high = getattr(row, f"{figure}_low"), getattr(row, f"{figure}_high")
        return (row.fps, row.fps) if pd.isna(low) else (low, high)

    def overlap(figure: str) -> bool:
        (a_low, a_high), (b_low, b_high) = interval(a, figure), interval(b, figure)
        return bool(a_low <= b_high and b_low <= a_high)

    alike = (a.run, a.image_size, a.batch_size) == (b.run, b.image_size, b.batch_size)
    known = all(row.backend == "pytorch" or not pd.isna(row.speedup_low) for row in (a, b))
    return overlap("fps") and (overlap("speedup") if alike and known else True)


def none_or(function, values: list):
    """The function of the values, or None where there are none: what can't be read is empty, never 0."""
    return function(values) if values else None


def write_csv(results: Path) -> pd.DataFrame:
    """Make results/benchmark_results.csv and environment.json anew from results/raw/; the rows."""
    rows = read_rows(results)
    write_atomic(
        results / "benchmark_results.csv", rows.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    )
    environments = {}
    for run in rows.run.unique():
        records = read_records(results / "raw" / run)
        environments[run] = {
            **records[-1]["request"]["environment"],
            **next((r["process"] for r in records if "process" in r), {}),
        }
        commands = dict.fromkeys(record["request"]["environment"]["command"] for record in records)
        environments[run]["command"] = " && ".join(commands)
        environments[run]["sweep"] = account(
            [record["wall"] for record in records if "process_s" in record.get("wall", {})]
        )
        environments[run]["short"] = short(environments[run])
        environments[run]["ceilings"] = read_ceilings(results / "raw" / run, records)
        environments[run]["settings"] = {
            k: v for k, v in records[-1]["request"].items() if k != "environment"
        }
    write_json(results / "environment.json", environments)
    return read_csv(results)


def account(walls: list[dict]) -> dict | None:
    """Where a sweep's time went, in seconds: timing with warm-up, checking against PyTorch, and what else its processes took."""
    if not walls:
        return None
    total, checked, timed = (
        round(sum(wall[name] for wall in walls), 1) for name in ("process_s", "check_s", "time_s")
    )
    return {
        "processes": len(walls),
        "total_s": total,
        "time_s": timed,
        "check_s": checked,
        "other_s": round(total - timed - checked, 1),
    }


def short(environment: dict) -> str:
    """The environment in one line, for the foot of tables and charts."""
    packages = environment["packages"]
    runtime = (
        "onnxruntime-gpu" if "onnxruntime-gpu" in packages else "onnxruntime"
    )  # the same module: only one is loaded
    shown = [
        f"{name} {packages[name]}"
        for name in ("torch", runtime, "torch-tensorrt", "tensorrt")
        if name in packages
    ]
    machine = (
        environment["gpu"]
        or f"{environment['cpu']}, {environment.get('threads', environment['cores'])} threads"
    )
    driver = environment.get("driver") and f"driver {environment['driver']}"
    return ", ".join(filter(None, [machine, driver, *shown, environment["date"]]))


def read_csv(results: Path) -> pd.DataFrame:
    """The committed table.  Texts that are missing are "", figures that are missing NaN."""
    texts = {
        name: str
        for name in (
            "run",
            "backend",
            "precision",
            "device",
            "status",
            "reason",
            "throttled",
            "limit",
            "notes",
        )
    }
    rows = pd.read_csv(results / "benchmark_results.csv", encoding="utf-8", dtype=texts)
    return rows.fillna(dict.fromkeys(texts, ""))
