"""Rows -> judgements: which is fastest, what is indistinguishable, what fits limits, what has changed.

The only place that judges: tables, charts, sentences and compare.py show what it finds.
"""

import numpy as np
import pandas as pd

from utils.measure import timing
from utils.utils import UserError

# What 95 % of two sweeps of the same code differ by on a CPU besides what their rounds tell: 2.8 standard
# deviations between sweeps, seen by tests/aa.py on a shared machine.
DRIFT = {"fps": 0.05, "speedup": 0.03}


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that may be compared and may win."""
    return rows[rows.status == "ok"]


def at(rows: pd.DataFrame, image_size: int, batch_size: int) -> pd.DataFrame:
    return rows[(rows.image_size == image_size) & (rows.batch_size == batch_size)]


def usual_size(rows: pd.DataFrame) -> int:
    """224 px, which ResNet-18 was made for, or else the smallest image size measured."""
    return 224 if (rows.image_size == 224).any() else int(rows.image_size.min())


def shared_batch(rows: pd.DataFrame) -> int:
    """The largest batch size at which more than half as many methods were measured as at any."""
    counts = rows.groupby("batch_size").backend.nunique()
    return int(counts.index[counts > counts.max() / 2].max())


def indistinguishable(a: pd.Series, b: pd.Series) -> bool:
    """Whether the 95 % intervals of two rows' throughput overlap; in one sweep, at the same image and batch
    size, also those of their speedups, in which what drifted for all cancels.  None differs from no interval.
    """
    alike = all(a[name] == b[name] for name in ("sweep", "image_size", "batch_size"))
    ends = [(f"{name}_low", f"{name}_high") for name in (["fps", "speedup"] if alike else ["fps"])]
    return not any(a[low] > b[high] or b[low] > a[high] for low, high in ends)


def fastest(rows: pd.DataFrame) -> list[pd.Series]:
    """The row with the highest throughput, and after it those that are indistinguishable from it."""
    ordered = [row for _, row in measured(rows).sort_values("fps", ascending=False, kind="stable").iterrows()]
    return [row for row in ordered if indistinguishable(ordered[0], row)]


def leaders(rows: pd.DataFrame) -> list[pd.Series]:
    """Where throughput is highest: its row, then those of that size and batch that are indistinguishable from
    it.  Sizes and batches at which several methods were measured come first."""
    found = measured(rows)
    shared = found.groupby(["image_size", "batch_size"]).fps.transform("size") > 1
    best = (found[shared] if shared.any() else found).nlargest(1, "fps")
    return [one for row in best.itertuples() for one in fastest(at(found, row.image_size, row.batch_size))]


def all_methods(rows: pd.DataFrame) -> pd.DataFrame:
    """Every method of a machine at one image and batch size: mismatches first, then from the slowest to the
    fastest.  The size is 224 px where it was measured, the batch the largest that most methods share."""
    ok = measured(rows)
    if ok.empty:
        return ok
    size = usual_size(ok)
    there = at(rows, size, shared_batch(ok[ok.image_size == size]))
    return pd.concat([there[there.status == "mismatch"], measured(there).sort_values("fps", kind="stable")])


def best_batch(rows: pd.DataFrame) -> pd.DataFrame:
    """For each sweep, backend and image size the measured row with the highest throughput."""
    ok = measured(rows)
    return ok.loc[ok.groupby(["sweep", "backend", "image_size"], sort=False).fps.idxmax()]


def best_within(rows: pd.DataFrame, limits: dict) -> pd.DataFrame:
    """The measured rows within the limits, fastest first: p95_ms and memory_mb (of the GPU, on a CPU of the
    host) at most, accuracy at least; None is no limit.  A row whose figure is not known does not fit."""
    ok = measured(rows)
    ok = ok.assign(memory_mb=ok.gpu_memory_mb.where(ok.device == "cuda", ok.host_memory_mb).astype(float))
    for column, limit in limits.items():
        if limit is not None:
            ok = ok[ok[column] >= limit] if column == "accuracy" else ok[ok[column] <= limit]
    return ok.sort_values("fps", ascending=False)


def saturation(rows: pd.DataFrame) -> int | None:
    """The smallest batch beyond which doubling gives one method at one image size under 5 % more, or None."""
    ordered = measured(rows).sort_values("batch_size")
    sizes, fps = ordered.batch_size.to_list(), ordered.fps.to_list()
    for i in range(len(sizes) - 1):
        if max(timing.gain(sizes, fps, i, j) for j in range(i + 1, len(sizes))) < timing.SATURATED:
            return sizes[i]
    return None


def ratios(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """For each configuration in both tables: throughput and speedup after / before, with 95 % intervals, and
    a `verdict` on throughput.  Sweeps are matched by name unless each table has one, or UserError is raised.

    The two were measured independently, so the half-widths of their intervals, on a logarithmic scale, add as
    squares; so does DRIFT, since a machine's state outlasts a sweep.
    """
    before, after = measured(before), measured(after)
    keys, names = ["backend", "image_size", "batch_size"], [sorted(set(one.sweep)) for one in (before, after)]
    if names[0] != names[1] and max(map(len, names)) > 1:
        raise UserError(f"sweeps {names[0]} and {names[1]} can't be matched; name one of each: --sweeps A B")
    by_name = ["sweep"] if names[0] == names[1] else []
    both = before.merge(after, on=by_name + keys, suffixes=("_before", "_after"))
    for figure, drift in DRIFT.items():
        ratio = both[f"{figure}_after"] / both[f"{figure}_before"]
        drift = np.log1p(np.where(both.device_after == "cpu", drift, 0))
        width = [both[f"{figure}_high_{when}"] / both[f"{figure}_low_{when}"] for when in ("before", "after")]
        half = np.exp(np.sqrt((np.log(width) ** 2).sum(axis=0) / 4 + drift**2))
        both[f"{figure}_ratio"] = ratio
        both[f"{figure}_ratio_low"], both[f"{figure}_ratio_high"] = ratio / half, ratio * half
    direction = np.where(both.fps_ratio > 1, "faster", "slower")
    both["verdict"] = np.where(agrees(both, "fps"), "no difference", direction)
    both.loc[both.fps_ratio_low.isna(), "verdict"] = "can't judge: one round"
    return both.assign(precision=both.precision_after)


def agrees(both: pd.DataFrame, figure: str) -> pd.Series:
    """Whether the ratio of a figure (fps, speedup) may be 1."""
    return (both[f"{figure}_ratio_low"] <= 1) & (both[f"{figure}_ratio_high"] >= 1)
