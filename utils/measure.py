"""Check one backend against PyTorch FP32, then time it: what every backend script does, alone or called by benchmark.py.

One (backend, image size, round) leaves one raw record, results/raw/<run>/<backend>_<size>_round<k>.json, with every sample in it.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import sys
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from utils import gpu, profiling, timing
from utils.request import add_arguments, make_request, measured, new_record, pick_device, record_path
from utils.utils import UserError, checkpoint_path, read_json, sha256, write_atomic, write_json

WARM_UP_SECONDS = 0.5  # at least, besides the calls asked for
SATURATED = 0.05  # more throughput than this is worth another doubling of the batch
MAX_SECONDS = {"cuda": 30.0, "cpu": 2.0}  # of timed runs per configuration, over all rounds
CPU_BATCH = 16  # of the accuracy pass on a CPU, where no shapes are fixed and memory is no concern
# The largest logit difference from PyTorch FP32 that passes, as a share of the largest logit.  ResNet-18 has 21 layers with
# weights, each rounding weights, products' sum and activation: 63 u (Higham, Accuracy and Stability of Numerical Algorithms,
# 2002, section 3.1) is 3 % for FP16 and TF32 with u = 2^-11.  FP32 sums of up to 4608 products and Winograd's transforms
# (Lavin and Gray, 2016) lose about three digits more than u = 2^-24 alone.
TOLERANCE = {"FP32": 1e-3, "TF32": 63 * 2**-11, "FP16": 63 * 2**-11}


def measure(name: str, backend, image_size: int, round_: int, request: dict, device: str) -> dict:
    """Load, check and time one backend at one image size for every batch size; the raw record, written after every step.

    Round 0 classifies the whole test set.  Whatever goes wrong costs this record alone and stands in it.
    """
    import torch

    path = record_path(request, name, image_size, round_)
    record = new_record(request, name, image_size, round_, precision=backend.precision, device=device)
    if reason := backend.why_unavailable(device):
        record.update(status="unavailable", reason=reason)
        write_json(path, record)
        return record
    record["batches"] = measured(path, record["key"])
    wall = record["wall"] = {"load_s": 0.0, "check_s": 0.0, "time_s": 0.0}
    context_mb = gpu.context_mb() if device == "cuda" else None
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    with torch.inference_mode(), stream:
        try:
            with stopwatch(wall, "load_s"):
                load(record, backend, request, device)
                record["process"]["context_mb"] = context_mb
            with stopwatch(wall, "check_s"):
                checked_with = check(record, backend, request, device)
        except UserError:
            raise
        except Exception as error:
            record.update(status=failure(error), reason=one_line(error))
            write_json(path, record)
            return record
        watch = request["sustain_seconds"] if device == "cuda" and round_ == 0 else 0
        for batch_size in batch_sizes_of(request, name, image_size, round_):
            if request["auto"] and round_ == 0 and saturated(record["batches"]):
                break
            if str(batch_size) in record["batches"]:
                continue
            try:
                with stopwatch(wall, "time_s"):
                    result = time_batch(backend, batch_size, checked_with, request, device, watch)
            except Exception as error:
                result = {"status": failure(error), "reason": one_line(error)}
            record["batches"][str(batch_size)] = result
            write_json(path, record)
        if watch:  # last, since the profiler may slow down what follows
            for batch_size, result in record["batches"].items():
                if result["status"] == "ok" and "busy_ms" not in result:
                    result["busy_ms"] = profiling.busy_ms(
                        prepared(backend, checked_with[0][: int(batch_size)], device)
                    )
            write_json(path, record)
    if request["auto"]:  # what the record holds is all that was wanted
        record["request"] = {**request, "batch_sizes": sorted(map(int, record["batches"]))}
        write_json(path, record)
    return record


@contextlib.contextmanager
def stopwatch(wall: dict, name: str):
    """Add the seconds that the block takes to wall[name], for the account of where a sweep's time goes."""
    start = time.perf_counter()
    try:
        yield
    finally:
        wall[name] = round(wall[name] + time.perf_counter() - start, 3)


def batch_sizes_of(request: dict, name: str, image_size: int, round_: int) -> list[int]:
    """The batch sizes to measure; with --batch-sizes auto, round 0 finds out how many and the later rounds follow it."""
    if request["auto"] and round_ > 0:
        return (read_json(record_path(request, name, image_size, 0)) or {"request": request})["request"][
            "batch_sizes"
        ]
    return request["batch_sizes"]


def saturated(batches: dict) -> bool:
    """Whether the last doubling gave under 5 % more throughput, or failed for want of memory or otherwise."""
    done = sorted(((int(size), result) for size, result in batches.items()), key=lambda item: item[0])
    if done and done[-1][1]["status"] != "ok":
        return True
    if len(done) < 2:
        return False
    (small, before), (large, after) = done[-2:]
    return large / timing.trimmed_mean(after["host_ms"]) < (1 + SATURATED) * small / timing.trimmed_mean(
        before["host_ms"]
    )


def load(record: dict, backend, request: dict, device: str) -> None:
    """Have the backend export, compile or deserialise; note how long that took and what the process looks like then."""
    import torch

    import model

    checkpoint = checkpoint_path(Path(request["weights"]), record["image_size"])
    backend.load(checkpoint, record["image_size"], request["batch_sizes"], device)
    artefact = getattr(backend, "artefact", None)
    record["precision"] = backend.precision
    record["build"] = {
        "seconds": round(backend.build_s, 3),
        "from_cache": backend.from_cache,
        "artefact_mb": artefact and round(artefact.stat().st_size / 2**20, 1),
    }
    if record["round"] == 0:
        record["work"] = model.count_work(record["image_size"], len(model.load_facts(checkpoint)["classes"]))
    record["process"] = {
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
    }


def check(record: dict, backend, request: dict, device: str) -> tuple:
    """Compare the backend with PyTorch FP32 on the whole test set in round 0, on a GPU at the smallest batch: memory grows from there.

    Returns what each batch size is checked and timed with: images float32 (N, 3, S, S) on the CPU, PyTorch's logits (N, classes)
    and the largest difference that passes, N being the largest batch.
    """
    import datasets
    import model

    size, largest = record["image_size"], request["batch_sizes"][-1]
    at_once = request["batch_sizes"][0] if device == "cuda" else CPU_BATCH
    checkpoint = checkpoint_path(Path(request["weights"]), size)
    baseline = record["backend"] == "pytorch"
    expected, labels = reference(checkpoint, size, request, device, backend if baseline else None)
    tolerance = TOLERANCE[backend.precision] * float(np.abs(expected).max())
    whole = record["round"] == 0
    loader = datasets.make_test_loader(
        Path(request["data"]),
        size,
        largest,
        model.load_facts(checkpoint)["classes"],
        num_workers=min(4, len(labels) // 250) if whole else 0,
    )
    first = next(iter(loader))[0]
    if whole:
        logits = (
            expected
            if baseline
            else np.concatenate([classify(backend, images, at_once, device) for images, _ in loader])
        )
        record["check"] = {
            "images": len(labels),
            "different": int((logits.argmax(1) != expected.argmax(1)).sum()),
            "correct": int((logits.argmax(1) == labels).sum()),
            "max_abs_diff": float(np.abs(logits - expected).max()),
            "tolerance": tolerance,
        }
    times = math.ceil(largest / len(first))
    return (
        first.repeat(times, 1, 1, 1)[:largest],
        np.tile(expected[: len(first)], (times, 1))[:largest],
        tolerance,
    )


def classify(backend, images, batch_size: int, device: str) -> np.ndarray:
    """Logits float32 (N, classes) of images (N, 3, S, S); the last batch is filled up, since some backends have fixed shapes."""
    import torch

    logits = []
    for chunk in images.split(batch_size):
        full = torch.cat([chunk, chunk[-1:].expand(batch_size - len(chunk), -1, -1, -1)])
        logits.append(backend.predict(backend.prepare(full.to(device)))[: len(chunk)].float().cpu().numpy())
    return np.concatenate(logits)


def reference(
    checkpoint: Path, image_size: int, request: dict, device: str, baseline=None
) -> tuple[np.ndarray, np.ndarray]:
    """PyTorch FP32's logits (N, classes) on the test set, and the labels (N,): from weights/ or, where they are stale, computed.

    By `baseline` if this process holds it, else in a process of its own, so that nothing of it stays in this one's memory.
    """
    path = checkpoint.with_name(f"reference_{image_size}_{device}.npz")
    environment = request["environment"]
    key = sha256(
        checkpoint, json.dumps([environment["data"], environment["packages"], environment["gpu"], device])
    )
    with contextlib.suppress(
        OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile
    ):  # missing or cut short: compute it
        with np.load(path) as stored:
            if str(stored["key"]) == key:
                return stored["logits"], stored["labels"]
    arguments = (
        checkpoint,
        image_size,
        request["data"],
        request["batch_sizes"][0] if device == "cuda" else CPU_BATCH,
        device,
    )
    if baseline:
        logits, labels = compute_reference(*arguments, baseline)
    else:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            logits, labels = pool.submit(compute_reference, *arguments).result()
    buffer = io.BytesIO()
    np.savez(buffer, key=key, logits=logits, labels=labels)
    write_atomic(path, buffer.getvalue())
    return logits, labels


def compute_reference(
    checkpoint: Path, image_size: int, data: str, batch_size: int, device: str, backend=None
):
    """Logits (N, classes) and labels (N,) of the test set by PyTorch FP32, loaded here unless given."""
    import torch

    import datasets
    import model

    if backend is None:
        from pytorch_inference import PyTorch

        backend = PyTorch()
        backend.load(checkpoint, image_size, [batch_size], device)
    loader = datasets.make_test_loader(
        Path(data), image_size, 16, model.load_facts(checkpoint)["classes"], num_workers=0
    )
    with torch.inference_mode():
        parts = [
            (classify(backend, images, batch_size, device), targets.numpy()) for images, targets in loader
        ]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def time_batch(
    backend, batch_size: int, checked_with: tuple, request: dict, device: str, watch: float
) -> dict:
    """Check, warm up and time one batch size; then let it run on for `watch` seconds while the driver is asked."""
    import torch

    images, expected, tolerance = (
        part if isinstance(part, float) else part[:batch_size] for part in checked_with
    )
    cuda = device == "cuda"
    synchronize = torch.cuda.current_stream().synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = (
        time.perf_counter()
    )  # the check is the first call of the warm-up: on a slow CPU it may be all of it
    difference = float(np.abs(classify(backend, images, batch_size, device) - expected).max())
    if not difference <= tolerance:  # NaN fails too
        return {
            "status": "mismatch",
            "reason": f"logits differ from PyTorch FP32 by {difference:.3g}, more than {tolerance:.3g}",
            "max_abs_diff": difference,
        }
    call = prepared(backend, images, device)
    rounds = request["rounds"]
    at_most = (request["max_seconds"] or MAX_SECONDS[device]) / rounds
    warmup = 1
    if time.perf_counter() - start < at_most / 2:
        warmup += timing.warm_up(call, synchronize, request["warmup"] - 1, WARM_UP_SECONDS, at_most / 2)
    samples = timing.sample(
        call,
        synchronize,
        runs=math.ceil(request["runs"] / rounds),
        min_seconds=request["min_seconds"] / rounds,
        max_seconds=at_most,
        new_event=(lambda: torch.cuda.Event(enable_timing=True)) if cuda else None,
    )
    gpu_memory_mb, memory_of = gpu.memory_mb() if cuda else (None, None)
    return {
        "status": "ok",
        "reason": "",
        "max_abs_diff": difference,
        "warmup": warmup,
        **vars(samples),
        "gpu_memory_mb": gpu_memory_mb,
        "memory_of": memory_of,
        "host_memory_mb": psutil.Process().memory_info().rss / 2**20,
        "torch_memory_mb": torch.cuda.max_memory_allocated() / 2**20
        if cuda and getattr(backend, "torch_allocator", False)
        else None,
        "sustained": profiling.sustain(call, synchronize, watch) if watch else None,
    }


def prepared(backend, images, device: str):
    """The call that is timed: predict() of images (N, 3, S, S), which lie on the device in the backend's own form."""
    x = backend.prepare(images.to(device))
    return lambda: backend.predict(x)


def failure(error: Exception) -> str:
    """The status that an exception stands for.  Runtimes say 'out of memory' each in their own words."""
    words = str(error).lower()
    short = any(
        text in words
        for text in (
            "out of memory",
            "outofmemory",
            "failed to allocate memory",
            "not enough memory",
            "can't allocate memory",
        )
    )
    return "out_of_memory" if short or isinstance(error, MemoryError) else "failed"


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]


def profile(name: str, backend, image_size: int, batch_size: int, request: dict, device: str) -> None:
    """Print the table by operator of some calls, and write their Chrome trace to results/profile/.  Raises UserError."""
    import torch

    if reason := backend.why_unavailable(device):
        raise UserError(f"{name}: {reason}")
    path = Path(request["results"]) / "profile" / f"{name}_{image_size}_batch{batch_size}.json"
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    with torch.inference_mode(), stream:
        backend.load(checkpoint_path(Path(request["weights"]), image_size), image_size, [batch_size], device)
        call = prepared(backend, torch.rand(batch_size, 3, image_size, image_size), device)
        print(f"{name}, {image_size} px, batch {batch_size}, {profiling.CALLS} calls")
        print(profiling.table_and_trace(call, device, path))
    print(f"written: {path} (open it in chrome://tracing or ui.perfetto.dev)")


def main(description: str, backends: dict) -> None:
    """A backend script's main(): measure its backends in this process and print their table.

    `backends` maps names to callables that make a backend.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, list(backends), default=[next(iter(backends))])
    parser.add_argument(
        "--profile", action="store_true", help="not time but trace the first size and last batch size"
    )
    args = parser.parse_args()
    request = {**make_request(args), "rounds": 1}  # rounds are fresh processes: benchmark.py's
    import torch

    from utils.records import read_rows
    from utils.report import text_table

    device = pick_device(request["device"])
    names, sizes = list(backends) if "all" in args.backends else args.backends, request["image_sizes"]
    if args.profile:
        for name in names:
            profile(name, backends[name](), sizes[0], request["batch_sizes"][-1], request, device)
        return
    for name, size in [(name, size) for name in names for size in sizes]:
        record = measure(name, backends[name](), size, 0, request, device)
        print(f"{name}, {size} px: {record['status']} {record['reason']}".rstrip(), file=sys.stderr)
        if device == "cuda":
            torch.cuda.empty_cache()
    rows = read_rows(Path(request["results"]))
    print(
        text_table(
            rows[rows.backend.isin(names) & rows.image_size.isin(sizes) & (rows.run == request["run"])]
        )
    )
