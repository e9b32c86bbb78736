"""PyTorch FP32's logits on the test set, kept in weights/, and the pass over it that compares a backend's."""

import math
from collections.abc import Callable

import numpy as np

from utils.backend import is_fresh, store
from utils.measure.accuracy import TOLERANCE, classify
from utils.measure.schema import BASELINE, Job
from utils.utils import UserError, sha256

CPU_BATCH = 16  # of the accuracy pass on a CPU, where no shapes are fixed and memory is no concern


def test_loader(job: Job):
    import datasets
    import model

    classes = model.load_facts(job.checkpoint)["classes"]
    return datasets.Loader(job.data, "test", classes, job.image_size, job.batch_sizes[-1])


def logits_on_test_set(job: Job, call: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, classes) by `call` and the labels (N,) of the whole test set."""
    # On a GPU in the smallest batches: its memory grows from there.
    size = job.batch_sizes[0] if job.device == "cuda" else CPU_BATCH
    logits, labels = [], []
    for images, targets in test_loader(job):
        logits.append(classify(call, images, size, job.device))
        labels.append(targets.numpy())
    return np.concatenate(logits), np.concatenate(labels)


def whole_test_set(job: Job, call: Callable, precision: str) -> tuple[dict | None, tuple]:
    """In round 0 the record of a pass over the test set (None later), and what batch sizes are tried with:
    images float32 (N, 3, S, S) on the CPU, PyTorch FP32's logits (N, classes) and the largest difference
    that passes; N is the largest batch."""
    expected, labels = reference(job)
    tolerance, found = TOLERANCE[precision] * float(np.abs(expected).max()), None
    largest = job.batch_sizes[-1]
    if job.round == 0:
        logits = expected
        if job.backend != BASELINE:
            logits, _ = logits_on_test_set(job, call)
        found = {
            "images": len(labels),
            "different": int((logits.argmax(1) != expected.argmax(1)).sum()),
            "correct": int((logits.argmax(1) == labels).sum()),
            "correct_fp32": int((expected.argmax(1) == labels).sum()),
            "max_abs_diff": float(np.abs(logits - expected).max()),
            "tolerance": tolerance,
        }
    first = next(iter(test_loader(job)))[0]
    times = math.ceil(largest / len(first))
    images = first.repeat(times, 1, 1, 1)[:largest]
    return found, (images, np.tile(expected[: len(first)], (times, 1))[:largest], tolerance)


def references(jobs: list[Job]) -> None:
    """Bring what is kept in weights/ up to date, in a process of its own before any backend is loaded."""
    for job in jobs:
        reference(job)


def reference(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """PyTorch FP32's logits (N, classes) and the labels (N,) of the test set, kept in weights/.

    Raises UserError where a logit is not a finite number: such a network is the reference of nothing.
    """
    import torch

    import model

    path = job.checkpoint.with_name(f"reference_{job.image_size}_{job.device}.npz")
    facts = {name: job.environment[name] for name in ("data", "packages", "gpu")}
    facts |= {"checkpoint": sha256(job.checkpoint), "device": job.device}
    if not is_fresh(path, facts):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        network, _ = model.load(job.checkpoint, job.device)
        with torch.inference_mode():
            logits, labels = logits_on_test_set(job, network)
        if not np.isfinite(logits).all():
            mend = f"train it again: python train.py --force --image-sizes {job.image_size}"
            raise UserError(f"{job.checkpoint} gives logits that are not finite numbers; {mend}")
        store(path, facts, lambda file: np.savez(file, logits=logits, labels=labels))
    with np.load(path) as stored:
        return stored["logits"], stored["labels"]
