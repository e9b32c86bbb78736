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
import dataclasses
import datetime
import gc
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import backends
from utils.backend import Backend, Unavailable, inference
from utils.devices import choose_device, leave_processes, torchrun_number
from utils.environment import is_out_of_memory, keep_to_share, read_driver
from utils.serve import choices, labels
from utils.serve.dali import open_decoder
from utils.serve.decoder import Batch
from utils.utils import UserError, add_path_arguments, number, run_main, sha256, write_json

# PyTorch is imported only once the first files are being decoded, then DALI and the backend.
DALI_PAYS = 4_000  # images from which DALI makes good the seconds that it takes to start (16 cores, H200)
STEPS = ["start", "decoding", "inference"]  # what the time went to
NOT_FINITE = "the network gives no finite numbers for it; try --backend pytorch, or python train.py --force"
RANK, LOCAL_RANK = torchrun_number("RANK", 0), torchrun_number("LOCAL_RANK", 0)
WORLD_SIZE, LOCAL_WORLD_SIZE = torchrun_number("WORLD_SIZE", 1), torchrun_number("LOCAL_WORLD_SIZE", 1)


def say(text: str) -> None:
    if RANK == 0:
        tqdm.write(text)  # above the progress bar
        sys.stdout.flush()


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("source", type=Path, help="folder of images, or one image")
    parser.add_argument("--out", type=Path, default=Path("labels.csv"))
    by_table = "default: the one measured here that is done first, else"
    parser.add_argument("--backend", choices=backends.SCRIPTS, metavar="NAME", help=f"{by_table} pytorch")
    auto = f"auto: DALI on a GPU for {DALI_PAYS:,} images or more"
    parser.add_argument("--decoder", choices=["auto", "pillow", "dali"], default="auto", help=auto)
    positive = number(int, 1, 1_000_000)
    parser.add_argument("--batch-size", type=positive, help=f"{by_table} 256 on a GPU and 16 on a CPU")
    parser.add_argument("--image-size", type=positive, help="default: that of the most accurate checkpoint")
    parser.add_argument("--probabilities", action="store_true", help="of every class, a column each")
    parser.add_argument("--excel", action="store_true", help="have Excel show letters like Cyrillic")
    parser.add_argument("--timings", type=Path, help="JSON file for the seconds that each step took")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add_path_arguments(parser)
    return parser.parse_args()


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
            atexit.register(leave_processes)
        dist.all_gather_object(values, value)
    return values


@dataclasses.dataclass(frozen=True)
class Run:
    """What a folder is classified with."""

    args: argparse.Namespace
    checkpoint: Path
    facts: dict
    choice: choices.Choice
    device: str
    decoder: str

    def classify(self, images: list[str], problems: dict, out: Path, progress: tqdm) -> int:
        """Classify what has no row yet and write the table; the exit code.  Raises Unavailable."""
        header = [*labels.COLUMNS, *(self.facts["classes"] if self.args.probabilities else [])]
        made_by = json.dumps([self.choice.backend, self.decoder, self.device, header])
        source = sha256(str(self.args.source), str(self.args.source.resolve()))
        key = f"{source[:8]}-{sha256(self.checkpoint, made_by)[:8]}"
        part, done = labels.resume(out, key, len(header), RANK)
        if done:
            say(f"resuming: {len(done):,} rows are there already")
        mine = [path for path in images[RANK::WORLD_SIZE] if path not in done]
        progress.reset(len(mine))
        everybody = gather(self.label(mine, part, progress))
        if RANK:
            return 0
        rows = labels.merge(out, key, images, header, self.args.excel)
        for told in everybody:
            problems |= told["problems"]
        lost = {path for path in images if path not in rows} - problems.keys()
        problems |= dict.fromkeys(lost, "its row is gone; run the same command again")
        return report(everybody, len(rows), problems, out, self.args.timings)

    def label(self, paths: list[str], part: Path, progress: tqdm) -> dict:
        """Classify, appending rows to `part` batch by batch; the problems and where the seconds went."""
        size, batch_size, device = self.facts["image_size"], self.choice.batch_size, self.device
        files = open_decoder(self.decoder, size, batch_size, device, paths, len(paths), LOCAL_RANK)
        with contextlib.closing(files):
            batches, images, problems = files.batches(paths), 0, {}
            import torch  # while the first files are being decoded

            from utils.serve.pipeline import Network, classify

            choose_device(self.args.device)
            if device == "cuda":
                torch.cuda.set_device(LOCAL_RANK)
            with inference(device):
                backend = self.load()
                files.get_ready(device)
                network = Network(backend, [batch_size], size, device)
                spent = {"start": time.perf_counter() - utils.STARTED}
                progress.set_description_str("labelling")
                progress.unpause()  # its images/s are without the start
                for batch, logits in classify(batches, network, spent):
                    for index in np.flatnonzero(~np.isfinite(logits).all(1)):
                        batch.problems.setdefault(int(index), NOT_FINITE)
                    labels.write_rows(part, self.rows_of(batch, logits), "a")
                    images += len(batch.paths)
                    problems |= {batch.paths[index]: why for index, why in batch.problems.items()}
                    progress.update(len(batch.paths))
                seconds = time.perf_counter() - utils.STARTED
        return {"images": images, "problems": problems, "spent": spent, "seconds": seconds}

    def rows_of(self, batch: Batch, logits: np.ndarray) -> list[list[str]]:
        """path, class, probability and, if asked for, every class's; of the files that could be read."""
        right, rows = [index for index in range(len(logits)) if index not in batch.problems], []
        power = np.exp(logits[right] - logits[right].max(1, keepdims=True))
        for index, shares in zip(right, power / power.sum(1, keepdims=True), strict=True):
            best, every = shares.argmax(), shares if self.args.probabilities else []
            texts = [f"{share:.6f}" for share in (shares[best], *every)]
            rows.append([batch.paths[index], self.facts["classes"][best], *texts])
        return rows

    def load(self) -> Backend:
        """The backend, loaded by the first process before the others, since it builds what they load."""
        why = gather(None)[0] if RANK else None
        backend, sizes = backends.make(self.choice.backend), list(self.choice.batch_sizes)
        backend.data = None if self.choice.measured else self.args.data  # INT8 as it was measured
        try:
            if not (why := why or backend.why_unavailable(self.device)):
                backend.load(self.checkpoint, self.facts["image_size"], sizes, self.device)
        except Unavailable as error:
            why = str(error)
        if not RANK:
            gather(why)
        if why:
            raise Unavailable(why)
        return backend


def report(told: list[dict], rows: int, problems: dict[str, str], out: Path, timings: Path | None) -> int:
    """Say where the time went, what the bottleneck was and what has no row; the exit code."""
    images, last = sum(part["images"] for part in told), max(told, key=lambda part: part["seconds"])
    seconds, spent = last["seconds"], last["spent"]
    rate = images / max(seconds - spent["start"], 0.001)
    parts = ", ".join(f"{step} {spent[step]:.1f} s" for step in STEPS)
    print(f"written: {out}, {rows:,} rows")
    print(f"{images:,} images in {seconds:.1f} s: {parts}; {rate:,.0f} images/s after the start")
    print(f"bottleneck: {max(STEPS, key=spent.get)}")
    if timings:
        write_json(timings, {"images": images, "seconds": seconds, **spent})
    if problems:
        print(f"{len(problems):,} files or folders can't be read and have no row:", file=sys.stderr)
    for path, why in sorted(problems.items()):
        print(f"  {path}: {why}", file=sys.stderr)
    return 1 if problems else 0


def classify_all(args: argparse.Namespace, images: list[str], problems: dict, out: Path, progress) -> int:
    """Choose what classifies, then have it done; the exit code."""
    checkpoint, facts = choices.choose_checkpoint(args.weights, args.image_size, args.data)
    # By the driver, since asking PyTorch takes seconds; where it can't use that GPU, choose_device() says so.
    gpu = args.device == "auto" and read_driver("nvmlDeviceGetName")
    device = "cuda" if gpu or args.device == "cuda" else "cpu"
    decoder, pays = args.decoder, device == "cuda" and len(images) >= DALI_PAYS
    if decoder == "auto":
        there = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
        decoder = "dali" if pays and there else "pillow"
    rows = choices.measured_here(args.results, device, facts["image_size"])
    found = choices.choose_backends(args.backend, rows, len(images), device)
    say(f"{checkpoint.name}: {choices.described(checkpoint, facts)}")
    if not args.backend and not found[0].measured:
        say("nothing was measured here at this size: PyTorch serves; python benchmark.py finds faster ones")
    if args.batch_size:
        found = [one.with_batch(args.batch_size) for one in found]
    while True:
        choice = found.pop(0)
        say(f"{len(images):,} images, {choice.backend}, batch {choice.batch_size}, {decoder}, {device}")
        try:
            run = Run(args, checkpoint, facts, choice, device, decoder)
            return run.classify(images, problems, out, progress)
        except Unavailable as why:
            if not found:
                raise UserError(f"{choice.backend} can't serve: {why}") from None
            say(f"{choice.backend} can't serve: {why}; the next one by the table is {found[0].backend}")
        except Exception as error:  # ONNX Runtime's are no RuntimeError
            if isinstance(error, UserError) or not is_out_of_memory(error):
                raise
            if args.batch_size or choice.batch_size == 1 or WORLD_SIZE > 1:
                said = " ".join(str(error).split())[-300:] or "out of memory"
                mend = "the rows stay, go on with a smaller --batch-size"
                raise UserError(f"batch {choice.batch_size}: {said}; {mend}") from None
            found.insert(0, choice.with_batch(choice.batch_size // 2))
            say(f"batch {choice.batch_size} does not fit into the memory; trying {found[0].batch_size}")
        gc.collect()  # lets go of the backend that can't be used
        import torch

        torch.cuda.empty_cache()


def main() -> None:
    args = parse()
    keep_to_share(LOCAL_RANK, LOCAL_WORLD_SIZE)
    (images, problems, others), out = choices.find_images(args.source), labels.check_out(args.out)
    alone = labels.alone_at(out) if RANK == 0 else contextlib.nullcontext()
    tqdm.set_lock(threading.RLock())  # its own is made for several processes, which takes a while
    shown = tqdm(total=len(images), desc="starting", unit="image", disable=True if RANK else None)
    with alone, shown as progress:
        if others:
            say(f"{others:,} files in {args.source} are no pictures")
        code = classify_all(args, images, problems, out, progress)
    sys.stdout.flush()
    sys.stderr.flush()
    if args.device != "cpu" and WORLD_SIZE == 1:
        os._exit(code)  # all is written; CUDA would take another second to end
    sys.exit(code)


if __name__ == "__main__":
    run_main(main)
