"""Right before fast: PyTorch FP32's logits on the test set, kept in weights/, and the gate that every backend
has to pass against them before its speed counts."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.backend import is_fresh, store
from utils.measure.schema import BASELINE, Job
from utils.utils import UserError, sha256

MIN_AGREEMENT = 0.99  # of the test images, or all but one on small sets
CPU_BATCH = 16  # of the accuracy pass on a CPU, where no shapes are fixed and memory is no concern
# The largest logit difference from PyTorch FP32 that passes, as a share of the largest logit.  ResNet-18
# has 21 layers with weights, each rounding weights, products' sum and activation: 63 u (Higham, Accuracy
# and Stability of Numerical Algorithms, 2002, section 3.1) is 3 % for FP16 and TF32 with u = 2^-11.  FP32
# sums of up to 4608 products and Winograd's transforms (Lavin and Gray, 2016) lose about three digits more
# than u = 2^-24 alone.  BF16 has u = 2^-8.  INT8 rounds weights and activations to 127 steps a side, half a
# step (u = 2^-8) off at most, and sums exactly: 42 u (Jacob et al., Quantization and Training of Neural
# Networks, 2018, section 2).
TOLERANCE = {"FP32": 1e-3, "TF32": 63 * 2**-11, "FP16": 63 * 2**-11, "BF16": 63 * 2**-8, "INT8": 42 * 2**-8}
SHARED_MEMORY = Path("/dev/shm")  # through which processes that read images hand over batches, on Linux


def mismatch(check: dict) -> str:
    """Why the pass over the test set fails the gate, or ""."""
    different, images = check["different"], check["images"]
    few = max(1, (1 - MIN_AGREEMENT) * images)
    lost = check.get("correct_fp32", check["correct"]) - check["correct"]
    if lost > few:
        return f"classifies {lost} of {images} test images fewer correctly than PyTorch FP32"
    if different > few:
        return f"another class than PyTorch FP32 on {different} of {images} test images"
    # Records of before INT8 left the classifier alone have a second figure, without 5 % of the images.
    return too_far(check.get("gated_abs_diff", check["max_abs_diff"]), check["tolerance"])


def too_far(difference: float, tolerance: float) -> str:
    """Why this difference of logits is too large, or ""; NaN always is."""
    if difference <= tolerance:
        return ""
    return f"logits differ from PyTorch FP32 by {difference:.3g}, more than {tolerance:.3g}"


def classify(call: Callable, images, batch_size: int, device: str) -> np.ndarray:
    """Logits float32 (N, classes) of images (N, 3, S, S) by `call`, which takes images on the device.

    The last batch is filled up, since some backends have fixed shapes.
    """
    import torch

    logits = []
    for chunk in images.split(batch_size):
        missing = batch_size - len(chunk)
        full = torch.cat([chunk, chunk[-1:].expand(missing, -1, -1, -1)])
        logits.append(call(full.to(device))[: len(chunk)].float().cpu().numpy())
    return np.concatenate(logits)


def test_loader(job: Job, workers: int = 0):
    import datasets
    import model

    classes = model.load_facts(job.checkpoint)["classes"]
    return datasets.make_test_loader(job.data, job.image_size, job.batch_sizes[-1], classes, workers)


def reading_processes(images: int, batch_size: int, image_size: int) -> int:
    """How many processes read so many test images: 250 each make one worth starting.

    A process that finds /dev/shm full is killed, and docker's has 64 MB: each has two batches there ready.
    """
    batch = min(batch_size, images) * 3 * image_size**2 * 4  # bytes
    room = shutil.disk_usage(SHARED_MEMORY).free // (3 * batch) if SHARED_MEMORY.is_dir() else 4
    return min(4, images // 250, room)


def logits_on_test_set(job: Job, call: Callable, workers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, classes) by `call` and the labels (N,) of the whole test set."""
    # On a GPU in the smallest batches: its memory grows from there.
    size = job.batch_sizes[0] if job.device == "cuda" else CPU_BATCH
    logits, labels = [], []
    for images, targets in test_loader(job, workers):
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
            workers = reading_processes(len(labels), largest, job.image_size)
            logits, _ = logits_on_test_set(job, call, workers)
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
