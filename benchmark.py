"""Measure every backend at every image size and batch size: which is fastest, by how much and at what cost.

Reads weights/best_resnet18_<size>.pth and data/test; writes results/raw/ (every sample),
benchmark_results.csv, environment.json, benchmark.log, README.md and the charts; a run into results/ also
renews the README's table.  What is measured already for the same settings and environment is not measured
again.  docs/method.md says how it measures.

    python benchmark.py
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)

import dataclasses
import itertools
import sys

import psutil
from tqdm import tqdm

import backends
from utils.measure import jobs, records
from utils.measure.schema import Job
from utils.utils import ROOT, file_lock, in_fresh_process, number, run_main, write_atomic, write_json

CI_WIDTH_PCT = {"cuda": 1.0, "cpu": 5.0}
BUDGET_MINUTES = {"cuda": 3.5, "cpu": 7.0}
TIMEOUT_S = 1800.0  # after which a step is taken to hang
BUSY_PCT = 20  # of all cores, by other programs


def further_jobs(measured, ci_width: float, round_: int) -> list[list[Job]]:
    """A further round of a Sweep: a group for each image size that has a row too wide, the widest first.

    All rows of the size are measured again: were each to stop as soon as its rounds agree, many would stop
    where they agree by chance, and 95 % intervals would hold less often.
    """
    from utils.report.rows import rows_of, width_pct

    keys, groups, widest = {job.key for job in measured.asked}, {}, {}
    rows = rows_of([record for record in measured.records.values() if record.key in keys], {})
    ok = {(row.backend, row.image_size, row.batch_size): row for row in rows if row.status == "ok"}
    for job in [job for job in measured.asked if job.round == 0]:
        if only := tuple(size for size in job.batch_sizes if (job.backend, job.image_size, size) in ok):
            groups.setdefault(job.image_size, []).append(dataclasses.replace(job, round=round_, only=only))
            widths = [width_pct(ok[job.backend, job.image_size, size]) for size in only]
            widest[job.image_size] = max(widest.get(job.image_size, 0), *widths)
    wide = [size for size in widest if widest[size] > ci_width]
    return [groups[size] for size in sorted(wide, key=lambda size: widest[size], reverse=True)]


def sweep(asked: list[Job], timeout: float, ci_width: float, budget_minutes: float) -> None:
    """Bring every record up to date, then add rounds where intervals are too wide."""
    from utils.measure import roofline
    from utils.measure.sweep import Sweep

    measured, limit_s, first = Sweep(asked, timeout), budget_minutes * 60, asked[0]
    todo = measured.prepare(ci_width)
    with tqdm(total=len(todo), desc="benchmark", unit="process", disable=None) as progress:
        if todo:
            print_busy()
        if records.read_roofline(first.folder, first.settings_key) is None:
            found = in_fresh_process(roofline.measure, first.device)
            write_json(first.folder / "ceilings.json", {"settings_key": first.settings_key, **found})
        for _, jobs_of_round in itertools.groupby(todo, key=lambda job: job.round):
            by_size = itertools.groupby(jobs_of_round, key=lambda job: job.image_size)
            measured.measure_round([list(group) for _, group in by_size], progress)
        rounds = first.settings.rounds
        for round_ in itertools.count(max([rounds, *(one.round + 1 for one in measured.records.values())])):
            groups = further_jobs(measured, ci_width, round_) if rounds > 1 else []
            if not groups or measured.spent_s >= limit_s:
                break
            sizes = ", ".join(str(group[0].image_size) for group in groups)
            progress.set_postfix_str(f"intervals at {sizes} px are still too wide")
            progress.total += sum(map(len, groups))
            measured.measure_round(groups, progress, limit_s)
    if not progress.total:
        print(f"{measured.folder}: everything is up to date")


def print_busy() -> None:
    """Before anything is timed: a load that lasts makes no interval wider, but every figure wrong."""
    if (busy := psutil.cpu_percent(1)) > BUSY_PCT:
        mend = "close them, or the figures are not this machine's"
        print(f"other programs use {busy:.0f} % of the processor: {mend}", file=sys.stderr)


def write_all(asked: list[Job], others: dict | None) -> int:
    """Records -> table, charts, answers and READMEs; the exit code.  `others`: the tables of what else
    README.md shows; at None it is left alone."""
    from utils import plot_utils
    from utils.report import readme, tables, words

    results = asked[0].results
    rows, environments = tables.write_table(results)
    print(words.text_table(rows))
    print("\n".join(words.answers_of(rows)).replace("**", ""))
    plot_utils.draw_all(rows, environments, results)
    write_atomic(results / "README.md", readme.folder_readme(results, rows, environments))
    if others is not None:
        made = readme.render(ROOT / "README.md", others | {ROOT / "results": (rows, environments)})
        write_atomic(ROOT / "README.md", made)
    print(f"written: {results / 'benchmark_results.csv'}, README.md, environment.json and charts beside it")
    wanted = {(job.sweep, job.backend, job.image_size) for job in asked}
    told = rows[rows.status == "failed"].itertuples()
    failed = [row for row in told if (row.sweep, row.backend, row.image_size) in wanted]
    for row in failed:
        where = f"{row.backend}, {row.image_size} px, batch {row.batch_size}"
        print(f"failed: {where}: {row.reason}", file=sys.stderr)
    return int(bool(failed) or not (rows.status == "ok").any())


def measure_script(description: str | None, script: str, makers: dict) -> None:
    """What a backend's `script` does when it is run itself: measure the first of its BACKENDS, the `makers`,
    or those asked for, in one round, and print the table."""
    from utils.report import words
    from utils.report.rows import read_rows

    parser = jobs.make_parser(description, list(makers))
    parser.set_defaults(rounds=1, backends=[next(iter(makers))])
    args = jobs.parse(parser)
    asked = jobs.make_jobs(args, dict.fromkeys(makers, script), {})
    with file_lock(asked[0].results / ".benchmark.lock", "measuring"):
        sweep(asked, TIMEOUT_S, CI_WIDTH_PCT[asked[0].device], budget_minutes=0)
    print(words.text_table(read_rows(asked[0].results)))


def main() -> None:
    parser = jobs.make_parser(__doc__, list(backends.SCRIPTS))
    width = f"half-width of a speedup's 95 %% interval to be reached, in percent; default {CI_WIDTH_PCT}"
    percent = number(float, 0.001, 1000)
    parser.add_argument("--ci-width", "--precision", type=percent, metavar="PCT", help=width)
    spend = f"minutes after which no further rounds begin; default {BUDGET_MINUTES}"
    parser.add_argument("--budget", type=number(float, 0, 1_000_000), metavar="MINUTES", help=spend)
    hangs = f"seconds after which a step is taken to hang; default {TIMEOUT_S:g}"
    parser.add_argument("--timeout", type=number(float, 0.001, 1_000_000), default=TIMEOUT_S, help=hangs)
    args = jobs.parse(parser)
    asked = jobs.make_jobs(args, backends.SCRIPTS, backends.DEFAULT)
    device, results, others = asked[0].device, asked[0].results, None
    budget = BUDGET_MINUTES[device] if args.budget is None else args.budget
    with file_lock(results / ".benchmark.lock", "measuring"):  # two would overwrite each other's records
        if results.resolve() == ROOT / "results":  # README.md shows it, and what is damaged is told now
            from utils.report import readme

            others = readme.read_folders(ROOT / "README.md", measuring=results)
        sweep(asked, args.timeout, args.ci_width or CI_WIDTH_PCT[device], budget)
        code = write_all(asked, others)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_main(main)
