"""Say what results tables mean: which backend is fastest, what fits given limits, what changed between two.

Reads benchmark_results.csv and environment.json alone, so any table can be read on any machine.

    python compare.py                                       # the table of results/ and the answers
    python compare.py --best --max-latency-ms 5 --min-accuracy 0.9
    python compare.py before/ after/ --fail-if-slower 5%    # exit code 0 only if judged and not slower
    python compare.py --write-readme                        # README.md, results' READMEs and charts anew
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from utils.utils import UserError, number, run_main

if TYPE_CHECKING:  # imported where it is needed, so that --help answers at once
    import pandas as pd

LIMITS = {  # column: flag, its largest value, what it bounds
    "p95_ms": ("--max-latency-ms", 1e9, "95th percentile of a batch"),
    "memory_mb": ("--max-memory-mb", 1e9, "of the process: GPU memory, on a CPU the host's"),
    "accuracy": ("--min-accuracy", 1, "top-1 on the test set, 0 to 1"),
}
PASSING = ["short", "settings", "packages", "date", "command", "commit", "clean", "sweep", "ceilings"]

# ---- one table


def tell(results: Path) -> None:
    """Print the table, the answers and the environment of each sweep."""
    from utils.report import tables, words

    rows, environments = tables.read_table(results)
    print(words.text_table(rows))
    print("\n".join(words.answers_of(rows)).replace("**", ""))
    for sweep, known in environments.items():
        print(f"sweep {sweep}: {known.get('short', '')}")


def best_lines(rows: "pd.DataFrame", limits: dict[str, float | None]) -> tuple[list[str], bool]:
    """Sentences that name the fastest row within the limits, its cost and the runner-up, or why none fits;
    and whether one does."""
    from utils.report import analysis, words

    fitting, missed = analysis.best_within(rows, limits)
    if fitting.empty:
        lines = [f"None of {len(analysis.measured(rows))} measured rows fits; see: python compare.py"]
        for column, count, best in missed:
            limit = f"{LIMITS[column][0]} {limits[column]:g}"
            lines.append(f"{count} miss {limit}; the best has {words.figure(best) or 'no such figure'}")
        return lines, False
    ordered = [row for _, row in fitting.iloc[:2].iterrows()]
    lines = [f"{place}: {costs(row)}" for place, row in zip(("Most images/s", "Next"), ordered, strict=False)]
    if any(row.fps_low != row.fps_low for row in ordered):  # NaN
        lines.append("Measured in one round, which supports no verdict: use --rounds 3.")
    elif len(ordered) > 1 and analysis.indistinguishable(*ordered):
        lines.append("The two are indistinguishable in throughput: their intervals overlap.")
    return lines, True


def costs(row: "pd.Series") -> str:
    """What a row achieves and takes, in one line."""
    from utils.report import words

    place = f"sweep {row.sweep}, {words.name(row)}, {row.image_size} px, batch {row.batch_size}"
    speed = f"{words.figure(row.fps)} images/s, p95 {words.figure(row.p95_ms)} ms"
    whose = "GPU memory" if row.device == "cuda" else "host memory"
    memory = f"{words.figure(row.memory_mb)} MB of {whose}" if row.memory_mb > 0 else f"unknown {whose}"
    built = f"built in {words.figure(row.build_s) or 'unknown'} s"
    return f"{place}: {speed}, {memory}, accuracy {words.percent(row.accuracy) or 'unknown'}; {built}"


# ---- two tables


def comparison(both: "pd.DataFrame") -> list[str]:
    """The ratios as aligned lines, and how many configurations agree within their intervals."""
    from utils.measure.schema import BASELINE
    from utils.report import analysis, words

    def limits(row) -> str:
        return words.interval(row.fps_ratio_low, row.fps_ratio_high, "{:.3f}".format)

    ratio = ("Ratio", lambda row: f"{row.fps_ratio:.3f}")
    columns = [*words.HEAD, ratio, ("Ratio, 95 % CI", limits), ("Verdict", "verdict")]
    lines = [words.aligned(words.lines_of(columns, both))]
    others = both[both.backend != BASELINE]
    for of, figure, rows in (("Throughput", "fps", both), ("Speedup over PyTorch FP32", "speedup", others)):
        known = rows[rows[f"{figure}_ratio_low"].notna()]
        count = f"{int(analysis.agrees(known, figure).sum())} of {len(known)} configurations"
        lines.append(f"{of} agrees within the 95 % intervals in {count}.")
    return lines


def environment_changes(before: dict, after: dict) -> list[str]:
    """One line for each fact of the environment that differs: what was, what is."""
    a, b = (known | known.get("packages", {}) for known in (before, after))
    changed = [key for key in dict.fromkeys([*a, *b]) if key not in PASSING and a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in changed]


def compare_two(paths: list[Path], sweeps: list[str] | None, slower_by: float | None) -> int:
    """Print how the second table differs from the first and draw it; the exit code."""
    from utils import plot_utils
    from utils.report import analysis, tables, words

    (before, old), (after, new) = (tables.read_table(path) for path in paths)
    first, second = (sweeps[0], sweeps[-1]) if sweeps else (before.sweep.iloc[0], after.sweep.iloc[0])
    if sweeps:
        for path, rows, sweep in zip(paths, (before, after), (first, second), strict=True):
            if sweep not in set(rows.sweep):
                raise UserError(f"{path} has no sweep {sweep}; name one of: {', '.join(rows.sweep.unique())}")
        before, after = before[before.sweep == first].assign(sweep=second), after[after.sweep == second]
    both = analysis.ratios(before, after)
    if both.empty:
        see = f"see: python compare.py {paths[0]}"
        raise UserError(f"{paths[0]} and {paths[1]} have no measured configuration in common; {see}")
    print(f"throughput, {paths[1]} / {paths[0]}, with 95 % intervals")
    print("\n".join(comparison(both)))
    median, low, high = map(words.figure, both.fps_ratio.quantile([0.5, 0, 1]))
    print(f"Median over {len(both)} configurations: {median}x {paths[0]} (range {low}-{high}).")
    changes = environment_changes(old.get(first, {}), new.get(second, {}))
    print("\n".join(["Environment:", *(changes or ["no difference"])]))
    chart = (paths[1].parent if paths[1].suffix == ".csv" else paths[1]) / "comparison.png"
    count = f"no difference in {int(analysis.agrees(both, 'fps').sum())} of {len(both)}"
    plot_utils.draw_comparison(both, f"{paths[0]} → {paths[1]}: {count}", chart)
    print(f"written: {chart}")
    return 0 if slower_by is None else gate(before, after, both, slower_by)


def gate(before: "pd.DataFrame", after: "pd.DataFrame", both: "pd.DataFrame", slower_by: float) -> int:
    """The exit code: 0 only if something could be judged, nothing is slower and nothing was lost."""
    from utils.report import analysis, words

    judged, lost = both[both.fps_ratio_low.notna()], analysis.lost(before, after)
    slower = judged[judged.fps_ratio_high < 1 - slower_by]
    beyond = f"slower by more than {slower_by:.1%} beyond their intervals"
    print(f"{len(slower)} of {len(judged)} configurations are {beyond}")
    if len(judged) < len(both):
        print(f"{len(both) - len(judged)} more can't be judged: measured in one round; use --rounds 3")
    for row in lost.itertuples():
        where = f"{words.name(row)}, {row.image_size} px, batch {row.batch_size}"
        print(f"no longer ok: {where}: {row.status.replace('_', ' ')}: {row.reason}")
    return int(judged.empty or len(slower) > 0 or len(lost) > 0)


# ---- README.md


def write_readmes(path: Path) -> None:
    """Renew README.md's generated parts and, of every folder it names, the README and the charts.

    Raises UserError where there is no such part.
    """
    from utils import plot_utils
    from utils.report import readme

    if not readme.marked(path):
        mend = "put <!-- begin summary results --> and <!-- end --> on lines of their own where one shall be"
        raise UserError(f"{path} has no generated parts; {mend}")
    found = readme.read_folders(path)
    readme.write_readme(path, found)
    for folder, (rows, environments) in found.items():
        plot_utils.draw_all(rows, environments, folder)
        readme.write_folder_readme(folder, rows, environments)
    print(f"written: {path}; README.md and charts in {', '.join(map(str, found))}")


# ---- arguments


def share(text: str) -> float:
    """ "5%" or "0.05" -> 0.05"""
    value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0% to 100%")
    return value


def parse() -> argparse.Namespace:
    """The arguments.  One without effect is refused: a gate that was not asked passes silently."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    which = "one folder (or its CSV), or two to compare"
    parser.add_argument("results", type=Path, nargs="*", default=[Path("results")], help=which)
    parser.add_argument("--sweeps", nargs="+", help="of two tables, the sweep of each to compare")
    slower = "exit code 1 if one is slower by more, beyond its interval, or nothing could be judged"
    parser.add_argument("--fail-if-slower", type=share, metavar="5%", help=slower)
    parser.add_argument("--best", action="store_true", help="only the fastest within the limits below")
    for column, (flag, most, of) in LIMITS.items():
        parser.add_argument(flag, dest=column, metavar="X", type=number(float, 0, most), help=of)
    anew = "renew the charts, README.md's generated parts and the results' READMEs"
    parser.add_argument("--write-readme", action="store_true", help=anew)
    args = parser.parse_args()
    two, limited = len(args.results) == 2, any(vars(args)[column] is not None for column in LIMITS)
    if len(args.results) > 2 or len(args.sweeps or []) > 2:
        parser.error("one results folder or two can be compared, and --sweeps takes one name, or two")
    if not two and (args.sweeps or args.fail_if_slower is not None):
        parser.error("--fail-if-slower and --sweeps need two results folders")
    if args.best + args.write_readme + two > 1:
        parser.error("--best and --write-readme are two commands, which take one results folder")
    if limited and not args.best:
        parser.error("--max-latency-ms, --max-memory-mb and --min-accuracy need --best")
    return args


def main() -> None:
    args = parse()
    code = 0
    if len(args.results) == 2:
        code = compare_two(args.results, args.sweeps, args.fail_if_slower)
    elif args.best:
        from utils.report import tables

        limits = {column: vars(args)[column] for column in LIMITS}
        lines, fits = best_lines(tables.read_table(args.results[0])[0], limits)
        print("\n".join(lines))
        code = int(not fits)
    elif args.write_readme:
        write_readmes(Path("README.md"))
    else:
        tell(args.results[0])
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_main(main)
