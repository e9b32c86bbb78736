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
import datetime
import itertools
import subprocess
import sys
import time
from pathlib import Path

import psutil
from tqdm import tqdm

import backends
from utils import environment
from utils.backend import builds_ahead
from utils.measure import jobs, records
from utils.measure.schema import BASELINE, Job, Record
from utils.utils import in_fresh_process, number, read_dict, run_main, write_json

CI_WIDTH_PCT = {"cuda": 1.0, "cpu": 5.0}
BUDGET_MINUTES = {"cuda": 3.5, "cpu": 7.0}
# What a process takes: on a GPU its context and libraries, and so many times the first layer's output in
# FP32 (seen on an H100 and an H200 at 224 to 512 px and batches 1 to 256, within a third).
GPU_MB, GPU_LAYERS, CPU_MB = 1000, 4, 2048
BUSY_PCT = 20  # of all cores, by other programs
ROOT = Path(__file__).resolve().parent


# ---- what there is to do


def is_up_to_date(record: Record | None, job: Job) -> bool:
    """Whether a record says all that measuring again would say; what failed is tried again."""
    if record is None or record.key != job.key or record.status == "failed":
        return False
    if record.status != "ok":
        return True
    kept = {batch["batch_size"] for batch in records.kept_batches(record)}
    return set(record.batch_sizes if job.auto else job.batch_sizes) <= kept


def without_a_gpu(asked: list[Job]) -> dict[str, str]:
    """The backends that can't run for want of a GPU, with their reasons: no process need be started for them.

    On a GPU only a process of its own may load a runtime.
    """
    scripts = {job.backend: job.script for job in asked if job.device == "cpu"}
    reasons = {name: backends.make(name, script).why_unavailable("cpu") for name, script in scripts.items()}
    return {name: reason for name, reason in reasons.items() if reason}


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


def room_for(job: Job) -> int:
    """How many processes may be alive together by the memory that is free now; 1: each is measured alone."""
    if job.device == "cpu":
        return max(2, int(psutil.virtual_memory().available / environment.MB // CPU_MB))
    memory = environment.read_driver("nvmlDeviceGetMemoryInfo")
    if memory is None:
        return 2
    layer_mb = max(job.to_measure) * 64 * (job.image_size / 2) ** 2 * 4 / environment.MB
    return max(1, int(memory.free / environment.MB // (GPU_MB + GPU_LAYERS * layer_mb)))


# ---- measuring


class Sweep:
    """Brings the records of one sweep up to date: in memory, and beside that in their files."""

    def __init__(self, asked: list[Job], timeout: float):
        self.asked, self.timeout = asked, timeout
        self.folder = asked[0].record.parent
        self.log = asked[0].results / "benchmark.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.unavailable = without_a_gpu(asked)
        self.read()

    def read(self) -> None:
        paths = sorted(self.folder.glob("*_round*.json"))
        self.records = {path: record for path in paths if (record := records.read_record(path))}

    def todo(self) -> list[Job]:
        return [job for job in self.asked if not is_up_to_date(self.records.get(job.record), job)]

    def prepare(self, ci_width: float) -> list[Job]:
        """Refuse what can't be measured, then put stale records away; what is left to do."""
        records.unpack(self.folder)
        self.read()
        if todo := self.todo():
            jobs.compute_references(todo)
        records.archive_stale_records(self.asked)
        self.read()
        self.spent_s = records.note_sweep(self.asked, precision_pct=ci_width).get("spent_s", 0.0)
        return self.todo()  # some may have come back

    def rows(self) -> list:
        """The rows that are asked for and have figures."""
        from utils.report.rows import rows_of

        keys = {job.key for job in self.asked}
        wanted = {(job.backend, job.image_size): job.batch_sizes for job in self.asked}
        rows = rows_of([record for record in self.records.values() if record.key in keys], {})
        rows = [row for row in rows if row.batch_size in wanted.get((row.backend, row.image_size), ())]
        return [row for row in rows if row.status == "ok"]

    def write_line(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def measure_round(self, groups: list[list[Job]], progress, limit_s: float | None = None) -> None:
        """Measure the groups, each a backend or more at one image size; no more once `limit_s` is spent."""
        from utils.measure.interleave import new_server

        new_server([job.script for job in groups[0]])
        for group in groups:
            if limit_s is not None and self.spent_s >= limit_s:
                break
            start = time.perf_counter()
            self.measure_group(group)
            self.spent_s = round(self.spent_s + time.perf_counter() - start, 1)
            records.note_sweep(self.asked, spent_s=self.spent_s)
            progress.update(len(group))

    def measure_group(self, group: list[Job]) -> None:
        """Measure one image size in one round, as many at once as there is room for; say what came out."""
        self.write_line(f"\n=== {datetime.datetime.now():%Y-%m-%d %H:%M:%S} round {group[0].round + 1}")
        able = [job for job in map(self.follow_round0, group) if not self.is_settled(job)]
        if able:
            self.measure_together(able, room_for(able[0]))
        for job in group:
            if record := self.records.get(job.record):
                if record.status == "unavailable":
                    self.unavailable[job.backend] = record.reason
                line = describe(record)
                self.write_line(line)
                tqdm.write(line)

    def measure_together(self, able: list[Job], room: int) -> None:
        """Measure these beside the baseline, `room` processes at once; each alone where there is but one."""
        if room < 2:
            for job in able:
                self.play([job], with_baseline=False, sequential=True)
            return
        first, others = (
            [job for job in able if (job.backend == BASELINE) == is_first] for is_first in (True, False)
        )
        for k in range(0, max(len(others), 1), room - 1):
            again = self.play([*first, *others[k : k + room - 1]])
            if room > 2:
                again = [job for one in again for job in self.play([one], sequential=True)]
            for job in again:
                self.play([job], with_baseline=False, sequential=True)
            first = []

    def is_settled(self, job: Job) -> bool:
        """Whether what happened before says what this job would give, which is noted: it is not tried again.

        That is where the backend is unavailable, and where in round 0 there was not enough memory, or the
        figures were wrong.
        """
        record, first = self.resumed(job), self.records.get(jobs.another(job, round=0).record)
        if job.backend in self.unavailable:
            known = backends.make(job.backend, job.script)
            record.precision, record.adds = known.precision, known.adds
            record.status, record.reason = "unavailable", self.unavailable[job.backend]
        elif first and first.key == job.key and job.round and not record.further:
            if first.status == "out_of_memory":
                record.status, record.reason = first.status, first.reason
            same = [batch for batch in first.batches if batch["status"] in ("out_of_memory", "mismatch")]
            record.batches += [batch for batch in same if not record.batch(batch["batch_size"])]
            record.batches.sort(key=lambda batch: batch["batch_size"])
        settled = record.status != "ok" or all(map(record.batch, job.to_measure))
        if settled or len(record.batches) > len(self.resumed(job).batches):
            self.keep(job, record)
        return settled

    def follow_round0(self, job: Job) -> Job:
        """With `auto`, later rounds measure what round 0 did."""
        first = self.records.get(jobs.another(job, round=0).record)
        if job.auto and job.round and first and first.batch_sizes:
            return jobs.another(job, batch_sizes=tuple(first.batch_sizes))
        return job

    def resumed(self, job: Job) -> Record:
        return records.resume(job, self.records.get(job.record))

    def keep(self, job: Job, record: Record) -> None:
        self.records[job.record] = record
        records.write_record(job.record, record)

    def play(self, part: list[Job], with_baseline: bool = True, sequential: bool = False) -> list[Job]:
        """Measure these in one round, beside the baseline; those that are to be tried again, less crowded."""
        from utils.measure.interleave import InterleavedRound, Member, Remote

        members = []
        try:
            if with_baseline and all(job.backend != BASELINE for job in part):
                sizes = tuple(sorted({size for job in part for size in job.to_measure}))
                script = backends.SCRIPTS[BASELINE]
                baseline = jobs.another(part[0], backend=BASELINE, script=script, only=sizes)
                members.append(Member(baseline, Remote(baseline, self.log, self.timeout), None))
            for job in part:  # one after the other: those that are started end, whatever happens
                member = Member(job, Remote(job, self.log, self.timeout), self.resumed(job))
                members.append(member)
            round_ = InterleavedRound(members, lambda one: self.keep(one.job, one.record), sequential)
            round_.play()
        finally:
            for member in members:
                member.steps.stop()
        return [member.job for member in dict.fromkeys(round_.again) if member.recorded]


def describe(record: Record) -> str:
    """One line on a record: milliseconds of a run at each batch size, or why there are none."""
    from utils.measure.timing import trimmed_mean

    head = f"round {record.round + 1}  {record.backend:<22} {record.image_size:>4} px"
    if record.status != "ok":
        return f"{head}  {record.status}: {record.reason}"
    cells = []
    for batch in record.batches:
        size = batch["batch_size"]
        if batch["status"] == "ok":
            mean = trimmed_mean(batch["host_ms"])
            cells.append(f"batch {size}: {mean:.3f} ms, {size / mean * 1000:,.0f} images/s")
        else:
            cells.append(f"batch {size}: {batch['status']} ({batch['reason'][-100:]})")
    return f"{head}  {'; '.join(cells)}"


def measure_roofline(job: Job) -> None:
    """Have a fresh process measure what this machine could do at most, unless it is known."""
    from utils.measure import roofline

    path = job.record.with_name("ceilings.json")
    known = read_dict(path)
    if known.get("settings_key") != job.settings_key or not {"tflops", "gb_per_s"} <= known.keys():
        found = in_fresh_process(roofline.measure, job.device)
        write_json(path, {"settings_key": job.settings_key, **found})


def sweep(asked: list[Job], timeout: float, ci_width: float, budget_minutes: float) -> None:
    """Bring every record up to date, then add rounds where intervals are too wide."""
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
            rows = measured.rows() if several else []
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
    hangs = "seconds after which a step is taken to hang; default 1800"
    parser.add_argument("--timeout", type=number(float, 0.001, 1_000_000), default=1800, help=hangs)
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
