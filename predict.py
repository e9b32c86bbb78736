"""Classify every image in a folder: files -> labels.csv with path, class and probability.

Reads the images (any depth, any format that Pillow reads), weights/best_resnet18_<size>.pth and, to choose
the fastest backend, results/benchmark_results.csv if it was measured on this machine with these packages.
Files that can't be read are named on stderr and skipped; the exit code is 1 then.  Interrupted and run again,
it goes on: rows stand in labels.csv.<key>.part<rank> until all are there.  Its processes hold 1.2 GB on 2
cores, 4.4 GB with DALI beside an H100 with 16, however many images; at the end 0.5 kB for each row instead.

    python predict.py photos/ --out labels.csv
    torchrun --nproc-per-node 2 predict.py photos/ --out labels.csv      the files shared among two GPUs
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)

import argparse
import atexit
import contextlib
import datetime
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.environment import environment, keep_to_share
from utils.serve import labels
from utils.utils import UserError, add_path_arguments, fresh_processes, run_main, sha256

# What else is needed is imported where it is used: the workers that decode import this file too.
BATCH_SIZE = {"cuda": 256, "cpu": 16}  # where none was measured
NOTHING = {"images": 0, "problems": {}}
FEW = 256  # images that threads have decoded before processes have started
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # by torchrun
WORLD_SIZE, LOCAL_WORLD_SIZE = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


def find_images(source: Path) -> list[str]:
    """All images of a folder in order, or the one file.  Raises UserError."""
    from utils.images import files_below, is_image

    if not source.exists():
        raise UserError(f"{source} is not there; name a folder of images: python predict.py FOLDER")
    if source.is_file():
        return [str(source)]
    found = files_below(source)
    if images := list(filter(is_image, found)):
        return images
    raise UserError(f"{source} holds no images, by the names of its {len(found)} files; name another folder")


# ---- what classifies


def choose_checkpoint(weights: Path, image_size: int | None) -> Path:
    """The checkpoint of that size, or the most accurate, of equals the smallest.  Raises UserError."""
    import model
    from utils.utils import checkpoint_path

    if image_size:
        return checkpoint_path(weights, image_size)
    found = [(model.load_facts(path), path) for path in weights.glob("best_resnet18_*.pth")]
    if not found:
        raise UserError(f"{weights} holds no checkpoint; train one: python train.py")
    return min(found, key=lambda pair: (-pair[0].get("accuracy", 0), pair[0]["image_size"]))[1]


def measured_here(results: Path, device: str, image_size: int):
    """The table's rows that were measured on this machine with these packages, fastest first, or None."""
    from utils.report import analysis, tables

    if not (results / "benchmark_results.csv").is_file():
        return None
    rows, environments = tables.read_table(results)
    here = environment(device)
    same = []
    for sweep, facts in environments.items():
        if all(facts.get(name) == here[name] for name in ("gpu", "cpu", "packages")):
            same.append(sweep)
    rows = rows[rows.sweep.isin(same) & (rows.device == device) & (rows.image_size == image_size)]
    return analysis.measured(rows).sort_values("fps", ascending=False)


def choose_backend(name: str | None, rows, device: str):
    """(backend, its name, batch size, batch sizes to load) by the table; PyTorch where it has none."""
    import backends

    known = rows is not None and not rows.empty
    for row in rows.itertuples() if known else ():
        if row.backend in ([name] if name else backends.SCRIPTS):
            backend = backends.make(row.backend)
            if not backend.why_unavailable(device):
                sizes = sorted(set(rows[rows.sweep == row.sweep].batch_size.tolist()))
                return backend, row.backend, row.batch_size, sizes
    if not name:
        say("nothing was measured here at this size: PyTorch serves; python benchmark.py finds faster ones")
    name = name or "pytorch"
    backend = backends.make(name)
    if reason := backend.why_unavailable(device):
        raise UserError(f"--backend {name}: {reason}")
    return backend, name, BATCH_SIZE[device], [BATCH_SIZE[device]]


def choose_decoder(name: str, device: str) -> str:
    """DALI on a GPU where it is installed, else Pillow.  Raises UserError for DALI where it is not."""
    from utils.serve.dali import why_no_dali

    if name == "pillow" or (name == "auto" and device == "cpu"):
        return "pillow"
    reason = why_no_dali()
    if reason and name == "dali":
        raise UserError(reason)
    if reason:
        say(f"Pillow decodes: {reason}")
    return "pillow" if reason else "dali"


# ---- rows


def rows_of(batch, logits: np.ndarray, classes: list[str], every: bool) -> list[list[str]]:
    """path, class, probability and, if asked for, every class's; of the files that could be read."""
    power = np.exp(logits - logits.max(1, keepdims=True))
    shares = power / power.sum(1, keepdims=True)
    rows = []
    for index, (path, share) in enumerate(zip(batch.paths, shares, strict=True)):
        if index not in batch.problems:
            best = share.argmax()
            others = [f"{value:.6f}" for value in share] if every else []
            rows.append([path, classes[best], f"{share[best]:.6f}", *others])
    return rows


# ---- several processes, by torchrun


def share_of(images: list[str], rank: int, of: int) -> list[str]:
    """One process's share, in order: drawn by lot, since every second file may be a heavy one."""
    lots = np.random.default_rng(0).permutation(len(images))
    return [images[k] for k in np.sort(lots[rank::of])]


def gather(value) -> list:
    """The value of every process; waits for all of them."""
    if WORLD_SIZE == 1:
        return [value]
    import torch
    import torch.distributed as dist

    values = [None] * WORLD_SIZE
    with contextlib.ExitStack() as undo:
        for number in (signal.SIGINT, signal.SIGTERM):  # which who waits inside torch would not hear
            undo.callback(signal.signal, number, signal.signal(number, signal.SIG_DFL))
        undo.enter_context(torch.inference_mode(False))  # torch 2.2 can't exchange anything within it
        if not dist.is_initialized():  # Gloo: no GPU has anything to exchange
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
            atexit.register(dist.destroy_process_group)  # else Gloo's threads may abort the process
        dist.all_gather_object(values, value)
    return values


def label(images: list[str], part: Path, decoder, network, to_rows: Callable) -> dict:
    """Classify, appending rows to `part` batch by batch; the problems, when it was, what it waited for."""
    from tqdm import tqdm

    from utils.serve.pipeline import classify

    told = {"images": len(images), "problems": {}, "waited": {}, "began": time.time()}
    with tqdm(total=len(images), unit="image", disable=True if RANK else None) as progress:
        for batch, logits in classify(decoder, network, images, told["waited"]):
            labels.write_rows(part, to_rows(batch, logits), "a")
            told["problems"] |= {batch.paths[index]: why for index, why in batch.problems.items()}
            progress.update(len(batch.paths))
    return {**told, "ended": time.time()}


def summarise(told: list[dict], paths: list[str], rows: dict, out: Path) -> int:
    """Say how fast it was, what was in the way and which images have no row; the exit code."""
    print(f"written: {out}, {len(rows):,} rows")
    if busy := [part for part in told if part["images"]]:
        images = sum(part["images"] for part in busy)
        seconds = max(part["ended"] for part in busy) - min(part["began"] for part in busy)
        spent = {name: sum(part["waited"][name] for part in busy) for name in ("decoding", "inference")}
        most = max(spent, key=spent.get)
        share = f"it waited {spent[most] / sum(spent.values()):.0%} of the time for it"
        speed = f"{images:,} images in {seconds:.1f} s, {images / seconds:,.0f} images/s"
        print(f"{speed}; in the way: {most} ({share})")
    problems = {path: "its row is gone; run the same command again" for path in paths if path not in rows}
    problems |= {path: why for part in told for path, why in part["problems"].items()}
    if problems:
        print(f"{len(problems):,} files can't be read and have no row:", file=sys.stderr)
    for path, why in sorted(problems.items()):
        print(f"  {path}: {why}", file=sys.stderr)
    return 1 if problems else 0


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("source", type=Path, help="folder of images, or one image")
    parser.add_argument("--out", type=Path, default=Path("labels.csv"))
    parser.add_argument("--backend", help="default: the fastest measured on this machine, else pytorch")
    decoders = ["auto", "pillow", "dali"]
    parser.add_argument("--decoder", choices=decoders, default="auto", help="auto: DALI on a GPU")
    batch = "default: the fastest measured, else 256 on a GPU and 16 on a CPU"
    parser.add_argument("--batch-size", type=int, help=batch)
    parser.add_argument("--image-size", type=int, help="default: that of the most accurate checkpoint")
    parser.add_argument("--probabilities", action="store_true", help="of every class, a column each")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add_path_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    keep_to_share(LOCAL_RANK, LOCAL_WORLD_SIZE)
    images, out = find_images(args.source), labels.check_out(args.out)
    with labels.alone_at(out) if RANK == 0 else contextlib.nullcontext():
        sys.exit(classify_all(args, images, out))


def classify_all(args: argparse.Namespace, images: list[str], out: Path) -> int:
    """Classify what has no row yet and write the table; the exit code."""
    if len(images) > FEW:
        fresh_processes("utils.serve.pipeline")  # what the decoding ones come from imports meanwhile
    import torch

    import backends
    import model
    from utils.devices import choose_device
    from utils.measure import jobs, worker
    from utils.serve.dali import DECODERS
    from utils.serve.pipeline import Network

    jobs.check_numbers(args, ["batch_size", "image_size"], least=1)
    if args.backend not in (None, *backends.SCRIPTS):
        raise UserError(f"--backend {args.backend} is not one of {', '.join(backends.SCRIPTS)}")
    device = choose_device(args.device)
    checkpoint = choose_checkpoint(args.weights, args.image_size)
    facts = model.load_facts(checkpoint)
    size, classes = facts["image_size"], facts["classes"]
    rows = measured_here(args.results, device, size)
    backend, name, batch_size, batch_sizes = choose_backend(args.backend, rows, device)
    if args.batch_size:
        batch_size, batch_sizes = args.batch_size, [args.batch_size]
    backend.data = args.data  # to calibrate with
    decoder_name = choose_decoder(args.decoder, device)
    say(f"{len(images):,} images, {checkpoint.name}, {name}, batch {batch_size}, {decoder_name}, {device}")

    header = ["path", "class", "probability", *(classes if args.probabilities else [])]
    settings = sha256(checkpoint, json.dumps([name, decoder_name, device, header]))
    key = f"{sha256(str(args.source), str(args.source.resolve()))[:8]}-{settings[:8]}"
    own, done = labels.resume(out, key, len(header), RANK)
    if done:
        say(f"going on: {len(done):,} rows are there already")
    mine = [path for path in share_of(images, RANK, WORLD_SIZE) if path not in done]
    if device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    told = NOTHING
    try:
        with worker.inference(device):
            if RANK:
                gather(None)  # the first process builds what the others load
            backend.load(checkpoint, size, batch_sizes, device)
            if not RANK:
                gather(None)
            if mine:
                network = Network(backend, [batch_size], size, device)
                decoder = DECODERS[decoder_name](size, batch_size, device, few=len(mine) <= FEW)
                with contextlib.closing(decoder):
                    to_rows = functools.partial(rows_of, classes=classes, every=args.probabilities)
                    told = label(mine, own, decoder, network, to_rows)
    except Exception as error:
        problem = worker.problem_of(error)
        if problem.status != "out_of_memory":
            raise
        raise UserError(f"{problem.reason}; the rows stay, go on with a smaller --batch-size") from error
    told = gather(told)
    return summarise(told, images, labels.merge(out, key, images, header), out) if RANK == 0 else 0


if __name__ == "__main__":
    run_main(main)
