"""Right before fast: the gate that every backend has to pass before its speed counts."""

from collections.abc import Callable

import numpy as np

MIN_AGREEMENT = 0.99  # of the test images, or all but one on small sets
# The largest logit difference from PyTorch FP32 that passes, as a share of the largest logit.  ResNet-18
# has 21 layers with weights, each rounding weights, products' sum and activation: 63 u (Higham, Accuracy
# and Stability of Numerical Algorithms, 2002, section 3.1) is 3 % for FP16 and TF32 with u = 2^-11.  FP32
# sums of up to 4608 products and Winograd's transforms (Lavin and Gray, 2016) lose about three digits more
# than u = 2^-24 alone.  BF16 has u = 2^-8.  INT8 rounds weights and activations to 127 steps a side, half a
# step (u = 2^-8) off at most, and sums exactly: 42 u (Jacob et al., Quantization and Training of Neural
# Networks, 2018, section 2).
TOLERANCE = {"FP32": 1e-3, "TF32": 63 * 2**-11, "FP16": 63 * 2**-11, "BF16": 63 * 2**-8, "INT8": 42 * 2**-8}


def mismatch(check: dict) -> str:
    """Why the pass over the test set fails the gate, or ""."""
    different, images = check["different"], check["images"]
    few = max(1, (1 - MIN_AGREEMENT) * images)
    lost = check.get("correct_fp32", check["correct"]) - check["correct"]
    if lost > few:
        return f"classifies {lost} of {images} test images fewer correctly than PyTorch FP32"
    if different > few:
        return f"another class than PyTorch FP32 on {different} of {images} test images"
    return too_far(check["max_abs_diff"], check["tolerance"])


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
