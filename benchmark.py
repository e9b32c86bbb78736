"""Measure every backend at every image size and batch size, and say which is fastest, by how much and at
what cost.

Each (backend, image size, round) is a process of its own; the order of backends rotates from round to
round, so that drift of the machine falls on all alike.  What is measured already for the same settings and
environment is not measured again.

Reads weights/best_resnet18_<size>.pth and data/test; writes results/raw/ (every sample),
benchmark_results.csv, environment.json, benchmark.log, README.md and the charts; a run into results/ also
renews the README's table.

    python benchmark.py
"""

import argparse
import datetime
import importlib
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

import onnx_inference
import pytorch_inference
import tensorrt_inference
from utils import ceilings, jobs, measure, plot_utils, readme, records, report, timing
from utils.schema import Backend, Job, Record
from utils.utils import fresh_processes, read_json, run_main, write_json

SCRIPTS = [pytorch_inference, onnx_inference, tensorrt_inference]
BACKENDS = {name: script.__name__ for script in SCRIPTS for name in script.BACKENDS}
DEFAULT = ["pytorch", "onnx", "torch-tensorrt", "tensorrt"]
ROOT = Path(__file__).resolve().parent


def make_backend(script: str, name: str) -> Backend:
    return importlib.import_module(script).BACKENDS[name]()


def is_up_to_date(job: Job) -> bool:
    """Whether there is a record that says all that measuring again would say; what failed is tried again."""
    record = records.read_record(job.record)
    if not records.is_current(record, job) or record.status == "failed":
        return False
    if record.status != "ok":
        return True
    kept = {batch["batch_size"] for batch in record.batches if batch["status"] != "failed"}
    return set(record.batch_sizes if job.auto else job.batch_sizes) <= kept


def work(job: Job, log: Path) -> None:
    """What a worker process does: measure, everything that anyone says going to the log."""
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    run_main(lambda: measure.measure(job, make_backend(job.script, job.backend)))


def run_job(job: Job, log: Path, timeout: float) -> Record:
    """Measure in a fresh process; the record.  If it dies or hangs, what it had measured stays."""
    said_before, start = log.stat().st_size, time.perf_counter()
    process = fresh_processes().Process(target=work, args=(job, log))
    process.start()
    try:
        process.join(timeout)
        code = process.exitcode
    finally:
        process.kill()
        process.join()
    record = records.read_record(job.record)
    if code == 0:
        if record.wall:
            record.wall["process_s"] = round(time.perf_counter() - start, 3)
            records.write_record(job.record, record)
        return record
    if code is None:
        reason = f"its process was stopped after {timeout:g} s (--timeout)"
    else:
        reason = f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
    said = log.read_bytes()[said_before:].decode("utf-8", errors="replace").strip().splitlines()
    if said:
        reason += f": {said[-1][:300]}"
    return mark_failed(job, record, reason)


def mark_failed(job: Job, record: Record | None, reason: str) -> Record:
    """The record of a process that died: what it has not measured has failed for `reason`."""
    if not records.is_current(record, job):
        record = records.start(job, status="failed", reason=reason)
    missing = [size for size in job.batch_sizes if not record.batch(size)]
    for size in missing[:1] if job.auto else missing:
        record.batches.append({"batch_size": size, "status": "failed", "reason": reason})
    records.write_record(job.record, record)
    return record


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


def without_a_gpu(todo: list[Job]) -> dict[str, dict]:
    """The backends that can't run for want of a GPU, with their reasons: no process need be started for them.

    On a GPU only a process of its own may load a runtime.
    """
    found = {}
    for job in todo:
        if job.device == "cpu" and job.backend not in found:
            backend = make_backend(job.script, job.backend)
            if reason := backend.why_unavailable("cpu"):
                found[job.backend] = unavailable(backend.precision, reason)
    return found


def unavailable(precision: str, reason: str) -> dict:
    return {"status": "unavailable", "precision": precision, "reason": reason}


def measure_ceilings(job: Job) -> None:
    """Have a fresh process measure what this machine could do at most, unless it is known for these
    settings."""
    path = job.record.with_name("ceilings.json")
    if (read_json(path) or {}).get("settings_key") != job.settings_key:
        with ProcessPoolExecutor(1, mp_context=fresh_processes()) as pool:
            found = pool.submit(ceilings.measure, job.device).result()
        write_json(path, {"settings_key": job.settings_key, **found})


def sweep(asked: list[Job], timeout: float) -> None:
    """Bring every record up to date, one process after another."""
    log = asked[0].results / "benchmark.log"
    log.parent.mkdir(parents=True, exist_ok=True)

    def note(text: str) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    todo = [job for job in asked if not is_up_to_date(job)]
    known = without_a_gpu(todo)
    records.note_sweep(asked[0])
    measure_ceilings(asked[0])
    with tqdm(todo, desc="benchmark", unit="process", disable=not todo) as progress:
        for job in progress:
            progress.set_postfix_str(f"{job.backend}, {job.image_size} px")
            when = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
            note(f"\n=== {when} round {job.round + 1}, {job.backend}, {job.image_size} px")
            if job.backend in known:  # not for want of another size or round
                record = records.start(job, **known[job.backend])
                records.write_record(job.record, record)
            else:
                record = run_job(job, log, timeout)
            if record.status == "unavailable":
                known[job.backend] = unavailable(record.precision, record.reason)
            line = describe(record)
            note(line)
            tqdm.write(line)
    if not todo:
        print(f"{asked[0].record.parent}: everything is up to date")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    jobs.add_arguments(parser, list(BACKENDS), DEFAULT)
    serve = "also measure from files to labels: see end_to_end.py"
    parser.add_argument("--end-to-end", action="store_true", help=serve)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a process hangs")
    args = parser.parse_args()
    asked = jobs.make_jobs(args, BACKENDS)
    sweep(asked, args.timeout)
    results = asked[0].results
    rows = records.write_csv(results)
    _, environments = records.read_table(results)
    plot_utils.draw_all(rows, environments, results)
    if args.end_to_end:
        sizes = map(str, sorted({job.image_size for job in asked}))
        paths = ["--data", args.data, "--weights", args.weights, "--results", results, "--sweep", args.sweep]
        command = [sys.executable, ROOT / "end_to_end.py", *paths, "--image-sizes", *sizes]
        subprocess.run(command, check=True)
    print(report.text_table(rows))
    print("\n".join(report.answers_of(rows)).replace("**", ""))
    readme.write_folder_readme(results)
    if results.resolve() == ROOT / "results":
        readme.write_readme(ROOT / "README.md")
    print(f"written: {results / 'benchmark_results.csv'}, README.md, environment.json and charts beside it")


if __name__ == "__main__":
    run_main(main)
