"""Say what results tables mean: which backend is fastest and by how much, what fits given limits, what changed between two tables.

Reads benchmark_results.csv and environment.json alone, so any table can be read on any machine.

    python compare.py                                         # the table of results/ and the answers
    python compare.py --best --max-latency-ms 5 --min-accuracy 0.9
    python compare.py before/ after/ --fail-if-slower 5%      # two runs, or two machines; exit code 1 only beyond doubt
    python compare.py --write-readme                          # README.md's tables and all charts anew
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from utils import records
from utils.measure import SATURATED
from utils.plot_utils import draw_comparison, label
from utils.utils import UserError, read_json, run_main

CONFIGURATION = ["backend", "image_size", "batch_size"]


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that may be compared and may win."""
    return rows[rows.status == "ok"]


def fastest(rows: pd.DataFrame) -> list[pd.Series]:
    """The row with the highest throughput, and after it those that this run can't tell from it."""
    ordered = [row for _, row in measured(rows).sort_values("fps", ascending=False).iterrows()]
    return [row for row in ordered if records.level(ordered[0], row)]


def saturation(rows: pd.DataFrame) -> int | None:
    """The smallest batch beyond which doubling gives under 5 % more throughput, from one backend's rows at one size; None: not reached.

    Between batch sizes that are not twice one another the gain is spread evenly over the doublings.
    """
    ordered = measured(rows).sort_values("batch_size")
    batches, fps = ordered.batch_size.to_list(), ordered.fps.to_list()
    for i in range(len(batches) - 1):
        later = [
            (fps[j] / fps[i]) ** (1 / math.log2(batches[j] / batches[i])) - 1
            for j in range(i + 1, len(batches))
        ]
        if max(later) < SATURATED:
            return batches[i]
    return None


def name(row: pd.Series) -> str:
    return label(row.backend, row.precision)


def best_within(
    rows: pd.DataFrame, max_latency_ms: float | None, max_memory_mb: float | None, min_accuracy: float | None
) -> list[str]:
    """Sentences that name the fastest row within the limits, what it costs and the runner-up, or say why none fits.

    Latency is the 95th percentile of a batch.  A row whose figure is not known does not fit.
    """
    ok = measured(rows)
    limits = {
        "p95_ms": ("takes longer than", max_latency_ms, "ms (p95)", ok.p95_ms <= (max_latency_ms or 0)),
        "gpu_memory_mb": (
            "takes more than",
            max_memory_mb,
            "MB of GPU memory, or unknown",
            ok.gpu_memory_mb <= (max_memory_mb or 0),
        ),
        "accuracy": ("has less than", min_accuracy, "top-1 accuracy", ok.accuracy >= (min_accuracy or 0)),
    }
    asked = {column: limit for column, limit in limits.items() if limit[1] is not None}
    fits = ok[np.logical_and.reduce([fit for *_, fit in asked.values()])] if asked else ok
    if fits.empty:
        if ok.empty:
            return ["No row was measured, so none can be best; see: python compare.py"]
        why = [
            f"{int((~fit).sum())} of {len(ok)} rows: {verb} {bound:g} {unit}"
            for verb, bound, unit, fit in asked.values()
        ]
        nearest = {column: ok[column].max() if column == "accuracy" else ok[column].min() for column in asked}
        return [
            "No row fits.",
            *why,
            "Best of each: " + ", ".join(f"{column} {value:g}" for column, value in nearest.items()),
        ]
    ordered = fits.sort_values("fps", ascending=False)
    lines = [
        f"{'Fastest' if i == 0 else 'Runner-up'}: {_costs(row)}"
        for i, (_, row) in enumerate(ordered.iloc[:2].iterrows())
    ]
    if len(ordered) > 1 and records.level(ordered.iloc[0], ordered.iloc[1]):
        lines.append("Between these two this run can show no difference in throughput.")
    return lines


def _costs(row: pd.Series) -> str:
    memory = (
        "GPU memory not known" if pd.isna(row.gpu_memory_mb) else f"{row.gpu_memory_mb:.0f} MB of GPU memory"
    )
    place = f"run {row.run}, {name(row)}, {row.image_size} px, batch {row.batch_size}"
    return f"{place}: {row.fps:,.1f} images/s, p95 {row.p95_ms:.3g} ms, {memory}, accuracy {row.accuracy:.1%}; built in {row.build_s:.1f} s"


def ratios(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """For each configuration that both tables have: throughput after / before, and speedup after / before, with 95 % intervals.

    The two were measured independently, so the half-widths of their intervals, on a logarithmic scale, add as squares.
    Raises UserError where runs can't be matched: same names in both tables, or one run in each.
    """
    before, after = measured(before), measured(after)
    keys = ["run", *CONFIGURATION]
    if set(before.run) != set(after.run):
        if before.run.nunique() > 1 or after.run.nunique() > 1:
            raise UserError(
                f"runs {sorted(set(before.run))} and {sorted(set(after.run))} can't be matched; name one of each with --runs A B"
            )
        keys = CONFIGURATION  # two environments or machines: their names need not agree
    both = before.merge(after, on=keys, suffixes=("_before", "_after"))
    for figure in ("fps", "speedup"):
        ratio = both[f"{figure}_after"] / both[f"{figure}_before"]
        halves = [
            np.log(both[f"{figure}_high_{when}"] / both[f"{figure}_low_{when}"]) / 2
            for when in ("before", "after")
        ]
        half = np.exp(np.hypot(*halves))
        both[f"{figure}_ratio"], both[f"{figure}_ratio_low"], both[f"{figure}_ratio_high"] = (
            ratio,
            ratio / half,
            ratio * half,
        )
    return both


def comparison(both: pd.DataFrame) -> list[str]:
    """The ratios as aligned lines, and how many configurations agree within their intervals."""
    lines = []
    for _, row in both.iterrows():
        verdict = (
            "no difference"
            if row.fps_ratio_low <= 1 <= row.fps_ratio_high
            else "faster"
            if row.fps_ratio > 1
            else "slower"
        )
        precision = row.precision_after
        head = f"{label(row.backend, precision):<34}{row.image_size:>5} px  batch {row.batch_size:>3}"
        lines.append(
            f"{head}  {row.fps_ratio:6.3f}  ({row.fps_ratio_low:.3f}–{row.fps_ratio_high:.3f})  {verdict}"
        )
    level = (both.fps_ratio_low <= 1) & (both.fps_ratio_high >= 1)
    lines.append(
        f"Throughput agrees within the 95 % intervals in {int(level.sum())} of {len(both)} configurations."
    )
    speed = both[(both.backend != "pytorch") & both.speedup_ratio.notna()]
    if len(speed):
        agree = (speed.speedup_ratio_low <= 1) & (speed.speedup_ratio_high >= 1)
        lines.append(f"Speedup over PyTorch FP32 agrees in {int(agree.sum())} of {len(speed)}.")
    return lines


def environment_changes(before: dict, after: dict) -> list[str]:
    """One line for each fact of the environment that differs: what was, what is."""

    def flat(known: dict) -> dict:
        facts = {
            key: value
            for key, value in known.items()
            if key not in ("short", "settings", "packages", "date", "command", "commit", "clean")
        }
        return facts | known.get("packages", {})

    a, b = flat(before), flat(after)
    return [
        f"{key}: {a.get(key)} -> {b.get(key)}" for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)
    ]


def read(results: Path) -> tuple[pd.DataFrame, dict]:
    """The rows and the environments (run name -> facts) of a results folder, or of the folder of a CSV.  Raises UserError."""
    folder = results.parent if results.suffix == ".csv" else results
    if not (folder / "benchmark_results.csv").is_file():
        raise UserError(f"{folder / 'benchmark_results.csv'} is missing; make it with: python benchmark.py")
    return records.read_csv(folder), read_json(folder / "environment.json") or {}


def compare_two(paths: list[Path], runs: list[str] | None, fail_if_slower: float | None) -> None:
    """Print how the second table differs from the first and draw it; exit code 1 if any row is slower beyond doubt."""
    (before, old), (after, new) = (read(path) for path in paths)
    if runs:
        before, after = before[before.run == runs[0]].assign(run=runs[-1]), after[after.run == runs[-1]]
    both = ratios(before, after)
    if both.empty:
        raise UserError(
            f"{paths[0]} and {paths[1]} have no measured configuration in common; see: python compare.py {paths[0]}"
        )
    print(f"throughput, {paths[1]} / {paths[0]}, with 95 % intervals")
    print("\n".join(comparison(both)))
    changes = environment_changes(
        old.get(runs[0] if runs else before.run.iloc[0], {}), new.get(after.run.iloc[0], {})
    )
    print("\n".join(["Environment: " + ("no difference" if not changes else ""), *changes]))
    chart = (paths[1].parent if paths[1].suffix == ".csv" else paths[1]) / "comparison.png"
    draw_comparison(both, f"{paths[0]} → {paths[1]}", chart)
    print(f"written: {chart}")
    if fail_if_slower is not None:
        slower = both[both.fps_ratio_high < 1 - fail_if_slower]
        print(
            f"{len(slower)} of {len(both)} configurations are slower by more than {fail_if_slower:.1%} beyond their intervals"
        )
        sys.exit(1 if len(slower) else 0)


def share(text: str) -> float:
    """ "5%" or "0.05" -> 0.05"""
    return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results",
        type=Path,
        nargs="*",
        default=[Path("results")],
        help="one folder (or its CSV), or two to compare",
    )
    parser.add_argument("--runs", nargs="+", help="of two tables, the run of each to compare")
    parser.add_argument(
        "--fail-if-slower",
        type=share,
        metavar="5%",
        help="exit code 1 if the second is slower by more, beyond its interval",
    )
    parser.add_argument(
        "--best", action="store_true", help="only the fastest configuration within the limits below"
    )
    parser.add_argument("--max-latency-ms", type=float, help="95th percentile of a batch")
    parser.add_argument("--max-memory-mb", type=float, help="GPU memory of the process")
    parser.add_argument("--min-accuracy", type=float, help="top-1 on the test set, 0 to 1")
    parser.add_argument(
        "--write-readme", action="store_true", help="renew the charts and the generated parts of README.md"
    )
    args = parser.parse_args()
    from utils import report

    if len(args.results) > 2:
        raise UserError("compare.py takes one results folder or two; see: python compare.py --help")
    if len(args.results) == 2:
        return compare_two(args.results, args.runs, args.fail_if_slower)
    rows, environments = read(args.results[0])
    if args.best:
        print("\n".join(best_within(rows, args.max_latency_ms, args.max_memory_mb, args.min_accuracy)))
        return
    print(report.text_table(rows))
    print("\n".join(report.answers_of(rows)).replace("**", ""))
    for run, environment in environments.items():
        print(f"run {run}: {environment.get('short', '')}")
    if args.write_readme:
        report.write_readme(Path("README.md"))


if __name__ == "__main__":
    run_main(main)
