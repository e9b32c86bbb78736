"""Image folders as files: what is there, its fingerprint, and the sample drawn where there is nothing."""

import functools
import hashlib
import itertools
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
SAMPLE_IMAGES = {"train": 18, "test": 25}  # per class; 5 epochs at 224 to 512 px: 12 minutes on 2 slow cores
LAYOUT = "put images into {data}/train/<class>/ and {data}/test/<class>/, or name another folder with --data"


def nfc(text: str) -> str:
    """One spelling of a name: macOS writes й as и + breve (NFD), Windows and Linux as one character (NFC)."""
    return unicodedata.normalize("NFC", text)


@functools.lru_cache
def image_suffixes() -> set[str]:
    formats = Image.registered_extensions().items()
    return {suffix for suffix, name in formats if name in Image.OPEN and name not in STUBS}


def is_image(path: Path) -> bool:
    """By the name alone; hidden files and folders (.DS_Store, ._x.jpg, .ipynb_checkpoints) are none."""
    hidden = path.name.startswith(".") or path.parent.name.startswith(".")
    return path.suffix.lower() in image_suffixes() and not hidden


def class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())


def visible_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("[!.]*") if path.is_file())


def list_images(data: Path) -> dict[str, dict[str, list[Path]]]:
    """split -> class (NFC) -> files; folders whose names differ only in their normal form are one class."""
    listed = {split: {} for split in SPLITS}
    for split, classes in listed.items():
        for folder in class_folders(data / split):
            found = [Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names]
            classes.setdefault(nfc(folder.name), []).extend(sorted(filter(is_image, found)))
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
    named = zip(images, content_hashes(images), strict=True)
    return sha256("\n".join(f"{relative_name(data, path)} {digest}" for path, digest in named))[:16]


def is_sample(data: Path) -> bool:
    """Whether any of the images is a drawn one: a mixture of drawn and own images is sample data too."""
    marker = data / "SAMPLE.txt"
    if not marker.is_file():
        return False
    drawn = {line.split(" ", 1)[0] for line in marker.read_text(encoding="utf-8").splitlines()}
    return not drawn.isdisjoint(content_hashes(all_images(data)))


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

    They are drawn in data/sample.part, then the marker SAMPLE.txt is written, then they are moved into place:
    an interruption before the marker leaves no data set, one after it is made good by the next call.
    Raises UserError rather than touch a user's images.
    """
    part, marker = data / "sample.part", data / "SAMPLE.txt"
    if not unfinished_sample(data):
        if has_data(data):
            mend = "draw the sample elsewhere: python datasets.py --draw-sample --data sample"
            raise UserError(f"{data} already holds images, which are not mixed with drawn ones; {mend}")
        shutil.rmtree(part, ignore_errors=True)
        marker.unlink(missing_ok=True)  # of a sample that was deleted since
        kinds = itertools.product(SPLITS, HEROES)
        drawn = [(split, name, index) for split, name in kinds for index in range(counts[split])]
        draw = functools.partial(draw_file, part, seed)
        files = in_threads(draw, drawn, "drawing the sample heroes")
        named = zip(content_hashes(files), files, strict=True)
        text = f"Drawn by datasets.py (seed {seed}). What is made with these is marked as sample data.\n\n"
        lines = [f"{digest} {relative_name(part, path)}\n" for digest, path in named]
        write_atomic(marker, text + "".join(lines))
    for path in visible_files(part):
        target = data / path.relative_to(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(part)


def draw_file(folder: Path, seed: int, what: tuple[str, str, int]) -> Path:
    """Draw one picture, decided by (seed, split, class, index) alone: JPEG, every fourth one PNG."""
    split, name, index = what
    rng = random.Random(f"{seed}/{split}/{name}/{index}")  # by the text's SHA-512: the same on every system
    png = index % 4 == 3
    image = draw_picture(name, rng, *((400, 0) if png else (700, 9)))  # a large PNG takes long to read
    path = folder / split / name / f"{name} {index + 1:02d}.{'png' if png else 'jpg'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **({} if png else {"quality": rng.randint(75, 95)}))
    return path
