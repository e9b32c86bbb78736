"""Rows -> judgements: which is fastest, what is level, where it saturates, what fits limits, what changed.

The only place that judges: the report, the charts and compare.py put its findings into words and pictures.
"""

import math

import numpy as np
import pandas as pd

from utils.measure.schema import BASELINE
from utils.utils import UserError

SATURATED = 0.05  # more throughput than this is worth another doubling of the batch
DRIFT = {  # what 95 % of two sweeps of the same code differ by besides what their rounds tell: 2.8 standard
    "fps": {"cpu": 0.05},  # deviations between sweeps, seen by tests/aa.py on a shared machine
    "speedup": {"cpu": 0.03},
}
CONFIGURATION = ["backend", "image_size", "batch_size"]


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that may be compared and may win."""
    return rows[rows.status == "ok"]


def level(a, b) -> bool:
    """Whether two rows of one table show no difference in throughput: their 95 % intervals overlap.

    At the same image and batch size their speedups must overlap too, where known: what drifted for all
    cancels in these.  A row without an interval, of a single round, differs from none.
    """

    def overlap(figure: str) -> bool:
        (a_low, a_high), (b_low, b_high) = bounds(a, figure), bounds(b, figure)
        return not (a_low > b_high or b_low > a_high)

    alike = (a.sweep, a.image_size, a.batch_size) == (b.sweep, b.image_size, b.batch_size)
    return overlap("fps") and (overlap("speedup") if alike else True)


def bounds(row, figure: str) -> tuple[float, float]:
    """A row's 95 % interval of fps or speedup; NaN where there is none."""
    if figure == "speedup" and row.backend == BASELINE:
        return 1.0, 1.0
    low, high = row[f"{figure}_low"], row[f"{figure}_high"]
    return (math.nan, math.nan) if pd.isna(low) else (low, high)


def fastest(rows: pd.DataFrame) -> list[pd.Series]:
    """The row with the highest throughput, and after it those that are level with it."""
    ordered = [row for _, row in measured(rows).sort_values("fps", ascending=False).iterrows()]
    return [row for row in ordered if level(ordered[0], row)]


def leaders(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Where the highest value of a column is: its row, then those of that size and batch level with it.

    Sizes and batches at which several backends were measured come first.
    """
    found = rows[rows[column].notna()]
    if found.empty:
        return found
    shared = found.groupby(["image_size", "batch_size"])[column].transform("size") > 1
    best = (found[shared] if shared.any() else found).nlargest(1, column).iloc[0]
    same = found[(found.image_size == best.image_size) & (found.batch_size == best.batch_size)]
    same = same.sort_values(column, ascending=False, kind="stable")
    return same[[level(row, best) for _, row in same.iterrows()]]


def wins(rows: pd.DataFrame) -> tuple[list[tuple[pd.Series, int]], int, int]:
    """Who is clearly fastest in how many combinations of image and batch size with several backends.

    Returns a row of each winner with its number of wins, most first; the number of ties; the number in all.
    """
    won, ties, total = {}, 0, 0
    for _, group in measured(rows).groupby(["image_size", "batch_size"]):
        if group.backend.nunique() < 2:
            continue
        total += 1
        best = fastest(group)
        if len(best) > 1:
            ties += 1
        else:
            row, count = won.get(best[0].backend, (best[0], 0))
            won[best[0].backend] = row, count + 1
    return sorted(won.values(), key=lambda entry: -entry[1]), ties, total


def saturated(batch_sizes: list[int], fps: list[float]) -> bool:
    """Whether the last step to a larger batch gave under 5 % more; sizes and images/s, ascending."""
    return len(fps) > 1 and gain(batch_sizes, fps, len(fps) - 2, len(fps) - 1) < SATURATED


def gain(batch_sizes: list[int], fps: list[float], i: int, j: int) -> float:
    """What a doubling of the batch gains between two measured sizes, spread evenly over the doublings."""
    return (fps[j] / fps[i]) ** (1 / math.log2(batch_sizes[j] / batch_sizes[i])) - 1


def saturation(rows: pd.DataFrame) -> int | None:
    """The smallest batch beyond which doubling gives under 5 % more; None: not reached.

    `rows` are one backend's at one image size.
    """
    ordered = measured(rows).sort_values("batch_size")
    sizes, fps = ordered.batch_size.to_list(), ordered.fps.to_list()
    for i in range(len(sizes) - 1):
        if max(gain(sizes, fps, i, j) for j in range(i + 1, len(sizes))) < SATURATED:
            return sizes[i]
    return None


def saturations(rows: pd.DataFrame) -> dict[int, int | None]:
    """Of one backend's rows: image size -> saturation(), where several batch sizes were measured."""
    groups = measured(rows).groupby("image_size")
    return {size: saturation(group) for size, group in groups if group.batch_size.nunique() > 1}


def best_batch(rows: pd.DataFrame) -> pd.DataFrame:
    """For each sweep, backend and image size the measured row with the highest throughput."""
    ok = measured(rows)
    return ok.loc[ok.groupby(["sweep", "backend", "image_size"], sort=False).fps.idxmax()]


def optimal(rows: pd.DataFrame) -> list[pd.Series]:
    """For each image size the optimum for throughput: of the fastest rows the one that answers soonest."""
    groups = [group for _, group in measured(rows).groupby("image_size")]
    return [min(fastest(group), key=lambda row: row.mean_ms) for group in groups]


def size_cost(rows: pd.DataFrame) -> dict[str, float]:
    """Backend -> throughput at the smallest image size over that at the largest, at the largest batch."""
    return _ends(rows[rows.batch_size == rows.batch_size.max()], "image_size", first_over_last=True)


def batch_gain(rows: pd.DataFrame) -> dict[str, float]:
    """Backend -> throughput at the largest batch over that at the smallest, at the smallest image size."""
    return _ends(rows[rows.image_size == rows.image_size.min()], "batch_size", first_over_last=False)


def _ends(rows: pd.DataFrame, axis: str, first_over_last: bool) -> dict[str, float]:
    first, last = rows[axis].min(), rows[axis].max()
    found = {}
    for backend, group in rows.groupby("backend", sort=False):
        fps = group.set_index(axis).fps
        if first != last and first in fps and last in fps:
            found[backend] = fps[first] / fps[last] if first_over_last else fps[last] / fps[first]
    return found


def memory_mb(rows: pd.DataFrame) -> pd.Series:
    """What each row's process takes in MB: of the GPU's memory, on a CPU of the host's."""
    return rows.gpu_memory_mb.where(rows.device == "cuda", rows.host_memory_mb).astype(float)


def best_within(
    rows: pd.DataFrame, max_latency_ms: float | None, max_memory_mb: float | None, min_accuracy: float | None
) -> tuple[pd.DataFrame, list[tuple[str, int, float]]]:
    """The measured rows within the limits, fastest first, and for each limit asked for its column, how many
    rows miss it and the best value there is.

    Latency is the 95th percentile of a batch.  A row whose figure is not known does not fit.
    """
    ok = measured(rows)
    ok = ok.assign(memory_mb=memory_mb(ok))
    fits, missed = pd.Series(True, ok.index), []
    for column, limit in (
        ("p95_ms", max_latency_ms),
        ("memory_mb", max_memory_mb),
        ("accuracy", min_accuracy),
    ):
        if limit is None:
            continue
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


def slower_beyond(both: pd.DataFrame, share: float) -> pd.DataFrame:
    """The configurations that are slower by more than `share`, the whole interval over."""
    return both[both.fps_ratio_high < 1 - share]


# ---- what may be said at all


def decided(rows: pd.DataFrame) -> pd.Series | None:
    """The row that is beyond doubt faster than all others; None where some are level with it, or where any
    was measured in a single round and so has no interval."""
    best = fastest(rows)
    return best[0] if len(best) == 1 and measured(rows).fps_low.notna().all() else None


def beats_baseline(row) -> bool:
    """Whether a row is beyond doubt faster than PyTorch FP32 at its size and batch."""
    return bool(row.speedup_low > 1)


def can_judge(both: pd.DataFrame) -> pd.Series:
    """Which of ratios()'s rows have intervals; a single round, before or after, has none."""
    return both.fps_ratio_low.notna()


def lost(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """The rows of the second table that were tried and are not ok, while they are in the first."""
    keys = ["sweep", *CONFIGURATION] if set(before.sweep) == set(after.sweep) else CONFIGURATION
    return after[after.status != "ok"].merge(measured(before)[keys], on=keys)


def missing(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first table that were measured and are not in the second at all."""
    keys = ["sweep", *CONFIGURATION] if set(before.sweep) == set(after.sweep) else CONFIGURATION
    was = measured(before)
    return was[~was.set_index(keys).index.isin(after.set_index(keys).index)]


# ---- rungs and serving


def ladder(rows: pd.DataFrame) -> pd.DataFrame:
    """The rungs of one sweep: its rows at 224 px, or the smallest size, and the largest batch that most
    methods share; mismatches first, then from the slowest to the fastest.

    `gain` is throughput over the rung below, `level` whether the two show no difference.
    """
    ok = measured(rows)
    ok = ok[ok.image_size == (224 if (ok.image_size == 224).any() else ok.image_size.min())]
    if ok.empty:
        return ok
    counts = ok.groupby("batch_size").backend.nunique()
    size, batch = ok.image_size.iloc[0], counts.index[counts > counts.max() / 2].max()
    rungs = ok[ok.batch_size == batch].sort_values("fps", kind="stable")
    below = [None, *(row for _, row in rungs.iterrows())]
    level_with = [k > 0 and level(below[k], below[k + 1]) for k in range(len(rungs))]
    rungs = rungs.assign(gain=rungs.fps / rungs.fps.shift(), level=level_with)
    wrong = rows[(rows.image_size == size) & (rows.batch_size == batch) & (rows.status == "mismatch")]
    return pd.concat([wrong.assign(gain=np.nan, level=False), rungs]) if len(wrong) else rungs


def highest_rates(load: pd.DataFrame) -> pd.Series:
    """Backend -> the highest rate offered at which 99 % of the images were answered within the limit."""
    kept = load[load.valid & (load.p99_ms <= load.max_latency_ms)]
    return kept.groupby("backend").rate.max().sort_values(ascending=False)
