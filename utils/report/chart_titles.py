"""What the charts say: titles that state the finding, notes on what is missing."""

import textwrap

import pandas as pd

from utils.measure.schema import BASELINE
from utils.report import analysis
from utils.report.words import figure, foot

REASON = {"out_of_memory": "out of memory", "mismatch": "wrong results", "ok": "no reading"}


def ends_of(values: pd.Series, unit: str) -> str:
    """ "1.2x (PyTorch FP32) to 11.8x (TensorRT FP16)": the least and the greatest."""
    values = values.sort_values(kind="stable")
    texts = [f"{figure(values.iloc[i])}{unit} ({values.index[i]})" for i in (0, -1)]
    return " to ".join(dict.fromkeys(texts))


def leader(block: pd.DataFrame, column: str) -> str:
    """The fastest (or the largest speedup) and where; no winner where the first are level."""
    lead, measured = analysis.leaders(block, column), block[block["fps"].notna()]
    if measured.empty:
        return "Nothing was measured"
    if lead.empty:
        return "No speedups: PyTorch FP32 was not measured"
    best, last = lead.iloc[0], lead.iloc[-1]
    where = f"at {best['image_size']} px, batch {best['batch_size']}"
    unit = "x the speed of PyTorch FP32" if column == "speedup" else " images/s"
    if measured["label"].nunique() == 1:
        return f"Only {best['label']} was measured: {figure(best['fps'])} images/s {where}"
    here = (measured["image_size"] == best["image_size"]) & (measured["batch_size"] == best["batch_size"])
    if measured.loc[here, "fps_low"].isna().any():
        return f"One round supports no verdict: {best['label']} {figure(best[column])}{unit} {where}"
    if column == "speedup" and BASELINE in set(lead["backend"]):
        return f"Nothing is clearly faster than PyTorch FP32 {where}"
    if len(lead) == 1:
        verb = "reaches" if column == "speedup" else "is fastest:"
        return f"{best['label']} {verb} {figure(best[column])}{unit} {where}"
    others = last["label"] if len(lead) == 2 else f"{len(lead) - 1} others"
    between = f"{figure(best[column])} to {figure(last[column])}{unit} {where}"
    return f"{best['label']} and {others} are level: {between} (95 % intervals overlap)"


def batching(block: pd.DataFrame, column: str) -> str:
    """What the largest batch gains over the smallest at the smallest image size."""
    ok = block[block["fps"].notna()]
    gains = analysis.batch_gain(ok)
    if not gains:
        return leader(block, column)
    labels = dict(zip(ok["backend"], ok["label"], strict=True))
    gains = pd.Series(gains, dtype=float).rename(labels)
    where = f"batch {ok['batch_size'].min()} at {ok['image_size'].min()} px"
    return f"Batch {ok['batch_size'].max()} serves {ends_of(gains, 'x')} the images/s of {where}"


def memory(block: pd.DataFrame, column: str) -> str:
    """The least and the most memory at the largest configuration that most backends could hold."""
    found, keys = block[block[column].notna()], ["image_size", "batch_size"]
    if found.empty:
        return "GPU memory was not read"
    counts = found.groupby(keys).size().rename("count").reset_index()
    most = counts.sort_values(["count", "batch_size", "image_size"]).iloc[-1]
    same = found[(found[keys] == most[keys]).all(axis=1)].set_index("label")[column]
    return f"GPU memory at {most['image_size']} px, batch {most['batch_size']}: {ends_of(same, ' MB')}"


def place(pairs: set, grid: set) -> str:
    """Which part of the grid: nothing for all, ": 512 px, batch 8, 16" for a rectangle, else how many."""
    sizes, batches = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
    if pairs == grid:
        return ""
    if len(pairs) < len(sizes) * len(batches):
        return f": {len(pairs)} of {len(grid)} configurations"
    parts = [f"{', '.join(map(str, sizes))} px"] if set(sizes) != {size for size, _ in grid} else []
    if set(batches) != {batch for _, batch in grid}:
        parts.append(f"batch {', '.join(map(str, batches))}")
    return f": {', '.join(parts)}"


def not_measured(block: pd.DataFrame, column: str) -> str:
    """ "TensorRT FP16 (unavailable), PyTorch FP32 (out of memory: 512 px, batch 16)", or nothing."""
    grid = set(zip(block["image_size"], block["batch_size"], strict=True))
    gaps = []
    for name, own in block.groupby("label", sort=False):
        parts = {"not run": grid - set(zip(own["image_size"], own["batch_size"], strict=True))}
        for row in own[own[column].isna()].itertuples():
            reason = REASON.get(row.status, row.status)
            parts.setdefault(reason, set()).add((row.image_size, row.batch_size))
        texts = [reason + place(pairs, grid) for reason, pairs in parts.items() if pairs]
        gaps += [f"{name} ({'; '.join(texts)})"] if texts else []
    return ", ".join(gaps)


def roofline_finding(block: pd.DataFrame) -> str:
    """Which row comes nearest to a measured matrix product, and what limits how many rows."""
    best, counts = block.loc[block["pct_measured_peak"].idxmax()], block["limit"].value_counts()
    kinds = [kind for kind in ("launch", "latency", "memory", "compute") if kind in counts]
    limits = ", ".join(f"{counts[kind]} {kind}-bound" for kind in kinds)
    share = f"{figure(best['pct_measured_peak'])} % of it"
    where = f"{best['image_size']} px, batch {best['batch_size']}"
    return f"{best['label']} comes nearest to the measured ceiling, {share} at {where}; rows: {limits}"


def end_to_end_finding(table: pd.DataFrame) -> str:
    """The most images/s from files to labels, and how much of the slower half that is."""
    ok = table[table["status"] == "ok"]
    if ok.empty:
        return "Nothing from files to labels was measured"
    best = ok.loc[ok["images_per_s"].idxmax()]
    share = f"{best['overlap']:.0%} of what its parts allow"
    return f"From files to labels: {best['label']}, {figure(best['images_per_s'])} images/s, {share}"


def load_finding(load: pd.DataFrame) -> str:
    """Up to which rate 99 % of the images are answered in time, for the backend that gets furthest."""
    rates, limit = analysis.highest_rates(load), f"{figure(load['max_latency_ms'].iloc[0])} ms"
    if rates.empty:
        return f"No rate tried keeps 99 % of the answers within {limit}"
    label = load.loc[load["backend"] == rates.index[0], "label"].iloc[0]
    return f"{label} answers 99 % within {limit} at up to {figure(rates.iloc[0])} images/s"


def feet_of(sweeps: list[str], environments: dict) -> list[str]:
    """A line of hardware and versions for each sweep, marked where the network saw sample data only."""
    lines = []
    for sweep in sweeps:
        text = foot(environments.get(sweep, {}))
        lines += textwrap.wrap(f"{sweep}: {text}" if len(sweeps) > 1 else text, 140)
    return lines
