"""What only a GPU with TensorRT can tell: whether engines are right; whether one engine with a profile for
each batch size is as fast as one built for that batch size alone.

Run by hand, in the repo's root, on a machine that does nothing else: some minutes, most of them building.
Every line that begins with FAIL is an error; the exit code is 1 then.  Engines lie in a temporary folder.

    python tests/check_tensorrt.py --data data --weights weights
"""

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from conftest import load_test_images

import backends
import model
import trt
from utils.backend import inference
from utils.measure import accuracy
from utils.utils import add_path_arguments, checkpoint_path, run_main

BATCHES = [1, 16, 256]
NAMES = ["tensorrt", "tensorrt-graph", "torch-tensorrt", "torch-tensorrt-graph", "tensorrt-int8-graph"]
NAMES += ["torch-compile-graph"]


class Check:
    """One checkpoint on the GPU: PyTorch FP32's logits on the test images, and what is held against them."""

    def __init__(self, checkpoint: Path, image_size: int, data: Path):
        self.checkpoint, self.size, self.data, self.failures = checkpoint, image_size, data, 0
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        network, facts = model.load(checkpoint, "cuda")
        images, self.labels = load_test_images(data, image_size, facts["classes"])
        self.images = images.cuda()
        self.expected = torch.cat([network(part) for part in self.images.split(16)])

    def attempt(self, step: Callable, *arguments) -> None:
        """Take a step; where it fails the others are taken all the same."""
        try:
            step(*arguments)
        except Exception:
            print(f"FAIL\n{traceback.format_exc()}", flush=True)
            self.failures += 1

    def logits(self, what: str, precision: str, call: Callable, batch: int) -> None:
        """Compare the logits of all whole batches."""
        times = -(-batch // len(self.images))
        images, expected = self.images.repeat(times, 1, 1, 1), self.expected.repeat(times, 1)
        parts = [part for part in images.split(batch) if len(part) == batch]
        found = torch.cat([call(part).float().clone() for part in parts])
        expected = expected[: len(found)]
        difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
        others = (found.argmax(1) != expected.argmax(1)).sum().item()
        good = difference <= accuracy.TOLERANCE[precision] * largest and others <= max(1, len(found) // 100)
        self.failures += not good
        told = (
            f"difference at most {difference:.4f} of {largest:.2f}, {others} of {len(found)} classes differ"
        )
        print(f"{'ok  ' if good else 'FAIL'} {what}, {self.size} px, batch {batch}: {told}", flush=True)

    def backend(self, name: str, batches: list[int]) -> None:
        """Build, load and compare a backend at every batch size, one after another and back again."""
        made = backends.make(name)
        if reason := made.why_unavailable("cuda"):
            print(f"{name}: {reason}")
            return
        made.data = self.data
        made.load(self.checkpoint, self.size, batches, "cuda")
        print(f"{name}: {made.build_s:.1f} s to build or find", flush=True)
        for batch in [*batches, *batches[::-1]]:
            self.logits(name, made.precision, lambda x: made.predict(made.prepare(x)), batch)

    def engine(self, batches: list[int]) -> trt.Engine:
        """A native engine, built in this process, with the seconds."""
        file = trt.NativeEngine(self.checkpoint, self.size, batches, self.data)
        timings, start = self.checkpoint.with_name("check.timings"), time.perf_counter()
        timings.write_bytes(file.make(file.path, timings.read_bytes() if timings.is_file() else b""))
        print(f"engine for {batches}: {time.perf_counter() - start:.1f} s to build", flush=True)
        return file.open()

    def profiles(self) -> None:
        """One engine for all batch sizes against one for each, plain and in a CUDA graph."""
        shared = self.engine(BATCHES)
        for batch in BATCHES:
            x, alone = self.batch_of(batch), self.engine([batch])
            plain = {"alone": partial(alone, x), "with profiles": partial(shared, x)}
            self.speeds(f"FP16 batch {batch}", plain, batch)
            graphs = {"alone": graph_of(alone, x), "with profiles": graph_of(shared, x)}
            self.speeds(f"FP16 batch {batch}, CUDA graph", graphs, batch)
        megabytes = shared.memory.numel() / 2**20
        print(f"{len(shared.bound)} contexts of one engine compute in the same {megabytes:.0f} MB")

    def batch_of(self, batch: int) -> torch.Tensor:
        return torch.randn(batch, 3, self.size, self.size, device="cuda").half()

    def speeds(self, title: str, calls: dict[str, Callable], batch: int) -> None:
        """Images/s by the median run, in interleaved blocks, and the ratio to the first."""
        took = {name: [] for name in calls}
        for block in range(13):
            for name, call in calls.items():
                for run in range(45):
                    start = time.perf_counter()
                    call()
                    torch.cuda.current_stream().synchronize()
                    if block and run >= 5:  # the first block and runs warm up
                        took[name].append(time.perf_counter() - start)
        rates = {name: batch / float(np.median(values)) for name, values in took.items()}
        first = next(iter(rates.values()))
        told = [f"{name} {rate:,.0f} images/s ({rate / first:.3f})" for name, rate in rates.items()]
        print(f"{title}: {', '.join(told)}", flush=True)


def graph_of(engine: trt.Engine, x: torch.Tensor) -> Callable:
    for _ in range(3):
        engine(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        engine(x)
    return lambda: (engine, x, graph.replay())  # which uses both, and keeps neither alive


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument(
        "--image-sizes", nargs="+", type=int, default=[224], help="speed is of the first alone"
    )
    parser.add_argument("--backends", nargs="+", default=NAMES)
    add_path_arguments(parser)
    args = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as folder, inference("cuda"):
        for size in args.image_sizes:
            checkpoint = Path(shutil.copy(checkpoint_path(args.weights, size), folder))
            check = Check(checkpoint, size, args.data)
            for name in args.backends:
                check.attempt(check.backend, name, [1, 8, 16])
            if size == args.image_sizes[0]:
                check.attempt(check.profiles)
            failures += check.failures
    sys.exit(failures > 0)


if __name__ == "__main__":
    run_main(main)
