"""Rows -> judgements: which is fastest, what is indistinguishable, what fits limits, what has changed.

The only place that judges: tables, charts, sentences and compare.py show what it finds.
"""

from collections import Counter

import numpy as np
import pandas as pd

from utils.measure import timing
from utils.utils import UserError

DRIFT = {  # what 95 % of two sweeps of the same code differ by besides what their rounds tell: 2.8 standard
    "fps": {"cpu": 0.05},  # deviations between sweeps, seen by tests/aa.py on a shared machine
    "speedup": {"cpu": 0.03},
}
CONFIGURATION = ["backend", "image_size", "batch_size"]


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


# ---- the fastest


def indistinguishable(a: pd.Series, b: pd.Series) -> bool:
    """Whether two rows of one table show no difference in throughput: their 95 % intervals overlap.

    In one sweep, at the same image and batch size, those of their speedups must overlap too: what drifted for
    all cancels in speedups.  A row without an interval differs from none.
    """
    alike = all(a[name] == b[name] for name in ("sweep", "image_size", "batch_size"))
    figures = ["fps", "speedup"] if alike else ["fps"]
    ends = [(f"{name}_low", f"{name}_high") for name in figures]
    return not any(a[low] > b[high] or b[low] > a[high] for low, high in ends)


def fastest(rows: pd.DataFrame) -> list[pd.Series]:
    """The row with the highest throughput, and after it those that are indistinguishable from it."""
    ordered = [row for _, row in measured(rows).sort_values("fps", ascending=False, kind="stable").iterrows()]
    return [row for row in ordered if indistinguishable(ordered[0], row)]


def leaders(rows: pd.DataFrame) -> list[pd.Series]:
    """Where throughput is highest: its row, then those of that size and batch that are indistinguishable from
    it.  Sizes and batches at which several methods were measured come first."""
    found = measured(rows)
    if found.empty:
        return []
    shared = found.groupby(["image_size", "batch_size"]).fps.transform("size") > 1
    best = (found[shared] if shared.any() else found).nlargest(1, "fps").iloc[0]
    return fastest(at(found, best.image_size, best.batch_size))


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


def best_within(rows: pd.DataFrame, limits: dict) -> tuple[pd.DataFrame, list[tuple[str, int, float]]]:
    """The measured rows within the limits, fastest first, and for each limit asked for its column, how many
    rows miss it and the best value there is.

    `limits` has p95_ms and memory_mb (of the GPU, on a CPU of the host) at most, and accuracy at least; None
    is no limit.  A row whose figure is not known does not fit.
    """
    ok = measured(rows)
    memory = ok.gpu_memory_mb.where(ok.device == "cuda", ok.host_memory_mb).astype(float)
    ok = ok.assign(memory_mb=memory)
    fits, missed = pd.Series(True, ok.index), []
    for column, limit in limits.items():
        if limit is not None:
            sign = 1 if column == "accuracy" else -1
            within = sign * ok[column] >= sign * limit
            missed.append((column, int((~within).sum()), sign * (sign * ok[column]).max()))
            fits &= within
    return ok[fits].sort_values("fps", ascending=False), missed


# ---- the five answers


def wins(rows: pd.DataFrame) -> tuple[list[tuple[pd.Series, int]], int, int]:
    """Who is clearly fastest in how many combinations of image and batch size with several methods.

    Returns a row of each winner with its number of wins, most first; the number of ties; the number in all.
    """
    groups = [group for _, group in measured(rows).groupby(["image_size", "batch_size"])]
    first = [fastest(group) for group in groups if group.backend.nunique() > 1]
    clear = [best[0] for best in first if len(best) == 1]
    counts, row_of = Counter(row.backend for row in clear), {row.backend: row for row in clear}
    won = [(row_of[backend], count) for backend, count in counts.most_common()]
    return won, len(first) - len(clear), len(first)


def size_cost(rows: pd.DataFrame) -> tuple[int, list[float]]:
    """A batch size, and of each method throughput there at the smallest image size over that at the largest.

    The batch is the largest at which a method was measured at both ends; no such batch: 0 and nothing.
    """
    fps = rows.pivot_table("fps", ["batch_size", "sweep", "backend"], "image_size")
    cost = (fps.iloc[:, 0] / fps.iloc[:, -1]).dropna()
    if fps.shape[1] < 2 or cost.empty:
        return 0, []
    batch = cost.index.get_level_values("batch_size").max()
    return int(batch), cost.loc[batch].to_list()


def batch_gain(rows: pd.DataFrame) -> list[float]:
    """Of each method the throughput at the largest batch that most share over that at the smallest, at the
    usual image size; nothing where that is one batch."""
    own = rows[rows.image_size == usual_size(rows)]
    fps, last = own.pivot_table("fps", ["sweep", "backend"], "batch_size"), shared_batch(own)
    return (fps[last] / fps.iloc[:, 0]).dropna().to_list() if last != fps.columns[0] else []


def saturation(rows: pd.DataFrame) -> int | None:
    """The smallest batch beyond which doubling gives under 5 % more; None: not reached.

    `rows` are one method's at one image size.
    """
    ordered = measured(rows).sort_values("batch_size")
    sizes, fps = ordered.batch_size.to_list(), ordered.fps.to_list()
    for i in range(len(sizes) - 1):
        if max(timing.gain(sizes, fps, i, j) for j in range(i + 1, len(sizes))) < timing.SATURATED:
            return sizes[i]
    return None


def optimal(rows: pd.DataFrame) -> list[pd.Series]:
    """For each image size the optimum for throughput: of the fastest rows the one that answers soonest."""
    groups = [group for _, group in measured(rows).groupby("image_size")]
    return [min(fastest(group), key=lambda row: row.mean_ms) for group in groups]


# ---- two tables


def ratios(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """For each configuration in both tables: throughput and speedup after / before, with 95 % intervals,
    and in `verdict` whether throughput is "faster", "slower" or shows "no difference"; "can't judge: one
    round" where one of them has no interval.

    The two were measured independently, so the half-widths of their intervals, on a logarithmic scale, add as
    squares; so does DRIFT, since a machine's state outlasts a sweep.  Raises UserError where sweeps can't be
    matched: same names in both, or one sweep in each.
    """
    before, after = measured(before), measured(after)
    names = sorted(set(before.sweep)), sorted(set(after.sweep))
    if names[0] != names[1] and max(map(len, names)) > 1:
        mend = "name one of each with --sweeps A B"
        raise UserError(f"sweeps {names[0]} and {names[1]} can't be matched; {mend}")
    both = before.merge(after, on=matching(before, after), suffixes=("_before", "_after"))
    for figure in ("fps", "speedup"):
        ratio = both[f"{figure}_after"] / both[f"{figure}_before"]
        drift = np.log1p(both.device_after.map(DRIFT[figure]).fillna(0))
        width = [both[f"{figure}_high_{when}"] / both[f"{figure}_low_{when}"] for when in ("before", "after")]
        half = np.exp(np.sqrt((np.log(width) ** 2).sum(axis=0) / 4 + drift**2))
        both[f"{figure}_ratio"] = ratio
        both[f"{figure}_ratio_low"], both[f"{figure}_ratio_high"] = ratio / half, ratio * half
    direction = np.where(both.fps_ratio > 1, "faster", "slower")
    both["verdict"] = np.where(agrees(both, "fps"), "no difference", direction)
    both.loc[both.fps_ratio_low.isna(), "verdict"] = "can't judge: one round"
    return both.assign(precision=both.precision_after)


def matching(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    """By which columns two tables are matched: two environments or machines need not name sweeps alike."""
    return ["sweep", *CONFIGURATION] if set(before.sweep) == set(after.sweep) else CONFIGURATION


def agrees(both: pd.DataFrame, figure: str) -> pd.Series:
    """Whether the ratio of a figure (fps, speedup) may be 1."""
    return (both[f"{figure}_ratio_low"] <= 1) & (both[f"{figure}_ratio_high"] >= 1)


def lost(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """What the first table measured and the second did not, with the status and reason that it has there;
    "missing" where there is no such row."""
    keys = matching(before, after)
    there = after[[*keys, "status", "reason"]]
    both = measured(before).drop(columns=["status", "reason"]).merge(there, on=keys, how="left")
    return both[both.status != "ok"].fillna({"status": "missing", "reason": "no such row"})


# ---- serving


def highest_rates(load: pd.DataFrame) -> pd.Series:
    """Backend -> the highest rate offered at which 99 % of the images were answered within the limit."""
    kept = load[load.valid & (load.p99_ms <= load.max_latency_ms)]
    return kept.groupby("backend").rate.max().sort_values(ascending=False)
