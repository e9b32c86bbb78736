"""Say what results tables mean: which backend is fastest, what fits given limits, what changed between two.

Reads benchmark_results.csv and environment.json alone, so any table can be read on any machine.

    python compare.py                                       # the table of results/ and the answers
    python compare.py --best --max-latency-ms 5 --min-accuracy 0.9
    python compare.py before/ after/ --fail-if-slower 5%    # two tables; exit code 1 only beyond doubt
    python compare.py --write-readme                        # README.md, results' READMEs and charts anew
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from utils import findings, plot_utils, readme, records, report
from utils.schema import BASELINE
from utils.utils import UserError, run_main

LIMITS = {  # column: what a row that misses the limit does, and the limit's unit
    "p95_ms": ("takes longer than", "ms (p95)"),
    "gpu_memory_mb": ("takes more than", "MB of GPU memory, or unknown"),
    "accuracy": ("has less than", "top-1 accuracy"),
}
PASSING = ["short", "settings", "packages", "date", "command", "commit", "clean", "sweep", "ceilings"]


def best_lines(rows: pd.DataFrame, max_latency_ms, max_memory_mb, min_accuracy) -> list[str]:
    """Sentences that name the fastest row within the limits, its cost and the runner-up, or why none fits."""
    total = len(findings.measured(rows))
    if not total:
        return ["No row was measured, so none can be best; see: python compare.py"]
    fitting, missed = findings.best_within(rows, max_latency_ms, max_memory_mb, min_accuracy)
    if fitting.empty:
        lines, nearest = ["No row fits."], []
        asked = {"p95_ms": max_latency_ms, "gpu_memory_mb": max_memory_mb, "accuracy": min_accuracy}
        for column, count, best in missed:
            verb, unit = LIMITS[column]
            lines.append(f"{count} of {total} rows: {verb} {asked[column]:g} {unit}")
            nearest.append(f"{column} {best:g}")
        return [*lines, "Best of each: " + ", ".join(nearest)]
    ordered = [row for _, row in fitting.iloc[:2].iterrows()]
    lines = [f"{name}: {costs(row)}" for name, row in zip(("Fastest", "Runner-up"), ordered, strict=False)]
    if len(ordered) > 1 and findings.level(*ordered):
        lines.append("Between these two this sweep can show no difference in throughput.")
    return lines


def costs(row: pd.Series) -> str:
    memory = f"{report.figure(row.gpu_memory_mb)} MB of GPU memory"
    memory = "GPU memory not known" if pd.isna(row.gpu_memory_mb) else memory
    place = f"sweep {row.sweep}, {report.name(row)}, {row.image_size} px, batch {row.batch_size}"
    speed = f"{report.figure(row.fps)} images/s, p95 {report.figure(row.p95_ms)} ms"
    return f"{place}: {speed}, {memory}, accuracy {row.accuracy:.1%}; built in {row.build_s:.1f} s"


COMPARISON = [
    ("Method", lambda row: report.label(row.backend, row.precision_after)),
    *report.HEAD[1:],
    ("Ratio", lambda row: f"{row.fps_ratio:.3f}"),
    ("95 %", lambda row: f"{row.fps_ratio_low:.3f}–{row.fps_ratio_high:.3f}"),
    ("Verdict", lambda row: row.verdict),
]


def comparison(both: pd.DataFrame) -> list[str]:
    """The ratios as aligned lines, and how many configurations agree within their intervals."""
    count = int(findings.agrees(both, "fps").sum())
    lines = [report.aligned(report.lines_of(COMPARISON, both))]
    lines.append(f"Throughput agrees within the 95 % intervals in {count} of {len(both)} configurations.")
    speed = both[(both.backend != BASELINE) & both.speedup_ratio.notna()]
    count = int(findings.agrees(speed, "speedup").sum())
    lines += [f"Speedup over PyTorch FP32 agrees in {count} of {len(speed)}."] if len(speed) else []
    return lines


def environment_changes(before: dict, after: dict) -> list[str]:
    """One line for each fact of the environment that differs: what was, what is."""
    a, b = (known | known.get("packages", {}) for known in (before, after))
    changed = [key for key in dict.fromkeys([*a, *b]) if key not in PASSING and a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in changed]


def compare_two(paths: list[Path], sweeps: list[str] | None, fail_if_slower: float | None) -> None:
    """Print how the second table differs from the first and draw it; exit code 1 if any is surely slower."""
    (before, old), (after, new) = (records.read_table(path) for path in paths)
    if sweeps:
        before = before[before.sweep == sweeps[0]].assign(sweep=sweeps[-1])
        after = after[after.sweep == sweeps[-1]]
    both = findings.ratios(before, after)
    if both.empty:
        see = f"see: python compare.py {paths[0]}"
        raise UserError(f"{paths[0]} and {paths[1]} have no measured configuration in common; {see}")
    print(f"throughput, {paths[1]} / {paths[0]}, with 95 % intervals")
    print("\n".join(comparison(both)))
    first = sweeps[0] if sweeps else before.sweep.iloc[0]
    changes = environment_changes(old.get(first, {}), new.get(after.sweep.iloc[0], {}))
    print("\n".join(["Environment: " + ("no difference" if not changes else ""), *changes]))
    chart = (paths[1].parent if paths[1].suffix == ".csv" else paths[1]) / "comparison.png"
    plot_utils.draw_comparison(both, f"{paths[0]} → {paths[1]}", chart)
    print(f"written: {chart}")
    if fail_if_slower is not None:
        slower = findings.slower_beyond(both, fail_if_slower)
        beyond = f"slower by more than {fail_if_slower:.1%} beyond their intervals"
        print(f"{len(slower)} of {len(both)} configurations are {beyond}")
        sys.exit(1 if len(slower) else 0)


def share(text: str) -> float:
    """ "5%" or "0.05" -> 0.05"""
    return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)


def write_readmes(path: Path) -> None:
    """Renew README.md's generated parts and, of every folder it names, the README and the charts."""
    readme.write_readme(path)
    for folder in readme.folders_of(path):
        plot_utils.draw_all(*records.read_table(folder), folder)
        readme.write_folder_readme(folder)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    folders = dict(nargs="*", default=[Path("results")], help="one folder (or its CSV), or two to compare")
    parser.add_argument("results", type=Path, **folders)
    parser.add_argument("--sweeps", nargs="+", help="of two tables, the sweep of each to compare")
    slower = "exit code 1 if the second is slower by more, beyond its interval"
    parser.add_argument("--fail-if-slower", type=share, metavar="5%", help=slower)
    parser.add_argument("--best", action="store_true", help="only the fastest within the limits below")
    parser.add_argument("--max-latency-ms", type=float, help="95th percentile of a batch")
    parser.add_argument("--max-memory-mb", type=float, help="GPU memory of the process")
    parser.add_argument("--min-accuracy", type=float, help="top-1 on the test set, 0 to 1")
    anew = "renew the charts, README.md's generated parts and the results' READMEs"
    parser.add_argument("--write-readme", action="store_true", help=anew)
    args = parser.parse_args()
    if len(args.results) > 2:
        raise UserError("compare.py takes one results folder or two; see: python compare.py --help")
    if len(args.results) == 2:
        return compare_two(args.results, args.sweeps, args.fail_if_slower)
    rows, environments = records.read_table(args.results[0])
    if args.best:
        print("\n".join(best_lines(rows, args.max_latency_ms, args.max_memory_mb, args.min_accuracy)))
        return None
    print(report.text_table(rows))
    print("\n".join(report.answers_of(rows)).replace("**", ""))
    for sweep, known in environments.items():
        print(f"sweep {sweep}: {known.get('short', '')}")
    if args.write_readme:
        write_readmes(Path("README.md"))
    return None


if __name__ == "__main__":
    run_main(main)
