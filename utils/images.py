"""Image folders as files: what is there, its fingerprint, and the sample drawn where there is nothing."""

import functools
import hashlib
import os
import random
import shutil
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from utils.heroes import HEROES, draw_picture
from utils.utils import UserError, sha256, write_atomic

SPLITS = ["train", "test"]
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow knows but can't decode everywhere
SAMPLE_IMAGES = {
    "train": 18,
    "test": 25,
}  # per class; 5 epochs at 224 to 512 px take 12 minutes on 2 slow cores
LAYOUT = "put images into {data}/train/<class>/ and {data}/test/<class>/, or name another folder with --data"


def nfc(text: str) -> str:
    """One spelling of a name: macOS writes й as и + breve (NFD), Windows and Linux as one character (NFC)."""
    return unicodedata.normalize("NFC", text)


@functools.lru_cache
def image_suffixes() -> set[str]:
    Image.init()
    return {
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in STUBS
    }


def is_image(path: str) -> bool:
    """By the name alone; hidden files and folders (.DS_Store, ._x.jpg, .ipynb_checkpoints) are none."""
    path = Path(path)
    return (
        path.suffix.lower() in image_suffixes()
        and not path.name.startswith(".")
        and not path.parent.name.startswith(".")
    )


def class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))


def visible_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if not path.name.startswith(".") and path.is_file()]


def list_images(data: Path) -> dict[str, dict[str, list[Path]]]:
    """split -> class (NFC) -> files; folders whose names differ only in their normal form are one class."""
    listed = {split: {} for split in SPLITS}
    for split in SPLITS:
        for folder in class_folders(data / split):
            images = [
                Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names
            ]
            listed[split].setdefault(nfc(folder.name), []).extend(
                sorted(path for path in images if is_image(str(path)))
            )
    return listed


def all_images(data: Path) -> list[Path]:
    return [path for classes in list_images(data).values() for images in classes.values() for path in images]


def relative_name(data: Path, path: Path) -> str:
    return nfc(path.relative_to(data).as_posix())


def in_threads(function, items: list, label: str | None = None) -> list:
    """The results in order; with a progress bar if there is a label and a terminal."""
    pool = ThreadPoolExecutor()
    quiet = None if label else True
    try:
        found = pool.map(function, items)
        return list(tqdm(found, label, len(items), unit="image", leave=False, disable=quiet))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C doesn't wait for what hasn't begun


def content_hashes(paths: list[Path]) -> list[str]:
    return in_threads(lambda path: hashlib.sha256(path.read_bytes()).hexdigest(), paths)


def fingerprint(data: Path) -> str:
    """16 hex digits over all images' relative names (NFC) and contents: the same on every system."""
    images = sorted(all_images(data), key=lambda path: relative_name(data, path))
    return sha256("\n".join(named_hashes(data, images)))[:16]


def named_hashes(folder: Path, paths: list[Path]) -> list[str]:
    """ "name digest" of each file, the name relative to `folder`."""
    digests = content_hashes(paths)
    return [f"{relative_name(folder, path)} {digest}" for path, digest in zip(paths, digests, strict=True)]


def is_sample(data: Path) -> bool:
    """Whether any of the images is a drawn one: a mixture of drawn and own images is sample data too."""
    marker = data / "SAMPLE.txt"
    if not marker.is_file():
        return False
    drawn = {line.split(" ", 1)[0] for line in marker.read_text(encoding="utf-8").splitlines()}
    images = all_images(data)
    return any(set(content_hashes(images[start : start + 64])) & drawn for start in range(0, len(images), 64))


# ---- sample heroes


def has_data(data: Path) -> bool:
    """Whether the user has begun to put anything there: any file, or a folder of a class not the sample's."""
    folders = [folder for split in SPLITS for folder in class_folders(data / split)]
    own = [folder for folder in folders if nfc(folder.name) not in HEROES]
    return bool(own) or any(visible_files(data / split) for split in SPLITS)


def unfinished_sample(data: Path) -> bool:
    """Whether moving a completely drawn sample into place was interrupted: see draw_sample()."""
    return (data / "SAMPLE.txt").is_file() and (data / "sample.part").is_dir()


def draw_sample(data: Path, seed: int = 0, counts: dict[str, int] = SAMPLE_IMAGES) -> None:
    """Draw the sample heroes into `data`, the same ones for the same seed.

    They are drawn in data/sample.part; the marker SAMPLE.txt is written when all are there, and only then
    they are moved into place.  An interruption before the marker leaves no data set, one after
    it is made good by the next call.  Raises UserError rather than touch a user's images.
    """
    part, marker = data / "sample.part", data / "SAMPLE.txt"
    if not unfinished_sample(data):
        if has_data(data):
            elsewhere = "python datasets.py --draw-sample --data sample"
            mend = f"the sample is not mixed with them; draw it elsewhere: {elsewhere}"
            raise UserError(f"{data} already holds images, {mend}")
        shutil.rmtree(part, ignore_errors=True)
        marker.unlink(missing_ok=True)  # of a sample that was deleted since
        jobs = []
        for split in SPLITS:
            for name in HEROES:
                where, key = part / split / name, f"{seed}/{split}/{name}"
                jobs += [(where, key, index) for index in range(counts[split])]
        files = in_threads(lambda job: draw_file(*job), jobs, "drawing the sample heroes")
        lines = [" ".join(reversed(line.rsplit(" ", 1))) for line in named_hashes(part, files)]
        head = f"Sample data drawn by datasets.py (seed {seed}). "
        head += "What is made with any of these images is marked as sample data."
        write_atomic(marker, "\n".join([head, "", *lines]) + "\n")
    for path in visible_files(part):
        target = data / path.relative_to(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(part)


def draw_file(folder: Path, key: str, index: int) -> Path:
    """Draw one picture, everything in it decided by (key, index) alone: JPEG mostly, every fourth one PNG."""
    rng = random.Random(f"{key}/{index}")  # seeds by the text's SHA-512: the same on every system
    name = nfc(folder.name)
    png = index % 4 == 3
    image = draw_picture(name, rng, *((400, 0) if png else (700, 9)))  # a large PNG takes long to read
    path = folder / f"{name} {index + 1:02d}.{'png' if png else 'jpg'}"
    folder.mkdir(parents=True, exist_ok=True)
    image.save(path, **({} if png else {"quality": rng.randint(75, 95)}))
    return path
