"""benchmark_results.csv and environment.json: a pure function of results/raw/, read on any machine."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd

from utils.measure.records import read_sweep, sweeps_of
from utils.measure.schema import STATUSES
from utils.report.rows import COLUMNS, read_rows
from utils.utils import UserError, write_atomic, write_json

TEXTS = ["sweep", "backend", "precision", "device", "status", "reason", "throttled", "limit", "adds", "notes"]
TEXTS += ["decoder", "images", "date", "data"]
COUNTS = ["image_size", "batch_size", "cores", "epoch", "train_images", "test_images"]
KINDS = dict.fromkeys(TEXTS, str) | dict.fromkeys(COUNTS, int) | {"valid": bool, "sample": bool}  # else float
SERVING = {  # the columns that are needed of what python end_to_end.py writes
    "end_to_end.csv": "sweep backend precision image_size batch_size decoder images_per_s images_per_s_low "
    "images_per_s_high decode_images_per_s infer_images_per_s overlap limit agreement status reason images "
    "cores date",
    "load.csv": "sweep backend precision image_size rate achieved p50_ms p90_ms p99_ms valid max_latency_ms "
    "cores date",
}


def write_table(results: Path) -> tuple[pd.DataFrame, dict]:
    """Make results/benchmark_results.csv and environment.json anew from results/raw/; what they hold."""
    rows = read_rows(results)
    rows = rows.assign(notes=rows.notes.map("; ".join))
    text = rows.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    write_atomic(results / "benchmark_results.csv", text)
    environments = {name: environment_of(folder) for name, folder in sweeps_of(results).items()}
    environments = {name: facts for name, facts in environments.items() if facts}
    write_json(results / "environment.json", environments)
    return read_table(results)


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
    return facts | {"settings": note.get("settings")}


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


def load_csv(path: Path, columns: list[str], mend: str) -> pd.DataFrame:
    """A table that one of the scripts wrote, with these columns at least; a text that is missing is "".

    Raises UserError, which ends in `mend`, where it is missing, cut short or no such table.
    """
    try:
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            raise ValueError("it is cut inside its last row")
        empty: dict = {"keep_default_na": False, "na_values": [""]}  # a sweep may be called NA or null
        table = pd.read_csv(io.BytesIO(content), dtype=dict.fromkeys(columns, float) | KINDS, **empty)
        if missing := [name for name in columns if name not in table]:
            raise ValueError(f"no column {missing[0]}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {mend}") from None
    except (OSError, ValueError, OverflowError) as error:  # of pandas' parser and of other encodings too
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no table as it was written ({said}); {mend}") from None
    texts = [name for name in TEXTS if name in table]
    return table.assign(**{name: table[name].astype(object).fillna("") for name in texts})


def read_table(results: Path) -> tuple[pd.DataFrame, dict]:
    """Rows and environments (sweep -> facts) of a results folder.  Raises UserError, with what brings them
    back, where rows are missing or either is damaged."""
    path, beside = results / "benchmark_results.csv", results / "environment.json"
    published = "published" in results.resolve().parts
    mend = "restore it: git checkout results/published" if published else "make it anew: python benchmark.py"
    rows = load_csv(path, COLUMNS, mend)[COLUMNS]
    measured = rows.fps[rows.status == "ok"].between(0, np.inf, inclusive="neither")
    if rows.empty or not (rows.status.isin(STATUSES).all() and measured.all()):
        what = "no rows, an unknown status, or a row that is ok without images/s"
        raise UserError(f"{path} is no table as it was written ({what}); {mend}")
    rows = rows.assign(notes=rows.notes.map(lambda text: text.split("; ") if text else []))
    try:
        known = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        if all(isinstance(facts, dict) for facts in known.values()):
            return rows, known
    except (OSError, ValueError, AttributeError):  # the last: of what is no dict
        pass
    raise UserError(f"{beside} does not say what a sweep was measured with; {mend}")


def read_serving(path: Path) -> pd.DataFrame | None:
    """end_to_end.csv or load.csv; None where it is missing, damaged or an earlier version's."""
    try:
        return load_csv(path, SERVING[path.name].split(), "")
    except UserError:
        return None
