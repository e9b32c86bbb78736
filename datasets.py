"""Image folders -> DataLoaders; draws four sample heroes where there is no data at all.

Reads data/train/<class>/* and data/test/<class>/*: images of any size, in any format that Pillow reads.
Writes them only when asked to draw the sample into a folder without images; data/SAMPLE.txt then says that
they are drawn.

    python datasets.py                  what is there: classes, counts, sizes, problems python datasets.py
    --draw-sample    draw the sample heroes (train.py does it by itself when there is no data)
"""

import argparse
import functools
import hashlib
import os
import random
import shutil
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from utils.heroes import HEROES, draw_picture
from utils.utils import UserError, run_main, sha256, write_atomic

SPLITS = ["train", "test"]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, for RGB in 0..1
STUBS = {
    "BUFR",
    "GRIB",
    "HDF5",
    "MPEG",
    "WMF",
}  # Pillow knows these formats by name but can't decode them everywhere
SAMPLE_IMAGES = {
    "train": 18,
    "test": 25,
}  # per class; 5 epochs at 224 to 512 px then take 12 minutes on 2 slow cores
LAYOUT = "put images into {data}/train/<class>/ and {data}/test/<class>/, or name another folder with --data"


# ----------------------------------------------------------------------------------------------------------------
# files


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


def check_folders(data: Path) -> None:
    """Raise UserError unless every class has images and every test class was trained; decodes nothing."""
    listed = list_images(data)
    for split in SPLITS:
        if not listed[split]:
            raise UserError(f"{data / split} holds no class folders; {LAYOUT.format(data=data)}")
    for split in SPLITS:
        empty = [str(data / split / name) for name, images in listed[split].items() if not images]
        if empty:
            raise UserError(
                f"no images in {', '.join(empty)}; put some there or remove the folder, then: python datasets.py"
            )
    unknown = [str(data / "test" / name) for name in listed["test"] if name not in listed["train"]]
    if unknown:
        mend = f"add {data / 'train'}/<the same name>/ or remove it, then: python datasets.py"
        raise UserError(f"{', '.join(unknown)} has no counterpart to learn from; {mend}")
    if len(listed["train"]) < 2:
        raise UserError(
            f"{data / 'train'} holds one class only, there is nothing to tell apart; {LAYOUT.format(data=data)}"
        )


def image_size_of(path: Path) -> tuple[int, int] | str:
    """(width, height) after really decoding the file, or what is wrong with it."""
    try:
        return load_rgb(path).size
    except (
        Exception
    ) as error:  # Pillow's plugins raise anything from OSError to struct.error on a damaged file
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def check_images(data: Path) -> dict[Path, tuple[int, int]]:
    """Decode every image, return their sizes; raise UserError naming all the broken ones at once."""
    check_folders(data)
    images = all_images(data)
    found = dict(zip(images, in_threads(image_size_of, images, "checking images"), strict=True))
    broken = [f"{path} ({problem})" for path, problem in found.items() if isinstance(problem, str)]
    if broken:
        count = f"{len(broken)} of {len(images)} images can't be read"
        raise UserError("\n  ".join([f"{count}; replace or delete them, then: python datasets.py", *broken]))
    return found


def in_threads(function, items: list, label: str | None = None) -> list:
    """The results in order; with a progress bar if there is a label and a terminal."""
    pool = ThreadPoolExecutor()
    try:
        return list(
            tqdm(
                pool.map(function, items),
                label,
                len(items),
                unit="image",
                leave=False,
                disable=None if label else True,
            )
        )
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C doesn't wait for what hasn't begun


def content_hashes(paths: list[Path]) -> list[str]:
    return in_threads(lambda path: hashlib.sha256(path.read_bytes()).hexdigest(), paths)


def fingerprint(data: Path) -> str:
    """16 hex digits over the relative names (NFC) and contents of all images: the same data set gives the
    same on every system."""
    images = sorted(all_images(data), key=lambda path: relative_name(data, path))
    lines = [
        f"{relative_name(data, path)} {digest}"
        for path, digest in zip(images, content_hashes(images), strict=True)
    ]
    return sha256("\n".join(lines))[:16]


def is_sample(data: Path) -> bool:
    """Whether any of the images is a drawn one: a mixture of drawn and own images is sample data too."""
    marker = data / "SAMPLE.txt"
    if not marker.is_file():
        return False
    drawn = {line.split(" ", 1)[0] for line in marker.read_text(encoding="utf-8").splitlines()}
    images = all_images(data)
    return any(set(content_hashes(images[start : start + 64])) & drawn for start in range(0, len(images), 64))


def ensure_data(data: Path, seed: int = 0) -> None:
    """Draw the sample where there is no data at all, otherwise check the folders.  Raises UserError."""
    if not has_data(data) or unfinished_sample(data):
        print(
            f"no images in {data}: drawing the sample heroes (your own: {LAYOUT.format(data=data)})",
            flush=True,
        )
        draw_sample(data, seed)
    check_folders(data)


# ---------------------------------------------------------------------------------------------------
# pictures -> tensors


def load_rgb(path: str | Path) -> Image.Image:
    """The picture as RGB, 8 bits: upright (EXIF), transparency on white, 16-bit grey scaled down rather
    than clipped."""
    with Image.open(path) as image:
        image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if (
        image.mode.startswith("I") or image.mode == "F"
    ):  # 16-bit grey opens as I;16 or I, by version of Pillow
        values = np.asarray(image, dtype=np.float32)
        full = next(
            (full for full in (1, 255, 65535) if image.mode == "F" and values.max() <= full),
            max(65535, values.max()),
        )
        return Image.fromarray((values / full * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def to_normalised() -> list:
    mean, std = (
        [255 * value for value in MEAN],
        [255 * value for value in STD],
    )  # on 0..255: spares a pass over the picture
    return [v2.ToImage(), v2.ToDtype(torch.float32), v2.Normalize(mean, std, inplace=True)]


def test_transform(image_size: int):
    """PIL RGB image -> float32 (3, S, S), normalised; the whole picture is squeezed into the square, so
    nothing is cut off."""
    return v2.Compose([v2.Resize((image_size, image_size), antialias=True), *to_normalised()])


test_transform.__test__ = False  # its name is part of the interface, pytest must not take it for a test


def train_transform(image_size: int):
    """The same with mild augmentation, and no more: on a CPU the reading workers take their time from the
    training itself."""
    crop = v2.RandomResizedCrop(image_size, scale=(0.75, 1.0), ratio=(0.9, 1.1), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *to_normalised()])


class HeroFolder(ImageFolder):
    """torchvision's ImageFolder with class names in NFC, labels by a given list of classes, and load_rgb()
    as the loader."""

    def __init__(self, root: Path, transform, classes: list[str] | None = None):
        self.known = classes
        super().__init__(str(root), transform=transform, loader=load_rgb, is_valid_file=is_image)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        folders = [folder.name for folder in class_folders(Path(directory))]
        classes = self.known or sorted({nfc(name) for name in folders})
        unknown = [name for name in folders if nfc(name) not in classes]
        if unknown:
            raise UserError(
                f"{Path(directory, unknown[0])} is a class the network never saw; remove it or train again: python train.py"
            )
        return classes, {name: classes.index(nfc(name)) for name in folders}


def make_loaders(
    data: Path,
    image_size: int,
    batch_size: int,
    num_workers: int = 4,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> tuple[DataLoader, DataLoader, list[str]]:
    """(train loader, test loader, classes): float32 (N, 3, S, S) normalised and int64 (N,); `batch_size` is
    that of one process.

    Call train_loader.sampler.set_epoch(epoch) before each epoch.  Of `world_size` processes each gets its
    own part: of the training images as many as the others (DistributedSampler repeats some), of the test
    images every one exactly once.
    """
    check_folders(data)
    train = HeroFolder(data / "train", train_transform(image_size))
    test = HeroFolder(data / "test", test_transform(image_size), train.classes)
    sampler = DistributedSampler(train, world_size, rank, shuffle=True, seed=seed)
    # A last batch of one image has no variance for batch normalisation: it is left out, a different one in
    # every epoch.
    drop_last = len(sampler) > batch_size and len(sampler) % batch_size == 1
    train_loader = loader(
        train, batch_size, num_workers, seed, sampler=sampler, drop_last=drop_last, pin_memory=pin_memory
    )
    share = range(rank, len(test), world_size)
    return (
        train_loader,
        loader(test, batch_size, num_workers, seed, sampler=share, pin_memory=pin_memory),
        train.classes,
    )


def loader(dataset, batch_size: int, num_workers: int, seed: int, **options) -> DataLoader:
    # Workers beyond the cores only wait here; the warning would meet every user of a small machine.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    return DataLoader(
        dataset,
        batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,  # starting them anew costs seconds on Windows and macOS
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def make_test_loader(
    data: Path, image_size: int, batch_size: int, classes: list[str], num_workers: int = 0
) -> DataLoader:
    """The test set in a fixed order: batches of float32 (N, 3, S, S) normalised, int64 (N,) indices in
    `classes`.  Raises UserError."""
    check_folders(data)
    return loader(
        HeroFolder(data / "test", test_transform(image_size), classes), batch_size, num_workers, seed=0
    )


# ------------------------------------------------------------------------------------------------------ the
# sample heroes


def has_data(data: Path) -> bool:
    """Whether the user has begun to put anything there: a file of any kind, or a folder of a class that
    isn't the sample's."""
    own = [
        folder for split in SPLITS for folder in class_folders(data / split) if nfc(folder.name) not in HEROES
    ]
    return bool(own) or any(visible_files(data / split) for split in SPLITS)


def unfinished_sample(data: Path) -> bool:
    """Whether moving a completely drawn sample into place was interrupted: see draw_sample()."""
    return (data / "SAMPLE.txt").is_file() and (data / "sample.part").is_dir()


def draw_sample(data: Path, seed: int = 0, counts: dict[str, int] = SAMPLE_IMAGES) -> None:
    """Draw the sample heroes into `data`, the same ones for the same seed.  Raises UserError rather than
    touch a user's images.

    They are drawn in data/sample.part; the marker SAMPLE.txt is written when all are there, and only then
    they are moved into place. An interruption before the marker leaves no data set, and one after it is
    made good by the next call.
    """
    part, marker = data / "sample.part", data / "SAMPLE.txt"
    if not unfinished_sample(data):
        if has_data(data):
            elsewhere = "python datasets.py --draw-sample --data sample"
            raise UserError(
                f"{data} already holds images, the sample is not mixed with them; draw it elsewhere: {elsewhere}"
            )
        shutil.rmtree(part, ignore_errors=True)
        marker.unlink(missing_ok=True)  # of a sample that was deleted since
        folders = [(split, name) for split in SPLITS for name in HEROES]
        jobs = [
            (part / split / name, f"{seed}/{split}/{name}", index)
            for split, name in folders
            for index in range(counts[split])
        ]
        files = in_threads(lambda job: draw_file(*job), jobs, "drawing the sample heroes")
        lines = [
            f"{digest} {relative_name(part, path)}"
            for path, digest in zip(files, content_hashes(files), strict=True)
        ]
        head = f"Sample data drawn by datasets.py (seed {seed}). What is made with any of these images is marked as sample data."
        write_atomic(marker, "\n".join([head, "", *lines]) + "\n")
    for path in visible_files(part):
        target = data / path.relative_to(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(part)


def draw_file(folder: Path, key: str, index: int) -> Path:
    """Draw one picture, everything in it decided by (key, index) alone: JPEG mostly, every fourth one PNG."""
    rng = random.Random(f"{key}/{index}")  # seeds by the text's SHA-512: the same on every system
    name = nfc(folder.name)
    png = index % 4 == 3
    image = draw_picture(
        name, rng, *((400, 0) if png else (700, 9))
    )  # a large or noisy PNG takes long to read
    path = folder / f"{name} {index + 1:02d}.{'png' if png else 'jpg'}"
    folder.mkdir(parents=True, exist_ok=True)
    image.save(path, **({} if png else {"quality": rng.randint(75, 95)}))
    return path


# ------------------------------------------------------------------------------------------------------------
# the report


def print_overview(data: Path) -> None:
    """Print classes, counts and sizes, and what is odd but no error.  Raises UserError like
    check_images()."""
    sizes, listed = check_images(data), list_images(data)
    print(f"{'class':<24}{'train':>7}{'test':>7}   size in px (narrowest x lowest .. widest x highest)")
    for name in sorted(listed["train"]):
        images = listed["train"][name] + listed["test"].get(name, [])
        widths, heights = zip(*(sizes[path] for path in images), strict=True)
        count = [len(listed[split].get(name, [])) for split in SPLITS]
        print(
            f"{name:<24}{count[0]:>7}{count[1]:>7}   {min(widths)}x{min(heights)} .. {max(widths)}x{max(heights)}"
        )
    total = [sum(map(len, listed[split].values())) for split in SPLITS]
    marked = ", sample data drawn by datasets.py" if is_sample(data) else ""
    print(f"{'all':<24}{total[0]:>7}{total[1]:>7}   fingerprint {fingerprint(data)}{marked}")
    for problem in oddities(data, listed):
        print(f"note: {problem}")


def oddities(data: Path, listed: dict[str, dict[str, list[Path]]]) -> list[str]:
    untested = [name for name in listed["train"] if name not in listed["test"]]
    found = [
        f"{data / 'test' / name} has no images: the accuracy says nothing about this class"
        for name in untested
    ]
    images = all_images(data)
    other = sorted({path for split in SPLITS for path in visible_files(data / split)} - set(images))
    if other:
        found.append(
            f"{len(other)} files aren't used, being no images in a class folder by their names: {', '.join(map(str, other[:5]))}"
        )
    first = {}
    for path, digest in zip(images, content_hashes(images), strict=True):
        if first.setdefault(digest, path) != path:
            found.append(f"{path} is the same image as {first[digest]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description="say what images there are, or draw the sample heroes where there are none"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder with train/<class>/ and test/<class>/"
    )
    parser.add_argument(
        "--draw-sample",
        action="store_true",
        help="draw the sample heroes; only where there are no images yet",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawn sample")
    args = parser.parse_args()
    if unfinished_sample(args.data) or args.draw_sample and not is_sample(args.data):
        draw_sample(args.data, args.seed)
    if not has_data(args.data):
        raise UserError(
            f"no images in {args.data}; {LAYOUT.format(data=args.data)}, or draw the sample: python datasets.py --draw-sample"
        )
    print_overview(args.data)


if __name__ == "__main__":
    run_main(main)
