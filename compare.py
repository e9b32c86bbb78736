"""Say what a results table means: which backend is fastest, by how much, how size and batch matter, where it saturates.

Reads results/benchmark_results.csv alone, so any table can be read on any machine.

    python compare.py                    # this machine's table and the answers
    python compare.py --write-readme     # the same into README.md, and the charts anew
"""

import argparse
import math
from pathlib import Path

import pandas as pd

from utils import records
from utils.plot_utils import label
from utils.utils import UserError, read_json, run_main

SATURATED = 0.05  # doubling the batch that gives less than this much more throughput
RESOLUTION = 0.05  # differences of single rows that the sentences call none, where there is no interval


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that may be compared and may win."""
    return rows[rows.status == "ok"]


def same(a: pd.Series, b: pd.Series) -> bool:
    """Whether the 95 % intervals of two rows' throughput overlap: then this run can show no difference."""
    return bool(a.fps_low <= b.fps_high and b.fps_low <= a.fps_high)


def fastest(rows: pd.DataFrame) -> list[pd.Series]:
    """The row with the highest throughput, and after it those that this run can't tell from it."""
    ordered = [row for _, row in measured(rows).sort_values("fps", ascending=False).iterrows()]
    return [row for row in ordered if same(ordered[0], row)]


def saturation(rows: pd.DataFrame) -> int | None:
    """The smallest batch beyond which doubling gives under 5 % more throughput, from one backend's rows at one size; None: not reached.

    Between batch sizes that are not twice one another the gain is spread evenly over the doublings.
    """
    ordered = measured(rows).sort_values("batch_size")
    batches, fps = ordered.batch_size.to_list(), ordered.fps.to_list()
    for i in range(len(batches) - 1):
        later = [(fps[j] / fps[i]) ** (1 / _doublings(batches[i], batches[j])) - 1 for j in range(i + 1, len(batches))]
        if max(later) < SATURATED:
            return batches[i]
    return None


def _doublings(small: int, large: int) -> float:
    return math.log2(large / small)


def name(row: pd.Series) -> str:
    return label(row.backend, row.precision)


def figure(value: float) -> str:
    """Three significant digits with thousands separated: "0.512", "34.1", "15,800"."""
    if pd.isna(value):
        return ""
    if abs(value) >= 1000:
        digits = len(str(int(abs(value)))) - 3
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def span(values: pd.Series) -> str:
    low, high = figure(values.min()), figure(values.max())
    return low if low == high else f"{low} to {high}"


def answers(rows: pd.DataFrame) -> list[str]:
    """Sentences that answer the five questions and name the optimum, one list item each; for each run on its own."""
    sentences = []
    for run in rows.run.unique():
        part = rows[rows.run == run]
        head = f"Run {run}: " if rows.run.nunique() > 1 else ""
        ok = measured(part)
        if ok.empty:
            sentences.append(f"{head}nothing was measured; the reasons are in the table.")
            continue
        sentences += [
            head + sentence for sentence in (_which(ok), _ranges(ok), _speedups(ok), _sizes(ok), _batches(ok), _optimum(ok)) if sentence
        ]
    return sentences


def _which(ok: pd.DataFrame) -> str:
    wins, ties, total = {}, 0, 0
    for _, group in ok.groupby(["image_size", "batch_size"]):
        if group.backend.nunique() < 2:
            continue
        total += 1
        best = fastest(group)
        wins[name(best[0])] = wins.get(name(best[0]), 0) + (len(best) == 1)
        ties += len(best) > 1
    if not total:
        return f"**Which is fastest?** Only {name(ok.iloc[0])} was measured, so there is nothing to compare it with."
    texts = [f"{who} in {count} of {total}" for who, count in sorted(wins.items(), key=lambda item: -item[1]) if count]
    if ties:
        texts.append(f"in {ties} of {total} no difference that this run can show between the first two")
    return f"**Which is fastest?** Of the {total} combinations of image size and batch size: {'; '.join(texts)}."


def _by_backend(ok: pd.DataFrame):
    return [(name(group.iloc[0]), group) for _, group in ok.groupby("backend", sort=False)]


def _ranges(ok: pd.DataFrame) -> str:
    return "**Throughput.** " + "; ".join(f"{who} {span(group.fps)} images/s" for who, group in _by_backend(ok)) + "."


def _speedups(ok: pd.DataFrame) -> str:
    texts = []
    for who, group in _by_backend(ok[(ok.backend != "pytorch") & ok.speedup.notna()]):
        best = group.loc[group.speedup.idxmax()]
        unclear = int(((group.speedup_low <= 1) & (group.speedup_high >= 1)).sum())
        text = f"{who} {group.speedup.min():.2f} to {best.speedup:.2f} times (most at {best.image_size} px, batch {best.batch_size})"
        texts.append(text + (f", no difference that this run can show in {unclear} of {len(group)} rows" if unclear else ""))
    return f"**Speedup** over PyTorch FP32. {'; '.join(texts)}." if texts else ""


def _sizes(ok: pd.DataFrame) -> str:
    small, large = ok.image_size.min(), ok.image_size.max()
    if small == large:
        return ""
    batch = ok.batch_size.max()
    texts = []
    for who, group in _by_backend(ok[ok.batch_size == batch]):
        ends = group.set_index("image_size").fps
        if small in ends and large in ends:
            texts.append(
                f"{who} falls from {figure(ends[small])} to {figure(ends[large])} images/s ({ends[small] / ends[large]:.1f} times)"
            )
    pixels = (large / small) ** 2
    return (
        f"**Image size.** From {small} to {large} px an image has {pixels:.1f} times the pixels; at batch {batch} {'; '.join(texts)}."
        if texts
        else ""
    )


def _batches(ok: pd.DataFrame) -> str:
    if ok.batch_size.nunique() < 2:
        return ""
    texts = []
    for who, group in _by_backend(ok):
        found = {size: saturation(rows) for size, rows in group.groupby("image_size") if rows.batch_size.nunique() > 1}
        reached = [f"{size} px at batch {batch}" for size, batch in found.items() if batch]
        missing = [f"{size}" for size, batch in found.items() if not batch]
        parts = reached + ([f"not reached up to batch {group.batch_size.max()} at {', '.join(missing)} px"] if missing else [])
        texts.append(f"{who}: {', '.join(parts)}")
    return "**Batch size.** Doubling the batch gives under 5 % more from here on: " + "; ".join(texts) + "."


def _optimum(ok: pd.DataFrame) -> str:
    texts = []
    for size, group in ok.groupby("image_size"):
        tied = fastest(group)
        best = min(tied, key=lambda row: row.mean_ms)  # of equals the one that answers soonest
        texts.append(f"{size} px: {name(best)}, batch {best.batch_size}, {figure(best.fps)} images/s at {figure(best.mean_ms)} ms a batch")
    return "**Optimal here,** for throughput: " + "; ".join(texts) + "."


TABLE = ["Method", "Size", "Batch", "Mean ms", "Std ms", "p95 ms", "Images/s", "95 %", "Speedup", "95 %", "GPU MB", "Agreement", "Accuracy"]


def cells(row: pd.Series) -> list[str]:
    """One row of the table as people read it; a row that is not ok says why instead of figures."""
    head = [name(row), str(row.image_size), str(row.batch_size)]
    shares = ["" if pd.isna(value) else f"{value:.1%}" for value in (row.agreement, row.accuracy)]
    if row.status != "ok":
        return [*head, row.status.replace("_", " "), *[""] * 7, *shares]
    times = [figure(value) for value in (row.mean_ms, row.std_ms, row.p95_ms, row.fps)]
    fps = f"{figure(row.fps_low)}–{figure(row.fps_high)}"
    speed = ["", ""] if pd.isna(row.speedup) else [f"{row.speedup:.2f}", f"{row.speedup_low:.2f}–{row.speedup_high:.2f}"]
    if row.backend == "pytorch":
        speed = ["1", ""]
    return [*head, *times, fps, *speed, figure(row.gpu_memory_mb), *shares]


def table(rows: pd.DataFrame) -> str:
    """The rows as aligned text, the reasons of those without figures below."""
    lines = [TABLE, *(cells(row) for _, row in rows.iterrows())]
    widths = [max(len(line[k]) for line in lines) for k in range(len(TABLE))]
    text = [
        "  ".join(cell.ljust(width) if k == 0 else cell.rjust(width) for k, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([*text, *(f"{line}" for line in reasons(rows))])


def reasons(rows: pd.DataFrame) -> list[str]:
    """One line for each distinct reason why rows have no figures or can't win."""
    grouped = rows[rows.status != "ok"].groupby(["backend", "precision", "status", "reason"], sort=False)
    lines = []
    for (backend, precision, status, reason), group in grouped:
        where = sorted(
            {f"{row.image_size} px batch {row.batch_size}" for _, row in group.iterrows()},
            key=lambda text: [int(t) for t in text.split() if t.isdigit()],
        )
        scope = "" if len(where) == len(rows[rows.backend == backend]) else f" ({', '.join(where)})"
        lines.append(f"{label(backend, precision)}{scope}: {status.replace('_', ' ')}: {reason}")
    return lines


def read(results: Path) -> tuple[pd.DataFrame, dict]:
    """The rows and the environments of a results folder.  Raises UserError where there are none."""
    if not (results / "benchmark_results.csv").is_file():
        raise UserError(f"{results / 'benchmark_results.csv'} is missing; make it with: python benchmark.py")
    return records.read_csv(results), read_json(results / "environment.json") or {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"), help="folder with benchmark_results.csv")
    parser.add_argument("--write-readme", action="store_true", help="renew the charts and the generated parts of README.md")
    args = parser.parse_args()
    rows, environments = read(args.results)
    print(table(rows))
    print("\n".join(answers(rows)).replace("**", ""))
    for run, environment in environments.items():
        print(f"run {run}: {environment.get('short', '')}")
    if args.write_readme:
        from utils import report

        report.write_readme(Path("README.md"))


if __name__ == "__main__":
    run_main(main)
