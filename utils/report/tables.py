"""benchmark_results.csv and environment.json: a pure function of results/raw/, read on any machine."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd

from utils.measure import records
from utils.measure.schema import STATUSES
from utils.report.rows import COLUMNS, Row, read_rows
from utils.utils import UserError, write_atomic, write_json

NEW_COLUMNS = ["load_s", "first_call_ms", "adds"]  # missing from tables made before 2026-11-25
# A sweep's environment: what has parts of its own, which of them it must have, and what is text.
PARTS = {"packages": set(), "ceilings": {"tflops", "gb_per_s"}, "sweep": set()}
TEXTS = ["short", "date", "gpu", "cpu", "driver", "command"]
SERVING = {  # the columns of what python end_to_end.py writes, besides the first four
    "end_to_end.csv": "batch_size decoder images_per_s images_per_s_low images_per_s_high "
    "decode_images_per_s infer_images_per_s serial_images_per_s overlap limit agreement status reason "
    "cores date",
    "load.csv": "scenario rate achieved p50_ms p90_ms p99_ms valid max_latency_ms fps cores date",
}


def write_csv(results: Path) -> pd.DataFrame:
    """Make results/benchmark_results.csv and environment.json anew from results/raw/; the rows."""
    rows = read_rows(results)
    text = rows.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    write_atomic(results / "benchmark_results.csv", text)
    environments = {name: environment_of(folder) for name, folder in records.sweeps_of(results).items()}
    write_json(results / "environment.json", {name: facts for name, facts in environments.items() if facts})
    return read_csv(results)


def environment_of(folder: Path) -> dict:
    """What a sweep's figures depend on: sweep.json's facts, the process's, ceilings, and where its time
    went."""
    found, note, limits = records.read_sweep(folder)
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
    runtime = (
        "onnxruntime-gpu" if "onnxruntime-gpu" in packages else "onnxruntime"
    )  # one module: one is loaded
    names = "torch", runtime, "torch-tensorrt", "tensorrt", "tensorrt-cu13", "tensorrt-cu12"
    shown = [f"{name} {packages[name]}" for name in names if name in packages]
    machine = facts.get("gpu") or f"{facts.get('cpu')}, {facts.get('threads', facts.get('cores'))} threads"
    driver = facts.get("driver") and f"driver {facts['driver']}"
    return ", ".join(filter(None, [machine, driver, *shown, facts.get("date")]))


def read_csv(results: Path) -> pd.DataFrame:
    """The table of a folder, or in a CSV.  Texts that are missing are "", figures that are missing NaN.

    Raises ValueError where it is no such table; an earlier one's lack of NEW_COLUMNS is no fault.
    """
    texts = [field.name for field in dataclasses.fields(Row) if "str" in str(field.type)]
    path = results if results.suffix == ".csv" else results / "benchmark_results.csv"
    rows = pd.read_csv(path, encoding="utf-8", dtype=dict.fromkeys(texts, str))
    if missing := [name for name in COLUMNS if name not in rows and name not in NEW_COLUMNS]:
        raise ValueError(f"no column {missing[0]}")
    rows = rows.reindex(columns=COLUMNS)
    for name in COLUMNS:
        if name in texts:
            rows[name] = rows[name].astype(object).fillna("")
        else:
            rows[name] = rows[name].astype(int if name in ("image_size", "batch_size") else float)
    if unknown := sorted(set(rows.status) - set(STATUSES)):
        raise ValueError(f"unknown status {unknown[0]!r}")
    if not rows.fps[rows.status == "ok"].between(0, np.inf, inclusive="neither").all():
        raise ValueError("a row that is ok has no images/s in column fps")
    return rows


def read_table(results: Path) -> tuple[pd.DataFrame, dict]:
    """Rows and environments (sweep -> facts) of a results folder, or of a CSV in it.  Raises UserError."""
    folder = results.parent if results.suffix == ".csv" else results
    path = results if results.suffix == ".csv" else folder / "benchmark_results.csv"
    beside, mend = folder / "environment.json", "make it anew: python benchmark.py"
    try:
        rows = read_csv(results)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {mend}") from None
    except (OSError, ValueError, OverflowError) as error:  # of pandas' parser and of other encodings too
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is no table of python benchmark.py ({said[0]}); {mend}") from None
    if rows.empty:
        raise UserError(f"{path} has no rows; {mend}")
    try:
        environments = json.loads(beside.read_text(encoding="utf-8"))
        whole = all(map(is_environment, environments.values()))
    except FileNotFoundError:
        return rows, {}
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{beside} does not say what a sweep was measured with; {mend}")
    return rows, environments


def is_environment(facts: dict) -> bool:
    """Whether its parts are what they should be; any may be missing.  AttributeError: it has none."""
    parts = {name: facts.get(name) or dict.fromkeys(needed) for name, needed in PARTS.items()}
    whole = all(isinstance(part, dict) and PARTS[name] <= part.keys() for name, part in parts.items())
    return whole and all(isinstance(facts.get(name) or "", str) for name in TEXTS)


def read_serving(path: Path) -> pd.DataFrame | None:
    """end_to_end.csv or load.csv, texts as in read_csv(); None where it is missing or an earlier version's.

    Raises UserError where it is no table at all.
    """
    mend = f"make it anew: python end_to_end.py{' --load' if path.name == 'load.csv' else ''}"
    texts = ["sweep", "backend", "precision", "decoder", "scenario", "limit", "status", "reason", "date"]
    try:
        table = pd.read_csv(path, encoding="utf-8", dtype=dict.fromkeys(texts, str))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is no table ({str(error).strip()}); {mend}") from None
    table = table.assign(**{name: table[name].astype(object).fillna("") for name in texts if name in table})
    needed = {"sweep", "backend", "precision", "image_size", *SERVING[path.name].split()}
    return table if needed <= set(table) else None
