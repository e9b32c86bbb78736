"""NVIDIA DALI as a decoder: files -> pixels on the GPU, many times as fast as CPUs decode.

Every file is looked at beforehand: what DALI would not decode as Pillow does goes through Pillow, in order.
"""

import contextlib
import itertools
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.environment import cores
from utils.serve.pipeline import IN_FLIGHT, Batch, Pillow, decode

PIPELINES = 2  # of DALI, in turn: while one waits for PNGs from the processor, the other has the JPEG engine
PREFETCH = 3  # batches that each works on at a time
HARDWARE = 0.8  # of a batch at most for the JPEG engine; with 16 CPUs beside an H100 0.65 and 1 are slower


class Dali(Pillow):
    """NVIDIA DALI: decodes and resizes on the GPU; the same on a CPU without one.

    The workers look at every file beforehand and decode what DALI would not decode as load_rgb() does.
    """

    name, leave_plain, chunk, hold = "dali", True, 32, PIPELINES * PREFETCH + 1

    def __init__(self, image_size: int, batch_size: int, device: str, few: bool = False):
        super().__init__(image_size, batch_size, device, few)
        shape = IN_FLIGHT + 1, batch_size, image_size, image_size, 3
        self.on_device = torch.empty(shape, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.folder = tempfile.TemporaryDirectory()
        names = ("filler.png", "filler.jpg")[:batch_size]
        self.fillers = [str(Path(self.folder.name, name)) for name in names]
        for path in self.fillers:  # a JPEG too: the first one of a process takes longer
            Image.new("RGB", (64, 64)).save(path)
        self.looked_at, self.ended = iter(()), True
        self.start()

    def start(self) -> None:
        """Make the pipelines, which takes seconds on a GPU, and have them decode what is there, or fillers.

        `fed` holds the batches that the pipelines have not given back yet, in order, None for fillers, each
        with the number of its pipeline.
        """
        self.fed, self.pipelines = deque(), []
        self.pipelines = [self.make_pipeline(number) for number in range(PIPELINES)]
        for pipeline in self.pipelines:
            pipeline.schedule_run()

    def close(self) -> None:
        self.pipelines.clear()
        self.folder.cleanup()
        super().close()

    def batches(self, paths: Iterable[str]) -> Iterator[Batch]:
        targets = itertools.cycle(self.on_device)
        self.fed = deque((None, number) for _, number in self.fed)  # nobody waits for what was broken off
        self.looked_at, self.ended, self.leave_plain = super().batches(paths), False, True
        with contextlib.closing(self.looked_at):
            for again in (True, True, False):
                try:
                    if not self.pipelines:
                        self.start()
                    yield from self.decoded(targets)
                    return
                except RuntimeError as error:  # DALI can't go on then, and doesn't say which file it was
                    left = [batch for batch, _ in self.fed if batch]
                    if not left:
                        raise
                    what = f"these {len(left)} batches" if again else "all that is left"
                    said = str(error).strip().splitlines()[0]
                    print(f"DALI failed, Pillow decodes {what}: {said}", file=sys.stderr)
                self.pipelines.clear()
                for batch in left:
                    yield self.finished(batch, None, next(targets))
            self.leave_plain = False  # a start costs seconds, and memory that DALI keeps
            for batch in self.looked_at:
                yield self.finished(batch, None, next(targets))

    def decoded(self, targets: Iterator[torch.Tensor]) -> Iterator[Batch]:
        """What DALI's pipelines make of the batches, in order."""
        while not self.ended or any(batch for batch, _ in self.fed):
            batch, number = self.fed[0]
            pipeline = self.pipelines[number]
            (images,) = pipeline.share_outputs()
            if batch:
                batch = self.finished(batch, images.as_tensor(), next(targets))
            self.fed.popleft()
            pipeline.release_outputs()
            pipeline.schedule_run()
            if batch:
                yield batch

    def make_pipeline(self, number: int):
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self.device == "cuda"
        # Of every batch nvImageCodec gives the JPEG engine as many files at most as its share of the first
        # one was (adjustBatchSizes() in its image_generic_codec.h): so that one is whole.
        first = (self.fillers * self.batch_size)[: self.batch_size] if on_gpu else self.fillers

        def source() -> list[np.ndarray]:
            """The names of the next files; never none, since DALI wants at least one image in a batch."""
            nonlocal first
            if names := first:
                batch, first = None, []
            else:
                batch = next(self.looked_at, None)
                self.ended = batch is None
                names = [batch.paths[k] for k in batch.plain] if batch else []
            self.fed.append((batch, number))
            return [np.frombuffer(os.fsencode(name), np.uint8) for name in names or self.fillers]

        mixed = {"hw_decoder_load": HARDWARE} if on_gpu else {}
        square = (self.image_size, self.image_size)

        @pipeline_def(
            batch_size=self.batch_size,
            num_threads=cores(),
            device_id=torch.cuda.current_device() if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
        )
        def from_files():
            # Mapped into memory, each file that is let go of stops all threads: 12,300 images/s, not 14,900.
            files = fn.io.file.read(fn.external_source(source, batch=True), dont_use_mmap=True)
            images = fn.decoders.image(
                files,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,  # as libjpeg does; else colours differ by up to 11 levels
                **mixed,
            )
            return fn.resize(images, size=square, interp_type=types.INTERP_LINEAR, antialias=True)

        pipeline = from_files()
        pipeline.build()
        return pipeline

    def finished(self, batch: Batch, images, target: torch.Tensor) -> Batch:
        """The batch with all pixels on the device: DALI's `images`, or if None Pillow's, and the others."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        pixels, plain = target[: len(batch.paths)], batch.plain
        if images is None:
            batch = self.decoded_by_pillow(batch)
            plain = []
        with torch.cuda.stream(self.stream):
            if len(plain) < len(pixels):
                pixels.copy_(batch.pixels, non_blocking=True)
            if plain:
                whole = len(plain) == len(pixels)
                into = pixels if whole else torch.empty_like(pixels[: len(plain)])
                feed_ndarray(images, into, cuda_stream=self.stream)
                if not whole:
                    pixels[torch.tensor(plain, device=pixels.device)] = into
        if self.stream:
            self.stream.synchronize()  # then DALI may have its memory back
        return Batch(batch.paths, pixels, batch.problems)

    def decoded_by_pillow(self, batch: Batch) -> Batch:
        first = (batch.pixels.data_ptr() - self.pixels.data_ptr()) // self.pixels[0].nbytes
        futures = [self.pool.submit(decode, first + k, [batch.paths[k]], False) for k in batch.plain]
        found = {k: future.result()[0] for k, future in zip(batch.plain, futures, strict=True)}
        problems = batch.problems | {k: problem for k, problem in found.items() if problem}
        return Batch(batch.paths, batch.pixels, problems)


DECODERS = {"pillow": Pillow, "dali": Dali}


def why_no_dali() -> str | None:
    """None if DALI can be used here, else one sentence that a user can act on."""
    try:
        from nvidia.dali.plugin import pytorch  # noqa: F401
    except ImportError:
        if sys.platform != "linux":
            return "NVIDIA DALI exists for Linux only; Pillow decodes instead: --decoder pillow"
        package = f"nvidia-dali-cuda{(torch.version.cuda or '13').partition('.')[0]}0"
        return f"NVIDIA DALI is not installed, which decodes on the GPU; run: pip install {package}"
    except Exception as error:  # a library that is missing or of another version: each fails in its own way
        return f"NVIDIA DALI is installed but does not load: {' '.join(str(error).split())}"
    return None
