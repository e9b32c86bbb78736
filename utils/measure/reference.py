"""PyTorch FP32's logits on the test set, kept in weights/, and the pass over it that compares a backend's."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.backend import is_fresh, store
from utils.measure.accuracy import CPU_BATCH, TOLERANCE, Probe, batch_size_of, classify
from utils.measure.schema import BASELINE, Job
from utils.utils import UserError, in_fresh_process, sha256

IMAGES_EACH = 250  # that make it worth starting another process that reads images
SHARED_MEMORY = Path("/dev/shm")  # through which such processes hand over batches, on Linux


def test_loader(data: Path, checkpoint: Path, image_size: int, batch_size: int, workers: int = 0):
    import datasets
    import model

    classes = model.load_facts(checkpoint)["classes"]
    return datasets.make_test_loader(data, image_size, batch_size, classes, workers)


def reading_processes(images: int, batch_size: int, image_size: int) -> int:
    """How many processes read so many test images: none where their batches find no room to be handed over.

    Docker's /dev/shm has 64 MB unless --shm-size says otherwise; a process that finds it full is killed.
    """
    wanted = min(4, images // IMAGES_EACH)
    if not wanted or not SHARED_MEMORY.is_dir():
        return wanted
    batch = (
        min(batch_size, images) * 3 * image_size**2 * 4
    )  # bytes; each process has two ready, one is in use
    return max(0, min(wanted, shutil.disk_usage(SHARED_MEMORY).free // (3 * batch)))


def whole_test_set(job: Job, call: Callable, precision: str) -> tuple[dict | None, Probe]:
    """In round 0 the record of a pass over the test set (None later), and the probe for every batch size."""
    expected, labels = reference(job, call)
    tolerance = TOLERANCE[precision] * float(np.abs(expected).max())
    whole, largest = job.round == 0, job.batch_sizes[-1]
    workers = reading_processes(len(labels), largest, job.image_size) if whole else 0
    loader = test_loader(job.data, job.checkpoint, job.image_size, largest, workers)
    first = next(iter(loader))[0]
    found = None
    if whole:
        logits = expected
        if job.backend != BASELINE:
            parts = [classify(call, images, batch_size_of(job), job.device) for images, _ in loader]
            logits = np.concatenate(parts)
        found = {
            "images": len(labels),
            "different": int((logits.argmax(1) != expected.argmax(1)).sum()),
            "correct": int((logits.argmax(1) == labels).sum()),
            "correct_fp32": int((expected.argmax(1) == labels).sum()),
            "max_abs_diff": float(np.abs(logits - expected).max()),
            "tolerance": tolerance,
        }
    times = math.ceil(largest / len(first))
    images = first.repeat(times, 1, 1, 1)[:largest]
    expected = np.tile(expected[: len(first)], (times, 1))[:largest]
    return found, Probe(images, expected, tolerance)


def reference(job: Job, call: Callable | None) -> tuple[np.ndarray, np.ndarray]:
    """PyTorch FP32's logits (N, classes) and the labels (N,) of the test set, kept in weights/.

    Where they are stale, the baseline's own process computes them by `call`; for any other backend a process
    is started, so that nothing of PyTorch FP32 stays in this one's memory.  Raises UserError where a logit is
    not a finite number: such a network is the reference of nothing.
    """
    path = job.checkpoint.with_name(f"reference_{job.image_size}_{job.device}.npz")
    facts = {name: job.environment[name] for name in ("data", "packages", "gpu")}
    facts |= {"checkpoint": sha256(job.checkpoint), "device": job.device}
    if not is_fresh(path, facts):
        if job.backend == BASELINE:
            logits, labels = compute_reference(job, call)
        else:
            logits, labels = in_fresh_process(compute_reference, job)
        if not np.isfinite(logits).all():
            mend = f"train it again: python train.py --force --image-sizes {job.image_size}"
            raise UserError(f"{job.checkpoint} gives logits that are not finite numbers; {mend}")
        store(path, facts, lambda file: np.savez(file, logits=logits, labels=labels))
    with np.load(path) as stored:
        return stored["logits"], stored["labels"]


def references(baselines: list[Job]) -> None:
    """Bring what is kept in weights/ up to date for the baseline's jobs."""
    for job in baselines:
        reference(job, None)


def compute_reference(job: Job, call: Callable | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, classes) and labels (N,) of the test set by `call`, or by PyTorch FP32 loaded here."""
    import torch

    import model

    if call is None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    network = call or model.load(job.checkpoint, job.device)[0]
    logits, labels = [], []
    with torch.inference_mode():
        for images, targets in test_loader(job.data, job.checkpoint, job.image_size, CPU_BATCH):
            logits.append(classify(network, images, batch_size_of(job), job.device))
            labels.append(targets.numpy())
    return np.concatenate(logits), np.concatenate(labels)
