"""What happens in a worker process: load a backend, check it against PyTorch FP32, time each batch size.

serve() takes the steps through a pipe from the process that plans the round (interleave.py).
"""

import contextlib
import functools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from utils.backend import Backend, Unavailable, inference, is_fresh, store
from utils.environment import is_out_of_memory
from utils.measure import accuracy, gpu, timing
from utils.measure.schema import BASELINE, Job, Problem
from utils.utils import MENDS, UserError, end_with_parent, sentence, sha256

WARM_UP_SECONDS = 0.3  # at least, besides the calls asked for
WAKE_MS, SLOW_MS = 10.0, 200.0  # untimed calls at the start of a block: a run of 200 ms needs none
LONGEST_REASON = 1000  # characters
CPU_BATCH = 16  # of the pass over the test set on a CPU; on a GPU the smallest: its memory grows from there


class Measurement:
    """One Job, step by step: open(); begin() each batch size; blocks of run(); end() each; busy_ms().

    Between the steps other processes may be at work.  A step returns what it found or raises what went wrong.
    """

    def __init__(self, job: Job, backend: Backend):
        self.job, self.backend, self.cuda = job, backend, job.device == "cuda"
        self.calls, self.samples = {}, {}  # batch size -> the call that is timed; what its blocks gave

    def open(self) -> dict:
        """Load; in round 0 classify the whole test set.  The fields of the record that this fills."""
        import torch

        job, backend = self.job, self.backend
        if reason := backend.why_unavailable(job.device):
            raise Problem("unavailable", reason)
        context_mb = gpu.context_mb() if self.cuda else None
        with gpu.own_phase():
            backend.data, begin = job.data, time.perf_counter()
            backend.load(job.checkpoint, job.image_size, list(job.batch_sizes), job.device)
            load_s = round(time.perf_counter() - begin, 4)
            check, work, self.probe = whole_test_set(job, whole_call(backend), backend.precision)
        self.synchronize, self.new_event = (lambda: None), None
        if self.cuda:
            self.synchronize = torch.cuda.current_stream().synchronize
            self.new_event = lambda: torch.cuda.Event(enable_timing=True)
        artefact = backend.artefact
        build = {"seconds": round(backend.build_s, 3), "from_cache": backend.from_cache, "load_s": load_s}
        build["artefact_mb"] = round(artefact.stat().st_size / 2**20, 1) if artefact else None
        process = {"context_mb": context_mb, "threads": torch.get_num_threads()}
        process["cuda"] = torch.version.cuda if self.cuda else None
        process["cudnn"] = torch.backends.cudnn.version() if self.cuda else None
        known = {"precision": backend.precision, "work": work, "check": check}
        return known | {"build": build, "process": process}

    def begin(self, batch_size: int, only: bool = False) -> dict:
        """Check a batch size and warm it up, at `only` with no other in memory; what is known of it then."""
        import torch

        settings, (images, expected, tolerance) = self.job.settings, self.probe
        with gpu.own_phase():
            if only:
                self.release()
            if self.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            images = images[:batch_size].to(self.job.device)
            begin = time.perf_counter()  # the check is the warm-up's first call
            logits = whole_call(self.backend)(images).float().cpu().numpy()
            took = [(time.perf_counter() - begin) * 1000]
            difference = float(np.abs(logits - expected[:batch_size]).max())
            if reason := accuracy.too_far(difference, tolerance):
                raise Problem("mismatch", reason, difference)
            x = self.backend.prepare(images)
            self.calls[batch_size] = call = functools.partial(self.backend.predict, x)
            limits = settings.warmup - 1, WARM_UP_SECONDS, settings.max_seconds / settings.rounds / 2
            took += timing.warm_up(call, self.synchronize, *limits)  # at least once: memory may still grow
        self.samples[batch_size] = dict(host_ms=[], enqueue_ms=[], gpu_ms=[], block_runs=[], core_ms=[])
        run_ms = max(float(np.median(took[len(took) // 2 :])), timing.RESOLUTION_MS)
        found = {"max_abs_diff": difference, "first_call_ms": took[0], "run_ms": run_ms, "warmup": len(took)}
        found["gpu_memory_mb"], found["memory_of"] = gpu.memory_mb() if self.cuda else (None, None)
        found["host_memory_mb"] = psutil.Process().memory_info().rss / 2**20
        own = self.cuda and self.backend.torch_allocator
        return found | {"torch_memory_mb": torch.cuda.max_memory_allocated() / 2**20 if own else None}

    def release(self) -> None:
        self.calls.clear()
        self.backend.release()

    def run(self, batch_size: int, runs: int, run_ms: float) -> float:
        """One block: time so many runs, each of about `run_ms`; their mean in milliseconds."""
        call, found = self.calls[batch_size], self.samples[batch_size]
        for _ in range(math.ceil(WAKE_MS / run_ms) if run_ms < SLOW_MS else 0):
            call()  # others were at work: caches are cold
        samples = timing.sample(call, self.synchronize, runs, self.new_event)
        for name, values in samples.items():
            found[name] += values
        found["block_runs"].append(runs)
        found["core_ms"].append(round(timing.core_ms(), 4))
        return timing.trimmed_mean(samples["host_ms"])

    def end(self, batch_size: int) -> dict:
        """One batch size's samples and, on a GPU in round 0, what the driver said beside a loop of calls."""
        seconds = self.job.settings.sustain_seconds if self.cuda and self.job.round == 0 else 0
        sustained = gpu.sustain(self.calls[batch_size], self.synchronize, seconds) if seconds else None
        return self.samples[batch_size] | {"sustained": sustained}

    def busy_ms(self, batch_size: int, only: bool) -> float | None:
        """Milliseconds of a call in which the GPU works.  Comes last: the profiler slows what follows."""
        if only:
            self.release()
        x = self.backend.prepare(self.probe[0][:batch_size].to(self.job.device))
        return gpu.busy_ms(lambda: self.backend.predict(x))


def serve(job: Job, pipe, log: Path, asked: float) -> None:
    """What a worker process, `asked` for then, does: the steps that come by the pipe, until it is closed."""
    end_with_parent()
    write_into(log)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # the pipe is closed, or Ctrl-C
        import backends

        measurement = Measurement(job, backends.make(job.backend, job.script))
        pipe.send(time.perf_counter() - asked)  # this clock is the same in all processes of a machine
        with inference(job.device):
            while True:
                step, arguments = pipe.recv()
                try:
                    result = getattr(measurement, step)(*arguments)
                except UserError as error:
                    result = error
                except Exception as error:
                    result = problem_of(error)
                    if result.status == "failed":
                        traceback.print_exception(error)
                pipe.send(result)


def write_into(log: Path) -> None:
    """Have all that this process prints, and what libraries print past Python, go to the log's end.

    The text streams are replaced, too: a Windows console's would fail, and without a console they are None.
    """
    file = log.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = file


def whole_call(backend: Backend) -> Callable:
    """Images float32 (N, 3, S, S) on the device -> logits (N, classes)."""
    return lambda images: backend.predict(backend.prepare(images))


def problem_of(error: Exception) -> Problem:
    """What an exception stands for, with what mends it; of a long message the end, where the cause stands."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Unavailable):
        return Problem("unavailable", str(error))
    words = " ".join(f"{type(error).__name__}: {error}".split())
    if is_out_of_memory(error) or is_out_of_memory(words):
        return Problem("out_of_memory", words[-LONGEST_REASON:])
    if isinstance(error, OSError) and error.errno in MENDS:
        return Problem("failed", sentence(error))
    mend = "benchmark.log beside the table says more; run the same command to try again"
    if isinstance(error, ModuleNotFoundError):
        mend = "install what is missing: pip install -r requirements.txt"
    return Problem("failed", f"{words[-LONGEST_REASON:]}; {mend}")


# ---- PyTorch FP32's answers, which every other is compared with


def test_loader(job: Job):
    import datasets
    import model

    classes = model.load_facts(job.checkpoint)["classes"]
    return datasets.Loader(job.data, "test", classes, job.image_size, job.batch_sizes[-1])


def logits_on_test_set(job: Job, call: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, classes) by `call` and the labels (N,) of the whole test set."""
    size = job.batch_sizes[0] if job.device == "cuda" else CPU_BATCH
    logits, labels = [], []
    for images, targets in test_loader(job):
        logits.append(accuracy.classify(call, images, size, job.device))
        labels.append(targets.numpy())
    return np.concatenate(logits), np.concatenate(labels)


def whole_test_set(job: Job, call: Callable, precision: str) -> tuple[dict | None, dict, tuple]:
    """In round 0 the record of a pass over the test set (None later), an image's work, and what batch sizes
    are tried with: images float32 (N, 3, S, S) on the CPU, PyTorch FP32's logits (N, classes) and the largest
    difference that passes; N is the largest batch."""
    expected, labels, work = reference(job)
    tolerance, found = accuracy.TOLERANCE[precision] * float(np.abs(expected).max()), None
    if job.round == 0:
        logits = expected if job.backend == BASELINE else logits_on_test_set(job, call)[0]
        found = {
            "images": len(labels),
            "different": int((logits.argmax(1) != expected.argmax(1)).sum()),
            "correct": int((logits.argmax(1) == labels).sum()),
            "correct_fp32": int((expected.argmax(1) == labels).sum()),
            "max_abs_diff": float(np.abs(logits - expected).max()),
            "tolerance": tolerance,
        }
    first, largest = next(iter(test_loader(job)))[0], job.batch_sizes[-1]
    times = math.ceil(largest / len(first))
    images = first.repeat(times, 1, 1, 1)[:largest]
    expected = np.tile(expected[: len(first)], (times, 1))[:largest]
    return found, work, (images, expected, tolerance)


def references(jobs: list[Job]) -> None:
    """Bring what is kept in weights/ up to date."""
    for job in jobs:
        reference(job)


def reference(job: Job) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """PyTorch FP32's logits (N, classes) and the labels (N,) of the test set, kept in weights/, and with
    them model.count_work(): importing what counts takes a second, or on a slow disk five.

    Raises UserError where a logit is not a finite number: such a network is the reference of nothing.
    """
    import torch

    import model

    path = job.checkpoint.with_name(f"reference_{job.image_size}_{job.device}.npz")
    facts = {name: job.environment[name] for name in ("data", "packages", "gpu")}
    facts |= {"checkpoint": sha256(job.checkpoint), "device": job.device, "version": 2}
    if not is_fresh(path, facts):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        network, _ = model.load(job.checkpoint, job.device)
        with torch.inference_mode():
            logits, labels = logits_on_test_set(job, network)
        if not np.isfinite(logits).all():
            mend = f"train it again: python train.py --force --image-sizes {job.image_size}"
            raise UserError(f"{job.checkpoint} gives logits that are not finite numbers; {mend}")
        kept = {"logits": logits, "labels": labels, **model.count_work(job.image_size, logits.shape[1])}
        store(path, facts, lambda file: np.savez(file, **kept))
    with np.load(path) as stored:
        work = {name: int(stored[name]) for name in ("flops", "activations", "weights")}
        return stored["logits"], stored["labels"], work
