"""Measure every backend at every image size and batch size: which is fastest, by how much and at what cost.

A round is fresh processes, from a server of their own: at each image size every backend's are alive together
and take turns of a fraction of a second.  After three rounds the image sizes with an interval still wider
than --precision get further ones, until all are narrow enough or --budget is spent.  What is measured already
for the same settings and environment is not measured again.

Reads weights/best_resnet18_<size>.pth and data/test; writes results/raw/ (every sample),
benchmark_results.csv, environment.json, benchmark.log, README.md and the charts; a run into results/ also
renews the README's table.

    python benchmark.py
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)

import argparse
import datetime
import itertools
import subprocess
import sys
import time
from pathlib import Path

import psutil
from tqdm import tqdm

import backends
from utils import environment, plot_utils
from utils.backend import builds_ahead
from utils.measure import interleave, jobs, records, roofline, timing
from utils.measure.schema import BASELINE, Job, Record
from utils.report import readme, tables, words
from utils.report.rows import Row, rows_of, width_pct
from utils.utils import in_fresh_process, read_dict, run_main, write_json

PRECISION_PCT = {"cuda": 1.0, "cpu": 5.0}
BUDGET_MINUTES = {"cuda": 3.5, "cpu": 7.0}
MEMORY_EACH_GB = {"cuda": 4, "cpu": 2}  # that a process may take: says how many are alive together
BUSY_PCT = 20  # of all cores, by other programs
ROOT = Path(__file__).resolve().parent


# ---- what there is to do


def is_up_to_date(job: Job) -> bool:
    """Whether there is a record that says all that measuring again would say; what failed is tried again."""
    record = records.read_record(job.record)
    if not records.is_current(record, job) or record.status == "failed":
        return False
    if record.status != "ok":
        return True
    kept = {batch["batch_size"] for batch in records.kept_batches(record, job)}
    return set(record.batch_sizes if job.auto else job.batch_sizes) <= kept


def without_a_gpu(todo: list[Job]) -> dict[str, str]:
    """The backends that can't run for want of a GPU, with their reasons: no process need be started for them.

    On a GPU only a process of its own may load a runtime.
    """
    scripts = {job.backend: job.script for job in todo if job.device == "cpu"}
    reasons = {name: backends.make(name, script).why_unavailable("cpu") for name, script in scripts.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def measured_rows(asked: list[Job]) -> list[Row]:
    """The rows of the sweep that are asked for and have figures."""
    wanted = {(job.backend, job.image_size): job.batch_sizes for job in asked}
    found, note, _ = records.read_sweep(asked[0].record.parent)
    rows = [row for row in rows_of(found, note) if row.status == "ok"]
    return [row for row in rows if row.batch_size in wanted.get((row.backend, row.image_size), ())]


def too_wide(rows: list[Row], precision: float) -> list[Row]:
    """The rows whose interval is wider than `precision` percent, the widest first."""
    wide = [row for row in rows if width_pct(row) > precision]
    return sorted(wide, key=width_pct, reverse=True)


def further_jobs(asked: list[Job], rows: list[Row], wide: list[Row], round_: int) -> list[list[Job]]:
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
                group.append(jobs.another(job, round=round_, batch_sizes=tuple(sorted(batches)), auto=False))
        groups.append(group)
    return groups


def next_round(job: Job) -> int:
    """The first that the sweep has no record of, after those that are asked for anyway."""
    found, _, _ = records.read_sweep(job.record.parent)
    return max([job.settings.rounds, *(record.round + 1 for record in found)])


def room_for(device: str) -> int:
    """How many processes may be alive together: two at least, a backend and the baseline beside it."""
    if device == "cuda":
        free_mb = environment.describe().get("gpu_memory_mb") or 0
    else:
        free_mb = psutil.virtual_memory().available / 2**20
    return max(2, int(free_mb / 1024 // MEMORY_EACH_GB[device]))


# ---- measuring


class Sweep:
    """Brings the records of one sweep up to date."""

    def __init__(self, asked: list[Job], timeout: float):
        self.asked, self.timeout = asked, timeout
        self.log = asked[0].results / "benchmark.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.unavailable = without_a_gpu(asked)

    def note(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def measure_round(self, groups: list[list[Job]], progress, limit_s: float | None = None) -> None:
        """Play the groups, each a backend or more at one image size; no more once `limit_s` is spent."""
        interleave.new_server()
        for group in groups:
            spent = records.note_sweep(self.asked[0]).get("spent_s", 0.0)
            if limit_s is not None and spent >= limit_s:
                break
            start = time.perf_counter()
            self.measure_group(group)
            spent += time.perf_counter() - start
            records.note_sweep(self.asked[0], spent_s=round(spent, 1))
            progress.update(len(group))

    def measure_group(self, group: list[Job]) -> None:
        """Measure one image size in one round, as many at once as there is room for; say what came out."""
        self.note(f"\n=== {datetime.datetime.now():%Y-%m-%d %H:%M:%S} round {group[0].round + 1}")
        for job in group:
            if job.backend in self.unavailable:  # not for want of another size or round
                reason = self.unavailable[job.backend]
                precision = backends.make(job.backend, job.script).precision
                record = records.start(job, status="unavailable", precision=precision, reason=reason)
                records.write_record(job.record, record)
        able = [job for job in group if job.backend not in self.unavailable]
        together = room_for(group[0].device) - 1
        others = [job for job in able if job.backend != BASELINE]
        first = [job for job in able if job.backend == BASELINE]
        parts = [others[k : k + together] for k in range(0, len(others), together)] or [[]]
        for part in parts:
            self.play([*first, *part])
            first = []
        for job in group:
            record = records.read_record(job.record)
            if record is None:
                continue
            if record.status == "unavailable":
                self.unavailable[job.backend] = record.reason
            line = describe(record)
            self.note(line)
            tqdm.write(line)

    def play(self, part: list[Job]) -> None:
        """Have these take turns with the baseline; what falls out tries again beside it, then alone."""
        for job in self.play_once(part) if part else []:
            for again in self.play_once([job], apart=True):
                self.play_once([again], company=False, apart=True)

    def play_once(self, part: list[Job], company: bool = True, apart: bool = False) -> list[Job]:
        """Play one round with these; those that ran out of memory beside others, or whose process ended."""
        members = []
        try:
            if company and all(job.backend != BASELINE for job in part):
                baseline = jobs.another(part[0], backend=BASELINE, script=backends.SCRIPTS[BASELINE])
                members.append(interleave.Remote(baseline, self.log, self.timeout, recorded=False))
            members += [interleave.Remote(job, self.log, self.timeout) for job in part]
            played = interleave.Round(members, apart)
            played.play()
        finally:
            for member in members:
                member.stop()
        return [member.job for member in dict.fromkeys(played.short) if member.recorded]


def describe(record: Record) -> str:
    """One line on a record: milliseconds of a run at each batch size, or why there are none."""
    head = f"round {record.round + 1}  {record.backend:<22} {record.image_size:>4} px"
    if record.status != "ok":
        return f"{head}  {record.status}: {record.reason}"
    cells = []
    for batch in record.batches:
        size = batch["batch_size"]
        if batch["status"] == "ok":
            mean = timing.trimmed_mean(batch["host_ms"])
            cells.append(f"batch {size}: {mean:.3f} ms, {size / mean * 1000:,.0f} images/s")
        else:
            cells.append(f"batch {size}: {batch['status']} ({batch['reason'][:100]})")
    return f"{head}  {'; '.join(cells)}"


def measure_ceilings(job: Job) -> None:
    """Have a fresh process measure what this machine could do at most, unless it is known."""
    path = job.record.with_name("ceilings.json")
    known = read_dict(path)
    if known.get("settings_key") != job.settings_key or not {"tflops", "gb_per_s"} <= known.keys():
        found = in_fresh_process(roofline.measure, job.device)
        write_json(path, {"settings_key": job.settings_key, **found})


def sweep(asked: list[Job], timeout: float, precision: float, budget_minutes: float) -> None:
    """Bring every record up to date, then add rounds where intervals are too wide."""
    if todo := [job for job in asked if not is_up_to_date(job)]:
        jobs.compute_references(todo)
    records.archive_stale_records(asked[0])
    todo = [job for job in todo if not is_up_to_date(job)]  # some may have come back
    measuring, limit_s = Sweep(asked, timeout), budget_minutes * 60
    with tqdm(total=len(todo), desc="benchmark", unit="process", disable=None) as progress:
        if todo:
            say_what_is_built(todo)
            say_what_is_busy()
        measure_ceilings(asked[0])
        records.note_sweep(asked[0], precision_pct=precision)
        for _, jobs_of_round in itertools.groupby(todo, key=lambda job: job.round):
            by_size = itertools.groupby(jobs_of_round, key=lambda job: job.image_size)
            measuring.measure_round([follow_round0(list(group)) for _, group in by_size], progress)
        later = 0
        for round_ in itertools.count(next_round(asked[0])):
            rows = measured_rows(asked) if asked[0].settings.rounds > 1 else []
            wide = too_wide(rows, precision)
            groups = further_jobs(asked, rows, wide, round_)
            spent = records.note_sweep(asked[0]).get("spent_s", 0.0)
            if not groups or spent >= limit_s:
                break
            widest = width_pct(wide[0])
            progress.set_postfix_str(f"{len(wide)} rows still too wide, the widest ±{widest:.1f} %")
            progress.total += sum(map(len, groups))
            measuring.measure_round(groups, progress, limit_s)
            later += 1
    if not todo and not later:
        print(f"{asked[0].record.parent}: everything is up to date")


def builds_of(todo: list[Job]) -> dict[Path, float | None]:
    """The artefacts that will be built before anything is measured, and the seconds of the last time."""
    ahead = {}
    for job in todo:
        backend = backends.make(job.backend, job.script)
        if job.round == 0 and not backend.why_unavailable(job.device):
            files = backend.artefacts(job.checkpoint, job.image_size, list(job.batch_sizes), job.device)
            ahead |= builds_ahead(files, job.checkpoint)
    return ahead


def say_what_is_built(todo: list[Job]) -> None:
    if ahead := in_fresh_process(builds_of, todo):  # on a GPU, only there a runtime may be loaded
        known = [seconds for seconds in ahead.values() if seconds]
        took = f"; last time {len(known)} of them took {sum(known):.0f} s" if known else ""
        print(f"to be built first: {', '.join(path.name for path in ahead)}{took}", file=sys.stderr)


def say_what_is_busy() -> None:
    """Before anything is timed: a load that lasts makes no interval wider, but every figure wrong."""
    if (busy := psutil.cpu_percent(1)) > BUSY_PCT:
        mend = "close them, or the figures are not this machine's"
        print(f"other programs use {busy:.0f} % of the processor: {mend}", file=sys.stderr)


def follow_round0(group: list[Job]) -> list[Job]:
    """With `auto`, later rounds measure what round 0 did."""
    followed = []
    for job in group:
        first = records.read_record(jobs.another(job, round=0).record)
        if job.auto and job.round > 0 and first and first.batch_sizes:
            job = jobs.another(job, batch_sizes=tuple(first.batch_sizes))
        followed.append(job)
    return followed


def write_all(args: argparse.Namespace, asked: list[Job], results: Path) -> None:
    """Records -> table, charts, answers and READMEs, with --end-to-end after measuring that, too."""
    rows = tables.write_csv(results)
    _, environments = tables.read_table(results)
    plot_utils.draw_all(rows, environments, results)
    served = 0
    if args.end_to_end:
        sizes = map(str, sorted({job.image_size for job in asked}))
        paths = ["--data", args.data, "--weights", args.weights, "--results", results, "--sweep", args.sweep]
        command = [sys.executable, ROOT / "end_to_end.py", *paths, "--image-sizes", *sizes]
        served = subprocess.run(command).returncode  # it has said what is wrong
    print(words.text_table(rows))
    print("\n".join(words.answers_of(rows)).replace("**", ""))
    readme.write_folder_readme(results)
    if results.resolve() == ROOT / "results":
        readme.write_readme(ROOT / "README.md")
    print(f"written: {results / 'benchmark_results.csv'}, README.md, environment.json and charts beside it")
    if served or not (rows.status == "ok").any():
        sys.exit(served or 1)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    jobs.add_arguments(parser, list(backends.SCRIPTS))
    width = "half-width of a speedup's 95 %% interval to be reached, in percent"
    parser.add_argument("--precision", type=float, help=f"{width}; default {PRECISION_PCT}")
    spend = f"minutes after which no further rounds begin; default {BUDGET_MINUTES}"
    parser.add_argument("--budget", type=float, metavar="MINUTES", help=spend)
    serve = "also measure from files to labels: see end_to_end.py"
    parser.add_argument("--end-to-end", action="store_true", help=serve)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a step hangs")
    args = parser.parse_args()
    asked = jobs.make_jobs(args, backends.SCRIPTS, backends.DEFAULT)
    device = asked[0].device
    precision = jobs.usual(args.precision, PRECISION_PCT[device], PRECISION_PCT[device], args.quick)
    budget = jobs.usual(args.budget, BUDGET_MINUTES[device], 0.0, args.quick)
    results = asked[0].results
    with jobs.measuring(results):
        sweep(asked, args.timeout, precision, budget)
        write_all(args, asked, results)


if __name__ == "__main__":
    run_main(main)
