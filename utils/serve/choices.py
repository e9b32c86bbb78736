"""Which images are classified, by which checkpoint, backend, batch size and decoder.  Needs no PyTorch."""

import contextlib
import csv
import dataclasses
import datetime
import errno
import importlib.util
import io
import pickle
import zipfile
from pathlib import Path

import backends
from utils.environment import PACKAGES, cpu_name, package_version, read_driver
from utils.images import files_below, fingerprint, is_image, unread_pictures
from utils.utils import UserError, checkpoint_path, read_dict

BATCH_SIZE = {"cuda": 256, "cpu": 16}  # where none was measured
DALI_PAYS = 4_000  # images from which DALI makes good the seconds that it takes to start (16 cores, H200)
DALI_RATE = 14_000  # images/s that it decodes: no backend need be faster (H200)


# ---- the images


def find_images(source: Path) -> tuple[list[str], dict[str, str], int]:
    """(all images of a folder in order, or the one file; what can't be read and why; how many other files).

    Raises UserError where there are none.
    """
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
    problems |= dict.fromkeys(unread_pictures(others), unread)
    if not images:
        some = "".join(f"\n  {path}: {why}" for path, why in sorted(problems.items())[:20])
        what = f"{source} holds no images, by the names of its {len(found)} files; name another folder"
        raise UserError(what + some)
    return images, problems, sum(not Path(path).name.startswith(".") for path in others - problems.keys())


# ---- the checkpoint


class FactsReader(pickle.Unpickler):
    """Reads the plain values of a file that torch.save() wrote, without PyTorch; all else becomes None.

    No code in it is run.
    """

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
        if weights.is_file():
            raise NotADirectoryError(errno.ENOTDIR, "", str(weights))
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


# ---- the backend


@dataclasses.dataclass(frozen=True)
class Served:
    """What serves images: the first columns of end_to_end.csv and load.csv."""

    sweep: str
    backend: str
    precision: str
    image_size: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """A backend, the batch size to run it with and those to load it for; whether that was measured here."""

    backend: str
    batch_size: int
    batch_sizes: tuple[int, ...]
    measured: bool = True

    def with_batch(self, size: int) -> "Choice":
        """The same for one batch size."""
        return dataclasses.replace(self, batch_size=size, batch_sizes=(size,))

    def smaller(self) -> "Choice":
        """The same for the next smaller batch size that was measured, else for half of this one."""
        known = (size for size in self.batch_sizes if size < self.batch_size)
        return self.with_batch(max(known, default=self.batch_size // 2))


def gpu_name() -> str | None:
    """By the driver, which is asked in no time; None where it has no GPU."""
    name = read_driver("nvmlDeviceGetName")
    return name.decode() if isinstance(name, bytes) else name


def measured_here(results: Path, device: str, image_size: int) -> list[dict]:
    """The rows of the table with figures of this machine with these packages.  Raises UserError.

    Each has backend, sweep, batch_size, fps (images/s), load_s and first_call_ms (NaN: not known).
    """
    path, gpu = results / "benchmark_results.csv", gpu_name() if device == "cuda" else None
    packages = {name: version for name in PACKAGES if (version := package_version(name))}
    here = {"gpu": gpu, "cpu": cpu_name(), "packages": packages}
    environments = read_dict(results / "environment.json")
    try:
        same = {sweep for sweep, facts in environments.items() if here.items() <= facts.items()}
        with path.open(encoding="utf-8", newline="") as file:
            rows = [
                {"backend": row["backend"], "sweep": row["sweep"], "batch_size": int(row["batch_size"])}
                | {name: float(row[name] or "nan") for name in ("fps", "load_s", "first_call_ms")}
                for row in csv.DictReader(file)
                if (row["status"], row["device"], row["image_size"]) == ("ok", device, str(image_size))
                and row["sweep"] in same
            ]
        if not all(row["fps"] > 0 and row["batch_size"] > 0 for row in rows):
            raise ValueError("a row that is ok has no images/s in column fps")
    except FileNotFoundError:
        return []
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        said = f"no table of python benchmark.py ({type(error).__name__}: {error})"
        raise UserError(f"{path} is {said}; make it anew: python benchmark.py") from None
    return rows


def choose_backends(name: str | None, rows: list[dict], count: int, device: str) -> list[Choice]:
    """By the table what is done first with `count` images, then the next ones; PyTorch where it has none.

    Of a backend the batch size is the one that classifies them fastest; to that come loading and the first
    calls.  `name` is the backend that the user wants, or None.
    """

    def inference_s(row: dict) -> float:
        seconds = -(-count // row["batch_size"]) * row["batch_size"] / row["fps"]
        return max(seconds, count / DALI_RATE) if device == "cuda" else seconds

    def known(rows: list[dict], column: str) -> list[float]:
        return [row[column] for row in rows if row[column] >= 0]

    # Where it is not known how long a backend takes to load, it is taken for the slowest one.
    slowest = max(known(rows, "load_s"), default=0.0)
    found = {}
    for backend in [name] if name else backends.SCRIPTS:
        if own := [row for row in rows if row["backend"] == backend]:
            best = min(own, key=inference_s)
            sizes = {row["batch_size"] for row in rows if row["sweep"] == best["sweep"]}
            start_s = min(known(own, "load_s"), default=slowest)
            start_s += max(known(own, "first_call_ms"), default=0.0) / 1000
            choice = Choice(backend, best["batch_size"], tuple(sorted(sizes)))
            found[choice] = start_s + inference_s(best)
    size = -(-count // -(-count // BATCH_SIZE[device]))  # so that the last batch is as large as the others
    return sorted(found, key=found.__getitem__) or [Choice(name or "pytorch", size, (size,), measured=False)]


# ---- the decoder


def choose_decoder(name: str, device: str, count: int) -> str:
    """DALI where a GPU, many images and the package are there, else Pillow; nothing is imported yet."""
    if name != "auto":
        return name
    there = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    return "dali" if device == "cuda" and count >= DALI_PAYS and there else "pillow"
