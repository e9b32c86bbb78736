"""Image files -> batches of pixels -> logits: decoding, resizing, copying and inference at the same time.

A decoder turns paths into uint8 batches (N, S, S, 3), in order: Pillow in worker processes, the reference,
which does what training and testing do, or DALI (dali.py).  A Network normalises them on the device and runs
 a backend.  classify() keeps a few batches of each in flight: memory is bounded however many files come.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torchvision.transforms import v2

import datasets
from utils import environment
from utils.backend import Backend
from utils.utils import MOST_WORKERS, end_with_parent, fresh_processes, uninterrupted

IN_FLIGHT = 2  # batches that wait for the network while the decoder goes on
WARM_UP_SECONDS = 1.0  # before a rate is timed, and until all that is decoded ahead has passed once
HUGE = 16_000_000  # pixels beyond which workers decode one picture at a time, to bound their memory
JPEG_END, PNG_END = b"\xff\xd9", b"IEND\xaeB\x60\x82"
ORIENTATION = 0x0112  # EXIF's tag
PLAIN = None  # outcome of a file that is left to DALI


@dataclasses.dataclass
class Batch:
    """Files in order and their pixels, uint8 (N, S, S, 3), where the decoder left them: host or device.

    The pixels stay as they are until IN_FLIGHT more batches have been taken.  `problems` says for the index
    of every file that can't be read why; its pixels mean nothing.
    """

    paths: list[str]
    pixels: torch.Tensor
    problems: dict[int, str]
    plain: list[int] = dataclasses.field(default_factory=list)  # indices of the files that are left to DALI


# ---- in the workers

here = threading.local()  # of a worker: `pixels` to write to, `resize`, `alone`, `broken_off`


def start_worker(memory, image_size: int, alone, broken_off, process: bool) -> None:
    here.pixels = np.frombuffer(memory, np.uint8).reshape(-1, image_size, image_size, 3)
    here.resize = v2.Resize((image_size, image_size), antialias=True)  # as datasets.test_transform() has it
    here.alone, here.broken_off = alone, broken_off
    warnings.filterwarnings("ignore", module="PIL")  # of odd but readable files
    if process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
        end_with_parent()
        # On a CPU inference goes first: its threads wait for each other, and decoding fills what they leave.
        psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS if os.name == "nt" else 10)


def decode(first: int, paths: list[str], leave_plain: bool) -> list[str | None]:
    """Decode files into here.pixels[first:]; of each "", PLAIN if left to DALI, or why it can't be read."""
    outcomes = []
    for index, path in enumerate(paths, first):
        if here.broken_off.value or (leave_plain and is_plain(path)):
            outcomes.append(PLAIN)
            continue
        try:
            with Image.open(path) as image:
                huge = image.width * image.height > HUGE
            with here.alone if huge else contextlib.nullcontext():
                here.pixels[index] = here.resize(datasets.load_rgb(path))
            outcomes.append("")
        except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error
            outcomes.append(" ".join(f"{type(error).__name__}: {error}".split()))
    return outcomes


def is_plain(path: str) -> bool:
    """Whether DALI decodes a file as load_rgb() does: a whole, upright JPEG or PNG, 8 bits, RGB or grey.

    From header and end, and from a PNG's checksums: DALI decodes truncated files without a word, and ends the
    whole batch at one that it can't decode.
    """
    try:
        with Path(path).open("rb") as file:
            file.seek(-8, os.SEEK_END)
            end = file.read()
            file.seek(0)
            image = Image.open(file)
            if image.mode not in ("RGB", "L") or image.width * image.height > HUGE:
                return False
            if image.format == "JPEG":
                upright = image.getexif().get(ORIENTATION, 1) == 1
                return upright and image.info.get("adobe_transform", 1) == 1 and end.endswith(JPEG_END)
            special = {"transparency", "exif", "Raw profile type exif"} & image.info.keys()
            plain = image.format == "PNG" and not special and not getattr(image, "is_animated", False)
            plain = plain and image.tile[0][3] == image.mode and end == PNG_END  # not from 1, 2, 4 or 16 bits
            if plain:
                image.verify()
            return plain
    except Exception:  # whatever is wrong, load_rgb() will say it
        return False


# ---- decoders


class Pillow:
    """Decodes in worker processes, which write into memory that they share with this one.

    Processes, since threads wait for each other's Python; but threads for `few` images, since processes take
    seconds to start.
    """

    name, leave_plain, chunk, hold = "pillow", False, 8, IN_FLIGHT

    def __init__(self, image_size: int, batch_size: int, device: str, few: bool = False):
        self.image_size, self.batch_size, self.device = image_size, batch_size, device
        workers, self.chunk = min(environment.cores(), MOST_WORKERS), min(self.chunk, batch_size)
        self.ahead = max(2, -(-2 * workers * self.chunk // batch_size))  # two chunks for every worker
        self.slots = self.ahead + self.hold + 1
        shape = self.slots * batch_size, image_size, image_size, 3
        if few:  # nor is a server started, whose imports would take seconds of a core
            context, memory = threading, bytearray(int(np.prod(shape)))
            self.broken_off = ctypes.c_bool()
        else:
            context = fresh_processes(__name__)
            # Shared, or in a file where /dev/shm is small.
            memory = context.RawArray(ctypes.c_uint8, int(np.prod(shape)))
            self.broken_off = context.RawValue(ctypes.c_bool)
        self.pixels = torch.from_numpy(np.frombuffer(memory, np.uint8).reshape(shape))
        self.pinned = device == "cuda" and self.pin()
        arguments = memory, image_size, context.Lock(), self.broken_off, not few
        options = {} if few else {"mp_context": context}
        options |= {"initializer": start_worker, "initargs": arguments}
        self.pool = (ThreadPoolExecutor if few else ProcessPoolExecutor)(workers, **options)
        with uninterrupted():  # processes that are on their way when this one ends would complain
            wait([self.pool.submit(int) for _ in range(workers)])

    def pin(self) -> bool:
        """Lock the shared memory: copies to the GPU then run beside all else.  Whether that was possible."""
        error = torch.cuda.cudart().cudaHostRegister(self.pixels.data_ptr(), self.pixels.nbytes, 0)
        return int(error) == 0

    def close(self) -> None:
        self.pool.shutdown()
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.pixels.data_ptr())

    def batches(self, paths: Iterable[str]) -> Iterator[Batch]:
        """The batches of all paths, in order, the next ones decoded meanwhile.  `paths` may be endless."""
        waiting, paths = deque(), iter(paths)
        try:
            for number in itertools.count():
                if group := list(itertools.islice(paths, self.batch_size)):
                    waiting.append(self.submit(group, number % self.slots * self.batch_size))
                if not waiting:
                    return
                if len(waiting) > self.ahead or not group:
                    yield self.collect(*waiting.popleft())
        finally:
            # Nothing writes on while the memory is used anew.  Nothing is cancelled: if a worker dies then, a
            # pool of processes never says of what was cancelled that it is done.
            self.broken_off.value = True
            wait([future for _, _, futures in waiting for future in futures])
            self.broken_off.value = False

    def submit(self, paths: list[str], first: int) -> tuple:
        starts = range(0, len(paths), self.chunk)
        work = [(first + k, paths[k : k + self.chunk], self.leave_plain) for k in starts]
        return paths, first, [self.pool.submit(decode, *arguments) for arguments in work]

    def collect(self, paths: list[str], first: int, futures: list) -> Batch:
        outcomes = [outcome for future in futures for outcome in future.result()]
        problems = {k: outcome for k, outcome in enumerate(outcomes) if outcome}
        plain = [k for k, outcome in enumerate(outcomes) if outcome is PLAIN]
        return Batch(paths, self.pixels[first : first + len(paths)], problems, plain)


# ---- the network


class Network:
    """A backend that takes uint8 pixels (N, S, S, 3), N up to the largest of its batch sizes."""

    def __init__(self, backend: Backend, batch_sizes: list[int], image_size: int, device: str):
        self.backend, self.batch_sizes, self.device = backend, sorted(batch_sizes), device
        moments = [torch.tensor([255 * value for value in of]) for of in (datasets.MEAN, datasets.STD)]
        self.mean, self.std = (values.view(1, 3, 1, 1).to(device) for values in moments)
        for size in self.batch_sizes:  # captures CUDA graphs before DALI's threads use the GPU, and compiles
            self.finish(self.enqueue(torch.zeros(size, image_size, image_size, 3, dtype=torch.uint8)))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, S, S, 3) -> float32 (N, 3, S, S) on the device, as datasets.to_normalised() does it."""
        pixels = pixels.to(self.device, non_blocking=True)
        images = pixels.permute(0, 3, 1, 2).float(memory_format=torch.contiguous_format)
        return images.sub_(self.mean).div_(self.std)

    def enqueue(self, pixels: torch.Tensor) -> tuple:
        """Start on a batch, filled up to the next batch size since some backends have fixed shapes."""
        count = len(pixels)
        missing = next(size for size in self.batch_sizes if size >= count) - count
        pixels = pixels.to(self.device, non_blocking=True)
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


def classify(decoder: Pillow, network: Network, paths: Iterable[str], waited: dict | None = None):
    """Yield (Batch, logits) for all paths in order, decoding and inferring at the same time.

    Adds to waited["decoding"] and waited["inference"] the seconds that this process waited for each.
    """
    waited = {} if waited is None else waited
    waiting, batches = deque(), decoder.batches(paths)
    with contextlib.closing(batches):
        while True:
            with stopwatch(waited, "decoding"):
                batch = next(batches, None)
            with stopwatch(waited, "inference"):
                if batch:
                    waiting.append((batch, network.enqueue(batch.pixels)))
                done = None
                if waiting and (len(waiting) == IN_FLIGHT or not batch):
                    oldest, started = waiting.popleft()
                    done = oldest, network.finish(started)
            if done:
                yield done
            elif not batch:
                return


@contextlib.contextmanager
def stopwatch(spent: dict, name: str):
    start = time.perf_counter()
    yield
    spent[name] = spent.get(name, 0.0) + time.perf_counter() - start


# ---- how fast: endless iterators of the images that each step has finished


def rate(served: Iterator[int], warm_up: int, seconds: float) -> float:
    """Images/s of an endless iterator of image counts, after `warm_up` batches and a second."""
    with contextlib.closing(served):
        begin, start, images = time.perf_counter(), None, 0
        for number, count in enumerate(served):
            now = time.perf_counter()
            if start:
                images += count
                if now - start >= seconds:
                    return images / (now - start)
            elif number >= warm_up and now - begin >= WARM_UP_SECONDS:
                start = now
    raise RuntimeError("what is to be timed came to an end")


def copied(batches: Iterable[Batch], device: str) -> Iterator[int]:
    """Bring the pixels of every batch to the device, and wait."""
    for batch in batches:
        batch.pixels.to(device, non_blocking=True)
        if device == "cuda":
            torch.cuda.current_stream().synchronize()
        yield len(batch.paths)


def inferred(network: Network, pixels: torch.Tensor) -> Iterator[int]:
    """Run the network on pixels that lie on the device, starting a batch before waiting for the last."""
    started = network.enqueue(pixels)
    while True:
        following = network.enqueue(pixels)
        yield len(network.finish(started))
        started = following


def one_after_another(
    decoder: Pillow, network: Network, files: Iterator[str], batch_size: int
) -> Iterator[int]:
    """The old way: nothing goes on while something else does."""
    while True:
        for batch in decoder.batches(itertools.islice(files, batch_size)):
            yield len(network.finish(network.enqueue(batch.pixels)))
