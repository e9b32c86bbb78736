"""From image files to labels: how fast with every backend and decoder, and what is in the way.

Reads results/benchmark_results.csv (what is ok, and its fastest batch), data/test and weights/; writes
results/end_to_end.csv.  The pipeline (utils/serve/pipeline.py) serves the test set over and over; beside it
stand its two halves alone (decode, resize and copy; inference), the old way of one step after another, and
whether the labels are those of the test set as training reads it.  Every round is a fresh process.

With --load, results/load.csv instead: the latency of single images that arrive at random.

    python end_to_end.py --image-sizes 224
    python end_to_end.py --load --image-sizes 224 --max-latency-ms 15
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import backends
from utils import environment
from utils.measure import accuracy, jobs, timing, worker
from utils.report import analysis, tables
from utils.serve import load
from utils.utils import (
    UserError,
    add_path_arguments,
    checkpoint_path,
    in_fresh_process,
    rename_to_backup,
    run_main,
    write_atomic,
)

LOAD_IMAGES = 256  # with --load at most: they lie in memory


@dataclasses.dataclass
class Row:
    """One line of end_to_end.csv; the fields are its columns.  Empty: not known."""

    sweep: str
    backend: str
    precision: str
    image_size: int
    batch_size: int
    decoder: str
    images_per_s: float | None = None  # from files to labels
    images_per_s_low: float | None = None
    images_per_s_high: float | None = None
    decode_images_per_s: float | None = None  # decoding, resizing and copying alone
    infer_images_per_s: float | None = None  # normalising, inference and copying back alone
    serial_images_per_s: float | None = None  # Pillow, one step after another
    overlap: float | None = None  # pipeline over its slower half; on a CPU over both sharing the cores
    limit: str = ""  # decode, copy or inference
    agreement: float | None = None  # with the test set as training reads it, on the same backend
    max_abs_diff: float | None = None
    accuracy: float | None = None
    status: str = "ok"
    reason: str = ""
    cores: int = dataclasses.field(default_factory=environment.cores)  # that this had
    date: str = dataclasses.field(default_factory=environment.today)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one process is asked: a measured row of the table, and how."""

    sweep: str
    backend: str
    precision: str
    image_size: int
    batch_size: int
    device: str
    batch_sizes: tuple[int, ...]  # of the table, so that the engine that was measured is the one that serves
    decoders: tuple[str, ...]
    data: Path
    weights: Path
    seconds: float


def load_backend(asked: Asked, further: Iterable[int] = ()):
    """The backend for the table's batch sizes and, if its engine takes any, `further` ones."""
    backend = backends.make(asked.backend)
    backend.data = asked.data  # to calibrate with
    checkpoint = checkpoint_path(asked.weights, asked.image_size)
    batch_sizes = sorted({*asked.batch_sizes, *(further if backend.any_batch else ())})
    backend.load(checkpoint, asked.image_size, batch_sizes, asked.device)
    return backend, batch_sizes


# ---- in the process that measures


def measure_here(asked: Asked, parity: bool) -> list[dict]:
    """Figures of every decoder, in one process; with `parity` also agreement and accuracy."""
    from utils.serve.dali import DECODERS, why_no_dali
    from utils.serve.pipeline import Network

    found = []
    with worker.inference(asked.device):
        backend, _ = load_backend(asked)
        network = Network(backend, [asked.batch_size], asked.image_size, asked.device)
        for name in asked.decoders:
            figures = {"decoder": name, "precision": backend.precision}
            if name == "dali" and (reason := why_no_dali()):
                found.append({**figures, "status": "unavailable", "reason": reason})
                continue
            decoder = DECODERS[name](asked.image_size, asked.batch_size, asked.device)
            with contextlib.closing(decoder):
                figures |= throughput(decoder, network, asked)
                figures |= compare(decoder, network, asked) if parity else {}
            found.append(figures)
    for figures in found:  # the old way is Pillow's
        figures["serial_images_per_s"] = found[0].get("serial_images_per_s")
    return found


def throughput(decoder, network, asked: Asked) -> dict:
    """Images/s of the pipeline, of its halves alone and of one step after another; overlap and limit."""
    from utils.serve.pipeline import classify, copied, inferred, one_after_another, rate

    files = itertools.cycle([path for path, _ in read_test_set(asked)[1]])
    first = next(decoder.batches(itertools.islice(files, asked.batch_size)))
    resident = first.pixels.to(asked.device, copy=True)
    on_gpu, full, half = asked.device == "cuda", decoder.slots, asked.seconds / 2
    parts = [
        (lambda: copied(decoder.batches(files), asked.device), full),
        (lambda: inferred(network, resident), 2),
        (lambda: (len(logits) for _, logits in classify(decoder, network, files)), full),
    ]
    rate(parts[-1][0](), full, half)  # not counted: a process that has just begun finds cold memory
    early = [rate(served(), warm_up, half) for served, warm_up in parts]
    late = [rate(served(), warm_up, half) for served, warm_up in reversed(parts)]  # finds warmer memory
    decode, infer, both = ((a + b) / 2 for a, b in zip(early, reversed(late), strict=True))
    figures = {"images_per_s": both, "decode_images_per_s": decode, "infer_images_per_s": infer}
    if decoder.name == "pillow":
        steps = one_after_another(decoder, network, files, asked.batch_size)
        figures["serial_images_per_s"] = rate(steps, 1, asked.seconds)
    possible = min(decode, infer) if on_gpu else 1 / (1 / decode + 1 / infer)
    limit = "decode" if decode < infer else "inference"
    if on_gpu and limit == "decode" and rate(copied(itertools.repeat(first), "cuda"), 2, 0.2) < 2 * decode:
        limit = "copy"
    return {**figures, "overlap": both / possible, "limit": limit}


def read_test_set(asked: Asked) -> tuple:
    """The loader that testing reads with, and in its order every file and the index of its class."""
    import datasets
    import model

    classes = model.load_facts(checkpoint_path(asked.weights, asked.image_size))["classes"]
    loader = datasets.make_test_loader(asked.data, asked.image_size, asked.batch_size, classes)
    return loader, [(str(path), truth) for path, truth in loader.dataset.files]


def compare(decoder, network, asked: Asked) -> dict:
    """Logits from files against those of the test set as training reads it, on the same backend."""
    from utils.serve.pipeline import classify

    loader, pairs = read_test_set(asked)
    files, truth = zip(*pairs, strict=True)
    call = worker.whole_call(network.backend)
    parts = [accuracy.classify(call, images, asked.batch_size, asked.device) for images, _ in loader]
    expected = np.concatenate(parts)
    logits = np.concatenate([found for _, found in classify(decoder, network, files)])
    chosen, different = logits.argmax(1), int((logits.argmax(1) != expected.argmax(1)).sum())
    figures = {
        "agreement": 1 - different / len(files),
        "max_abs_diff": float(np.abs(logits - expected).max()),
        "accuracy": float((chosen == truth).mean()),
    }
    if different > max(1, (1 - accuracy.MIN_AGREEMENT) * len(files)):
        reason = f"another class than the test set as training reads it on {different} of {len(files)} images"
        figures |= {"status": "mismatch", "reason": reason}
    return figures


# ---- all processes


def make_asked(args: argparse.Namespace) -> list[Asked]:
    """The fastest batch of every backend of the table.  Raises UserError where there is none."""
    rows, _ = tables.read_table(args.results)
    rows = rows[rows.sweep == args.sweep]
    chosen = analysis.best_batch(analysis.measured(rows))
    for column, wanted in (("image_size", args.image_sizes), ("backend", args.backends)):
        chosen = chosen[chosen[column].isin(wanted)] if wanted else chosen
    if chosen.empty:
        path = args.results / "benchmark_results.csv"
        wanted = f"sweep {args.sweep} for these --image-sizes and --backends"
        raise UserError(f"{path} has no measured row of {wanted}; make it with: python benchmark.py")
    sizes = tuple(sorted(set(rows.batch_size.tolist())))
    asked = []
    for row in chosen.itertuples():
        decoders = args.decoders or (["pillow", "dali"] if row.device == "cuda" else ["pillow"])
        what = row.sweep, row.backend, row.precision, int(row.image_size), int(row.batch_size), row.device
        asked.append(Asked(*what, sizes, tuple(decoders), args.data, args.weights, args.seconds))
    return asked


def measure_rounds(asked: list[Asked], rounds: int) -> list[Row]:
    """Every backend in a fresh process per round, each round starting with another one."""
    found = {}
    with tqdm(total=rounds * len(asked), desc="end to end", unit="process") as progress:
        for k in range(rounds):
            shift = k % len(asked)
            for one in asked[shift:] + asked[:shift]:
                progress.set_postfix_str(f"{one.backend}, {one.image_size} px")
                try:
                    told = in_fresh_process(measure_here, one, k == 0)
                except UserError:
                    raise
                except Exception as error:  # costs its own rows
                    failed = vars(worker.problem_of(error))
                    told = [{"decoder": name, **failed} for name in one.decoders]
                for figures in told:
                    found.setdefault((one, figures["decoder"]), []).append(figures)
                progress.update()
    return [row_of(one, name, told) for (one, name), told in found.items()]


def row_of(asked: Asked, decoder: str, rounds: list[dict]) -> Row:
    """One line from the figures of each round; a single round has no interval."""
    where = asked.sweep, asked.backend, asked.precision, asked.image_size, asked.batch_size
    row = Row(*where, decoder)
    for figures in rounds:
        for name in ("precision", "agreement", "max_abs_diff", "accuracy"):
            setattr(row, name, figures.get(name, getattr(row, name)))
        if row.status == "ok" and "status" in figures:
            row.status, row.reason = figures["status"], figures["reason"]
    timed = [figures for figures in rounds if "images_per_s" in figures]
    if not timed:
        return row
    rates = [figures["images_per_s"] for figures in timed]
    row.images_per_s = 1 / float(np.mean(1 / np.array(rates)))
    row.images_per_s_low, row.images_per_s_high = timing.interval(row.images_per_s, rates)
    for name in ("decode_images_per_s", "infer_images_per_s", "serial_images_per_s", "overlap"):
        setattr(row, name, float(np.median([figures.get(name) or np.nan for figures in timed])))
    limits = [figures["limit"] for figures in timed]
    row.limit = max(limits, key=limits.count)
    return row


def write_table(rows: list, path: Path, keys: list[str]) -> None:
    """Write the rows with what the file has of others; a damaged one, or of other columns, is set aside."""
    table = pd.DataFrame([vars(row) for row in rows])
    old = None
    with contextlib.suppress(UserError):  # it says how to make the table anew, which this does
        old = tables.read_serving(path)
    if old is not None and list(old) == list(table):
        kept = old[~old.set_index(keys).index.isin(table.set_index(keys).index)]
        table = pd.concat([kept, table]) if len(kept) else table
    elif path.exists():
        print(f"what was {path} is kept as {rename_to_backup(path)}", file=sys.stderr)
    table = table.sort_values(["sweep", "image_size"], kind="stable")
    write_atomic(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def describe(row: Row) -> str:
    head = f"{row.backend:<24} {row.image_size:>4} px batch {row.batch_size:<4} {row.decoder:<7}"
    if row.images_per_s:
        halves = f"decode {row.decode_images_per_s:,.0f}, inference {row.infer_images_per_s:,.0f}"
        head += f"{row.images_per_s:>8,.0f} images/s ({halves})"
        head += f", overlap {row.overlap:.2f}, limit: {row.limit}"
    return head if row.status == "ok" else f"{head} {row.status}: {row.reason}"


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--image-sizes", nargs="+", type=int, help="default: all that are in the table")
    parser.add_argument("--backends", nargs="+", help="default: all that are in the table")
    decoders = "default: both on a GPU, pillow on a CPU"
    parser.add_argument("--decoders", nargs="+", choices=["pillow", "dali"], help=decoders)
    whose = "whose rows; this environment must be the one that measured them"
    parser.add_argument("--sweep", default="main", help=whose)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for every backend")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each timing, after a warm-up")
    parser.add_argument("--load", action="store_true", help="latency of single images under load instead")
    limit = "with --load: what 99 %% of the images have to be answered within"
    parser.add_argument("--max-latency-ms", type=float, default=15.0, help=limit)
    add_path_arguments(parser)
    args = parser.parse_args()
    jobs.check_numbers(args, ["seconds", "max_latency_ms"], least=0.001)
    jobs.check_numbers(args, ["rounds"], least=1)
    asked = make_asked(args)
    if args.load:
        measure_load(asked, args.max_latency_ms, args.results / "load.csv")
        return
    rows = measure_rounds(asked, args.rounds)
    write_table(rows, args.results / "end_to_end.csv", ["sweep", "backend", "image_size", "decoder"])
    print("\n".join(map(describe, rows)))


def measure_load(asked: list[Asked], max_latency_ms: float, path: Path) -> None:
    """Every backend in a fresh process; the table is written after each."""
    if reason := load.why_unavailable():
        raise UserError(reason)
    for one in asked:
        try:
            rows = in_fresh_process(load_here, one, max_latency_ms)
        except UserError:
            raise
        except Exception as error:  # costs its own rows
            problem = worker.problem_of(error)
            print(f"{one.backend}, {one.image_size} px: {problem.status}: {problem.reason}")
            continue
        write_table(rows, path, ["sweep", "backend", "image_size"])
        print(load.describe(rows), flush=True)


def load_here(asked: Asked, max_latency_ms: float) -> list:
    import torch

    from utils.serve.pipeline import Network, Pillow

    between = [2**k for k in range(asked.batch_size.bit_length())]  # so that 2 images don't cost as much as 8
    files = [path for path, _ in read_test_set(asked)[1][:LOAD_IMAGES]]
    with worker.inference(asked.device):
        backend, sizes = load_backend(asked, between)
        sizes = [size for size in sizes if size <= asked.batch_size]
        network = Network(backend, sizes, asked.image_size, asked.device)
        with contextlib.closing(Pillow(asked.image_size, 16, "cpu", few=True)) as decoder:
            pixels = torch.cat([batch.pixels.clone() for batch in decoder.batches(files)])
        where = {name: getattr(asked, name) for name in ("sweep", "backend", "image_size")}
        where |= {"precision": backend.precision, "batch_size_max": sizes[-1]}
        return load.measure(where, network, pixels, max_latency_ms)


if __name__ == "__main__":
    run_main(main)
