"""Which images are classified, by which checkpoint, backend, batch size and decoder.  Needs no PyTorch."""

import contextlib
import csv
import dataclasses
import datetime
import importlib.util
import io
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import backends
from utils.environment import PACKAGES, cpu_name, package_version, read_driver
from utils.images import HEIF, files_below, fingerprint, is_image, unread_pictures
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
    pictures = set(images)
    others = [path for path in found if path not in pictures]
    problems = dict.fromkeys(denied, "this folder can't be listed; change its permissions")
    for path in unread_pictures(others):
        heif = "; pip install pillow-heif, or" if path.lower().endswith(tuple(HEIF)) else ";"
        problems[path] = f"pictures of this format are not read here{heif} convert it to JPEG"
    if not images:
        some = "".join(f"\n  {path}: {why}" for path, why in sorted(problems.items())[:20])
        what = f"{source} holds no images, by the names of its {len(found)} files; name another folder"
        raise UserError(what + some)
    visible = [path for path in others if not f"{os.sep}{path}".rpartition(os.sep)[2].startswith(".")]
    return images, problems, len(set(visible) - set(problems))


# ---- the checkpoint


class FactsReader(pickle.Unpickler):
    """Reads the plain values of a file that torch.save() wrote, without PyTorch and running no code."""

    def find_class(self, module: str, name: str):
        if module in ("torch", "torch._utils"):
            return lambda *parts: None  # tensors, which are left where they are
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")

    def persistent_load(self, saved) -> None:
        """A tensor's numbers."""


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
    found = [(path, load_facts(path)) for path in sorted(weights.glob("best_resnet18_*.pth"))]
    if not found:
        raise UserError(f"{weights} holds no checkpoint; train one: python train.py")
    if len({data_of(facts) for _, facts in found}) > 1:
        here = fingerprint(data)
        if trained_here := [pair for pair in found if data_of(pair[1]) == here]:
            found = trained_here
        elif len({tuple(facts["classes"]) for _, facts in found}) > 1:
            lines = [f"  {path.name}: {described(path, facts)}" for path, facts in found]
            ask = "choose one: --image-size SIZE, or --data the folder of images that it was trained on"
            what = f"{weights} holds checkpoints of different classes, and none was trained on {data}"
            raise UserError("\n".join([f"{what}; {ask}", *lines]))
        else:
            newest = data_of(max(found, key=lambda pair: pair[0].stat().st_mtime)[1])
            found = [pair for pair in found if data_of(pair[1]) == newest]
    return min(found, key=lambda pair: (-pair[1].get("accuracy", 0), pair[1]["image_size"]))


def data_of(facts: dict) -> str | None:
    """The fingerprint of the images that a checkpoint was trained on."""
    return (facts.get("data") or {}).get("fingerprint")


def described(path: Path, facts: dict) -> str:
    """Which classes a checkpoint knows, and when its file was written."""
    classes = facts["classes"]
    more = f" and {len(classes) - 5} more" if len(classes) > 5 else ""
    trained = datetime.datetime.fromtimestamp(path.stat().st_mtime)
    return f"classes {', '.join(classes[:5])}{more}; trained {trained:%Y-%m-%d %H:%M}"


# ---- the backend


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
        sizes = tuple(size for size in self.batch_sizes if size < self.batch_size)
        if not sizes:
            return self.with_batch(self.batch_size // 2)
        return dataclasses.replace(self, batch_size=sizes[-1], batch_sizes=sizes)


def gpu_name() -> str | None:
    """By the driver, which is asked in no time; None where it has no GPU."""
    name = read_driver("nvmlDeviceGetName")
    return name.decode() if isinstance(name, bytes) else name


def measured_here(results: Path, device: str, image_size: int) -> list[dict]:
    """The rows of the table with figures of this machine with these packages.  Raises UserError.

    Each has backend, sweep, batch_size, fps (images/s), load_s and first_call_ms (NaN: not known).
    """
    path = results / "benchmark_results.csv"
    packages = {name: version for name in PACKAGES if (version := package_version(name))}
    gpu = gpu_name() if device == "cuda" else None
    here = {"gpu": gpu, "cpu": cpu_name(), "packages": packages}
    environments, rows = read_dict(results / "environment.json"), []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                facts = environments.get(row["sweep"], {})
                same = all(facts.get(name) == value for name, value in here.items())
                asked = row["status"], row["device"], row["image_size"]
                if same and asked == ("ok", device, str(image_size)):
                    rows.append({name: row[name] for name in ("backend", "sweep")})
                    rows[-1] |= {"batch_size": int(row["batch_size"]), "fps": float(row["fps"])}
                    rows[-1] |= {name: float(row[name] or "nan") for name in ("load_s", "first_call_ms")}
                    if not (rows[-1]["fps"] > 0 and rows[-1]["batch_size"] > 0):
                        raise ValueError(f"a row that is ok has {row['fps']} images/s in column fps")
    except FileNotFoundError:
        return []
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        said = f"{type(error).__name__}: {error}"
        mend = "make it anew: python benchmark.py"
        raise UserError(f"{path} is no table of python benchmark.py ({said}); {mend}") from None
    return rows


def choose_backends(name: str | None, rows: list[dict], count: int, device: str) -> list[Choice]:
    """By the table what is done first with `count` images, then the next ones; PyTorch where it has none.

    Of a backend the batch size is the one that classifies them fastest; to that come loading and the first
    calls.  `name` is the backend that the user wants, or None.
    """
    known = [row for row in rows if row["backend"] in ([name] if name else backends.SCRIPTS)]
    # Where it is not known how long a backend takes to load, it is taken for the slowest one.
    slowest = max((row["load_s"] for row in rows if row["load_s"] >= 0), default=0.0)
    found = []
    for backend in dict.fromkeys(row["backend"] for row in known):
        own = [row for row in known if row["backend"] == backend]
        seconds, row = min(((inference_seconds(row, count), row) for row in own), key=lambda pair: pair[0])
        seconds = max(seconds, count / DALI_RATE) if device == "cuda" else seconds
        loading = min(
            (row["load_s"] for row in own if row["load_s"] >= 0), default=slowest
        )  # not known: slow
        first = max((row["first_call_ms"] for row in own if row["first_call_ms"] >= 0), default=0.0) / 1000
        sizes = {other["batch_size"] for other in rows if other["sweep"] == row["sweep"]}
        choice = Choice(backend, row["batch_size"], tuple(sorted(sizes)))
        found.append((loading + first + seconds, choice))
    batches = -(-count // BATCH_SIZE[device])
    size = -(-count // batches)  # so that the last batch is as large as the others
    default = [Choice(name or "pytorch", size, (size,), measured=False)]
    return [choice for _, choice in sorted(found, key=lambda pair: pair[0])] or default


def inference_seconds(row: dict, count: int) -> float:
    """What the network needs for whole batches of `count` images."""
    return -(-count // row["batch_size"]) * row["batch_size"] / row["fps"]


# ---- the decoder


def choose_decoder(name: str, device: str, count: int) -> str:
    """DALI where a GPU, many images and the package are there, else Pillow; nothing is imported yet."""
    if name != "auto":
        return name
    return "dali" if device == "cuda" and count >= DALI_PAYS and not why_not_installed() else "pillow"


def why_not_installed() -> str | None:
    """None if NVIDIA DALI is here, else one sentence that a user can act on."""
    if sys.platform != "linux":
        return "NVIDIA DALI exists for Linux only; Pillow decodes instead: --decoder pillow"
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        return None
    cuda = re.search(r"\+cu(\d\d)", package_version("torch") or "")
    package = f"nvidia-dali-cuda{cuda[1] if cuda else 13}0"
    return f"NVIDIA DALI is not installed, which decodes on the GPU; run: pip install {package}"
