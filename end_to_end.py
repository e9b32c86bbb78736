"""From files on disk to labels on the host: what each step of serving costs, at each backend's fastest batch size.

Reads results/benchmark_results.csv (which rows are ok, and their fastest batch), data/test and weights/; writes results/end_to_end.csv.
Images are read, decoded and resized by a pool of threads, one for each core; they cross to the device as uint8 from pinned memory and are
normalised there.  Steps are timed one after another with a synchronise between them, so that their shares add up; every
(backend, image size) is a process of its own.

    python end_to_end.py --image-sizes 224
"""

import argparse
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import compare
from utils.utils import (
    UserError,
    add_path_arguments,
    checkpoint_path,
    fresh_processes,
    run_main,
    write_atomic,
)

STEPS = ["decode", "resize", "copy", "normalise", "infer", "copy_back"]


def serve(
    backend_name: str,
    image_size: int,
    batch_size: int,
    batch_sizes: list[int],
    device: str,
    data: Path,
    weights: Path,
    seconds: float,
) -> dict:
    """Serve the test set over and over for at least `seconds` after one untimed pass; ms per image of every step, images/s, accuracy.

    `batch_sizes` are those of the table, so that the engine that was measured is the one that serves.
    """
    import torch
    from torchvision.transforms import v2

    import datasets
    import model
    import onnx_inference
    import pytorch_inference
    import tensorrt_inference

    scripts = (pytorch_inference, onnx_inference, tensorrt_inference)
    backend = {name: make for script in scripts for name, make in script.BACKENDS.items()}[backend_name]()
    checkpoint = checkpoint_path(weights, image_size)
    classes = model.load_facts(checkpoint)["classes"]
    files = [
        (path, classes.index(name))
        for name, paths in datasets.list_images(data)["test"].items()
        for path in paths
    ]
    files += (
        files[: -len(files) % batch_size]
        if len(files) >= batch_size
        else files * (math.ceil(batch_size / len(files)) - 1)
    )
    files = files[: len(files) // batch_size * batch_size]
    batches = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    resize = v2.Resize((image_size, image_size), antialias=True)
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (datasets.MEAN, datasets.STD)
    )
    cuda = device == "cuda"
    stream = torch.cuda.Stream() if cuda else None
    spent, served, correct = dict.fromkeys(STEPS, 0.0), 0, 0
    with torch.inference_mode(), torch.cuda.stream(stream), ThreadPoolExecutor(os.cpu_count()) as pool:
        backend.load(checkpoint, image_size, batch_sizes, device)
        pinned = torch.empty(batch_size, image_size, image_size, 3, dtype=torch.uint8, pin_memory=cuda)
        stop = None
        while stop is None or time.perf_counter() < stop:
            for batch in batches:
                clock = [time.perf_counter()]

                def tick(clock=clock):
                    if cuda:
                        stream.synchronize()
                    clock.append(time.perf_counter())

                pictures = list(pool.map(datasets.load_rgb, [path for path, _ in batch]))
                tick()
                list(
                    pool.map(
                        lambda k, pictures=pictures: np.copyto(pinned[k].numpy(), resize(pictures[k])),
                        range(batch_size),
                    )
                )
                tick()
                images = pinned.to(device, non_blocking=True)
                tick()
                x = backend.prepare((images.permute(0, 3, 1, 2).float() / 255 - mean) / std)
                tick()
                logits = backend.predict(x)
                tick()
                labels = logits.argmax(1).cpu().tolist()
                tick()
                if stop is not None:  # the first pass warms up
                    for step, start, end in zip(STEPS, clock[:-1], clock[1:], strict=True):
                        spent[step] += (end - start) * 1000
                    served += batch_size
                    correct += sum(label == truth for label, (_, truth) in zip(labels, batch, strict=True))
            stop = stop or time.perf_counter() + seconds
    total = sum(spent.values())
    return {
        **{
            "precision": backend.precision,
            "images": served,
            "images_per_s": served / total * 1000,
            "accuracy": correct / served,
        },
        **{f"{step}_ms": spent[step] / served for step in STEPS},
        "bottleneck": f"{max(spent, key=spent.get)} ({max(spent.values()) / total:.0%})",
    }


def run(
    rows: pd.DataFrame, sizes: list[int] | None, data: Path, weights: Path, results: Path, seconds: float
) -> pd.DataFrame:
    """Serve with every backend of `rows` at every size at its fastest batch; merge into results/end_to_end.csv and return what is new."""
    ok = compare.measured(rows)
    batch_sizes = sorted(set(rows.batch_size.tolist()))
    chosen = ok.loc[ok.groupby(["run", "backend", "image_size"], sort=False).fps.idxmax()]
    if sizes:
        chosen = chosen[chosen.image_size.isin(sizes)]
    table = []
    for row in tqdm(list(chosen.itertuples()), desc="end to end", unit="process"):
        with ProcessPoolExecutor(1, mp_context=fresh_processes()) as pool:
            where = row.image_size, row.batch_size, batch_sizes, row.device
            served = pool.submit(serve, row.backend, *where, data, weights, seconds).result()
        known = {
            "run": row.run,
            "backend": row.backend,
            "image_size": row.image_size,
            "batch_size": row.batch_size,
        }
        table.append({**known, **served, "infer_alone_images_per_s": row.fps})
    new, path = pd.DataFrame(table), results / "end_to_end.csv"
    keys = ["run", "backend", "image_size"]
    both = pd.concat([pd.read_csv(path), new]).drop_duplicates(keys, keep="last") if path.exists() else new
    write_atomic(
        path,
        both.sort_values(["run", "image_size"], kind="stable").to_csv(
            index=False, float_format="%.6g", lineterminator="\n"
        ),
    )
    return new


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-sizes", nargs="+", type=int, help="default: all that are in the table")
    parser.add_argument(
        "--run", default="main", help="whose rows; this environment must be the one that measured them"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of serving, at least, after an untimed pass"
    )
    add_path_arguments(parser)
    args = parser.parse_args()
    rows, _ = compare.read(args.results)
    rows = rows[rows.run == args.run]
    if compare.measured(rows).empty:
        raise UserError(
            f"{args.results / 'benchmark_results.csv'} has no measured row of run {args.run}; make it with: python benchmark.py"
        )
    from utils import report

    print(
        report.end_to_end_text(
            run(rows, args.image_sizes, args.data, args.weights, args.results, args.seconds)
        )
    )


if __name__ == "__main__":
    run_main(main)
