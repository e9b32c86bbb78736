"""benchmark_results.csv and environment.json: a pure function of results/raw/, read on any machine."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd

from utils.measure.records import read_sweep, sweeps_of
from utils.measure.schema import STATUSES
from utils.report.rows import COLUMNS, Row, read_rows
from utils.utils import UserError, write_atomic, write_json

NEW_COLUMNS = ["load_s", "first_call_ms", "adds"]  # missing from tables made before 2026-11-25
ROW_TEXTS = [field.name for field in dataclasses.fields(Row) if "str" in str(field.type)]
# A sweep's environment: what has parts of its own, which of them it must have, and what is text.
PARTS = {"packages": set(), "ceilings": {"tflops", "gb_per_s"}, "sweep": set()}
TEXTS = ["short", "date", "gpu", "cpu", "driver", "command"]
GPU_FACTS = ["gpu", "driver", "gpu_memory_mb", "power_limit_w", "cuda", "cudnn"]
SERVING = {  # the columns of what python end_to_end.py writes, besides the first four
    "end_to_end.csv": "batch_size decoder images_per_s images_per_s_low images_per_s_high "
    "decode_images_per_s infer_images_per_s serial_images_per_s overlap limit agreement status reason "
    "cores date",
    "load.csv": "scenario rate achieved p50_ms p90_ms p99_ms valid max_latency_ms fps cores date",
}
SERVING_TEXTS = ["sweep", "backend", "precision", "decoder", "scenario", "limit", "status", "reason", "date"]
SERVING_TEXTS += ["images"]

# ---- from the records


def write_table(results: Path) -> tuple[pd.DataFrame, dict]:
    """Make results/benchmark_results.csv and environment.json anew from results/raw/; what they hold."""
    rows = read_rows(results)
    text = rows.assign(notes=rows.notes.map("; ".join)).to_csv(
        index=False, float_format="%.6g", lineterminator="\n"
    )
    write_atomic(results / "benchmark_results.csv", text)
    environments = {name: environment_of(folder) for name, folder in sweeps_of(results).items()}
    environments = {name: facts for name, facts in environments.items() if facts}
    write_json(results / "environment.json", environments)
    return read_csv(results), environments


def environment_of(folder: Path) -> dict:
    """What a sweep's figures depend on: its note, what its processes and machine are like, its time."""
    found, note, limits = read_sweep(folder)
    if not found:
        return {}
    process = next((record.process for record in found if record.process), {})
    facts = {**note.get("environment", {}), **process, "command": " && ".join(note.get("commands", []))}
    timed = [sum(batch.get("host_ms", [])) for record in found for batch in record.batches]
    spent = {"timed_s": round(sum(timed) / 1000, 1), "total_s": note.get("spent_s")}
    facts |= {"sweep": {"processes": len(found), **spent}, "short": short(facts), "ceilings": limits}
    return signed(facts | {"settings": note.get("settings")}, found[-1].device)


def signed(facts: dict, device: str) -> dict:
    """The facts of a sweep as its device signs them: a CPU's figures name no GPU, though one was there."""
    if device == "cuda" or not facts.get("gpu"):
        return facts
    own = facts | {name: None for name in GPU_FACTS if name in facts}
    return own | {"short": short(own)}


def short(facts: dict) -> str:
    """The environment in one line, for the foot of tables and charts."""
    packages = facts.get("packages", {})
    # Both are one module, of which the GPU's is loaded.
    runtime = "onnxruntime-gpu" if "onnxruntime-gpu" in packages else "onnxruntime"
    names = "torch", runtime, "openvino", "torch-tensorrt", "tensorrt", "tensorrt-cu13", "tensorrt-cu12"
    shown = [f"{name} {packages[name]}" for name in names if name in packages]
    limit = f" within {facts['cpu_quota']:g} cores' time" if facts.get("cpu_quota") else ""
    threads = f"{facts.get('threads', facts.get('cores'))} threads{limit}"
    machine = facts.get("gpu") or f"{facts.get('cpu')}, {threads}"
    driver = facts.get("driver") and f"driver {facts['driver']}"
    return ", ".join(filter(None, [machine, driver, *shown, facts.get("date")]))


# ---- from the files


def load_csv(path: Path, texts: list[str], mend: str) -> pd.DataFrame:
    """A table that one of the scripts wrote: texts that are missing are "", figures that are missing NaN.

    Raises FileNotFoundError; UserError, which ends in `mend`, where it is cut short or no table.
    """
    try:
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            raise ValueError("it is cut inside its last row")
        table = pd.read_csv(io.BytesIO(content), encoding="utf-8", dtype=dict.fromkeys(texts, str))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, OverflowError) as error:  # of pandas' parser and of other encodings too
        raise no_table(path, error, mend) from None
    return table.assign(**{name: table[name].astype(object).fillna("") for name in texts if name in table})


def no_table(path: Path, error: Exception, mend: str) -> UserError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{path} is no table as it was written ({said}); {mend}")


def remedy(folder: Path) -> str:
    """What brings a results folder's files back."""
    published = "published" in folder.resolve().parts
    return "restore it: git checkout results/published" if published else "make it anew: python benchmark.py"


def read_csv(results: Path) -> pd.DataFrame:
    """The rows of a folder, or in a CSV.  Raises FileNotFoundError; UserError where it is no such table.

    That an earlier version's table lacks NEW_COLUMNS is no fault.
    """
    path = results if results.suffix == ".csv" else results / "benchmark_results.csv"
    rows = load_csv(path, ROW_TEXTS, remedy(path.parent))
    try:
        if missing := [name for name in COLUMNS if name not in rows and name not in NEW_COLUMNS]:
            raise ValueError(f"no column {missing[0]}")
        rows = rows.reindex(columns=COLUMNS)
        for name in COLUMNS:
            kind = int if name in ("image_size", "batch_size") else float
            rows[name] = (
                rows[name].astype(object).fillna("") if name in ROW_TEXTS else rows[name].astype(kind)
            )
        if unknown := sorted(set(rows.status) - set(STATUSES)):
            raise ValueError(f"unknown status {unknown[0]!r}")
        if not rows.fps[rows.status == "ok"].between(0, np.inf, inclusive="neither").all():
            raise ValueError("a row that is ok has no images/s in column fps")
    except (ValueError, OverflowError) as error:
        raise no_table(path, error, remedy(path.parent)) from None
    return rows.assign(notes=rows.notes.map(lambda text: text.split("; ") if text else []))


def read_table(results: Path) -> tuple[pd.DataFrame, dict]:
    """Rows and environments (sweep -> facts) of a results folder, or of a CSV in it.  Raises UserError."""
    folder = results.parent if results.suffix == ".csv" else results
    mend, environments, beside = remedy(folder), {}, folder / "environment.json"
    try:
        rows = read_csv(results)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; {mend}") from None
    if rows.empty:
        raise UserError(f"{folder / 'benchmark_results.csv'} has no rows; {mend}")
    try:
        environments = json.loads(beside.read_text(encoding="utf-8"))
        whole = all(map(is_environment, environments.values()))
    except FileNotFoundError:
        whole = True
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{beside} does not say what a sweep was measured with; {mend}")
    devices = dict(zip(rows.sweep, rows.device, strict=True))
    return rows, {sweep: signed(facts, devices.get(sweep, "cuda")) for sweep, facts in environments.items()}


def is_environment(facts: dict) -> bool:
    """Whether its parts are what they should be; any may be missing.  AttributeError: it has none."""
    parts = {name: facts.get(name) or dict.fromkeys(needed) for name, needed in PARTS.items()}
    whole = all(isinstance(part, dict) and PARTS[name] <= part.keys() for name, part in parts.items())
    return whole and all(isinstance(facts.get(name) or "", str) for name in TEXTS)


def read_serving(path: Path) -> pd.DataFrame | None:
    """end_to_end.csv or load.csv; None where it is missing or an earlier version's.  Raises UserError."""
    command = f"python end_to_end.py{' --load' if path.name == 'load.csv' else ''}"
    try:
        table = load_csv(path, SERVING_TEXTS, f"make it anew: {command}")
    except FileNotFoundError:
        return None
    needed = {"sweep", "backend", "precision", "image_size", *SERVING[path.name].split()}
    return table if needed <= set(table) else None
