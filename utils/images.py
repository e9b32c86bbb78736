"""Image folders and files: what is there, its fingerprint, its pictures as RGB."""

import contextlib
import functools
import hashlib
import os
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from tqdm import tqdm

from utils.utils import UserError, sha256

SPLITS = ["train", "test"]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, for RGB in 0..1
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow knows but can't decode everywhere
HEIF = {".heic", ".heics", ".heif", ".heifs", ".hif"}  # an iPhone's photos, read by pillow-heif
UNREAD = {".arw", ".cr2", ".cr3", ".dng", ".jxl", ".nef", ".orf", ".raf", ".rw2", ".svg"}  # pictures, too
HUGE = 25_000_000  # pixels beyond which threads decode one picture at a time, to bound their memory
# Bytes; Pillow's 1 MB refuses long profiles.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * 2**20
ORIENTATION = 0x0112  # EXIF's tag: how to turn the picture upright
TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))  # by its value


@functools.lru_cache
def image_suffixes() -> set[str]:
    formats = Image.registered_extensions().items()
    return {suffix for suffix, name in formats if name in Image.OPEN and name not in STUBS} | HEIF


def is_image(path: str | Path) -> bool:
    """By the name, or where it has no suffix by the content; hidden files (._x.jpg) and pipes are none.

    A link to nothing is one: that it can't be read is to be said.
    """
    name, a_file = os.path.basename(path), os.path.isfile(path)
    suffix = os.path.splitext(name)[1].lower()
    if name.startswith(".") or (suffix and suffix not in image_suffixes()):
        return False
    if suffix or not a_file:
        return a_file or not os.path.exists(path)
    with contextlib.suppress(Exception), open_image(path) as image:  # plugins raise also struct.error
        return image.format not in STUBS
    return False


def files_below(folder: Path, denied: list[str] | None = None) -> list[str]:
    """All in it and its subfolders but folders and what lies in hidden ones (.ipynb_checkpoints/).

    Links are followed once, and never to a folder around it.  Folders that can't be listed are added to
    `denied`; where that is not given, the first one is an OSError.
    """

    def refuse(error: OSError) -> None:
        if denied is None:
            raise error
        denied.append(os.fsdecode(error.filename))

    found, seen = [], set(map(str, folder.resolve().parents))
    for at, below, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(at)) in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if not name.startswith(".")]
        found += [os.path.join(at, name).removeprefix(f".{os.sep}") for name in names]
    return sorted(found, key=lambda path: path.replace(os.sep, "\0"))  # folder by folder


def visible_files(folder: Path) -> list[Path]:
    """All files in it and its subfolders but hidden ones; [] where it is no folder."""
    found = map(Path, files_below(folder) if folder.is_dir() else [])
    return [path for path in found if not path.name.startswith(".")]


def list_images(data: Path) -> dict[str, dict[str, list[Path]]]:
    """split -> class -> files; macOS writes й as и + breve (NFD), and both spellings are one class (NFC)."""
    listed = {split: {} for split in SPLITS}
    for split, classes in listed.items():
        folders = (data / split).iterdir() if (data / split).is_dir() else ()
        for folder in sorted(folders, key=str):  # paths of Windows fold case: ё after п
            if folder.is_dir() and not folder.name.startswith("."):
                name = unicodedata.normalize("NFC", folder.name)
                classes.setdefault(name, []).extend(filter(is_image, visible_files(folder)))
    return listed


def all_images(data: Path) -> list[Path]:
    return [path for classes in list_images(data).values() for images in classes.values() for path in images]


def relative_name(data: Path, path: Path) -> str:
    return unicodedata.normalize("NFC", path.relative_to(data).as_posix())


def in_threads(function, items: list, label: str | None = None) -> list:
    """The results in order; with a progress bar if there is a label and a terminal."""
    quiet = None if label else True
    with ThreadPoolExecutor() as pool:
        found = pool.map(function, items)
        return list(tqdm(found, label, len(items), unit="image", leave=False, disable=quiet))


def content_hashes(paths: list[Path]) -> list[str]:
    return in_threads(lambda path: hashlib.sha256(path.read_bytes()).hexdigest(), paths)


def fingerprint(data: Path) -> str:
    """16 hex digits over all images' relative names (NFC) and contents: the same on every system."""
    images = sorted(all_images(data), key=lambda path: relative_name(data, path))
    named = zip(images, content_hashes(images), strict=True)
    return sha256("\n".join(f"{relative_name(data, path)} {digest}" for path, digest in named))[:16]


def is_sample(data: Path) -> bool:
    """Whether any of the images is a drawn one: a mixture of drawn and own images is sample data too."""
    drawn = drawn_hashes(data)
    return bool(drawn) and not drawn.isdisjoint(content_hashes(all_images(data)))


def drawn_hashes(data: Path) -> set[str]:
    """The hashes of the files' contents that datasets.py has drawn here, by SAMPLE.txt."""
    marker = data / "SAMPLE.txt"
    lines = marker.read_text("utf-8", "replace").splitlines() if marker.is_file() else []
    return {line.partition(" ")[0] for line in lines}


# ---- files -> pictures

alone = threading.Lock()  # held around a huge picture


def load_rgb(path: str | Path) -> Image.Image:
    """The picture as RGB, 8 bits: upright (EXIF), transparency on white, 16-bit grey scaled, not clipped."""
    with open_image(path) as image, alone if image.width * image.height > HUGE else contextlib.nullcontext():
        image.load()
        turn = None
        # ImageOps.exif_transpose() would write the EXIF anew, which fails on odd fields.
        with contextlib.suppress(Exception):  # damaged EXIF says nothing: as it lies
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        return to_rgb(image if turn is None else image.transpose(turn))


def open_image(path: str | Path) -> Image.Image:
    """Image.open(), for HEIC and HEIF, too."""
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        with contextlib.suppress(ImportError):  # takes a third of a second: only who meets HEIC imports it
            import pillow_heif

            pillow_heif.register_heif_opener()
        return Image.open(path)


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey opens as I;16 or I, by Pillow's version
        grey = (np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


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
