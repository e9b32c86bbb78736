"""Arguments -> Jobs, and the key that says when a record is stale."""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

from utils.devices import choose_device
from utils.environment import environment
from utils.measure.schema import Job, Settings
from utils.utils import (
    BATCH_SIZES,
    IMAGE_SIZES,
    ROOT,
    UserError,
    add_path_arguments,
    checkpoint_path,
    number,
    sha256,
)

# Of timed runs per configuration, over the rounds.  On a GPU half a second a round told no more.
MIN_SECONDS = {"cuda": 0.75, "cpu": 1.5}
MAX_SECONDS = {"cuda": 30.0, "cpu": 2.0}
QUICK = {"image_sizes": [64], "batch_sizes": [1, 4], "runs": 20, "min_seconds": 0.0, "budget": 0.0}
DAY = 86_400  # seconds
# A change of any of these, or of a backend, makes an earlier measurement stale.
DECISIVE = ["model.py", "datasets.py", "trt.py", "torch_trt.py"]
DECISIVE += ["utils/backend.py", "utils/images.py", "utils/onnx_export.py"]
MEASURING = ["accuracy", "gpu", "interleave", "roofline", "timing", "worker"]
DECISIVE += [f"utils/measure/{name}.py" for name in MEASURING]


def make_parser(description: str | None, backends: list[str]) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    add, names, count = parser.add_argument, ", ".join(backends) + " or all", number(int, 1, 1_000_000)
    add("--backends", nargs="+", choices=[*backends, "all"], metavar="NAME", help=names)
    pixels = f"pixels; default {IMAGE_SIZES}"
    add("--image-sizes", nargs="+", type=number(int, 32, 4096), default=IMAGE_SIZES, help=pixels)
    batches = f"default {BATCH_SIZES}"
    add("--batch-sizes", nargs="+", type=number(int, 1, 65_536), default=BATCH_SIZES, help=batches)
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--runs", type=count, default=100, help="timed runs per configuration, over the rounds; default 100")
    add("--warmup", type=count, default=10, help="untimed calls, and at least 0.3 s of them")
    add("--rounds", type=number(int, 1, 1000), default=3, help="of fresh processes, at least; default 3")
    add("--min-seconds", type=number(float, 0, DAY), help=f"of timed runs; default {MIN_SECONDS}")
    add("--max-seconds", type=number(float, 0.001, DAY), help=f"of timed runs; default {MAX_SECONDS}")
    watched = "on a GPU, an untimed loop in which the driver is asked; 0: none"
    add("--sustain-seconds", type=number(float, 0, DAY), default=1.5, help=watched)
    add("--seed", type=int, default=0)
    add("--sweep", default="main", help="its name: all measured in one environment here")
    add("--quick", action="store_true", help="64 px, batches 1 and 4, 20 runs, into results/quick")
    add_path_arguments(parser)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments.  --quick changes only what was not asked for."""
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def settings_of(args: argparse.Namespace, device: str) -> Settings:
    """How to measure, by the arguments.  Raises UserError where a round would have no run."""
    if args.runs < args.rounds:
        few = f"--runs {args.runs} leaves some of the {args.rounds} rounds without one"
        raise UserError(f"{few}; give --runs {args.rounds} or more")
    asked: dict = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    usual: dict = {"min_seconds": MIN_SECONDS[device], "max_seconds": MAX_SECONDS[device]}
    return Settings(**asked | {name: value for name, value in usual.items() if asked[name] is None})


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
    if missing := {str(size): path for size, path in paths.items() if not path.is_file()}:
        flags = "--quick" if args.quick and image_sizes == [64] else f"--image-sizes {' '.join(missing)}"
        raise UserError(f"{next(iter(missing.values()))} is missing; train it first: python train.py {flags}")
    facts = {size: model.load_facts(path) for size, path in paths.items()}
    datasets.ensure_data(args.data, args.seed)
    tested = set(datasets.list_images(args.data)["test"])
    for size, known in facts.items():
        if unknown := sorted(tested - set(known["classes"])):
            what = f"{paths[size]} does not know the class {unknown[0]} of {args.data / 'test'}"
            raise UserError(f"{what}; train it: python train.py --force --image-sizes {size}")
    return facts


def print_other_images(data: Path, fingerprint: str, facts: dict[int, dict]) -> None:
    """Say where the images are not those that a checkpoint was trained beside."""
    trained = {size: known.get("data") for size, known in facts.items()}
    known = {str(size): on.get("fingerprint") for size, on in trained.items() if isinstance(on, dict)}
    if others := " ".join(size for size, found in known.items() if found != fingerprint):
        why = f"{data} does not hold the images that the networks of {others} px were trained on"
        print(f"{why}; train them on these: python train.py --force --image-sizes {others}", file=sys.stderr)


def make_jobs(args: argparse.Namespace, scripts: dict[str, str], default: dict[str, list[str]]) -> list[Job]:
    """Everything that is asked for, round by round, in each size by size, in each backend by backend.

    `scripts` maps every backend to the module that makes it, `default` devices to the usual ones.  Raises
    UserError for impossible settings and missing checkpoints.
    """
    device = choose_device(args.device)
    wanted = args.backends or default[device]
    names = list(scripts) if "all" in wanted else list(dict.fromkeys(wanted))
    settings, image_sizes = settings_of(args, device), sorted(set(args.image_sizes))
    results = results_folder(args)
    facts = check_checkpoints(args, image_sizes)
    known = environment_of(args.data, device)
    print_other_images(args.data, known["data"], facts)
    settings_key = staleness_key(settings, device, known)
    shared: dict = {"sweep": args.sweep, "data": args.data, "results": results, "device": device, "round": 0}
    shared |= {"settings": settings, "environment": known, "settings_key": settings_key}
    shared["batch_sizes"] = tuple(sorted(set(args.batch_sizes)))
    jobs = []
    for size in image_sizes:
        path = checkpoint_path(args.weights, size)
        own = {"image_size": size, "checkpoint": path, "key": sha256(settings_key, path)[:16]}
        jobs += [Job(backend=name, script=scripts[name], **shared, **own) for name in names]
    return [dataclasses.replace(job, round=k) for k in range(settings.rounds) for job in jobs]


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
    code = [*sorted(ROOT.glob("*_inference.py")), *(ROOT / name for name in DECISIVE)]
    facts = json.dumps([dataclasses.asdict(settings), device, machine], sort_keys=True)
    return sha256(facts, *code)[:16]
