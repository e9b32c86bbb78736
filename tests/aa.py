"""What "95 %" means here: sweeps of the same code, all pairs of them compared as compare.py does.

Run by hand, on a machine that does nothing else.  Arguments that are not named below go to benchmark.py; a
sweep that is there already is not measured again.  Prints how often two sweeps of the same thing were called
different (at most 5 % should be) and how wide the intervals are, and adds a line to --out.

    python tests/aa.py --sweeps 6 --folder aa --image-sizes 64 96 --batch-sizes 1 4 16 --backends pytorch onnx
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd

from utils.measure import timing
from utils.measure.schema import BASELINE
from utils.report import analysis, tables
from utils.utils import run_main, write_atomic


def half_widths(rows: pd.DataFrame, figure: str) -> np.ndarray:
    """Half of each row's interval, in percent."""
    bounds = zip(rows[f"{figure}_low"], rows[f"{figure}_high"], strict=True)
    return np.array([timing.half_width_pct(low, high) for low, high in bounds])


def summary(tables: list[pd.DataFrame], figure: str) -> dict:
    """Of throughput ("fps") or speedup: comparisons, the share called different, widths of the intervals."""
    kept = [analysis.measured(rows) for rows in tables]
    if figure == "speedup":
        kept = [rows[rows.backend != BASELINE] for rows in kept]
    pairs = [analysis.ratios(one, other) for one, other in itertools.combinations(kept, 2)]
    agree = np.concatenate([analysis.agrees(both, figure) for both in pairs])
    widths = np.concatenate([half_widths(rows, figure) for rows in kept])
    return {
        "figure": "throughput" if figure == "fps" else figure,
        "comparisons": len(agree),
        "different_pct": 100 * float((~agree).mean()),
        "half_width_median_pct": float(np.median(widths)),
        "half_width_90_pct": float(np.quantile(widths, 0.9)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path("aa"), help="where the sweeps go")
    parser.add_argument("--out", type=Path, help="a CSV to which the result is added")
    args, passed_on = parser.parse_known_args()
    folders = [args.folder / str(number) for number in range(args.sweeps)]
    for folder in folders:
        command = [sys.executable, ROOT / "benchmark.py", *passed_on, "--results", folder]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    found, environments = zip(*map(tables.read_table, folders), strict=True)
    known = next(iter(environments[0].values()))
    spent = [next(iter(found.values()))["sweep"]["total_s"] for found in environments]
    rows = []
    for figure in ("fps", "speedup"):
        told = summary(list(found), figure)
        rows.append({"machine": known["short"], "sweeps": len(found), "rows": len(found[0]), **told})
        rows[-1] |= {"minutes_each": sum(spent) / 60 / len(spent), "arguments": " ".join(passed_on)}
        print(
            f"{told['figure']}: {told['different_pct']:.1f} % of {told['comparisons']} comparisons called "
            f"different; half-width {told['half_width_median_pct']:.2f} % in the median, "
            f"{told['half_width_90_pct']:.2f} % for 90 % of the rows"
        )
    if args.out:
        old = [pd.read_csv(args.out)] if args.out.is_file() else []
        table = pd.concat([*old, pd.DataFrame(rows)])
        table = table.drop_duplicates(["machine", "arguments", "figure"], keep="last")
        write_atomic(args.out, table.to_csv(index=False, float_format="%.3g", lineterminator="\n"))


if __name__ == "__main__":
    run_main(main)
