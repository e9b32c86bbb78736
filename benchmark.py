"""Measure every backend at every image size and batch size: which is fastest, by how much and at what cost.

A round is fresh processes, from a server of their own: at each image size the backends' processes are alive
together and are timed in turn, in blocks of a fraction of a second.  After three rounds the image sizes with
an interval still wider than --ci-width get further rounds, until all are narrow enough or --budget is spent.
What is measured already for the same settings and environment is not measured again.

Reads weights/best_resnet18_<size>.pth and data/test; writes results/raw/ (every sample),
benchmark_results.csv, environment.json, benchmark.log, README.md and the charts; a run into results/ also
renews the README's table.

    python benchmark.py
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

import psutil
from tqdm import tqdm

import backends
from utils.backend import builds_ahead
from utils.measure import jobs, records
from utils.measure.schema import Job
from utils.utils import in_fresh_process, number, run_main, write_json

CI_WIDTH_PCT = {"cuda": 1.0, "cpu": 5.0}
BUDGET_MINUTES = {"cuda": 3.5, "cpu": 7.0}
TIMEOUT_S = 1800.0  # after which a step is taken to hang
BUSY_PCT = 20  # of all cores, by other programs
ROOT = Path(__file__).resolve().parent


# ---- what there is to do


def measured_rows(measured) -> list:
    """The rows of a Sweep that are asked for and have figures."""
    from utils.report.rows import rows_of

    keys = {job.key for job in measured.asked}
    wanted = {(job.backend, job.image_size): job.batch_sizes for job in measured.asked}
    rows = rows_of([record for record in measured.records.values() if record.key in keys], {})
    rows = [row for row in rows if row.batch_size in wanted.get((row.backend, row.image_size), ())]
    return [row for row in rows if row.status == "ok"]


def further_jobs(asked: list[Job], rows: list, wide: list, round_: int) -> list[list[Job]]:
    """A further round: a group for each image size that has a row too wide, the widest first.

    All `rows` of the size are measured again: were each to stop as soon as its rounds agree, many would stop
    where they agree by chance, and 95 % intervals would hold less often.
    """
    groups = []
    for size in dict.fromkeys(row.image_size for row in wide):
        group = []
        for job in asked:
            batches = [row.batch_size for row in rows if (row.backend, row.image_size) == (job.backend, size)]
            if job.image_size == size and job.round == 0 and batches:
                group.append(jobs.another(job, round=round_, only=tuple(sorted(batches)), auto=False))
        groups.append(group)
    return groups


# ---- measuring


def measure_roofline(job: Job) -> None:
    """Have a fresh process measure what this machine could do at most, unless it is known."""
    from utils.measure import roofline

    folder = job.record.parent
    if records.read_roofline(folder, job.settings_key) is None:
        found = in_fresh_process(roofline.measure, job.device)
        write_json(folder / "ceilings.json", {"settings_key": job.settings_key, **found})


def sweep(asked: list[Job], timeout: float, ci_width: float, budget_minutes: float) -> None:
    """Bring every record up to date, then add rounds where intervals are too wide."""
    from utils.measure.sweep import Sweep
    from utils.report.rows import width_pct

    measured, limit_s, several = Sweep(asked, timeout), budget_minutes * 60, asked[0].settings.rounds > 1
    todo, further = measured.prepare(ci_width), 0
    with tqdm(total=len(todo), desc="benchmark", unit="process", disable=None) as progress:
        if todo:
            print_builds(todo)
            print_busy()
        measure_roofline(asked[0])
        for _, jobs_of_round in itertools.groupby(todo, key=lambda job: job.round):
            by_size = itertools.groupby(jobs_of_round, key=lambda job: job.image_size)
            measured.measure_round([list(group) for _, group in by_size], progress)
        next_round = max(
            [asked[0].settings.rounds, *(record.round + 1 for record in measured.records.values())]
        )
        for round_ in itertools.count(next_round):
            rows = measured_rows(measured) if several else []
            wide = sorted((row for row in rows if width_pct(row) > ci_width), key=width_pct, reverse=True)
            if not wide or measured.spent_s >= limit_s:
                break
            groups = further_jobs(asked, rows, wide, round_)
            progress.set_postfix_str(
                f"{len(wide)} rows still too wide, the widest ±{width_pct(wide[0]):.1f} %"
            )
            progress.total += sum(map(len, groups))
            measured.measure_round(groups, progress, limit_s)
            further += 1
    if not todo and not further:
        print(f"{measured.folder}: everything is up to date")


def builds_of(todo: list[Job]) -> dict[Path, float | None]:
    """The artefacts that will be built before anything is measured, and the seconds of the last time."""
    ahead = {}
    for job in todo:
        backend = backends.make(job.backend, job.script)
        if job.round == 0 and not backend.why_unavailable(job.device):
            files = backend.artefacts(job.checkpoint, job.image_size, list(job.batch_sizes), job.device)
            ahead |= builds_ahead(files, job.checkpoint)
    return ahead


def print_builds(todo: list[Job]) -> None:
    if ahead := in_fresh_process(builds_of, todo):  # on a GPU, only there a runtime may be loaded
        known = [seconds for seconds in ahead.values() if seconds]
        took = f"; last time {len(known)} of them took {sum(known):.0f} s" if known else ""
        print(f"to be built first: {', '.join(path.name for path in ahead)}{took}", file=sys.stderr)


def print_busy() -> None:
    """Before anything is timed: a load that lasts makes no interval wider, but every figure wrong."""
    if (busy := psutil.cpu_percent(1)) > BUSY_PCT:
        mend = "close them, or the figures are not this machine's"
        print(f"other programs use {busy:.0f} % of the processor: {mend}", file=sys.stderr)


# ---- what is written


def tables_shown_beside(results: Path) -> dict | None:
    """The tables of other results that the repository's README.md shows beside results/, read before anything
    is measured: UserError where one is damaged, or README.md is.  None where other results are measured."""
    from utils.report import readme

    shown = results.resolve() == ROOT / "results"
    return readme.read_folders(ROOT / "README.md", measuring=results) if shown else None


def write_all(args: argparse.Namespace, asked: list[Job], results: Path, others: dict | None) -> int:
    """Records -> table, charts, answers and READMEs, and with --end-to-end its table, too; the exit code.

    `others` are the tables of the other results that README.md shows, or None to leave it alone.
    """
    from utils import plot_utils
    from utils.report import readme, tables, words

    rows, environments = tables.write_table(results)
    served = 0
    if args.end_to_end:
        sizes = map(str, sorted({job.image_size for job in asked}))
        paths = ["--data", args.data, "--weights", args.weights, "--results", results, "--sweep", args.sweep]
        command = [sys.executable, ROOT / "end_to_end.py", *paths, "--image-sizes", *sizes]
        served = subprocess.run(command).returncode  # it has said what is wrong
    print(words.text_table(rows))
    print("\n".join(words.answers_of(rows)).replace("**", ""))
    plot_utils.draw_all(rows, environments, results)
    readme.write_folder_readme(results, rows, environments)
    if others is not None:
        readme.write_readme(ROOT / "README.md", others | {ROOT / "results": (rows, environments)})
    print(f"written: {results / 'benchmark_results.csv'}, README.md, environment.json and charts beside it")
    wanted = {(args.sweep, job.backend, job.image_size) for job in asked}
    every = rows.loc[rows.status == "failed"].to_dict("records")
    failed = [row for row in every if (row["sweep"], row["backend"], row["image_size"]) in wanted]
    for row in failed:
        where = f"{row['backend']}, {row['image_size']} px, batch size {row['batch_size']}"
        print(f"failed: {where}: {row['reason']}", file=sys.stderr)
    return served or int(bool(failed) or not (rows.status == "ok").any())


def measure_script(description: str | None, script: str, makers: dict) -> None:
    """What a backend's script does when it is run itself: measure its first backend, or those asked for, in
    one round, and print their table; with --profile trace instead.

    `makers` is its BACKENDS; `script` is the module's name.
    """
    from utils.measure.worker import trace
    from utils.report import words
    from utils.report.rows import read_rows

    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs.add_arguments(parser, list(makers))
    tracing = "not time but trace the first size and last batch size"
    parser.add_argument("--profile", action="store_true", help=tracing)
    args = parser.parse_args()
    usual = {device: [next(iter(makers))] for device in ("cpu", "cuda")}
    asked = jobs.make_jobs(args, dict.fromkeys(makers, script), usual, rounds=1)
    if args.profile:
        for job in asked:
            if job.image_size == asked[0].image_size:
                trace(job, makers[job.backend]())
        return
    with jobs.lock_results(asked[0].results):
        sweep(asked, TIMEOUT_S, CI_WIDTH_PCT[asked[0].device], budget_minutes=0)
    rows = read_rows(asked[0].results)
    wanted = {(args.sweep, job.backend, job.image_size) for job in asked}
    shown = [which in wanted for which in zip(rows.sweep, rows.backend, rows.image_size, strict=True)]
    print(words.text_table(rows.loc[shown]))


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    jobs.add_arguments(parser, list(backends.SCRIPTS))
    width = f"half-width of a speedup's 95 %% interval to be reached, in percent; default {CI_WIDTH_PCT}"
    parser.add_argument(
        "--ci-width", "--precision", type=number(float, 0.001, 1000), metavar="PCT", help=width
    )
    spend = f"minutes after which no further rounds begin; default {BUDGET_MINUTES}"
    parser.add_argument("--budget", type=number(float, 0, 1_000_000), metavar="MINUTES", help=spend)
    serve = "also measure from files to labels: see end_to_end.py"
    parser.add_argument("--end-to-end", action="store_true", help=serve)
    hangs = f"seconds after which a step is taken to hang; default {TIMEOUT_S:g}"
    parser.add_argument("--timeout", type=number(float, 0.001, 1_000_000), default=TIMEOUT_S, help=hangs)
    args = parser.parse_args()
    asked = jobs.make_jobs(args, backends.SCRIPTS, backends.DEFAULT)
    device = asked[0].device
    ci_width = args.ci_width or CI_WIDTH_PCT[device]
    budget = jobs.usual(args.budget, BUDGET_MINUTES[device], 0.0, args.quick)
    results = asked[0].results
    with jobs.lock_results(results):
        others = tables_shown_beside(results)
        sweep(asked, args.timeout, ci_width, budget)
        code = write_all(args, asked, results, others)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_main(main)
