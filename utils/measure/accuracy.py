"""Right before fast: PyTorch FP32's logits on the test set, and the gate that every backend has to pass."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.backend import is_fresh, store
from utils.measure.schema import BASELINE, Job
from utils.utils import in_fresh_process, sha256

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


@dataclasses.dataclass
class Probe:
    """What every batch size is checked and timed with; N is the largest batch."""

    images: object  # float32 tensor (N, 3, S, S) on the CPU
    expected: np.ndarray  # PyTorch FP32's logits (N, classes)
    tolerance: float  # the largest difference that passes


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


def batch_size_of(job: Job) -> int:
    """Of the accuracy pass: on a GPU the smallest, since memory grows from there."""
    return job.batch_sizes[0] if job.device == "cuda" else CPU_BATCH


def test_loader(data: Path, checkpoint: Path, image_size: int, batch_size: int, workers: int = 0):
    import datasets
    import model

    classes = model.load_facts(checkpoint)["classes"]
    return datasets.make_test_loader(data, image_size, batch_size, classes, workers)


def whole_test_set(job: Job, call: Callable, precision: str) -> tuple[dict | None, Probe]:
    """In round 0 the record of a pass over the test set (None later), and the probe for every batch size."""
    expected, labels = reference(job, call)
    tolerance = TOLERANCE[precision] * float(np.abs(expected).max())
    whole, largest = job.round == 0, job.batch_sizes[-1]
    workers = min(4, len(labels) // 250) if whole else 0
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
    is started, so that nothing of PyTorch FP32 stays in this one's memory.
    """
    path = job.checkpoint.with_name(f"reference_{job.image_size}_{job.device}.npz")
    facts = {name: job.environment[name] for name in ("data", "packages", "gpu")}
    facts |= {"checkpoint": sha256(job.checkpoint), "device": job.device}
    if not is_fresh(path, facts):
        if job.backend == BASELINE:
            logits, labels = compute_reference(job, call)
        else:
            logits, labels = in_fresh_process(compute_reference, job)
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
        call = model.load(job.checkpoint, job.device)[0]
    logits, labels = [], []
    with torch.inference_mode():
        for images, targets in test_loader(job.data, job.checkpoint, job.image_size, CPU_BATCH):
            logits.append(classify(call, images, batch_size_of(job), job.device))
            labels.append(targets.numpy())
    return np.concatenate(logits), np.concatenate(labels)
