"""What a backend's script does when it is run itself: measure in this process and print a table."""

import argparse
import sys

from utils.backend import Backend
from utils.measure import interleave, jobs, records, worker
from utils.measure.schema import Job, Record
from utils.report import words
from utils.report.rows import read_rows


def main(description: str | None, script: str, backends: dict) -> None:
    """Measure in one round, or with --profile trace.

    `backends` maps names to callables that make a backend; `script` is the module's name.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    jobs.add_arguments(parser, list(backends))
    trace = "not time but trace the first size and last batch size"
    parser.add_argument("--profile", action="store_true", help=trace)
    args = parser.parse_args()
    first = [next(iter(backends))]
    default = {"cpu": first, "cuda": first}
    asked = jobs.make_jobs(
        args, dict.fromkeys(backends, script), default, rounds=1
    )  # rounds are fresh processes
    if args.profile:
        for job in asked:
            if job.image_size == asked[0].image_size:
                worker.trace(job, backends[job.backend]())
        return
    jobs.compute_references(asked)
    with jobs.lock_results(asked[0].results), worker.inference(asked[0].device):
        records.archive_stale_records(asked)
        records.note_sweep(asked)
        for job in asked:
            record = measure(job, backends[job.backend]())
            print(
                f"{job.backend}, {job.image_size} px: {record.status} {record.reason}".rstrip(),
                file=sys.stderr,
            )
    rows = read_rows(asked[0].results)
    wanted = {(args.sweep, job.backend, job.image_size) for job in asked}
    shown = [which in wanted for which in zip(rows.sweep, rows.backend, rows.image_size, strict=True)]
    print(words.text_table(rows.loc[shown]))


def write(member: interleave.Member) -> None:
    records.write_record(member.job.record, member.record)


def measure(job: Job, backend: Backend) -> Record:
    """Measure one backend in this process, write its record, and return it."""
    record = records.resume(job, records.read_record(job.record))
    member = interleave.Member(job, interleave.Local(job, backend), record)
    interleave.InterleavedRound([member], write, sequential=True).play()
    return member.record
