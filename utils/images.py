"""Image folders: what is there, its fingerprint, its pictures, and the sample drawn where nothing is."""

import contextlib
import functools
import hashlib
import itertools
import os
import random
import shutil
import threading
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.sample_images import HEROES, draw_picture
from utils.utils import UserError, sha256, write_atomic

SPLITS = ["train", "test"]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, for RGB in 0..1
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow knows but can't decode everywhere
OURS = {
    "train",
    "test",
    "sample.part",
    "SAMPLE.txt",
    "README.md",
}  # what data/ may hold without being the user's
# A picture may have twice Pillow's limit, 179 million pixels.  So many in all are decoded at a time, whatever
# the number of threads: at 4 bytes and about three copies each that is at most 2 GB.
PIXELS_IN_FLIGHT = 2 * Image.MAX_IMAGE_PIXELS
SAMPLE_IMAGES = {"train": 18, "test": 25}  # per class; 5 epochs at 224 to 512 px: 12 minutes on 2 slow cores
LAYOUT = "put images into {data}/train/<class>/ and {data}/test/<class>/, or name another folder with --data"


def nfc(text: str) -> str:
    """One spelling of a name: macOS writes й as и + breve (NFD), Windows and Linux as one character (NFC)."""
    return unicodedata.normalize("NFC", text)


@functools.lru_cache
def image_suffixes() -> set[str]:
    formats = Image.registered_extensions().items()
    return {suffix for suffix, name in formats if name in Image.OPEN and name not in STUBS}


def is_image(path: str | Path) -> bool:
    """By the name; what is hidden (._x.jpg) is none, nor is a pipe or a device.

    A link that leads nowhere is one: reading it fails, and that is to be said.
    """
    name = os.path.basename(path)
    named = os.path.splitext(name)[1].lower() in image_suffixes() and not name.startswith(".")
    return named and (os.path.isfile(path) or not os.path.exists(path))


def class_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())


def files_below(folder: Path) -> list[str]:
    """All in it and its subfolders but folders and what lies in hidden ones (.ipynb_checkpoints/).

    Links are followed once, and never to a folder around it.
    """
    found, seen = [], set(map(str, folder.resolve().parents))
    for at, below, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(at)) in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if not name.startswith(".")]
        found += [os.path.join(at, name).removeprefix(f".{os.sep}") for name in names]
    return sorted(found, key=lambda path: path.replace(os.sep, "\0"))  # folder by folder


def visible_files(folder: Path) -> list[Path]:
    return [path for path in map(Path, files_below(folder)) if not path.name.startswith(".")]


def list_images(data: Path) -> dict[str, dict[str, list[Path]]]:
    """split -> class (NFC) -> files; folders whose names differ only in their normal form are one class."""
    listed = {split: {} for split in SPLITS}
    for split, classes in listed.items():
        for folder in class_folders(data / split):
            found = map(Path, filter(is_image, files_below(folder)))
            classes.setdefault(nfc(folder.name), []).extend(found)
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
    return in_threads(content_hash, paths)


def content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):  # as many large files as threads need not be in memory whole
            digest.update(piece)
    return digest.hexdigest()


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
    drawn = {line.split(" ", 1)[0] for line in marker.read_text("utf-8", "replace").splitlines()}
    return not drawn.isdisjoint(content_hashes(all_images(data)))


# ---- files -> pictures


class Budget:
    """So much of something (pixels) may be taken at a time, by all threads together."""

    def __init__(self, total: int):
        self.total, self.free, self.changed = total, total, threading.Condition()

    @contextlib.contextmanager
    def take(self, amount: int) -> Iterator[None]:
        amount = min(amount, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= amount)
            self.free -= amount
        try:
            yield
        finally:
            with self.changed:
                self.free += amount
                self.changed.notify_all()


pixels = Budget(PIXELS_IN_FLIGHT)


def load_rgb(path: str | Path) -> Image.Image:
    """The picture as RGB, 8 bits: upright (EXIF), transparency on white, 16-bit grey scaled, not clipped."""
    with Image.open(path) as image, pixels.take(image.width * image.height):
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey opens as I;16 or I, by Pillow's version
        return Image.fromarray(to_8_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def to_8_bits(image: Image.Image) -> np.ndarray:
    """Grey of 16 or 32 bits or float as uint8 (H, W).  NaN is black, infinite white, transparent white."""
    values = np.asarray(image, dtype=np.float32)
    highest = values.max(where=np.isfinite(values), initial=0)
    scales = [full for full in (1, 255, 65535) if image.mode == "F" and highest <= full]
    grey = values / (scales or [max(65535, highest)])[0] * 255
    grey = np.nan_to_num(grey, nan=0, posinf=255, neginf=0).clip(0, 255).round()
    if isinstance(clear := image.info.get("transparency"), int):  # PNG: the grey level that is transparent
        grey[values == clear] = 255
    return grey.astype(np.uint8)


def image_or_problem(path: Path) -> Image.Image | str:
    """The picture, or what is wrong with the file."""
    try:
        return load_rgb(path)
    except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def load_known(path: Path) -> Image.Image:
    """The picture of a file that could be read when the folders were looked through.  Raises UserError."""
    if isinstance(image := image_or_problem(path), str):
        again = "put it back, then run the same command again"
        raise UserError(f"{path} can't be read any more ({image}); {again}")
    return image


# ---- sample heroes


def has_data(data: Path) -> bool:
    """Whether the user has begun to put anything there: any file, or a folder of a class not the sample's."""
    folders = [folder for split in SPLITS for folder in class_folders(data / split)]
    own = [folder for folder in folders if nfc(folder.name) not in HEROES]
    return bool(own) or any(visible_files(data / split) for split in SPLITS)


def check_nothing_else(data: Path) -> None:
    """Raise UserError if `data` holds anything of the user's outside train/ and test/."""
    others = [path.name for path in sorted(data.glob("[!.]*")) if path.name not in OURS]
    if others:
        mend = LAYOUT.format(data=data)
        raise UserError(f"{data} holds {', '.join(others[:5])}, but no images in train/ and test/; {mend}")


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
        check_nothing_else(data)
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
