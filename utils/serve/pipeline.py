"""Batches of pixels -> logits: decoding, copying and inference at the same time.

A decoder turns paths into uint8 batches (N, S, S, 3), in order: Pillow in worker processes (decoder.py),
which does what training and testing do, or DALI (dali.py).  A Network normalises them on the device and
runs a backend.  A few batches of each are in flight: memory is bounded however many files come.
"""

import collections
import contextlib
import time
from collections.abc import Generator

import numpy as np
import torch

from utils.backend import Backend
from utils.images import MEAN, STD
from utils.serve.decoder import IN_FLIGHT, Batch


class Network:
    """A backend that takes uint8 pixels (N, S, S, 3), N up to the largest of its batch sizes."""

    def __init__(self, backend: Backend, batch_sizes: list[int], image_size: int, device: str):
        self.backend, self.batch_sizes, self.device = backend, sorted(batch_sizes), device
        moments = [torch.tensor([255 * value for value in of]) for of in (MEAN, STD)]
        self.mean, self.std = (values.view(1, 3, 1, 1).to(device) for values in moments)
        for size in self.batch_sizes:  # CUDA graphs are captured before DALI's threads use the GPU
            pixels = torch.zeros(size, image_size, image_size, 3, dtype=torch.uint8)
            backend.prepare(self.normalise(pixels))
        if device == "cuda":
            torch.cuda.current_stream().synchronize()

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, S, S, 3) -> float32 (N, 3, S, S) on the device, as datasets.to_normalised() does it."""
        pixels = pixels.to(self.device, non_blocking=True)
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return images.sub_(self.mean).div_(self.std)

    def enqueue(self, pixels: np.ndarray | torch.Tensor) -> tuple:
        """Start on a batch, filled up to the next batch size since some backends have fixed shapes."""
        count = len(pixels)
        missing = next(size for size in self.batch_sizes if size >= count) - count
        pixels = torch.as_tensor(pixels).to(self.device, non_blocking=True)
        if missing:
            pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        logits = self.backend.predict(self.backend.prepare(self.normalise(pixels)))
        logits = logits[:count].float().to("cpu", non_blocking=True, copy=True)  # into pinned memory
        done = torch.cuda.Event() if self.device == "cuda" else None
        if done:
            done.record()
        return logits, done

    def finish(self, started: tuple) -> np.ndarray:
        """Wait for a batch; its logits, float32 (N, classes)."""
        logits, done = started
        if done:
            done.synchronize()
        return logits.numpy()


def classify(batches: Generator[Batch, None, None], network: Network, waited: dict | None = None):
    """Yield (Batch, logits) for a decoder's batches in order, decoding and inferring at the same time.

    waited["decoding"] and waited["inference"] become the seconds that this process waited for each.
    """
    waiting, decoding, inference = collections.deque(), 0.0, 0.0
    with contextlib.closing(batches):
        while True:
            start, done = time.perf_counter(), None
            batch = next(batches, None)
            decoded = time.perf_counter()
            if batch:
                waiting.append((batch, network.enqueue(batch.pixels)))
            if waiting and (len(waiting) == IN_FLIGHT or not batch):
                oldest, started = waiting.popleft()
                done = oldest, network.finish(started)
            decoding, inference = decoding + decoded - start, inference + time.perf_counter() - decoded
            if waited is not None:
                waited |= {"decoding": decoding, "inference": inference}
            if done:
                yield done
            elif not batch:
                return
