"""Which images are classified, by which checkpoint, backend and batch size.  Needs no PyTorch."""

import collections
import contextlib
import csv
import dataclasses
import datetime
import io
import pickle
import zipfile
from pathlib import Path

import backends
from utils.environment import PACKAGES, cpu_name, package_version, read_driver
from utils.images import UNREAD, files_below, fingerprint, is_image
from utils.utils import UserError, checkpoint_path, read_dict

BATCH_SIZE = {"cuda": 256, "cpu": 16}  # where none was measured


def find_images(source: Path) -> tuple[list[str], dict[str, str], int]:
    """All images below, or the one file; why others can't be read; how many are no pictures.  UserError."""
    if not source.exists():
        raise UserError(f"{source} is not there; name a folder of images: python predict.py FOLDER")
    if source.is_file():
        return [str(source)], {}, 0
    denied = []
    found = files_below(source, denied)
    images = list(filter(is_image, found))
    others = set(found) - set(images)
    problems = dict.fromkeys(denied, "this folder can't be listed; change its permissions")
    unread = "pictures of this format are not read here; convert it to JPEG (HEIC: pip install pillow-heif)"
    problems |= {path: unread for path in others if Path(path).suffix.lower() in UNREAD}
    if not images:
        some = "".join(f"\n  {path}: {why}" for path, why in sorted(problems.items())[:20])
        raise UserError(f"{source} holds no images in its {len(found)} files; name another folder{some}")
    return images, problems, sum(not Path(path).name.startswith(".") for path in others - problems.keys())


class FactsReader(pickle.Unpickler):
    """Reads the plain values that torch.save() wrote, without PyTorch; no code is run, all else is None."""

    def find_class(self, module: str, name: str):
        return lambda *parts: None

    def persistent_load(self, saved) -> None:
        """A tensor's numbers, which are left where they are."""


def load_facts(path: Path) -> dict:
    """As model.load_facts(), which is asked where anything is odd, but in no time."""
    with contextlib.suppress(Exception):  # a damaged file gives anything from BadZipFile to KeyError
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            facts = FactsReader(io.BytesIO(archive.read(name))).load()
        del facts["model"]
        known = checkpoint_path(path.parent, facts["image_size"])
        if path == known and {*map(type, facts["classes"])} == {str}:
            return facts
    import model

    return model.load_facts(path)


def choose_checkpoint(weights: Path, image_size: int | None, data: Path) -> tuple[Path, dict]:
    """The checkpoint of that size, or the most accurate one of a single data set, of equals the smallest.

    Of several data sets it is the one in `data`, else the newest.  Raises UserError where that would be a
    guess, since their classes differ.  Returns the facts, too.
    """
    if image_size:
        path = checkpoint_path(weights, image_size)
        return path, load_facts(path)
    paths = sorted(weights.glob("best_resnet18_*.pth"))  # among them copies: "best_resnet18_64 (1).pth"
    found = [(path, load_facts(path)) for path in paths if path.stem.rpartition("_")[2].isdecimal()]
    if not found:
        raise UserError(f"{weights} holds no checkpoint; train one: python train.py")
    if len({data_of(facts) for _, facts in found}) > 1:
        here, newest = fingerprint(data), data_of(max(found, key=lambda pair: pair[0].stat().st_mtime)[1])
        trained_here = [pair for pair in found if data_of(pair[1]) == here]
        if not trained_here and len({tuple(facts["classes"]) for _, facts in found}) > 1:
            lines = [f"  {path.name}: {described(path, facts)}" for path, facts in found]
            ask = "choose one: --image-size SIZE, or --data the folder of images that it was trained on"
            what = f"{weights} holds checkpoints of different classes, and none was trained on {data}"
            raise UserError("\n".join([f"{what}; {ask}", *lines]))
        found = trained_here or [pair for pair in found if data_of(pair[1]) == newest]
    return min(found, key=lambda pair: (-pair[1].get("accuracy", 0), pair[1]["image_size"]))


def data_of(facts: dict) -> str | None:
    """The fingerprint of the images that a checkpoint was trained on."""
    return (facts.get("data") or {}).get("fingerprint")


def described(path: Path, facts: dict) -> str:
    """Which classes a checkpoint knows, and when its file was written."""
    classes = facts["classes"]
    more = f" and {len(classes) - 5} more" if len(classes) > 5 else ""
    try:
        trained = f"{datetime.datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError, OSError):  # after the year 9999, or on Windows before 1970
        trained = "at an unknown time"
    return f"classes {', '.join(classes[:5])}{more}; trained {trained}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A backend, the batch size to run it with and those to load it for; whether that was measured here."""

    backend: str
    batch_size: int
    batch_sizes: tuple[int, ...]
    measured: bool = True

    def with_batch(self, size: int) -> "Choice":
        return dataclasses.replace(self, batch_size=size, batch_sizes=(size,))


def measured_here(results: Path, device: str, image_size: int) -> list[dict]:
    """The rows of the table with figures of this machine with these packages.  Raises UserError.

    Each has backend, batch_size, fps (images/s), load_s and first_call_ms (not known: infinite), and all
    batch_sizes of its backend in its sweep, whatever they gave: an engine may be for just these."""
    path, gpu = results / "benchmark_results.csv", read_driver("nvmlDeviceGetName")
    packages = {name: version for name in PACKAGES if (version := package_version(name))}
    here = {"gpu": gpu if device == "cuda" else None, "cpu": cpu_name(), "packages": packages}
    environments = read_dict(results / "environment.json")
    try:
        same = {sweep for sweep, facts in environments.items() if here.items() <= facts.items()}
        with path.open(encoding="utf-8", newline="") as file:
            table = [row for row in csv.DictReader(file) if row["sweep"] in same]
        table = [row for row in table if (row["device"], row["image_size"]) == (device, str(image_size))]
        rows, together = [], collections.defaultdict(set)
        for row in table:
            (sizes := together[row["sweep"], row["backend"]]).add(size := int(row["batch_size"]))
            if row["status"] == "ok":
                rows.append({"backend": row["backend"], "batch_size": size, "batch_sizes": sizes})
                rows[-1] |= {name: float(row[name] or "inf") for name in ("fps", "load_s", "first_call_ms")}
        if not all(0 < row["fps"] < float("inf") and row["batch_size"] > 0 for row in rows):
            raise ValueError("a row that is ok has no images/s in column fps")
    except FileNotFoundError:
        return []
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        said = f"no table of python benchmark.py ({type(error).__name__}: {error})"
        raise UserError(f"{path} is {said}; make it anew: python benchmark.py") from None
    return rows


def choose_backends(name: str | None, rows: list[dict], count: int, device: str) -> list[Choice]:
    """By the table what is done first with `count` images, then the next ones; PyTorch where it has none.

    `name` is the backend that the user wants, or None.  Loading it and its first call count, too.
    """

    def inference_s(row: dict) -> float:
        return -(-count // row["batch_size"]) * row["batch_size"] / row["fps"]

    found = {}
    for backend in [name] if name else backends.SCRIPTS:
        if own := [row for row in rows if row["backend"] == backend]:
            best = min(own, key=inference_s)
            first_call_s = max(row["first_call_ms"] for row in own) / 1000
            choice = Choice(backend, best["batch_size"], tuple(sorted(best["batch_sizes"])))
            found[choice] = best["load_s"] + first_call_s + inference_s(best)
    size = -(-count // -(-count // BATCH_SIZE[device]))  # so that the last batch is as large as the others
    return sorted(found, key=found.__getitem__) or [Choice(name or "pytorch", size, (size,), measured=False)]
