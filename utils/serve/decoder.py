"""Image files -> batches of uint8 pixels by Pillow, as training and testing read them; needs no PyTorch."""

import ctypes
import dataclasses
import itertools
import os
import signal
import threading
import typing
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from utils import images
from utils.environment import cores
from utils.utils import MOST_WORKERS, end_with_parent, fresh_processes, uninterrupted

FEW = 256  # images that threads have decoded before processes have started
CHUNK = {False: 8, True: 32}  # files that a worker takes at a time: to decode, or to look at for DALI
IN_FLIGHT = 2  # batches that wait for the network while the decoder goes on
HUGE = 16_000_000  # pixels beyond which a picture is not left to DALI, to bound its memory
JPEG_END, PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
PLAIN = None  # outcome of a file that is left to DALI


@dataclasses.dataclass
class Batch:
    """Files in order and their pixels, uint8 (N, S, S, 3): NumPy's, or from DALI a tensor on the device.

    The pixels stay as they are until IN_FLIGHT more batches have been taken.  `problems` says for the index
    of every file that can't be read why; its pixels mean nothing.
    """

    paths: list[str]
    pixels: typing.Any
    problems: dict[int, str]
    plain: list[int] = dataclasses.field(default_factory=list)  # indices of the files that are left to DALI
    slot: int = 0  # of the Pillow decoder's memory


here = threading.local()  # in a worker: `pixels` to write to, `broken_off`


def start_worker(memory, image_size: int, broken_off, alone=None, everybody=None) -> None:
    """Processes share the lock `alone`, and wait at the barrier `everybody` until all have started."""
    here.pixels = np.frombuffer(memory, np.uint8).reshape(-1, image_size, image_size, 3)
    here.broken_off = broken_off
    warnings.filterwarnings("ignore", module="PIL")  # of odd but readable files
    if everybody:
        images.alone = alone
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
        end_with_parent()
        # On a CPU inference goes first: its threads wait for each other, and decoding fills what they leave.
        psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS if os.name == "nt" else 10)
        everybody.wait(300)


def decode(first: int, paths: list[str], leave_plain: bool) -> list[str | None]:
    """Decode files into here.pixels[first:]; of each "", PLAIN if left to DALI, or why it can't be read."""
    outcomes, square = [], here.pixels.shape[1:3]
    for index, path in enumerate(paths, first):
        if here.broken_off.value or (leave_plain and is_plain(path)):
            outcomes.append(PLAIN)
            continue
        try:
            # On Pillow's images torchvision's Resize(antialias=True), as testing has it, is this.
            here.pixels[index] = images.load_rgb(path).resize(square, Image.Resampling.BILINEAR)
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
                upright = image.getexif().get(images.ORIENTATION, 1) == 1
                return upright and image.info.get("adobe_transform", 1) == 1 and end.endswith(JPEG_END)
            if {"transparency", "exif", "Raw profile type exif"} & image.info.keys():
                return False
            image.verify()
            whole = image.format == "PNG" and end == PNG_END and not getattr(image, "is_animated", False)
            return whole and image.tile[0][3] == image.mode  # not from 1, 2, 4 or 16 bits
    except Exception:  # whatever is wrong, load_rgb() will say it
        return False


class Pillow:
    """Decodes in worker processes, which write into memory that they share with this one, or in threads.

    `count` is the number of files that will come, None if it is not known.  `for_dali`: workers look at every
    file and decode only what DALI would not decode alike.  `hold` batches are kept.
    """

    def __init__(self, image_size: int, batch_size: int, count=None, for_dali=False, hold=IN_FLIGHT):
        self.image_size, self.batch_size, self.leave_plain = image_size, batch_size, for_dali
        self.chunk = min(CHUNK[for_dali], batch_size)
        needed = MOST_WORKERS if count is None else max(1, -(-count // self.chunk))
        workers, threads = min(cores(), needed, MOST_WORKERS), count is not None and count <= FEW
        self.ahead = max(2, -(-2 * workers * self.chunk // batch_size))  # two chunks for every worker
        self.slots, self.unpin = self.ahead + hold + 1, None
        shape = self.slots * batch_size, image_size, image_size, 3
        if threads:
            memory, self.broken_off = bytearray(int(np.prod(shape))), ctypes.c_bool()
            arguments = memory, image_size, self.broken_off
            self.pool = ThreadPoolExecutor(workers, initializer=start_worker, initargs=arguments)
        else:
            context = fresh_processes(__name__, large=())
            # Shared, or in a file where /dev/shm is small.
            memory: typing.Any = context.RawArray(ctypes.c_uint8, int(np.prod(shape)))
            self.broken_off = context.RawValue(ctypes.c_bool)
            arguments = memory, image_size, self.broken_off, context.Lock(), context.Barrier(workers)
            self.pool = ProcessPoolExecutor(workers, context, start_worker, arguments)
            with uninterrupted():  # processes that are on their way when this one ends would complain
                wait([self.pool.submit(int) for _ in range(workers)])
        self.pixels = np.frombuffer(memory, np.uint8).reshape(shape)

    def get_ready(self, device: str) -> None:
        """To be called once PyTorch is imported: on a GPU, lock the memory that it copies from."""
        if device == "cuda" and not self.unpin:
            import torch

            cuda, where = typing.cast(typing.Any, torch.cuda.cudart()), self.pixels.ctypes.data
            if int(cuda.cudaHostRegister(where, self.pixels.nbytes, 0)) == 0:  # else copies are slower
                self.unpin = lambda: cuda.cudaHostUnregister(where)

    def close(self) -> None:
        self.broken_off.value = True
        self.pool.shutdown()
        if self.unpin:
            self.unpin()

    def batches(self, paths: Iterable[str]) -> Generator[Batch, None, None]:
        """The batches of all paths, in order, the next ones decoded meanwhile.  `paths` may be endless.

        The first ones are being decoded when this returns.
        """
        paths = iter(paths)
        groups = iter(lambda: list(itertools.islice(paths, self.batch_size)), [])
        submitted = map(self.submit, groups, itertools.cycle(range(self.slots)))
        return self.in_order(deque(itertools.islice(submitted, self.ahead)), submitted)

    def submit(self, paths: list[str], slot: int, again=False) -> tuple[list[str], int, list[Future]]:
        """Have a batch decoded into a slot of the memory; `again`: also what DALI should have decoded."""
        first, plain = slot * self.batch_size, self.leave_plain and not again
        chunks = [(first + k, paths[k : k + self.chunk]) for k in range(0, len(paths), self.chunk)]
        return paths, slot, [self.pool.submit(decode, *chunk, plain) for chunk in chunks]

    def in_order(self, waiting: deque, submitted: Iterator) -> Generator[Batch, None, None]:
        """What becomes of `waiting`, one batch more submitted for each that is given out."""
        try:
            while waiting:
                waiting.extend(itertools.islice(submitted, 1))
                yield self.collect(*waiting.popleft())
        finally:
            # Nothing writes on while the memory is used anew.  Nothing is cancelled: if a worker dies then, a
            # pool of processes never says of what was cancelled that it is done.
            self.broken_off.value = True
            wait([future for _, _, futures in waiting for future in futures])
            self.broken_off.value = False

    def collect(self, paths: list[str], slot: int, futures: list[Future]) -> Batch:
        outcomes = [outcome for future in futures for outcome in future.result()]
        problems = {k: outcome for k, outcome in enumerate(outcomes) if outcome}
        plain = [k for k, outcome in enumerate(outcomes) if outcome is PLAIN]
        return Batch(paths, self.pixels[slot * self.batch_size :][: len(paths)], problems, plain, slot)
