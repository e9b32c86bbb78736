"""One Job -> one Record: load a backend, check it against PyTorch FP32, time it at every batch size.

What every backend script does, alone or called by benchmark.py.
"""

import contextlib
import dataclasses
import math
import time

import numpy as np
import psutil

from utils import check, findings, gpu, timing
from utils.records import is_current, read_record, start, write_record
from utils.schema import Backend, Job, Record
from utils.utils import UserError

WARM_UP_SECONDS = 0.5  # at least, besides the calls asked for
SHORT_OF_MEMORY = ["out of memory", "outofmemory", "failed to allocate memory", "not enough memory"]
SHORT_OF_MEMORY += ["can't allocate memory"]  # runtimes say it each in their own words


def measure(job: Job, backend: Backend) -> Record:
    """Load, check and time one backend for every batch size; the record, written after every step.

    Round 0 classifies the whole test set.  Whatever goes wrong costs this record alone and stands in it.
    """
    record = start(job, precision=backend.precision)
    if reason := backend.why_unavailable(job.device):
        return finish(job, record, status="unavailable", reason=reason)
    record.batches = kept_batches(job)
    record.wall = {"load_s": 0.0, "check_s": 0.0, "time_s": 0.0}
    context_mb = gpu.context_mb() if job.device == "cuda" else None
    with inference(job.device):
        try:
            with stopwatch(record.wall, "load_s"):
                open_backend(job, record, backend)
                record.process["context_mb"] = context_mb
            with stopwatch(record.wall, "check_s"):
                call = whole_call(backend)
                record.check, probe = check.whole_test_set(job, call, backend.precision)
        except UserError:
            raise
        except Exception as error:
            return finish(job, record, status=failure(error), reason=one_line(error))
        time_batches(job, record, backend, probe)
    if job.auto:  # what the record holds is all that was wanted
        record.batch_sizes = sorted(batch["batch_size"] for batch in record.batches)
    return finish(job, record)


def finish(job: Job, record: Record, **changes) -> Record:
    record = dataclasses.replace(record, **changes)
    write_record(job.record, record)
    return record


def kept_batches(job: Job) -> list[dict]:
    """What an earlier record of the same key holds and need not be measured again: all that has not
    failed."""
    record = read_record(job.record)
    if not is_current(record, job):
        return []
    return [batch for batch in record.batches if batch["status"] != "failed"]


@contextlib.contextmanager
def inference(device: str):
    """Inference mode; on a GPU on a stream of its own, since graphs can't be captured on the default one."""
    import torch

    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    with torch.inference_mode(), stream:
        yield


@contextlib.contextmanager
def stopwatch(wall: dict, name: str):
    """Add the seconds that the block takes to wall[name], for the account of where a sweep's time goes."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        wall[name] = round(wall[name] + time.perf_counter() - begin, 3)


def open_backend(job: Job, record: Record, backend: Backend) -> None:
    """Have the backend export, build or deserialise; note how long that took and what the process is like."""
    import torch

    import model

    backend.load(job.checkpoint, job.image_size, list(job.batch_sizes), job.device)
    artefact = backend.artefact
    megabytes = round(artefact.stat().st_size / 2**20, 1) if artefact else None
    seconds = round(backend.build_s, 3)
    record.precision = backend.precision
    record.build = dict(seconds=seconds, from_cache=backend.from_cache, artefact_mb=megabytes)
    if job.round == 0:
        classes = model.load_facts(job.checkpoint)["classes"]
        record.work = model.count_work(job.image_size, len(classes))
    cuda = job.device == "cuda"
    record.process = {
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }


def whole_call(backend: Backend):
    """Images float32 (N, 3, S, S) on the device -> logits (N, classes)."""
    return lambda images: backend.predict(backend.prepare(images))


def prepared(backend: Backend, images, device: str):
    """The call that is timed: predict() of images that lie on the device in the backend's own form."""
    x = backend.prepare(images.to(device))
    return lambda: backend.predict(x)


def time_batches(job: Job, record: Record, backend: Backend, probe: check.Probe) -> None:
    """Time every batch size that the record lacks, writing it after each; last, ask the profiler."""
    watch = job.settings.sustain_seconds if job.device == "cuda" and job.round == 0 else 0
    for batch_size in batch_sizes_of(job):
        if job.auto and job.round == 0 and has_saturated(record.batches):
            break
        if record.batch(batch_size):
            continue
        try:
            with stopwatch(record.wall, "time_s"):
                result = time_batch(job, backend, batch_size, probe, watch)
        except Exception as error:
            result = {"status": failure(error), "reason": one_line(error)}
        record.batches.append({"batch_size": batch_size, **result})
        record.batches.sort(key=lambda batch: batch["batch_size"])
        write_record(job.record, record)
    for batch in record.batches if watch else []:  # last, since the profiler may slow down what follows
        if batch["status"] == "ok" and "busy_ms" not in batch:
            images = probe.images[: batch["batch_size"]]
            batch["busy_ms"] = gpu.busy_ms(prepared(backend, images, job.device))


def batch_sizes_of(job: Job) -> list[int]:
    """The batch sizes to measure; with auto, round 0 finds out how many and the later rounds follow it."""
    if job.auto and job.round > 0:
        first = read_record(job.round0)
        return first.batch_sizes if first else list(job.batch_sizes)
    return list(job.batch_sizes)


def has_saturated(batches: list[dict]) -> bool:
    """Whether the last doubling gave too little for another, or failed for want of memory or otherwise."""
    if batches and batches[-1]["status"] != "ok":
        return True
    sizes = [batch["batch_size"] for batch in batches]
    fps = [batch["batch_size"] / timing.trimmed_mean(batch["host_ms"]) for batch in batches]
    return findings.saturated(sizes, fps)


def time_batch(job: Job, backend: Backend, batch_size: int, probe: check.Probe, watch: float) -> dict:
    """Check, warm up and time one batch size; then let it run for `watch` seconds while the driver is
    asked."""
    import torch

    cuda, settings = job.device == "cuda", job.settings
    images, expected = probe.images[:batch_size], probe.expected[:batch_size]
    synchronize = torch.cuda.current_stream().synchronize if cuda else lambda: None
    new_event = (lambda: torch.cuda.Event(enable_timing=True)) if cuda else None
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()  # the check is the warm-up's first call: on a slow CPU it may be all of it
    logits = check.classify(whole_call(backend), images, batch_size, job.device)
    difference = float(np.abs(logits - expected).max())
    if reason := check.too_far(difference, probe.tolerance):
        return {"status": "mismatch", "reason": reason, "max_abs_diff": difference}
    call = prepared(backend, images, job.device)
    at_most, warmup = settings.max_seconds / settings.rounds, 1
    if time.perf_counter() - begin < at_most / 2:
        warmup += timing.warm_up(call, synchronize, settings.warmup - 1, WARM_UP_SECONDS, at_most / 2)
    runs, at_least = math.ceil(settings.runs / settings.rounds), settings.min_seconds / settings.rounds
    samples = timing.sample(call, synchronize, runs, at_least, at_most, new_event)
    memory_mb, memory_of = gpu.memory_mb() if cuda else (None, None)
    allocated = torch.cuda.max_memory_allocated() / 2**20 if cuda and backend.torch_allocator else None
    return {
        "status": "ok",
        "reason": "",
        "max_abs_diff": difference,
        "warmup": warmup,
        **vars(samples),
        "gpu_memory_mb": memory_mb,
        "memory_of": memory_of,
        "host_memory_mb": psutil.Process().memory_info().rss / 2**20,
        "torch_memory_mb": allocated,
        "sustained": gpu.sustain(call, synchronize, watch) if watch else None,
    }


def failure(error: Exception) -> str:
    """The status that an exception stands for."""
    words = str(error).lower()
    short = any(text in words for text in SHORT_OF_MEMORY)
    return "out_of_memory" if short or isinstance(error, MemoryError) else "failed"


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]


def trace(job: Job, backend: Backend) -> None:
    """Print the table by operator of some calls at the largest batch, and write their Chrome trace to
    results/profile/.  Raises UserError where the backend can't run."""
    import torch

    if reason := backend.why_unavailable(job.device):
        raise UserError(f"{job.backend}: {reason}")
    batch_size, size = job.batch_sizes[-1], job.image_size
    path = job.results / "profile" / f"{job.backend}_{size}_batch{batch_size}.json"
    with inference(job.device):
        backend.load(job.checkpoint, size, [batch_size], job.device)
        call = prepared(backend, torch.rand(batch_size, 3, size, size), job.device)
        print(f"{job.backend}, {size} px, batch {batch_size}, {gpu.CALLS} calls")
        print(gpu.table_and_trace(call, job.device, path))
    print(f"written: {path} (open it in chrome://tracing or ui.perfetto.dev)")
