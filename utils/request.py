"""What is asked of the benchmark: its arguments as one plain request, the key that says when a record is stale, the records' files."""

import argparse
import datetime
import json
from pathlib import Path

from utils.utils import (
    BATCH_SIZES,
    IMAGE_SIZES,
    UserError,
    add_path_arguments,
    checkpoint_path,
    environment,
    fingerprint_of_code,
    read_json,
    sha256,
)

AUTO_BATCH_SIZES = [2**k for k in range(9)]  # 1 to 256; measured until they saturate


def add_arguments(parser: argparse.ArgumentParser, backends: list[str], default: list[str]) -> None:
    parser.add_argument(
        "--backends",
        nargs="+",
        default=default,
        choices=[*backends, "all"],
        metavar="NAME",
        help=", ".join(backends) + " or all",
    )
    parser.add_argument("--image-sizes", nargs="+", type=int, help=f"pixels; default {IMAGE_SIZES}")
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=batch_size,
        help=f"default {BATCH_SIZES}; auto: double from 1 until it saturates",
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--runs", type=int, help="timed runs per configuration, over all rounds; default 100")
    parser.add_argument(
        "--warmup", type=int, default=10, help="untimed calls before them, and at least half a second"
    )
    parser.add_argument("--rounds", type=int, help="fresh processes that share the runs; default 3")
    parser.add_argument("--min-seconds", type=float, help="of timed runs per configuration; default 1")
    parser.add_argument(
        "--max-seconds", type=float, help="of timed runs per configuration; default 30 on a GPU, 2 on a CPU"
    )
    parser.add_argument(
        "--sustain-seconds",
        type=float,
        default=3.0,
        help="on a GPU, an untimed loop in which the driver is asked; 0: none",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", default="main", help="name of this run: one environment on one machine")
    parser.add_argument(
        "--quick", action="store_true", help="64 px, batches 1 and 4, 20 runs, into results/quick"
    )
    add_path_arguments(parser)


def batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def pick_device(wanted: str) -> str:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch finds no CUDA GPU; check that nvidia-smi lists one, or use --device cpu"
        )
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def make_request(args: argparse.Namespace) -> dict:
    """Everything that a measurement depends on, in plain values.  Raises UserError for impossible settings and missing checkpoints."""
    import datasets

    def chosen(value, usual, quick):
        return value if value is not None else quick if args.quick else usual

    image_sizes = sorted(set(chosen(args.image_sizes, IMAGE_SIZES, [64])))
    batch_sizes = chosen(args.batch_sizes, BATCH_SIZES, [1, 4])
    auto = batch_sizes == ["auto"]
    if "auto" in batch_sizes and not auto:
        raise UserError("--batch-sizes takes numbers or auto, not both; see --help")
    batch_sizes = AUTO_BATCH_SIZES if auto else sorted(set(batch_sizes))
    runs, rounds = chosen(args.runs, 100, 20), chosen(args.rounds, 3, 1)
    if min(image_sizes) < 32 or min(*batch_sizes, runs, rounds, args.warmup, 1) < 1 or runs < rounds:
        raise UserError(
            "image sizes start at 32, batch sizes, runs, rounds and warm-up at 1, with at least one run a round; see --help"
        )
    if not args.run.replace("-", "").replace(".", "").replace("_", "").isalnum():
        raise UserError(
            f"the run's name {args.run!r} becomes a folder's; use letters, digits, '.', '-' and '_' in --run"
        )
    datasets.prepare(args.data, args.seed)
    missing = [size for size in image_sizes if not checkpoint_path(args.weights, size).is_file()]
    if missing:
        flags = (
            f"--image-sizes {' '.join(map(str, missing))}"
            if args.image_sizes or not args.quick
            else "--quick"
        )
        raise UserError(
            f"{checkpoint_path(args.weights, missing[0])} is missing; train it first: python train.py {flags}"
        )
    return {
        "run": args.run,
        "image_sizes": image_sizes,
        "batch_sizes": batch_sizes,
        "auto": auto,
        "device": args.device,
        "runs": runs,
        "rounds": rounds,
        "warmup": args.warmup,
        "min_seconds": chosen(args.min_seconds, 1.0, 0.0),
        "max_seconds": args.max_seconds,
        "sustain_seconds": args.sustain_seconds,
        "seed": args.seed,
        "data": args.data.as_posix(),
        "weights": args.weights.as_posix(),
        "results": (
            args.results / "quick" if args.quick and args.results.name != "quick" else args.results
        ).as_posix(),
        "environment": {
            **environment(),
            "data": datasets.fingerprint(args.data),
            "sample_data": datasets.is_sample(args.data),
        },
    }


def settings_key(request: dict) -> str:
    """Short hash of the settings, the machine, the packages, the data and the code: rows of one table share it."""
    passing = {"commit", "clean", "date", "command"}
    settings = {
        name: request[name]
        for name in "device runs rounds warmup min_seconds max_seconds sustain_seconds seed".split()
    }
    machine = {name: value for name, value in request["environment"].items() if name not in passing}
    return sha256(json.dumps([settings, machine, fingerprint_of_code()], sort_keys=True))[:16]


def record_key(request: dict, image_size: int) -> str:
    """Short hash of what a record depends on: an equal key means that measuring again would measure the same."""
    return sha256(settings_key(request), checkpoint_path(Path(request["weights"]), image_size))[:16]


def record_path(request: dict, backend: str, image_size: int, round_: int) -> Path:
    return Path(request["results"]) / "raw" / request["run"] / f"{backend}_{image_size}_round{round_}.json"


def new_record(request: dict, backend: str, image_size: int, round_: int, **known) -> dict:
    """An empty record; `known` fills in what is known already (precision, device, status, reason)."""
    return {
        **{"key": record_key(request, image_size), "settings_key": settings_key(request)},
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        **{"run": request["run"], "backend": backend, "precision": "", "device": request["device"]},
        **{
            "image_size": image_size,
            "round": round_,
            "status": "ok",
            "reason": "",
            "request": request,
            "batches": {},
            **known,
        },
    }


def measured(path: Path, key: str) -> dict:
    """The batch sizes of an earlier record that need not be measured again: the same request, and not failed."""
    record = read_json(path)
    if record is None or record["key"] != key:
        return {}
    return {size: result for size, result in record["batches"].items() if result["status"] != "failed"}
