"""From files on disk to labels on the host: what each step of serving costs, at each backend's fastest
batch size.

Reads results/benchmark_results.csv (which rows are ok, and their fastest batch), data/test and weights/;
writes results/end_to_end.csv.  Images are read, decoded and resized by a pool of threads, one for each
core; they cross to the device as uint8 from pinned memory and are normalised there.  Steps are timed one
after another with a synchronise between them, so that their shares add up; every (backend, image size) is a
process of its own.

    python end_to_end.py --image-sizes 224
"""

import argparse
import itertools
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import benchmark
from utils import findings, records, report
from utils.utils import (
    UserError,
    add_path_arguments,
    checkpoint_path,
    fresh_processes,
    run_main,
    write_atomic,
)

STEPS = ["decode", "resize", "copy", "normalise", "infer", "copy_back"]


class Clock:
    """Seconds spent in each step, over all batches."""

    def __init__(self, synchronize):
        self.synchronize, self.spent = synchronize, dict.fromkeys(STEPS, 0.0)

    def begin(self) -> None:
        self.last = time.perf_counter()

    def done(self, step: str) -> None:
        self.synchronize()
        now = time.perf_counter()
        self.spent[step] += now - self.last
        self.last = now


class Server:
    """A backend that classifies batches of image files, step by step."""

    def __init__(self, backend, image_size: int, batch_size: int, device: str):
        import torch
        from torchvision.transforms import v2

        import datasets

        self.backend, self.device, self.load_rgb = backend, device, datasets.load_rgb
        self.resize = v2.Resize((image_size, image_size), antialias=True)
        shape = batch_size, image_size, image_size, 3
        self.pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=device == "cuda")
        moments = datasets.MEAN, datasets.STD
        self.mean, self.std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in moments)
        self.pool = ThreadPoolExecutor(os.cpu_count())

    def resize_into(self, k: int, picture) -> None:
        np.copyto(self.pinned[k].numpy(), self.resize(picture))

    def classify(self, paths: list[Path], clock: Clock) -> list[int]:
        """The class of each file, by index; `paths` is a whole batch."""
        clock.begin()
        pictures = list(self.pool.map(self.load_rgb, paths))
        clock.done("decode")
        list(self.pool.map(self.resize_into, range(len(paths)), pictures))
        clock.done("resize")
        images = self.pinned.to(self.device, non_blocking=True)
        clock.done("copy")
        x = self.backend.prepare((images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std)
        clock.done("normalise")
        logits = self.backend.predict(x)
        clock.done("infer")
        labels = logits.argmax(1).cpu().tolist()
        clock.done("copy_back")
        return labels


def serve(row, batch_sizes: list[int], data: Path, weights: Path, seconds: float) -> dict:
    """Serve the test set over and over for `seconds` after one untimed pass: ms per image of every step,
    images/s, accuracy.

    `row` says backend, image_size, batch_size and device; `batch_sizes` are those of the table, so that the
    engine that was measured is the one that serves.
    """
    import torch

    import datasets
    import model

    backend = benchmark.make_backend(benchmark.BACKENDS[row.backend], row.backend)
    checkpoint = checkpoint_path(weights, row.image_size)
    classes = model.load_facts(checkpoint)["classes"]
    listed = datasets.list_images(data)["test"].items()
    files = [(path, classes.index(name)) for name, paths in listed for path in paths]
    count = (
        -(-len(files) // row.batch_size) * row.batch_size
    )  # whole batches: the first files fill up the last
    files = list(itertools.islice(itertools.cycle(files), count))
    cuda = row.device == "cuda"
    stream = torch.cuda.Stream() if cuda else None
    clock = Clock(stream.synchronize if cuda else lambda: None)
    served = correct = 0
    with torch.inference_mode(), torch.cuda.stream(stream):
        backend.load(checkpoint, row.image_size, batch_sizes, row.device)
        server = Server(backend, row.image_size, row.batch_size, row.device)
        stop = None
        while stop is None or time.perf_counter() < stop:
            timed = clock if stop else Clock(clock.synchronize)  # the first pass warms up
            for first in range(0, count, row.batch_size):
                paths, truth = zip(*files[first : first + row.batch_size], strict=True)
                labels = server.classify(list(paths), timed)
                if timed is clock:
                    served += len(labels)
                    correct += sum(map(int.__eq__, labels, truth))
            stop = stop or time.perf_counter() + seconds
    total, slowest = sum(clock.spent.values()), max(clock.spent, key=clock.spent.get)
    figures = {"images": served, "images_per_s": served / total, "accuracy": correct / served}
    steps = {f"{step}_ms": spent * 1000 / served for step, spent in clock.spent.items()}
    share = f"{slowest} ({clock.spent[slowest] / total:.0%})"
    return {"precision": backend.precision, **figures, **steps, "bottleneck": share}


def measure(
    rows: pd.DataFrame, sizes: list[int] | None, data: Path, weights: Path, seconds: float
) -> pd.DataFrame:
    """Serve with every backend of `rows` at every size at its fastest batch, each in a fresh process."""
    batch_sizes = sorted(set(rows.batch_size.tolist()))
    chosen = findings.best_batch(rows)
    if sizes:
        chosen = chosen[chosen.image_size.isin(sizes)]
    table = []
    for row in tqdm(list(chosen.itertuples(name=None, index=False)), desc="end to end", unit="process"):
        known = dict(zip(chosen.columns, row, strict=True))
        where = ("sweep", "backend", "image_size", "batch_size", "device")
        asked = argparse.Namespace(**{name: known[name] for name in where})
        with ProcessPoolExecutor(1, mp_context=fresh_processes()) as pool:
            served = pool.submit(serve, asked, batch_sizes, data, weights, seconds).result()
        head = {name: known[name] for name in where[:-1]}
        table.append({**head, **served, "infer_alone_images_per_s": known["fps"]})
    return pd.DataFrame(table)


def merge(new: pd.DataFrame, path: Path) -> None:
    """Write the table with what the file has of other sweeps, backends and sizes."""
    if path.exists():
        keys = ["sweep", "backend", "image_size"]
        new = pd.concat([pd.read_csv(path), new]).drop_duplicates(keys, keep="last")
    both = new.sort_values(["sweep", "image_size"], kind="stable")
    write_atomic(path, both.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--image-sizes", nargs="+", type=int, help="default: all that are in the table")
    whose = "whose rows; this environment must be the one that measured them"
    parser.add_argument("--sweep", default="main", help=whose)
    parser.add_argument("--seconds", type=float, default=3.0, help="of serving, after an untimed pass")
    add_path_arguments(parser)
    args = parser.parse_args()
    rows, _ = records.read_table(args.results)
    rows = rows[rows.sweep == args.sweep]
    if findings.measured(rows).empty:
        path = args.results / "benchmark_results.csv"
        raise UserError(
            f"{path} has no measured row of sweep {args.sweep}; make it with: python benchmark.py"
        )
    table = measure(rows, args.image_sizes, args.data, args.weights, args.seconds)
    merge(table, args.results / "end_to_end.csv")
    print(report.end_to_end_text(table))


if __name__ == "__main__":
    run_main(main)
