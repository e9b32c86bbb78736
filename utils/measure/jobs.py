"""Arguments -> Jobs, and the key that says when a record is stale."""

import argparse
import contextlib
import dataclasses
import json
import re
import sys
from pathlib import Path

from utils.devices import choose_device
from utils.environment import environment
from utils.measure.schema import BASELINE, Job, Settings
from utils.utils import (
    BATCH_SIZES,
    IMAGE_SIZES,
    ROOT,
    UserError,
    add_path_arguments,
    checkpoint_path,
    file_lock,
    in_fresh_process,
    number,
    sha256,
)

AUTO_BATCH_SIZES = [2**k for k in range(9)]  # 1 to 256; measured until they saturate
# Of timed runs per configuration, over the rounds.  On a GPU half a second a round told no more.
MIN_SECONDS = {"cuda": 0.75, "cpu": 1.5}
MAX_SECONDS = {"cuda": 30.0, "cpu": 2.0}
DAY = 86_400  # seconds
# A change of any of these makes an earlier measurement stale.
DECISIVE = ["model.py", "datasets.py", "*_inference.py", "trt.py", "torch_trt.py"]
DECISIVE += ["utils/backend.py", "utils/images.py", "utils/onnx_export.py"]
DECISIVE += [
    f"utils/measure/{name}.py" for name in ("accuracy", "reference", "gpu", "interleave", "roofline")
]
DECISIVE += [f"utils/measure/{name}.py" for name in ("timing", "worker")]


def add_arguments(parser: argparse.ArgumentParser, backends: list[str]) -> None:
    add, names = parser.add_argument, ", ".join(backends) + " or all"
    add("--backends", nargs="+", choices=[*backends, "all"], metavar="NAME", help=names)
    add("--image-sizes", nargs="+", type=number(int, 32, 4096), help=f"pixels; default {IMAGE_SIZES}")
    auto = f"default {BATCH_SIZES}; auto: double from 1 until it saturates"
    add("--batch-sizes", nargs="+", type=batch_size, help=auto)
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    runs = "timed runs per configuration, over the rounds; default 100"
    add("--runs", type=number(int, 1, 1_000_000), help=runs)
    warmup = "untimed calls, and at least 0.3 s of them"
    add("--warmup", type=number(int, 1, 1_000_000), default=10, help=warmup)
    add("--rounds", type=number(int, 1, 1000), help="of fresh processes, at least; default 3")
    add("--min-seconds", type=number(float, 0, DAY), help=f"of timed runs; default {MIN_SECONDS}")
    add("--max-seconds", type=number(float, 0.001, DAY), help=f"of timed runs; default {MAX_SECONDS}")
    watched = "on a GPU, an untimed loop in which the driver is asked; 0: none"
    add("--sustain-seconds", type=number(float, 0, DAY), default=1.5, help=watched)
    add("--seed", type=int, default=0)
    add("--sweep", default="main", help="its name: all measured in one environment here")
    quick = "64 px, batches 1 and 4, 20 runs, into results/quick"
    add("--quick", action="store_true", help=quick)
    add_path_arguments(parser)


def batch_size(text: str):
    """For argparse's `type=`: a batch size as train.py takes them, or "auto"."""
    return text if text == "auto" else int(number(int, 1, 65_536)(text))


def usual(value, default, quick, is_quick: bool):
    """What was asked for, or what is usual."""
    if value is not None:
        return value
    return quick if is_quick else default


def settings_of(args: argparse.Namespace, device: str, rounds: int | None) -> Settings:
    """How to measure, by the arguments.  Raises UserError where a round would have no run."""
    settings = Settings(
        runs=usual(args.runs, 100, 20, args.quick),
        rounds=rounds or usual(args.rounds, 3, 3, args.quick),
        warmup=args.warmup,
        min_seconds=usual(args.min_seconds, MIN_SECONDS[device], 0.0, args.quick),
        max_seconds=args.max_seconds or MAX_SECONDS[device],
        sustain_seconds=args.sustain_seconds,
        seed=args.seed,
    )
    if settings.runs < settings.rounds:
        mend = f"give --runs {settings.rounds} or more"
        raise UserError(
            f"--runs {settings.runs} leaves some of the {settings.rounds} rounds without one; {mend}"
        )
    return settings


def batch_sizes_of(asked: list) -> list[int]:
    """[8, 1] -> [1, 8]; ["auto"] -> all that may be tried.  Raises UserError."""
    if asked == ["auto"]:
        return AUTO_BATCH_SIZES
    if "auto" in asked:
        raise UserError("--batch-sizes takes numbers, or auto alone; see --help")
    return sorted(set(asked))


def name_problem(name: str, beside: list[str]) -> str | None:
    """Why a folder of this name can't be the same on every system, or None; `beside` are its neighbours."""
    if not re.fullmatch(r"[\w.-]+", name) or name.endswith("."):
        return "use letters, digits, '.', '-' and '_', and no dot at the end"
    if re.fullmatch(r"(con|nul|prn|aux|(com|lpt)[0-9¹²³])(\..*)?", name, re.IGNORECASE):
        return "Windows keeps this name for a device; choose another one"
    same = [other for other in beside if other != name and other.casefold() == name.casefold()]
    return f"on Windows and macOS it is the folder {same[0]!r}; write it as it is there" if same else None


def results_folder(args: argparse.Namespace) -> Path:
    """Where this run writes.  Raises UserError where the sweep's name can't be a folder's of its own."""
    results = args.results / "quick" if args.quick and args.results.name != "quick" else args.results
    beside = [path.stem if path.suffix == ".zip" else path.name for path in (results / "raw").glob("*")]
    if problem := name_problem(args.sweep, beside):
        raise UserError(f"--sweep {args.sweep}: {problem}")
    return results


def check_checkpoints(args: argparse.Namespace, image_sizes: list[int]) -> dict[int, dict]:
    """Image size -> what its checkpoint says of itself; draws the sample where there are no images.

    Raises UserError for a checkpoint that is not there, is none, or does not know a class of the test set.
    """
    import datasets
    import model

    paths = {size: checkpoint_path(args.weights, size) for size in image_sizes}
    if missing := [size for size in image_sizes if not paths[size].is_file()]:
        flags = f"--image-sizes {joined(missing)}" if args.image_sizes or not args.quick else "--quick"
        raise UserError(f"{paths[missing[0]]} is missing; train it first: python train.py {flags}")
    facts = {size: model.load_facts(path) for size, path in paths.items()}
    datasets.ensure_data(args.data, args.seed)
    tested = datasets.list_images(args.data)["test"]
    for size, known in facts.items():
        if unknown := sorted(set(tested) - set(known["classes"])):
            mend = f"train it: python train.py --force --image-sizes {size}"
            raise UserError(
                f"{paths[size]} does not know the class {unknown[0]} of {args.data / 'test'}; {mend}"
            )
    return facts


def print_other_images(data: Path, fingerprint: str, facts: dict[int, dict]) -> None:
    """Say where the images are not those that a checkpoint was trained beside."""
    trained = {size: known.get("data") for size, known in facts.items()}
    others = [
        size for size, on in trained.items() if isinstance(on, dict) and on.get("fingerprint") != fingerprint
    ]
    if others:
        why = f"{data} does not hold the images that the networks of {joined(others)} px were trained on"
        mend = f"to train them on these: python train.py --force --image-sizes {joined(others)}"
        print(f"{why}; {mend}", file=sys.stderr)


def joined(sizes: list[int]) -> str:
    return " ".join(map(str, sizes))


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
    batch_sizes, results = tuple(batch_sizes_of(asked)), results_folder(args)
    facts = check_checkpoints(args, image_sizes)
    known = environment_of(args.data, device)
    print_other_images(args.data, known["data"], facts)
    settings_key = staleness_key(settings, device, known)
    jobs = []
    for size in image_sizes:
        checkpoint = checkpoint_path(args.weights, size)
        first = Job(
            sweep=args.sweep,
            backend="",
            script="",
            image_size=size,
            batch_sizes=batch_sizes,
            auto=asked == ["auto"],
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

    import datasets

    facts = {"threads": torch.get_num_threads(), "data": datasets.fingerprint(data)}
    return {**environment(device), **facts, "sample_data": datasets.is_sample(data)}


def staleness_key(settings: Settings, device: str, known: dict) -> str:
    """Short hash of the settings, the machine, the packages, the data and the code."""
    passing = {"commit", "clean", "date", "command"}
    machine = {name: value for name, value in known.items() if name not in passing}
    code = []
    for pattern in DECISIVE:
        found = sorted(ROOT.glob(pattern))
        if not found:
            raise FileNotFoundError(f"{ROOT / pattern}: what makes records stale is not there; see DECISIVE")
        code += found
    facts = json.dumps([dataclasses.asdict(settings), device, machine], sort_keys=True)
    return sha256(facts, *code)[:16]


def lock_results(results: Path) -> contextlib.AbstractContextManager:
    """Keep a second benchmark out of the folder: both would be wrong, and overwrite each other's records."""
    return file_lock(results / ".benchmark.lock", "measuring")


def compute_references(todo: list[Job]) -> None:
    """Before anything is replaced: PyTorch FP32's logits on every test image of every size, for which
    checkpoints and images are read whole.  Raises UserError, also where a logit is not finite."""
    from utils.measure import reference

    baselines = {job.image_size: another(job, backend=BASELINE) for job in todo}
    in_fresh_process(reference.references, list(baselines.values()))
