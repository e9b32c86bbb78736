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

from utils.utils import UserError, number, run_main, write_atomic

LIMITS = {  # column: flag, its largest value, what it bounds
    "p95_ms": ("--max-latency-ms", 1e9, "95th percentile of a batch"),
    "memory_mb": ("--max-memory-mb", 1e9, "of the process: GPU memory, on a CPU the host's"),
    "accuracy": ("--min-accuracy", 1, "top-1 on the test set, 0 to 1"),
}
PASSING = ["short", "settings", "packages", "date", "command", "commit", "clean", "sweep", "ceilings"]


def tell(results: Path) -> None:
    """Print the table, the answers and the environment of each sweep."""
    from utils.report import tables, words

    rows, environments = tables.read_table(results)
    print(words.text_table(rows))
    print("\n".join(words.answers_of(rows)).replace("**", ""))
    for sweep, known in environments.items():
        print(f"sweep {sweep}: {known.get('short', '')}")


def tell_best(results: Path, limits: dict[str, float | None]) -> int:
    """Print the fastest row within the limits and the next; the exit code: 1 if none fits."""
    from utils.report import analysis, tables, words

    best = analysis.best_within(tables.read_table(results)[0], limits).head(2)
    if best.empty:
        print(f"None of the measured rows fits; see: python compare.py {results}")
        return 1
    print(words.text_table(best))
    if best.fps_low.isna().any():
        print("Measured in one round, which supports no verdict: use --rounds 3.")
    elif len(best) > 1 and analysis.indistinguishable(best.iloc[0], best.iloc[1]):
        print("The two are indistinguishable in throughput: their intervals overlap.")
    return 0


def compare_two(paths: list[Path], sweeps: list[str] | None, slower_by: float | None) -> int:
    """Print how the second table differs from the first; the exit code: 0, with `slower_by` only if something
    could be judged, nothing is slower and nothing was lost."""
    from utils.measure.schema import BASELINE
    from utils.report import analysis, tables, words

    (before, old), (after, new) = (tables.read_table(path) for path in paths)
    first, second = sweeps or (before.sweep.iloc[0], after.sweep.iloc[0])
    if sweeps:
        before, after = before[before.sweep == first].assign(sweep=second), after[after.sweep == second]
    both = analysis.ratios(before, after)
    if both.empty:
        mend = f"see their sweeps: python compare.py {paths[0]}, python compare.py {paths[1]}"
        raise UserError(f"{paths[0]} and {paths[1]} have no measured configuration in common; {mend}")
    print(f"throughput, {paths[1]} / {paths[0]}, with 95 % intervals")
    print(words.aligned(words.lines_of(words.RATIOS, both)))
    others = both[both.backend != BASELINE]
    for of, figure, rows in (("Throughput", "fps", both), ("Speedup over PyTorch FP32", "speedup", others)):
        known = rows[rows[f"{figure}_ratio_low"].notna()]
        count = f"{int(analysis.agrees(known, figure).sum())} of {len(known)} configurations"
        print(f"{of} agrees within the 95 % intervals in {count}.")
    median, low, high = map(words.figure, both.fps_ratio.quantile([0.5, 0, 1]))
    print(f"Median over {len(both)} configurations: {median}x {paths[0]} (range {low}-{high}).")
    a, b = (known | known.get("packages", {}) for known in (old.get(first, {}), new.get(second, {})))
    for fact in dict.fromkeys([*a, *b]):
        if fact not in PASSING and a.get(fact) != b.get(fact):
            print(f"{fact}: {a.get(fact)} -> {b.get(fact)}")
    if slower_by is None:
        return 0
    judged, lost = both[both.fps_ratio_low.notna()], len(analysis.measured(before)) - len(both)
    slower = judged[judged.fps_ratio_high < 1 - slower_by]
    beyond = f"slower by more than {slower_by:.1%} beyond their intervals"
    print(f"{len(slower)} of {len(judged)} configurations are {beyond}")
    if len(judged) < len(both):
        print(f"{len(both) - len(judged)} more can't be judged: measured in one round; use --rounds 3")
    if lost:
        print(f"{lost} configurations of the first table are not ok in the second, whose own table says why")
    return int(judged.empty or len(slower) > 0 or lost > 0)


def write_readmes(path: Path) -> None:
    """Renew README.md's generated parts and, of every folder it shows, the README and the charts."""
    from utils import plot_utils
    from utils.report import readme

    found = readme.read_folders(path)
    write_atomic(path, readme.render(path, found))
    for folder, (rows, environments) in found.items():
        plot_utils.draw_all(rows, environments, folder)
        write_atomic(folder / "README.md", readme.folder_readme(folder, rows, environments))
    print(f"written: {path}; README.md and charts in {', '.join(map(str, found))}")


def share(text: str) -> float:
    """ "5%" or "0.05" -> 0.05"""
    return number(float, 0, 100)(text[:-1]) / 100 if text.endswith("%") else number(float, 0, 1)(text)


def parse() -> argparse.Namespace:
    """The arguments.  One without effect is refused: a gate that was not asked passes silently."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    which = "one results folder, or two to compare"
    parser.add_argument("results", type=Path, nargs="*", default=[Path("results")], help=which)
    pair = "of two tables, the sweep of each to compare"
    parser.add_argument("--sweeps", nargs=2, metavar=("A", "B"), help=pair)
    slower = "exit code 1 if one is slower by more, beyond its interval, or nothing could be judged"
    parser.add_argument("--fail-if-slower", type=share, metavar="5%", help=slower)
    parser.add_argument("--best", action="store_true", help="only the fastest within the limits below")
    for column, (flag, most, of) in LIMITS.items():
        parser.add_argument(flag, dest=column, metavar="X", type=number(float, 0, most), help=of)
    anew = "renew the charts, README.md's generated parts and the results' READMEs"
    parser.add_argument("--write-readme", action="store_true", help=anew)
    args = parser.parse_args()
    two, limited = len(args.results) == 2, any(vars(args)[column] is not None for column in LIMITS)
    if len(args.results) > 2 or args.best + args.write_readme + two > 1:
        parser.error("name one results folder, with --best or --write-readme or neither, or two to compare")
    if not two and (args.sweeps or args.fail_if_slower is not None):
        parser.error("--fail-if-slower and --sweeps need two results folders")
    if limited and not args.best:
        parser.error("--max-latency-ms, --max-memory-mb and --min-accuracy need --best")
    return args


def main() -> None:
    args = parse()
    code = 0
    if len(args.results) == 2:
        code = compare_two(args.results, args.sweeps, args.fail_if_slower)
    elif args.best:
        code = tell_best(args.results[0], {column: vars(args)[column] for column in LIMITS})
    elif args.write_readme:
        write_readmes(Path("README.md"))
    else:
        tell(args.results[0])
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_main(main)
