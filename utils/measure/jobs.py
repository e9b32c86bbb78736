"""Arguments -> Jobs, and the key that says when a record is stale; a backend script's own main()."""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from pathlib import Path

import datasets
import model
from utils.devices import choose_device
from utils.environment import environment
from utils.measure import accuracy, interleave, records, worker
from utils.measure.schema import BASELINE, Job, Settings
from utils.report import words
from utils.report.rows import read_rows
from utils.utils import (
    BATCH_SIZES,
    IMAGE_SIZES,
    ROOT,
    UserError,
    add_path_arguments,
    checkpoint_path,
    file_lock,
    in_fresh_process,
    name_problem,
    sha256,
)

AUTO_BATCH_SIZES = [2**k for k in range(9)]  # 1 to 256; measured until they saturate
# Of timed runs per configuration, over the rounds.  On a GPU half a second a round told no more.
MIN_SECONDS = {"cuda": 0.75, "cpu": 1.5}
MAX_SECONDS = {"cuda": 30.0, "cpu": 2.0}
# A change of any of these makes an earlier measurement stale.
MEASURING = ["model.py", "datasets.py", "*_inference.py", "trt.py", "torch_trt.py"]
MEASURING += ["utils/backend.py", "utils/images.py", "utils/onnx_export.py"]
MEASURING += [f"utils/measure/{name}.py" for name in ("accuracy", "gpu", "interleave", "roofline")]
MEASURING += [f"utils/measure/{name}.py" for name in ("timing", "worker")]


def add_arguments(parser: argparse.ArgumentParser, backends: list[str]) -> None:
    names = dict(choices=[*backends, "all"], metavar="NAME", help=", ".join(backends) + " or all")
    parser.add_argument("--backends", nargs="+", **names)
    parser.add_argument("--image-sizes", nargs="+", type=int, help=f"pixels; default {IMAGE_SIZES}")
    auto = f"default {BATCH_SIZES}; auto: double from 1 until it saturates"
    parser.add_argument("--batch-sizes", nargs="+", help=auto)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--runs", type=int, help="timed runs per configuration, over the rounds; default 100")
    parser.add_argument("--warmup", type=int, default=10, help="untimed calls, and at least 0.3 s of them")
    parser.add_argument("--rounds", type=int, help="of fresh processes, at least; default 3")
    parser.add_argument("--min-seconds", type=float, help=f"of timed runs; default {MIN_SECONDS}")
    parser.add_argument("--max-seconds", type=float, help=f"of timed runs; default {MAX_SECONDS}")
    watched = "on a GPU, an untimed loop in which the driver is asked; 0: none"
    parser.add_argument("--sustain-seconds", type=float, default=1.5, help=watched)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", default="main", help="its name: all measured in one environment here")
    quick = "64 px, batches 1 and 4, 20 runs, into results/quick"
    parser.add_argument("--quick", action="store_true", help=quick)
    add_path_arguments(parser)


def usual(value, default, quick, is_quick: bool):
    """What was asked for, or what is usual."""
    if value is not None:
        return value
    return quick if is_quick else default


def batch_sizes_of(texts: list[str]) -> list[int]:
    """ "8 1" -> [1, 8]; "auto" -> all that may be tried.  Raises UserError."""
    if texts == ["auto"]:
        return AUTO_BATCH_SIZES
    try:
        return sorted({int(text) for text in texts})
    except ValueError as error:
        raise UserError("--batch-sizes takes numbers, or auto alone; see --help") from error


def settings_of(args: argparse.Namespace, device: str, rounds: int | None) -> Settings:
    return Settings(
        runs=usual(args.runs, 100, 20, args.quick),
        rounds=rounds or usual(args.rounds, 3, 3, args.quick),
        warmup=args.warmup,
        min_seconds=usual(args.min_seconds, MIN_SECONDS[device], 0.0, args.quick),
        max_seconds=args.max_seconds or MAX_SECONDS[device],
        sustain_seconds=args.sustain_seconds,
        seed=args.seed,
    )


def results_folder(args: argparse.Namespace) -> Path:
    return args.results / "quick" if args.quick and args.results.name != "quick" else args.results


def check_arguments(args, settings: Settings, image_sizes: list[int], batch_sizes: list[int]) -> None:
    """Raises UserError for settings that make no sense and checkpoints that aren't there."""
    least = min(*batch_sizes, settings.runs, settings.rounds, settings.warmup)
    if min(image_sizes) < 32 or least < 1 or settings.runs < settings.rounds:
        raise UserError(
            "image sizes start at 32, batch sizes, runs, rounds and warm-up at 1, "
            "with at least one run a round; see --help"
        )
    raw = results_folder(args) / "raw"
    if problem := name_problem(args.sweep, [path.name for path in raw.glob("*")]):
        raise UserError(f"--sweep {args.sweep}: {problem}")
    check_numbers(args, ["max_seconds", "precision", "timeout"], least=0.001)
    check_numbers(args, ["min_seconds", "sustain_seconds", "budget"], least=0)
    missing = [size for size in image_sizes if not checkpoint_path(args.weights, size).is_file()]
    if missing:
        sizes = " ".join(map(str, missing))
        flags = f"--image-sizes {sizes}" if args.image_sizes or not args.quick else "--quick"
        path = checkpoint_path(args.weights, missing[0])
        raise UserError(f"{path} is missing; train it first: python train.py {flags}")
    for size in image_sizes:
        model.load_facts(checkpoint_path(args.weights, size))


def check_numbers(args: argparse.Namespace, names: list[str], least: float) -> None:
    """Raises UserError for arguments that are not numbers from `least` on; None is left to the defaults."""
    for name in names:
        value = getattr(args, name, None)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value:g} makes no sense; see --help")


def make_jobs(
    args: argparse.Namespace,
    scripts: dict[str, str],
    default: dict[str, list[str]],
    rounds: int | None = None,
) -> list[Job]:
    """Everything that is asked for, round by round, in each size by size, in each backend by backend.

    `scripts` maps every backend to the module that makes it, `default` devices to the usual ones.  Draws the
    sample where there are no images.  Raises UserError for impossible settings and missing checkpoints.
    """
    device = choose_device(args.device)
    wanted = args.backends or default[device]
    names = list(scripts) if "all" in wanted else list(dict.fromkeys(wanted))
    settings = settings_of(args, device, rounds)
    image_sizes = sorted(set(usual(args.image_sizes, IMAGE_SIZES, [64], args.quick)))
    asked = usual(args.batch_sizes, BATCH_SIZES, [1, 4], args.quick)
    batch_sizes = batch_sizes_of(list(map(str, asked)))
    check_arguments(args, settings, image_sizes, batch_sizes)
    datasets.ensure_data(args.data, args.seed)
    known = environment_of(args.data, device)
    settings_key = staleness_key(settings, device, known)
    results = results_folder(args)
    jobs = []
    for size in image_sizes:
        checkpoint = checkpoint_path(args.weights, size)
        first = Job(
            sweep=args.sweep,
            backend="",
            script="",
            image_size=size,
            batch_sizes=tuple(batch_sizes),
            auto=list(asked) == ["auto"],
            round=0,
            device=device,
            settings=settings,
            environment=known,
            data=args.data,
            checkpoint=checkpoint,
            results=results,
            record=results,
            settings_key=settings_key,
            key=sha256(settings_key, checkpoint)[:16],
        )
        jobs += [another(first, backend=name, script=scripts[name]) for name in names]
    return [another(job, round=k) for k in range(settings.rounds) for job in jobs]


def another(job: Job, **changes) -> Job:
    """The job with another backend, round or batch sizes, and the record that goes with it."""
    job = dataclasses.replace(job, **changes)
    name = f"{job.backend}_{job.image_size}_round{job.round}.json"
    return dataclasses.replace(job, record=job.results / "raw" / job.sweep / name)


def environment_of(data: Path, device: str) -> dict:
    """Machine, driver, packages, threads, commit, command and the images' fingerprint."""
    import torch

    facts = {"threads": torch.get_num_threads(), "data": datasets.fingerprint(data)}
    return {**environment(device), **facts, "sample_data": datasets.is_sample(data)}


def staleness_key(settings: Settings, device: str, known: dict) -> str:
    """Short hash of the settings, the machine, the packages, the data and the code."""
    passing = {"commit", "clean", "date", "command"}
    machine = {name: value for name, value in known.items() if name not in passing}
    root = ROOT
    code = []
    for pattern in MEASURING:
        found = sorted(root.glob(pattern))
        if not found:
            raise FileNotFoundError(f"{root / pattern}: what makes records stale is not there; see MEASURING")
        code += found
    facts = json.dumps([dataclasses.asdict(settings), device, machine], sort_keys=True)
    return sha256(facts, *code)[:16]


def measuring(results: Path) -> contextlib.AbstractContextManager:
    """Keep a second benchmark out of the folder: both would be wrong, and overwrite each other's records."""
    return file_lock(results / ".benchmark.lock", "measuring")


def compute_references(todo: list[Job]) -> None:
    """Before anything is replaced: PyTorch FP32's logits on every test image of every size, for which
    checkpoints and images are read whole.  Raises UserError."""
    baselines = {job.image_size: another(job, backend=BASELINE) for job in todo}
    in_fresh_process(accuracy.references, list(baselines.values()))


def main(description: str, script: str, backends: dict) -> None:
    """A backend script's main(): measure its backends in this process, one round, and print their table.

    `backends` maps names to callables that make a backend; `script` is the module's name.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    add_arguments(parser, list(backends))
    trace = "not time but trace the first size and last batch size"
    parser.add_argument("--profile", action="store_true", help=trace)
    args = parser.parse_args()
    first = [next(iter(backends))]
    default = {"cpu": first, "cuda": first}
    jobs = make_jobs(args, dict.fromkeys(backends, script), default, rounds=1)  # rounds are fresh processes
    if args.profile:
        for job in jobs:
            if job.image_size == jobs[0].image_size:
                worker.trace(job, backends[job.backend]())
        return
    compute_references(jobs)
    with measuring(jobs[0].results), worker.inference(jobs[0].device):
        records.archive_stale_records(jobs[0])
        records.note_sweep(jobs[0])
        for job in jobs:
            interleave.Round([interleave.Local(job, backends[job.backend]())]).play()
            record = records.read_record(job.record)
            line = f"{job.backend}, {job.image_size} px: {record.status} {record.reason}"
            print(line.rstrip(), file=sys.stderr)
    rows = read_rows(jobs[0].results)
    rows = rows[rows.sweep == args.sweep]
    wanted = {(job.backend, job.image_size) for job in jobs}
    shown = [pair in wanted for pair in zip(rows.backend, rows.image_size, strict=True)]
    print(words.text_table(rows[shown]))
