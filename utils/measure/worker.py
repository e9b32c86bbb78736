"""One Job -> one Record: load a backend, check it against PyTorch FP32, time it at every batch size.

What every backend script does, alone or called by benchmark.py.
"""

import contextlib
import ctypes
import functools
import math
import sys
import time
from collections.abc import Callable

import numpy as np
import psutil

from utils.backend import Backend, Unavailable
from utils.measure import accuracy, gpu, timing
from utils.measure.records import kept_batches, note_failure, read_record, start, write_record
from utils.measure.schema import Job, Settings
from utils.utils import MENDS, UserError, is_out_of_memory, sentence

WARM_UP_SECONDS = 0.3  # at least, besides the calls asked for
# Of a turn at least: below, what the others left in the caches shows.  A core that shares its hardware with
# a neighbour's changes between two speeds several times a second, which shows where launching is the limit.
TURN_MS = {"cpu": 30.0, "cuda": 15.0}
MOST_TURNS = 48  # of a round, at each batch size: further rounds tell more than further turns
WAKE_MS, SLOW_MS = 10.0, 200.0  # untimed calls at the start of a turn: a run of 200 ms needs none
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


class Problem(Exception):  # noqa: N818 (it is a finding, handed on like one)
    """Why a step gave nothing: one of schema.STATUSES and the reason."""

    def __init__(self, status: str, reason: str):
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class Measuring:
    """One Job on its way to its Record: open(); begin() each batch size; turns of run(); end() each; close().

    Between the steps other processes may be at work (interleave.py).  A step that fails raises what went
    wrong; fail() and close() write it into the record, so that it costs this record alone.
    """

    def __init__(self, job: Job, backend: Backend):
        self.job, self.backend, self.cuda = job, backend, job.device == "cuda"
        self.watch = job.settings.sustain_seconds if self.cuda and job.round == 0 else 0
        self.record = start(job, precision=backend.precision, adds=backend.adds)
        self.record.batches = kept_batches(read_record(job.record), job)
        self.whole_call = whole_call(backend)
        self.begun, self.calls = {}, {}  # batch size -> what goes into the record; the call that is timed

    def open(self) -> None:
        """Load; in round 0 classify the whole test set."""
        job, record = self.job, self.record
        if reason := self.backend.why_unavailable(job.device):
            raise Problem("unavailable", reason)
        record.work = count_work(job) if job.round == 0 else None
        context_mb = gpu.context_mb() if self.cuda else None
        with gpu.own_phase():
            record.build, record.process = open_backend(job, self.backend)
            record.process["context_mb"] = context_mb
            record.precision = self.backend.precision
            record.check, self.probe = accuracy.whole_test_set(job, self.whole_call, record.precision)

    def begin(self, batch_size: int) -> float:
        """Check one batch size and warm it up; the milliseconds that a run takes."""
        with gpu.own_phase():
            return self.warm_up(batch_size)

    def warm_up(self, batch_size: int) -> float:
        import torch

        settings, probe = self.job.settings, self.probe
        self.synchronize, self.new_event = (lambda: None), None
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.synchronize = torch.cuda.current_stream().synchronize
            self.new_event = lambda: torch.cuda.Event(enable_timing=True)
        images = probe.images[:batch_size].to(self.job.device)
        begin = time.perf_counter()  # the check is the warm-up's first call
        logits = self.whole_call(images).float().cpu().numpy()
        took = [(time.perf_counter() - begin) * 1000]
        expected = probe.expected[:batch_size]
        difference = float(np.abs(logits - expected).max())
        batch = {"batch_size": batch_size, "status": "ok", "reason": "", "max_abs_diff": difference}
        self.begun[batch_size] = batch
        if reason := accuracy.too_far(difference, probe.tolerance):
            raise Problem("mismatch", reason)
        x = self.backend.prepare(images)
        self.calls[batch_size] = call = functools.partial(self.backend.predict, x)
        limits = settings.warmup - 1, WARM_UP_SECONDS, settings.max_seconds / settings.rounds / 2
        took += timing.warm_up(call, self.synchronize, *limits)  # once at least: memory may grow till then
        batch |= {"first_call_ms": took[0], "run_ms": float(np.median(took[len(took) // 2 :]))}
        batch |= {name: [] for name in ("host_ms", "enqueue_ms", "gpu_ms", "turns", "core_ms")}
        batch["warmup"] = len(took)
        batch["gpu_memory_mb"], batch["memory_of"] = gpu.memory_mb() if self.cuda else (None, None)
        batch["host_memory_mb"] = psutil.Process().memory_info().rss / 2**20
        own = self.cuda and self.backend.torch_allocator
        batch["torch_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20 if own else None
        return batch["run_ms"]

    def run(self, batch_size: int, runs: int) -> float:
        """One turn: time so many runs; their mean in milliseconds."""
        batch, call = self.begun[batch_size], self.calls[batch_size]
        for _ in range(math.ceil(WAKE_MS / batch["run_ms"]) if batch["run_ms"] < SLOW_MS else 0):
            call()  # others were at work: caches are cold
        samples = timing.sample(call, self.synchronize, runs, self.new_event)
        for name, values in vars(samples).items():
            batch[name] += values
        batch["turns"].append(runs)
        batch["core_ms"].append(round(timing.core_ms(), 4))
        return timing.trimmed_mean(samples.host_ms)

    def end(self, batch_size: int, beside_ms: list[float] | None) -> None:
        """Note what one batch size gave, with the baseline's means in the same turns; close() writes it."""
        call, watch = self.calls[batch_size], self.watch
        sustained = gpu.sustain(call, self.synchronize, watch) if watch else None
        self.note(self.begun[batch_size] | {"beside_ms": beside_ms, "sustained": sustained})

    def save(self) -> None:
        """Write the record as it is, before what may end this process."""
        write_record(self.job.record, self.record)

    def fail(self, batch_size: int, status: str, reason: str) -> None:
        """Note that a batch size gave no figures, and why."""
        difference = self.begun.get(batch_size, {}).get("max_abs_diff")
        failed = {"batch_size": batch_size, "status": status, "reason": reason}
        self.note(failed if difference is None else failed | {"max_abs_diff": difference})

    def note(self, batch: dict) -> None:
        others = [one for one in self.record.batches if one["batch_size"] != batch["batch_size"]]
        self.record.batches = sorted([*others, batch], key=lambda one: one["batch_size"])

    def close(self, status: str = "ok", reason: str = "") -> None:
        """Write the record with its status; ask the profiler last, since it may slow down what follows."""
        record = self.record
        if status != "ok" and record.batches:  # a measurement is not replaced by a failure
            note_failure(self.job, reason)
            return
        for batch in record.batches if self.watch and status == "ok" else []:
            if batch["status"] == "ok" and "busy_ms" not in batch:
                x = self.backend.prepare(self.probe.images[: batch["batch_size"]].to(self.job.device))
                batch["busy_ms"] = gpu.busy_ms(lambda x=x: self.backend.predict(x))
        if self.job.auto and status == "ok":  # what the record holds is all that was wanted
            record.batch_sizes = [batch["batch_size"] for batch in record.batches]
        record.status, record.reason = status, reason
        write_record(self.job.record, record)


def whole_call(backend: Backend) -> Callable:
    """Images float32 (N, 3, S, S) on the device -> logits (N, classes)."""
    return lambda images: backend.predict(backend.prepare(images))


def turns_of(run_ms: list[float], settings: Settings, device: str) -> tuple[int, list[int]]:
    """How many turns a round has at one batch size, and how many runs each member then takes a turn.

    `run_ms` is what a run takes each of them.  Every member gets its share of the runs and seconds asked for,
    within the seconds allowed; the slowest decides how often they can change.
    """
    least, most = 1000 * settings.min_seconds / settings.rounds, 1000 * settings.max_seconds / settings.rounds
    wanted = [max(math.ceil(settings.runs / settings.rounds), math.ceil(least / ms)) for ms in run_ms]
    runs = [max(1, min(n, int(most / ms))) for n, ms in zip(wanted, run_ms, strict=True)]
    spans = [n * ms / TURN_MS[device] for n, ms in zip(runs, run_ms, strict=True)]
    turns = max(1, min([MOST_TURNS, *runs, *map(int, spans)])) if runs else 0
    return turns, [math.ceil(n / turns) for n in runs]


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for the next call, as ONNX Runtime's own arena does.

    By glibc's defaults a run of PyTorch on a CPU that takes and frees tensors of over 32 MB is page faults
    for up to half its time, and by 10 to 30 % more of them in one process than in the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, value in {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}.items() if mallopt else []:
        mallopt(option, value)


@contextlib.contextmanager
def inference(device: str):
    """Inference mode; on a GPU on a stream of its own, since graphs can't be captured on the default one."""
    import torch

    keep_freed_memory()
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    with torch.inference_mode(), stream:
        yield


def open_backend(job: Job, backend: Backend) -> tuple[dict, dict]:
    """Have the backend export, build or deserialise: how that went, and what the process is like."""
    import torch

    backend.data, begin = job.data, time.perf_counter()
    backend.load(job.checkpoint, job.image_size, list(job.batch_sizes), job.device)
    seconds, artefact = time.perf_counter() - begin, backend.artefact
    megabytes = round(artefact.stat().st_size / 2**20, 1) if artefact else None
    build = dict(seconds=round(backend.build_s, 3), from_cache=backend.from_cache, artefact_mb=megabytes)
    cuda = job.device == "cuda"
    process = {
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }
    return build | {"load_s": round(seconds, 4)}, process


def count_work(job: Job) -> dict:
    import model

    return model.count_work(job.image_size, len(model.load_facts(job.checkpoint)["classes"]))


def problem_of(error: Exception) -> Problem:
    """What an exception stands for."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Unavailable):
        return Problem("unavailable", str(error))
    if isinstance(error, OSError) and error.errno in MENDS:
        return Problem("failed", sentence(error))
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:1000]
    return Problem("out_of_memory" if is_out_of_memory(error) else "failed", reason)


def trace(job: Job, backend: Backend) -> None:
    """Print the table by operator of some calls at the largest batch, and write their Chrome trace to
    results/profile/.  Raises UserError where the backend can't run."""
    import torch

    if reason := backend.why_unavailable(job.device):
        raise UserError(f"{job.backend}: {reason}")
    batch_size, size = job.batch_sizes[-1], job.image_size
    path = job.results / "profile" / f"{job.backend}_{size}_batch{batch_size}.json"
    with inference(job.device):
        backend.data = job.data
        backend.load(job.checkpoint, size, [batch_size], job.device)
        x = backend.prepare(torch.rand(batch_size, 3, size, size).to(job.device))
        print(f"{job.backend}, {size} px, batch {batch_size}, {gpu.CALLS} calls")
        print(gpu.table_and_trace(lambda: backend.predict(x), job.device, path))
    print(f"written: {path} (open it in chrome://tracing or ui.perfetto.dev)")
