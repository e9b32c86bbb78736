"""How fast files become labels, in the process that measures: pipeline, its halves alone, under load."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

import backends
import datasets
import model
from utils.backend import inference
from utils.measure import accuracy
from utils.measure.worker import whole_call
from utils.serve import choices, load
from utils.serve.dali import open_decoder, why_no_dali
from utils.serve.decoder import Batch, Pillow
from utils.serve.pipeline import Network, classify
from utils.utils import checkpoint_path

WARM_UP_SECONDS = 0.5  # before a rate is timed, and until all that is decoded ahead has passed once
LOAD_IMAGES = 256  # under load at most: they lie in memory


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one process is asked: a measured row of the table, and how."""

    sweep: str
    backend: str
    precision: str
    image_size: int
    batch_size: int
    device: str
    batch_sizes: tuple[int, ...]  # that it was measured with, so that the same engine serves
    decoders: tuple[str, ...]
    data: Path
    weights: Path
    results: Path
    seconds: float
    photos: Path | None = None  # a folder that is read instead of the test set


def open_network(asked: Asked, under_load: bool = False) -> Network:
    """The backend, loaded as it was measured; under load it serves all batch sizes up to the fastest and, if
    its engine takes any, powers of two as well, so that 2 images don't cost as much as 8."""
    backend, serving = backends.make(asked.backend), {asked.batch_size}
    backend.data = asked.data  # to calibrate with
    checkpoint = checkpoint_path(asked.weights, asked.image_size)
    backend.load(checkpoint, asked.image_size, list(asked.batch_sizes), asked.device)
    if under_load:
        powers = {2**k for k in range(asked.batch_size.bit_length())} if backend.any_batch else set()
        serving |= {size for size in powers.union(asked.batch_sizes) if size < asked.batch_size}
    return Network(backend, list(serving), asked.image_size, asked.device)


def read_test_set(asked: Asked) -> tuple:
    """The loader that testing reads with, and in its order every file and the index of its class."""
    classes = model.load_facts(checkpoint_path(asked.weights, asked.image_size))["classes"]
    loader = datasets.Loader(asked.data, "test", classes, asked.image_size, asked.batch_size)
    files, truth = zip(*loader.files, strict=True)
    return loader, list(map(str, files)), truth


def measure_here(asked: Asked, parity: bool) -> list[dict]:
    """Figures of every decoder, in one process; with `parity` also agreement and accuracy."""
    found = []
    loader, files, truth = read_test_set(asked)
    files = choices.find_images(asked.photos)[0] if asked.photos else files
    with inference(asked.device):
        network = open_network(asked)
        for name in asked.decoders:
            figures = {"decoder": name, "precision": network.backend.precision}
            found.append(figures)
            if name == "dali" and (reason := why_no_dali()):
                figures |= {"status": "unavailable", "reason": reason}
                continue
            decoder = open_decoder(name, asked.image_size, asked.batch_size, asked.device, files)
            with contextlib.closing(decoder):
                decoder.get_ready(asked.device)
                figures |= throughput(decoder, network, files, asked)
                if parity and not asked.photos:
                    figures |= compare(decoder.batches(files), network, loader, truth)
    return found


def throughput(decoder, network, files: list[str], asked: Asked) -> dict:
    """Images/s of the pipeline and of its halves alone; overlap and limit."""
    endless = itertools.cycle(files)
    first = next(decoder.batches(itertools.islice(endless, asked.batch_size)))
    resident = dataclasses.replace(first, pixels=torch.as_tensor(first.pixels).to(asked.device, copy=True))
    full, half = decoder.slots, asked.seconds / 2
    parts = [
        (lambda: copied(decoder.batches(endless), asked.device), full),
        (lambda: classified(network, (resident for _ in itertools.count())), 2),
        (lambda: classified(network, decoder.batches(endless)), full),
    ]
    rate(parts[-1][0](), full, half)  # not counted: a process that has just begun finds cold memory
    early = [rate(served(), warm_up, half) for served, warm_up in parts]
    late = [rate(served(), warm_up, half) for served, warm_up in reversed(parts)]  # finds warmer memory
    decode, infer, both = ((a + b) / 2 for a, b in zip(early, reversed(late), strict=True))
    possible = min(decode, infer) if asked.device == "cuda" else 1 / (1 / decode + 1 / infer)
    figures = {"images_per_s": both, "decode_images_per_s": decode, "infer_images_per_s": infer}
    return figures | {"overlap": both / possible, "limit": "decode" if decode < infer else "inference"}


def compare(batches, network, loader, truth: tuple[int, ...]) -> dict:
    """Logits from files against those of the test set as training reads it, on the same backend."""
    call, size = whole_call(network.backend), network.batch_sizes[-1]
    expected = np.concatenate([accuracy.classify(call, images, size, network.device) for images, _ in loader])
    logits = np.concatenate([found for _, found in classify(batches, network)])
    chosen, count = logits.argmax(1), len(truth)
    different = int((chosen != expected.argmax(1)).sum())
    figures = {"agreement": 1 - different / count, "accuracy": float((chosen == truth).mean())}
    figures["max_abs_diff"] = float(np.abs(logits - expected).max())
    if different > max(1, (1 - accuracy.MIN_AGREEMENT) * count):
        reason = f"another class than the test set as training reads it on {different} of {count} images"
        figures |= {"status": "mismatch", "reason": reason}
    return figures


def load_here(asked: Asked, max_latency_ms: float) -> list[dict]:
    """Rows of latency under load."""
    files = read_test_set(asked)[1][:LOAD_IMAGES]
    with inference(asked.device):
        network = open_network(asked, under_load=True)
        with contextlib.closing(Pillow(asked.image_size, 16, len(files))) as decoder:
            pixels = torch.cat([torch.tensor(batch.pixels) for batch in decoder.batches(files)])
        where = {"sweep": asked.sweep, "backend": asked.backend, "precision": network.backend.precision}
        where |= {"image_size": asked.image_size, "batch_size_max": network.batch_sizes[-1]}
        return load.measure(where, network, pixels, max_latency_ms)


def rate(served, warm_up: int, seconds: float) -> float:
    """Images/s of an endless generator of image counts, after `warm_up` batches and half a second."""
    with contextlib.closing(served):
        begin = time.perf_counter()
        for number, _ in enumerate(served):
            if number >= warm_up and time.perf_counter() - begin >= WARM_UP_SECONDS:
                break
        start, images = time.perf_counter(), 0
        while (took := time.perf_counter() - start) < seconds:
            images += next(served)
        return images / took


def copied(batches: Iterable[Batch], device: str) -> Iterator[int]:
    """Bring the pixels of every batch to the device, and wait."""
    for batch in batches:
        torch.as_tensor(batch.pixels).to(device)
        yield len(batch.paths)


def classified(network: Network, batches: Generator[Batch, None, None]) -> Iterator[int]:
    for _, logits in classify(batches, network):
        yield len(logits)
