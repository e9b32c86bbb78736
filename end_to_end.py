"""From image files to labels: how fast with every backend and decoder, and what the bottleneck is.

Reads results/benchmark_results.csv (what is ok, and its fastest batch), data/test and weights/; writes
results/end_to_end.csv.  The pipeline (utils/serve/pipeline.py) serves the test set over and over; beside it
stand its two halves alone (decode, resize and copy; inference) and whether the labels are those of the test
set as training reads it.  Every round is a fresh process.

With --images, a row for that folder too, with the seconds that `python predict.py FOLDER` takes to start and
in all.  With --load, results/load.csv instead: the latency of single images that arrive at random.

    python end_to_end.py --image-sizes 224 --images photos/
    python end_to_end.py --load --image-sizes 224 --max-latency-ms 15
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)

import argparse
import collections
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from utils import environment
from utils.backend import why_not_importable
from utils.devices import choose_device
from utils.images import fingerprint
from utils.serve import choices
from utils.utils import (
    UserError,
    add_path_arguments,
    checkpoint_path,
    in_fresh_process,
    number,
    run_main,
    write_atomic,
)

COLUMNS = ["sweep", "backend", "precision", "image_size", "batch_size", "decoder"]  # of end_to_end.csv
COLUMNS += ["images_per_s", "images_per_s_low", "images_per_s_high"]  # from files to labels, once running
COLUMNS += ["decode_images_per_s", "infer_images_per_s"]  # with copying to the device, or from it; alone
COLUMNS += ["overlap"]  # pipeline over its slower half; on a CPU over both sharing the cores
COLUMNS += ["limit"]  # decode or inference
COLUMNS += ["agreement", "max_abs_diff"]  # with the test set as training reads it, on the same backend
COLUMNS += ["accuracy", "status", "reason", "images"]  # "test set", or "photos": the folder of --images
COLUMNS += ["files", "start_s", "whole_s"]  # by one command: how many, until the first batch, in all


def make_asked(args: argparse.Namespace) -> list:
    """The fastest batch of every backend of the table.  UserError where there is none, or no such device."""
    from utils.report import analysis, tables
    from utils.serve.throughput import Asked

    rows, _ = tables.read_table(args.results)
    rows = rows[rows.sweep == args.sweep]
    chosen = analysis.best_batch(analysis.measured(rows))
    for column, wanted in (("image_size", args.image_sizes), ("backend", args.backends)):
        chosen = chosen[chosen[column].isin(wanted)] if wanted else chosen
    if chosen.empty:
        path = args.results / "benchmark_results.csv"
        wanted = f"sweep {args.sweep} for these --image-sizes and --backends"
        raise UserError(f"{path} has no measured row of {wanted}; make it with: python benchmark.py")
    for device in sorted(set(chosen.device)):
        choose_device(device)
    sizes, asked = rows.groupby(["backend", "image_size"]).batch_size.agg(sorted), []
    for row in chosen.itertuples():
        decoders = args.decoders or (["pillow", "dali"] if row.device == "cuda" else ["pillow"])
        own = tuple(sizes[row.backend, row.image_size])
        what = row.sweep, row.backend, row.precision, int(row.image_size), int(row.batch_size), row.device
        how = own, tuple(decoders), args.data, args.weights, args.results, args.seconds
        asked += [Asked(*what, *how, photos) for photos in dict.fromkeys([None, args.images])]
    return asked


def warn_of_other_data(asked: list) -> None:
    """Say where a network was trained on other images than those beside the test set."""
    here = fingerprint(asked[0].data)
    for path in dict.fromkeys(checkpoint_path(one.weights, one.image_size) for one in asked):
        if (trained_on := choices.data_of(choices.load_facts(path))) and trained_on != here:
            what = f"{path} was trained on other images than those in {asked[0].data}"
            print(f"{what}: accuracy is of images it was not made for", file=sys.stderr)


def measure_rounds(asked: list, rounds: int) -> list[dict]:
    """Every backend in a fresh process per round."""
    from utils.serve.throughput import measure_here

    found = collections.defaultdict(list)
    with tqdm(total=rounds * len(asked), desc="end to end", unit="process", disable=None) as progress:
        for k, one in itertools.product(range(rounds), asked):
            progress.set_postfix_str(f"{one.backend}, {one.image_size} px")
            for figures in guarded(measure_here, one, k == 0):
                if one.photos and k == 0 and "status" not in figures:
                    figures |= run_predict(one, figures["decoder"])
                found[one, figures["decoder"]].append(figures)
            progress.update()
    return [row_of(one, told) for (one, _), told in found.items()]


def guarded(function, asked, *arguments) -> list:
    """What the function returns in a fresh process; what goes wrong there costs its own rows."""
    try:
        return in_fresh_process(function, asked, *arguments)
    except Exception as error:
        from utils.measure.worker import problem_of

        if isinstance(error, UserError):
            raise
        return [{"decoder": name, **vars(problem_of(error))} for name in asked.decoders]


def run_predict(asked, decoder: str) -> dict:
    """How long `python predict.py FOLDER` takes with this backend and decoder, as a user runs it."""
    options = {name: getattr(asked, name) for name in ("backend", "device", "data", "weights", "results")}
    options |= {"decoder": decoder, "image-size": asked.image_size}
    with tempfile.TemporaryDirectory() as folder:
        timings = Path(folder, "timings.json")
        options |= {"out": Path(folder, "labels.csv"), "timings": timings}
        script = Path(__file__).with_name("predict.py")
        command = [sys.executable, script, asked.photos, *(f"--{name}={options[name]}" for name in options)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if not timings.exists():
            return {"status": "failed", "reason": f"predict.py: {' '.join(done.stderr.split())[-500:]}"}
        told = json.loads(timings.read_text(encoding="utf-8"))
    return {"files": told["images"], "start_s": told["start"], "whole_s": told["seconds"]}


def row_of(asked, rounds: list[dict]) -> dict:
    """One line from the figures of each round; a single round has no interval."""
    from utils.measure import timing

    row = dict.fromkeys(COLUMNS) | {name: getattr(asked, name) for name in COLUMNS[:5]}
    row |= {"status": "ok", "images": "photos" if asked.photos else "test set"}
    row |= collections.ChainMap(*rounds)  # what only some of them know, by the first that does
    if timed := [figures for figures in rounds if "images_per_s" in figures]:
        rates = [figures["images_per_s"] for figures in timed]
        row["images_per_s"] = statistics.harmonic_mean(rates)
        row["images_per_s_low"], row["images_per_s_high"] = timing.interval(row["images_per_s"], rates)
        for name in ("decode_images_per_s", "infer_images_per_s", "overlap"):
            row[name] = statistics.median(figures[name] for figures in timed)
        row["limit"] = statistics.mode(figures["limit"] for figures in timed)
    return row


def write_table(rows: list[dict], path: Path) -> None:
    """Write the rows with what the file has of others; one that can't be read is renamed to a backup."""
    import pandas as pd

    from utils.report import tables

    table = pd.DataFrame(rows).assign(cores=environment.cores(), date=str(datetime.date.today()))
    keys = [name for name in ("sweep", "backend", "image_size", "decoder", "images") if name in table]
    old = tables.read_serving(path)
    if old is not None and set(keys) <= set(old):
        kept = old[~old.set_index(keys).index.isin(table.set_index(keys).index)]
        table = pd.concat([kept, table]) if len(kept) else table
    elif path.exists():
        backup = path.replace(path.with_name(f"{path.name}.1"))
        print(f"{path} was no such table; it was renamed to {backup}", file=sys.stderr)
    table = table.sort_values(["sweep", "image_size"], kind="stable")
    write_atomic(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def measure_load(asked: list, max_latency_ms: float, path: Path) -> None:
    """Every backend in a fresh process; the table is written after each."""
    from utils.serve.throughput import load_here

    if reason := why_not_importable("mlperf_loadgen", "pip install mlcommons-loadgen"):
        raise UserError(reason)
    for one in tqdm(asked, "under load", unit="process", disable=None):
        rows = guarded(load_here, one, max_latency_ms)
        if "status" in rows[0]:
            tqdm.write(f"{one.backend}, {one.image_size} px: {rows[0]['status']}: {rows[0]['reason']}")
        else:
            write_table(rows, path)


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    size, in_table = number(int, 1, 1_000_000), "default: all that are in the table"
    parser.add_argument("--image-sizes", nargs="+", type=size, help=in_table)
    parser.add_argument("--backends", nargs="+", help=in_table)
    parser.add_argument("--decoders", nargs="+", choices=["pillow", "dali"], help="default: both on a GPU")
    parser.add_argument("--images", type=Path, help="folder of photos: a row for these, too")
    parser.add_argument("--sweep", default="main", help="whose rows; it was measured in this environment")
    parser.add_argument("--rounds", type=number(int, 1, 1000), default=3, help="processes for every backend")
    parser.add_argument("--seconds", type=number(float, 0.001, 3600), default=2.0, help="of each timing")
    parser.add_argument("--load", action="store_true", help="latency of single images under load instead")
    within = "with --load: what 99 %% of the images have to be answered within"
    parser.add_argument("--max-latency-ms", type=number(float, 0.001, 1e6), default=15.0, help=within)
    add_path_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    asked = make_asked(args)
    warn_of_other_data(asked)
    from utils.report import tables, words

    path = args.results / ("load.csv" if args.load else "end_to_end.csv")
    if args.load:
        measure_load([one for one in asked if not one.photos], args.max_latency_ms, path)
    else:
        write_table(measure_rounds(asked, args.rounds), path)
    if (table := tables.read_serving(path)) is not None:
        columns = words.LOAD if args.load else words.END_TO_END
        print(words.aligned(words.lines_of(columns, table[table.sweep == args.sweep])))


if __name__ == "__main__":
    run_main(main)
