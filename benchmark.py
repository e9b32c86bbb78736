"""Measure every backend at every image size and batch size, and say which is fastest, by how much and at what cost.

Each (backend, image size, round) is a process of its own; the order of backends rotates from round to round, so that drift of
the machine falls on all alike.  Whatever is measured already for the same request and environment is not measured again.

Reads weights/best_resnet18_<size>.pth and data/test; writes results/raw/ (every sample), results/benchmark_results.csv,
environment.json, benchmark.log, the charts and, for a run into results/, the README's tables.

    python benchmark.py
"""

import argparse
import datetime
import importlib
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

import onnx_inference
import pytorch_inference
import tensorrt_inference
from utils import ceilings, measure, records
from utils.request import (
    add_arguments,
    make_request,
    measured,
    new_record,
    pick_device,
    record_key,
    record_path,
    settings_key,
)
from utils.utils import fresh_processes, read_json, run_main, write_json

BACKENDS = {**pytorch_inference.BACKENDS, **onnx_inference.BACKENDS, **tensorrt_inference.BACKENDS}
SCRIPTS = {
    name: script.__name__
    for script in (pytorch_inference, onnx_inference, tensorrt_inference)
    for name in script.BACKENDS
}
DEFAULT = ["pytorch", "onnx", "torch-tensorrt", "tensorrt"]
ROOT = Path(__file__).resolve().parent


def plan(request: dict) -> list[tuple[int, str, int]]:
    """(round, backend, image size) in the order of measuring; in round k the backends start with the k-th."""
    backends = request["backends"]
    order = []
    for round_ in range(request["rounds"]):
        shift = round_ % len(backends)
        rotated = backends[shift:] + backends[:shift]
        order += [(round_, backend, size) for size in request["image_sizes"] for backend in rotated]
    return order


def up_to_date(request: dict, backend: str, size: int, round_: int) -> bool:
    """Whether a record of the same request says all that measuring again would say; what failed is tried again."""
    path, key = record_path(request, backend, size, round_), record_key(request, size)
    record = read_json(path)
    if record is None or record["key"] != key or record["status"] == "failed":
        return False
    wanted = record["request"] if request["auto"] and record["request"]["auto"] else request
    return record["status"] != "ok" or set(map(str, wanted["batch_sizes"])) <= set(measured(path, key))


def work(request: dict, script: str, backend: str, size: int, round_: int, log: Path) -> None:
    """What a worker process does: measure one backend at one image size, everything that anyone says going to the log."""
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    make = importlib.import_module(script).BACKENDS[backend]
    run_main(lambda: measure.measure(backend, make(), size, round_, request, pick_device(request["device"])))


def run_worker(request: dict, backend: str, size: int, round_: int, log: Path) -> dict:
    """Measure in a fresh process; the record.  If it dies or hangs, what it had measured stays and the rest is marked failed."""
    said_before, start = log.stat().st_size, time.perf_counter()
    process = fresh_processes().Process(
        target=work, args=(request, SCRIPTS[backend], backend, size, round_, log)
    )
    process.start()
    try:
        process.join(request["timeout"])
        code = process.exitcode
    finally:
        process.kill()
        process.join()
    key, path = record_key(request, size), record_path(request, backend, size, round_)
    record = read_json(path)
    if code == 0:
        if "wall" in record:
            record["wall"]["process_s"] = round(time.perf_counter() - start, 3)
            write_json(path, record)
        return record
    died = (
        f"its process was stopped after {request['timeout']:g} s (--timeout)"
        if code is None
        else f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
    )
    said = log.read_bytes()[said_before:].decode("utf-8", errors="replace").strip().splitlines()
    reason = f"{died}: {said[-1][:300]}" if said else died
    if record is None or record["key"] != key:
        record = new_record(request, backend, size, round_, status="failed", reason=reason)
    missing = [size for size in map(str, request["batch_sizes"]) if size not in record["batches"]]
    for batch_size in missing[:1] if request["auto"] else missing:
        record["batches"].setdefault(batch_size, {"status": "failed", "reason": reason})
    write_json(path, record)
    return record


def describe(record: dict) -> str:
    """One line on a record: milliseconds of a run at each batch size, or why there are none."""
    head = f"round {record['round'] + 1}  {record['backend']:<22} {record['image_size']:>4} px"
    if record["status"] != "ok":
        return f"{head}  {record['status']}: {record['reason']}"
    cells = []
    for batch_size, result in sorted(record["batches"].items(), key=lambda item: int(item[0])):
        if result["status"] == "ok":
            mean = records.timing.trimmed_mean(result["host_ms"])
            cells.append(f"batch {batch_size}: {mean:.3f} ms, {int(batch_size) / mean * 1000:,.0f} images/s")
        else:
            cells.append(f"batch {batch_size}: {result['status']} ({result['reason'][:100]})")
    return f"{head}  {'; '.join(cells)}"


def without_a_gpu(request: dict) -> dict[str, dict]:
    """The backends that can't run for want of a GPU, with their reasons.  On a GPU only a process of its own may load a runtime."""
    if pick_device(request["device"]) != "cpu":
        return {}
    asked = {name: BACKENDS[name]() for name in request["backends"] if name in BACKENDS}
    reasons = {name: backend.why_unavailable("cpu") for name, backend in asked.items()}
    known = {"device": "cpu", "status": "unavailable"}
    return {
        name: {**known, "precision": asked[name].precision, "reason": reason}
        for name, reason in reasons.items()
        if reason
    }


def measure_ceilings(request: dict) -> None:
    """Have a fresh process measure what this machine could do at most, unless it is known for the same settings."""
    path, key = Path(request["results"]) / "raw" / request["run"] / "ceilings.json", settings_key(request)
    if (read_json(path) or {}).get("settings_key") != key:
        with ProcessPoolExecutor(1, mp_context=fresh_processes()) as pool:
            write_json(
                path,
                {
                    "settings_key": key,
                    **pool.submit(ceilings.measure, pick_device(request["device"])).result(),
                },
            )


def sweep(request: dict) -> None:
    """Bring every record of the request up to date, one process after another."""
    log = Path(request["results"]) / "benchmark.log"
    log.parent.mkdir(parents=True, exist_ok=True)

    def note(text: str) -> None:
        with open(log, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    todo = [step for step in plan(request) if not up_to_date(request, step[1], step[2], step[0])]
    unavailable = without_a_gpu(request)
    measure_ceilings(request)
    with tqdm(todo, desc="benchmark", unit="process", disable=not todo) as progress:
        for round_, backend, size in progress:
            progress.set_postfix_str(f"{backend}, {size} px")
            note(
                f"\n=== {datetime.datetime.now():%Y-%m-%d %H:%M:%S} round {round_ + 1}, {backend}, {size} px"
            )
            if (
                backend in unavailable
            ):  # not for want of another size or round: no process need be started to find out again
                record = new_record(request, backend, size, round_, **unavailable[backend])
                write_json(record_path(request, backend, size, round_), record)
            else:
                record = run_worker(request, backend, size, round_, log)
            if record["status"] == "unavailable":
                unavailable[backend] = {
                    name: record[name] for name in ("device", "status", "precision", "reason")
                }
            line = describe(record)
            note(line)
            tqdm.write(line)
    if not todo:
        print(f"{Path(request['results']) / 'raw' / request['run']}: everything is up to date")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, list(SCRIPTS), DEFAULT)
    parser.add_argument(
        "--end-to-end", action="store_true", help="also measure from files to labels: see end_to_end.py"
    )
    parser.add_argument(
        "--timeout", type=float, default=1800, help="seconds after which a process is taken for hung"
    )
    args = parser.parse_args()
    request = make_request(args)
    request["backends"] = list(SCRIPTS) if "all" in args.backends else list(dict.fromkeys(args.backends))
    request["timeout"] = args.timeout
    sweep(request)

    import end_to_end
    from utils import plot_utils, report

    results = Path(request["results"])
    rows = records.write_csv(results)
    environments = read_json(results / "environment.json")
    plot_utils.draw_all(rows, environments, results)
    if args.end_to_end:
        print(
            report.end_to_end_text(
                end_to_end.run(
                    rows[rows.run == args.run], request["image_sizes"], args.data, args.weights, results, 3.0
                )
            )
        )
    print(report.text_table(rows))
    print("\n".join(report.answers_of(rows)).replace("**", ""))
    if results.resolve() == ROOT / "results":
        report.write_readme(ROOT / "README.md")
    print(f"written: {results / 'benchmark_results.csv'}, environment.json and charts beside it")


if __name__ == "__main__":
    run_main(main)
