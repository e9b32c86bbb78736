"""NVIDIA DALI as a decoder: files -> pixels on the GPU, many times as fast as CPUs decode."""

import contextlib
import itertools
import os
import re
import sys
import tempfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from utils.backend import why_not_importable
from utils.environment import cores, package_version
from utils.serve.decoder import IN_FLIGHT, Batch, Pillow
from utils.utils import UserError

PREFETCH = 3  # batches that each pipeline works on at a time
STARTS = 3  # of the pipelines, where files make them fail: each takes seconds, and memory that DALI keeps
HARDWARE = 0.8  # of a batch at most for the JPEG engine; with 16 CPUs beside an H100 0.65 and 1 are slower


class Dali:
    """Decodes and resizes on the GPU; the same on a CPU without one.

    Its Pillow decoder looks at every file beforehand and decodes what DALI would not decode as load_rgb()
    does.  One pipeline is enough for JPEGs.  Where other files come, two alternate: while one waits for PNGs,
    which the processor decodes, the other keeps the JPEG engine busy.
    """

    def __init__(self, image_size: int, batch_size: int, device: str, paths: list[str], count=None, index=0):
        """For files like `paths`, `count` of them if that is known; `index` is the GPU's.

        PyTorch is not needed before get_ready(), so that it is imported while the pipelines start.
        """
        only_jpegs = all(path.lower().endswith((".jpg", ".jpeg")) for path in paths)
        self.count, self.index = 1 if only_jpegs else 2, index if device == "cuda" else None
        self.image_size, self.batch_size, self.device = image_size, batch_size, device
        self.folder = tempfile.TemporaryDirectory()
        names = ("filler.jpg",) if only_jpegs else ("filler.png", "filler.jpg")[:batch_size]
        self.fillers = [str(Path(self.folder.name, name)) for name in names]
        for path in self.fillers:  # a JPEG too: the first one of a process takes longer
            Image.new("RGB", (64, 64)).save(path)
        self.pipelines, self.looked_at, self.fed, self.targets = [], iter(()), deque(), iter(())
        self.helper = ThreadPoolExecutor(1)
        self.started = self.helper.submit(self.start)
        self.pillow = Pillow(image_size, batch_size, count, for_dali=True, hold=self.count * PREFETCH + 1)
        self.slots = self.pillow.slots

    def get_ready(self, device: str) -> None:
        """Wait for the pipelines and take memory on the device; to be called once PyTorch is imported."""
        import torch
        from nvidia.dali.plugin.pytorch import feed_ndarray

        self.started.result()
        self.feed, size = feed_ndarray, self.image_size
        shape = IN_FLIGHT + 1, self.batch_size, size, size, 3
        self.targets = itertools.cycle(torch.empty(shape, dtype=torch.uint8, device=device))
        self.stream = torch.cuda.Stream() if device == "cuda" else None

    def start(self) -> None:
        """Make the pipelines, which takes seconds on a GPU, and have each decode fillers.

        Then they stand still, so that CUDA graphs can be captured.
        """
        if reason := why_no_dali():
            raise UserError(f"{reason}; to decode by Pillow all the same: --decoder pillow")
        self.pipelines = [self.make_pipeline(number) for number in range(self.count)]
        self.starting = True
        for pipeline in self.pipelines:
            pipeline.schedule_run()  # the first call starts as many batches as it prefetches
        self.drain()
        self.starting = False

    def drain(self) -> None:
        """Wait for what the pipelines are decoding and let go of it."""
        while self.fed:
            _, number = self.fed.popleft()
            self.pipelines[number].share_outputs()
            self.pipelines[number].release_outputs()

    def close(self) -> None:
        self.helper.shutdown()
        self.pipelines.clear()
        self.folder.cleanup()
        self.pillow.close()

    def batches(self, paths: Iterable[str]) -> Generator[Batch, None, None]:
        """The batches of all paths, in order; where DALI fails, what it had is decoded by Pillow."""
        self.pillow.leave_plain, self.looked_at = True, self.pillow.batches(paths)
        with contextlib.closing(self.looked_at):
            for starts_left in reversed(range(STARTS)):
                try:
                    if not self.pipelines:
                        self.start()
                    yield from self.by_pipelines()
                    return
                except RuntimeError as error:  # DALI can't go on then, and doesn't say which file it was
                    lost = [batch for batch, _ in self.fed if batch]
                    self.pipelines.clear()
                    self.fed.clear()
                    if not lost:
                        raise
                    what = f"these {len(lost)} batches" if starts_left else "all that is left"
                    said = str(error).strip().splitlines()[0]
                    print(f"DALI failed, Pillow decodes {what}: {said}", file=sys.stderr)
                yield from map(self.by_pillow, lost)
            self.pillow.leave_plain = False
            yield from map(self.by_pillow, self.looked_at)

    def by_pipelines(self) -> Iterator[Batch]:
        """What DALI's pipelines make of the batches, in order.

        `fed` holds those that the pipelines have not given back yet, each with the number of its pipeline;
        None, decoded as fillers, where there are no more.
        """
        for pipeline in self.pipelines * PREFETCH:
            pipeline.schedule_run()
        try:
            while self.fed:
                batch, number = self.fed[0]
                (images,) = self.pipelines[number].share_outputs()
                done = batch and self.on_device(batch, images.as_tensor())
                self.fed.popleft()
                self.pipelines[number].release_outputs()
                if done:
                    self.pipelines[number].schedule_run()
                    yield done
        except GeneratorExit:
            self.drain()
            raise

    def make_pipeline(self, number: int):
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self.device == "cuda"
        # Of every batch nvImageCodec gives the JPEG engine as many files at most as its share of the first
        # one was (adjustBatchSizes() in its image_generic_codec.h): so that one is whole.
        first = (self.fillers * self.batch_size)[: self.batch_size] if on_gpu else self.fillers

        def source() -> list[np.ndarray]:
            """The names of the next files; never none, since DALI wants at least one image in a batch."""
            batch = None if self.starting else next(self.looked_at, None)
            self.fed.append((batch, number))
            names = [batch.paths[k] for k in batch.plain] if batch else []
            names = names or (first if self.starting else self.fillers)
            return [np.frombuffer(os.fsencode(name), np.uint8) for name in names]

        settings = {"batch_size": self.batch_size, "num_threads": cores(), "device_id": self.index}
        how = {"device": "mixed", "hw_decoder_load": HARDWARE} if on_gpu else {"device": "cpu"}
        square = (self.image_size, self.image_size)

        @pipeline_def(**settings, prefetch_queue_depth=PREFETCH)
        def from_files():
            # Mapped into memory, each file that is let go of stops all threads: 12,300 images/s, not 14,900.
            files = fn.io.file.read(fn.external_source(source, batch=True), dont_use_mmap=True)
            # Chroma is interpolated as libjpeg does it, else colours differ by up to 11 levels.
            images = fn.decoders.image(files, output_type=types.RGB, jpeg_fancy_upsampling=True, **how)
            return fn.resize(images, size=square, interp_type=types.INTERP_LINEAR, antialias=True)

        pipeline = from_files()
        pipeline.build()
        return pipeline

    def on_device(self, batch: Batch, images=None) -> Batch:
        """The batch with all pixels on the device: DALI's `images` and, between or without them, Pillow's."""
        import torch

        pixels, plain = next(self.targets)[: len(batch.paths)], batch.plain if images is not None else []
        with torch.cuda.stream(self.stream):
            if len(plain) == len(pixels):
                self.feed(images, pixels, cuda_stream=self.stream)
            else:
                self.pillow.get_ready(self.device)  # not before, since folders of JPEGs alone never need it
                pixels.copy_(torch.from_numpy(batch.pixels), non_blocking=True)
                if plain:
                    part = torch.empty_like(pixels[: len(plain)])
                    self.feed(images, part, cuda_stream=self.stream)
                    pixels[torch.tensor(plain, device=pixels.device)] = part
        if self.stream:
            self.stream.synchronize()  # then DALI may have its memory back
        return Batch(batch.paths, pixels, batch.problems)

    def by_pillow(self, batch: Batch) -> Batch:
        """The same, all decoded by Pillow."""
        if batch.plain:
            batch = self.pillow.collect(*self.pillow.submit(batch.paths, batch.slot, again=True))
        return self.on_device(batch)


def open_decoder(name, image_size, batch_size, device, paths, count=None, index=0) -> Pillow | Dali:
    """The decoder of this name for files like `paths`, `count` of them; `index` is the GPU's."""
    if name == "dali":
        return Dali(image_size, batch_size, device, paths, count, index)
    return Pillow(image_size, batch_size, count)


def why_no_dali() -> str | None:
    """None if DALI can be used here, else one sentence that a user can act on."""
    if sys.platform != "linux":
        return "NVIDIA DALI exists for Linux only; Pillow decodes instead: --decoder pillow"
    cuda = re.search(r"\+cu(\d\d)", package_version("torch") or "")
    install = f"pip install nvidia-dali-cuda{cuda[1] if cuda else 13}0"
    return why_not_importable("nvidia", install) or why_not_importable("nvidia.dali", install)
