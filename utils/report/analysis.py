"""Rows -> judgements: which is fastest, what is indistinguishable, what fits limits, what has changed.

The only place that judges: tables, charts, sentences and compare.py show what it finds.
"""

import math

import numpy as np
import pandas as pd

from utils.measure import timing
from utils.measure.schema import BASELINE
from utils.utils import UserError

DRIFT = {  # what 95 % of two sweeps of the same code differ by besides what their rounds tell: 2.8 standard
    "fps": {"cpu": 0.05},  # deviations between sweeps, seen by tests/aa.py on a shared machine
    "speedup": {"cpu": 0.03},
}
CONFIGURATION = ["backend", "image_size", "batch_size"]


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that may be compared and may win."""
    return rows[rows.status == "ok"]


def indistinguishable(a, b, column: str = "fps") -> bool:
    """Whether two rows of one table show no difference in a column (fps, speedup): 95 % intervals overlap.

    In one sweep, at the same image and batch size, those of throughput and of speedup must both overlap,
    where known: what drifted for all cancels in speedups.  A row of a single round has no interval and
    differs from none.
    """

    def overlap(figure: str) -> bool:
        (a_low, a_high), (b_low, b_high) = bounds(a, figure), bounds(b, figure)
        return not (a_low > b_high or b_low > a_high)

    alike = (a.sweep, a.image_size, a.batch_size) == (b.sweep, b.image_size, b.batch_size)
    return all(map(overlap, ["fps", "speedup"] if alike else [column]))


def bounds(row, figure: str) -> tuple[float, float]:
    """A row's 95 % interval of fps or speedup; NaN where there is none."""
    if figure == "speedup" and row.backend == BASELINE:
        return 1.0, 1.0
    low, high = row[f"{figure}_low"], row[f"{figure}_high"]
    return (math.nan, math.nan) if pd.isna(low) else (low, high)


def fastest(rows: pd.DataFrame, column: str = "fps") -> list[pd.Series]:
    """The row with the highest value, and after it those that are indistinguishable from it."""
    found = measured(rows)
    found = found[found[column].notna()].sort_values(column, ascending=False, kind="stable")
    ordered = [row for _, row in found.iterrows()]
    return [row for row in ordered if indistinguishable(ordered[0], row, column)]


def leaders(rows: pd.DataFrame, column: str) -> list[pd.Series]:
    """Where the highest value of a column is: its row, then those of that size and batch that are
    indistinguishable from it.  Sizes and batches at which several methods were measured come first."""
    found = measured(rows)
    found = found[found[column].notna()]
    if found.empty:
        return []
    shared = found.groupby(["image_size", "batch_size"])[column].transform("size") > 1
    best = (found[shared] if shared.any() else found).nlargest(1, column).iloc[0]
    return fastest(at(found, best.image_size, best.batch_size), column)


def at(rows: pd.DataFrame, image_size: int, batch_size: int) -> pd.DataFrame:
    return rows[(rows.image_size == image_size) & (rows.batch_size == batch_size)]


def wins(rows: pd.DataFrame) -> tuple[list[tuple[pd.Series, int]], int, int]:
    """Who is clearly fastest in how many combinations of image and batch size with several methods.

    Returns a row of each winner with its number of wins, most first; the number of ties; the number in all.
    """
    won, ties, total = {}, 0, 0
    for _, group in measured(rows).groupby(["image_size", "batch_size"]):
        if group.backend.nunique() > 1:
            best, total = fastest(group), total + 1
            ties += len(best) > 1
            if len(best) == 1:
                row, count = won.get(best[0].backend, (best[0], 0))
                won[best[0].backend] = row, count + 1
    return sorted(won.values(), key=lambda entry: -entry[1]), ties, total


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


def usual_size(rows: pd.DataFrame) -> int:
    """224 px, which ResNet-18 was made for, or else the smallest image size measured."""
    return 224 if (rows.image_size == 224).any() else int(rows.image_size.min())


def shared_batch(rows: pd.DataFrame) -> int:
    """The largest batch size at which more than half as many methods were measured as at any."""
    counts = rows.groupby("batch_size").backend.nunique()
    return int(counts.index[counts > counts.max() / 2].max())


def all_methods(rows: pd.DataFrame) -> pd.DataFrame:
    """Every method of a machine at one image and batch size: mismatches first, then from the slowest to the
    fastest.  The size is 224 px where it was measured, the batch the largest that most methods share."""
    ok = measured(rows)
    ok = ok[ok.image_size == usual_size(ok)] if len(ok) else ok
    if ok.empty:
        return ok
    size, batch = ok.image_size.iloc[0], shared_batch(ok)
    wrong = at(rows[rows.status == "mismatch"], size, batch)
    return pd.concat([wrong, at(ok, size, batch).sort_values("fps", kind="stable")])


def best_batch(rows: pd.DataFrame) -> pd.DataFrame:
    """For each sweep, backend and image size the measured row with the highest throughput."""
    ok = measured(rows)
    return ok.loc[ok.groupby(["sweep", "backend", "image_size"], sort=False).fps.idxmax()]


def optimal(rows: pd.DataFrame) -> list[pd.Series]:
    """For each image size the optimum for throughput: of the fastest rows the one that answers soonest."""
    groups = [group for _, group in measured(rows).groupby("image_size")]
    return [min(fastest(group), key=lambda row: row.mean_ms) for group in groups]


def size_cost(rows: pd.DataFrame) -> tuple[int, list[float]]:
    """A batch size, and of each method throughput there at the smallest image size over that at the largest.

    The batch is the largest at which a method was measured at both ends; no such batch: 0 and nothing.
    """
    first, last = rows.image_size.min(), rows.image_size.max()
    for batch in sorted(rows.batch_size.unique(), reverse=True):
        ends = [at(rows, size, batch).set_index(["sweep", "backend"]).fps for size in (first, last)]
        found = (ends[0] / ends[1]).dropna()
        if first != last and len(found):
            return int(batch), found.to_list()
    return 0, []


def batch_gain(rows: pd.DataFrame) -> pd.Series:
    """(sweep, backend) -> throughput at the largest batch that most share over that at the smallest, at the
    usual image size."""
    own = rows[rows.image_size == usual_size(rows)]
    batches = own.batch_size.min(), shared_batch(own)
    first, last = (own[own.batch_size == b].set_index(["sweep", "backend"]).fps for b in batches)
    return (last / first).dropna() if batches[0] != batches[1] else first[:0]


def memory_mb(rows: pd.DataFrame) -> pd.Series:
    """What each row's process takes in MB: of the GPU's memory, on a CPU of the host's."""
    return rows.gpu_memory_mb.where(rows.device == "cuda", rows.host_memory_mb).astype(float)


def best_within(rows: pd.DataFrame, limits: dict) -> tuple[pd.DataFrame, list[tuple[str, int, float]]]:
    """The measured rows within the limits, fastest first, and for each limit asked for its column, how many
    rows miss it and the best value there is.

    `limits` has p95_ms and memory_mb at most, and accuracy at least; None is no limit.  A row whose figure is
    not known does not fit.
    """
    ok = measured(rows)
    ok = ok.assign(memory_mb=memory_mb(ok))
    fits, missed = pd.Series(True, ok.index), []
    for column, limit in limits.items():
        if limit is not None:
            within = ok[column] >= limit if column == "accuracy" else ok[column] <= limit
            best = ok[column].max() if column == "accuracy" else ok[column].min()
            missed.append((column, int((~within).sum()), best))
            fits &= within
    return ok[fits].sort_values("fps", ascending=False), missed


def ratios(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """For each configuration in both tables: throughput and speedup after / before, with 95 % intervals,
    and in `verdict` whether throughput is "faster", "slower" or shows "no difference"; "can't judge" where
    either was measured in a single round and so has no interval.

    The two were measured independently, so the half-widths of their intervals, on a logarithmic scale, add as
    squares; so does DRIFT, since a machine's state outlasts a sweep.  Raises UserError where sweeps can't be
    matched: same names in both, or one sweep in each.
    """
    before, after = measured(before), measured(after)
    names = sorted(set(before.sweep)), sorted(set(after.sweep))
    keys = ["sweep", *CONFIGURATION]
    if names[0] != names[1]:
        if max(map(len, names)) > 1:
            mend = "name one of each with --sweeps A B"
            raise UserError(f"sweeps {names[0]} and {names[1]} can't be matched; {mend}")
        keys = CONFIGURATION  # two environments or machines: their names need not agree
    both = before.merge(after, on=keys, suffixes=("_before", "_after"))
    for figure in ("fps", "speedup"):
        ratio = both[f"{figure}_after"] / both[f"{figure}_before"]
        widths = [
            both[f"{figure}_high_{when}"] / both[f"{figure}_low_{when}"] for when in ("before", "after")
        ]
        drift = np.log1p(both.device_after.map(DRIFT[figure]).fillna(0))
        half = np.exp(np.sqrt(sum((np.log(width) / 2) ** 2 for width in widths) + drift**2))
        both[f"{figure}_ratio"] = ratio
        both[f"{figure}_ratio_low"], both[f"{figure}_ratio_high"] = ratio / half, ratio * half
    direction = np.where(both.fps_ratio > 1, "faster", "slower")
    both["verdict"] = np.where(agrees(both, "fps"), "no difference", direction)
    both.loc[both.fps_ratio_low.isna(), "verdict"] = "can't judge"
    return both


def agrees(both: pd.DataFrame, figure: str) -> pd.Series:
    """Whether the ratio of a figure (fps, speedup) may be 1."""
    return (both[f"{figure}_ratio_low"] <= 1) & (both[f"{figure}_ratio_high"] >= 1)


# ---- what may be said at all


def decided(rows: pd.DataFrame) -> pd.Series | None:
    """The row that is beyond doubt faster than all others, or None; without intervals nothing is decided."""
    best = fastest(rows)
    return best[0] if len(best) == 1 and measured(rows).fps_low.notna().all() else None


def lost(before: pd.DataFrame, after: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of what the first table measured: the second's rows that were tried and are not ok, and the first's
    rows that the second does not have at all."""
    keys = ["sweep", *CONFIGURATION] if set(before.sweep) == set(after.sweep) else CONFIGURATION
    was = measured(before)
    gone = was[~was.set_index(keys).index.isin(after.set_index(keys).index)]
    return after[after.status != "ok"].merge(was[keys], on=keys), gone


# ---- serving


def highest_rates(load: pd.DataFrame) -> pd.Series:
    """Backend -> the highest rate offered at which 99 % of the images were answered within the limit."""
    kept = load[load.valid & (load.p99_ms <= load.max_latency_ms)]
    return kept.groupby("backend").rate.max().sort_values(ascending=False)
