"""Image folders -> DataLoaders; draws four sample heroes where there is no data at all.

Reads data/train/<class>/* and data/test/<class>/*: images of any size, in any format that Pillow reads.
Writes only to draw the sample into a folder without images; data/SAMPLE.txt then says that they are drawn.

    python datasets.py                  what is there: classes, counts, sizes, problems
    python datasets.py --draw-sample    draw the sample heroes (train.py does it where there is no data)
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)

import argparse
import contextlib
import functools
import itertools
import math
import random
import shutil
import signal
import sys
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils import images
from utils.images import MEAN, SPLITS, STD, all_images, content_hashes, fingerprint, is_sample, list_images
from utils.images import load_rgb as load_rgb
from utils.sample_images import LAYOUT, draw_sample, has_data
from utils.utils import UserError, run_main, uninterrupted

DEFAULT = Path("data")


def check_folders(data: Path) -> None:
    """Raise UserError unless every class has images and every test class was trained; decodes nothing."""
    listed, again = list_images(data), "then: python datasets.py"
    lost = [str(path) for split in SPLITS for path in images.visible(data / split) if not path.exists()]
    if lost:
        raise UserError(f"{', '.join(lost)} is a link that leads nowhere; mend or remove it, {again}")
    for split, classes in listed.items():
        if not classes:
            hidden = ", ".join(path.name for path in images.visible(data / split) if path.is_dir())
            cause = f"holds hidden folders only ({hidden})" if hidden else "holds no class folders"
            raise UserError(f"{data / split} {cause}; {LAYOUT.format(data=data)}")
        if empty := [data / split / name for name, paths in classes.items() if not paths]:
            unread = images.unread_pictures(itertools.chain(*map(images.visible_files, empty)))
            cause = f" but {len(unread)} in formats that are not read, as {unread[0]}" if unread else ""
            mend = f"put some there, as JPEG for instance, or remove the folder, {again}"
            raise UserError(f"no images in {', '.join(map(str, empty))}{cause}; {mend}")
    if unknown := [str(data / "test" / name) for name in listed["test"] if name not in listed["train"]]:
        mend = f"add {data / 'train'}/<the same name>/ or remove it, {again}"
        raise UserError(f"{', '.join(unknown)} has no counterpart to learn from; {mend}")
    if len(listed["train"]) < 2:
        cause = "holds one class only, and a network learns to tell classes apart"
        raise UserError(f"{data / 'train'} {cause}; {LAYOUT.format(data=data)}")


def image_size_of(path: Path) -> tuple[int, int] | str:
    """(width, height) after really decoding the file, or what is wrong with it."""
    found = images.image_or_problem(path)
    return found if isinstance(found, str) else found.size


def check_images(data: Path) -> dict[Path, tuple[int, int]]:
    """Decode every image, return their sizes; raise UserError naming all the broken ones at once."""
    check_folders(data)
    paths = all_images(data)
    found = dict(zip(paths, images.in_threads(image_size_of, paths, "checking images"), strict=True))
    broken = [f"{path} ({problem})" for path, problem in found.items() if isinstance(problem, str)]
    if broken:
        count = f"{len(broken)} of {len(paths)} images can't be read"
        raise UserError("\n  ".join([f"{count}; replace or delete them, then: python datasets.py", *broken]))
    if unread := images.unread_pictures(files_of(data)):
        cause = "are in formats that are not read; convert them, to JPEG for instance, to use them"
        print(f"note: {len(unread)} pictures {cause}: {', '.join(unread[:5])}", file=sys.stderr)
    return found


def files_of(data: Path) -> list[Path]:
    return [path for split in SPLITS for path in images.visible_files(data / split)]


def ensure_data(data: Path, seed: int = 0) -> None:
    """Check the folders; draw the sample if the default one holds nothing at all.  Raises UserError."""
    if not has_data(data):
        if data != DEFAULT and not (data / "sample.part").is_dir():
            what = "holds no images" if data.exists() else "does not exist"
            draw = f"or draw the sample there: python datasets.py --draw-sample --data {data}"
            raise UserError(f"{data} {what}; {LAYOUT.format(data=data)}, {draw}")
        draw_sample(data, seed)
    check_folders(data)


def class_names(data: Path) -> list[str]:
    """The classes in the order of a network's outputs."""
    return sorted(list_images(data)["train"])


def describe(data: Path) -> dict:
    """What a checkpoint says of the images it was trained on."""
    listed = list_images(data)
    counts = {f"{split}_images": sum(map(len, classes.values())) for split, classes in listed.items()}
    return counts | {"fingerprint": fingerprint(data), "sample": is_sample(data)}


# ---- pictures -> tensors


def to_normalised(picture: Image.Image, image_size: int, rng: random.Random | None = None):
    """RGB image -> float32 (3, S, S), normalised; squeezed into the square: nothing is cut off.

    With a generator it is a random part of the picture, mirrored or not: mild, since on a CPU the readers
    take their time from the training itself.
    """
    import torch

    width, height = picture.size
    box = 0, 0, width, height
    if rng:
        share, ratio = rng.uniform(0.75, 1), rng.uniform(0.9, 1.1)
        wide, high = min(1, math.sqrt(share * ratio)) * width, min(1, math.sqrt(share / ratio)) * height
        left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
        box = left, top, left + wide, top + high
    square = picture.resize((image_size, image_size), Image.Resampling.BILINEAR, box)
    if rng and rng.random() < 0.5:
        square = ImageOps.mirror(square)
    mean, std = (torch.tensor([[[255 * value]] for value in values]) for values in (MEAN, STD))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float().sub_(mean).div_(std)


class Pictures:
    """One split as (float32 (3, S, S), label), the label by the class's place in `classes`.

    With a seed, chance is decided by it and the number asked for: epoch * len + index.  So a training that
    was interrupted sees the same pictures as one that was not, with any number of workers.
    """

    def __init__(self, data: Path, split: str, classes: list[str], image_size: int, seed: int | None = None):
        listed = list_images(data)[split]
        if unknown := sorted(set(listed) - set(classes)):
            mend = f"remove it, or train on it: python train.py --force --data {data}"
            raise UserError(f"{data / split / unknown[0]} is a class that the network never saw; {mend}")
        self.image_size, self.seed = image_size, seed
        self.files = [(path, classes.index(name)) for name, paths in listed.items() for path in paths]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple:
        path, label = self.files[number % len(self.files)]
        rng = None if self.seed is None else random.Random(f"{self.seed}/{number}")
        return to_normalised(images.load_known(path), self.image_size, rng), label


class EpochSampler:
    """One process's part of the images in random order, as numbers that tell the epoch, too: see Pictures."""

    def __init__(self, count: int, world_size: int, rank: int, seed: int):
        self.count, self.world_size, self.rank, self.seed, self.epoch = count, world_size, rank, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.world_size)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        shared = np.resize(order, len(self) * self.world_size)  # repeats some, so that all get as many
        return iter((self.epoch * self.count + shared[self.rank :: self.world_size]).tolist())


def make_loaders(
    data: Path, image_size: int, batch_size: int, num_workers=4, seed=0, rank=0, world_size=1, **options
) -> tuple:
    """(train loader, test loader, classes): float32 (N, 3, S, S) normalised and int64 (N,).

    `batch_size` is that of one process.  Call train_loader.sampler.set_epoch(epoch) before each epoch.  Of
    `world_size` processes each gets its own part: of the training images as many as the others, of the test
    images every one exactly once.
    """
    check_folders(data)
    classes = class_names(data)
    train = Pictures(data, "train", classes, image_size, seed)
    test = Pictures(data, "test", classes, image_size)
    sampler = EpochSampler(len(train), world_size, rank, seed)
    # A last batch of one image has no variance for batch norm: it is left out, another one in every epoch.
    drop_last = len(sampler) > batch_size and len(sampler) % batch_size == 1
    workers = affordable_workers(num_workers, world_size, batch_size, image_size)
    common = batch_size, workers, seed
    train_loader = loader(train, *common, sampler=sampler, drop_last=drop_last, **options)
    test_loader = loader(test, *common, sampler=range(rank, len(test), world_size), **options)
    return train_loader, test_loader, classes


def make_test_loader(data: Path, image_size: int, batch_size: int, classes: list[str], num_workers=0):
    """The test set in a fixed order: float32 (N, 3, S, S) normalised, int64 (N,) indices in `classes`.

    Raises UserError.
    """
    check_folders(data)
    test = Pictures(data, "test", classes, image_size)
    return loader(test, batch_size, affordable_workers(num_workers, 1, batch_size, image_size), seed=0)


@functools.lru_cache  # says it once
def affordable_workers(wanted: int, processes: int, batch_size: int, image_size: int) -> int:
    """How many worker processes can leave their batches in /dev/shm, each three; 0: this process reads."""
    shared = Path("/dev/shm")
    if not wanted or not shared.is_dir():  # not Linux
        return wanted
    free_mb, batch_mb = shutil.disk_usage(shared).free / 1e6, batch_size * 3 * image_size**2 * 4 / 1e6
    fit = min(wanted, int(free_mb / (3 * batch_mb * processes)))
    if fit < wanted:
        cause = f"/dev/shm has {free_mb:.0f} MB free, so {fit} instead of {wanted} processes read images"
        print(f"note: {cause}; docker run --shm-size=2g gives a container more", file=sys.stderr)
    return fit


def loader(dataset, batch_size: int, num_workers: int, seed: int, **options) -> typing.Any:
    """torch's DataLoader; Ctrl-C waits while its workers start: they and half an iterator would complain."""
    import torch

    class Loader(torch.utils.data.DataLoader):
        def __iter__(self):
            with uninterrupted():
                return super().__iter__()

    # Workers beyond the cores only wait here; the warning would meet every user of a small machine.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    options["generator"] = torch.Generator().manual_seed(seed)
    options["persistent_workers"] = num_workers > 0  # starting them anew costs seconds on Windows and macOS
    return Loader(dataset, batch_size, num_workers=num_workers, worker_init_fn=be_quiet, **options)


def be_quiet(worker: int) -> None:
    """In a worker: Ctrl-C is for the main process to hear; that that one has gone nobody need be told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    shown = sys.excepthook

    def show(kind, error, trace) -> None:
        if not isinstance(error, ConnectionError | EOFError):
            shown(kind, error, trace)

    sys.excepthook = show


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Around the use of a loader: what went wrong in a worker process becomes one sentence, a UserError."""
    try:
        yield
    except UserError as error:  # torch wraps it into the worker's traceback
        raise UserError(str(error).rstrip().splitlines()[-1].rpartition("UserError: ")[2]) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        mend = "perhaps for want of memory; use fewer, --workers 1, then run the same command again"
        if "shared memory" in str(error) or "Bus error" in str(error):
            mend = "since /dev/shm is full; use --workers 0, or docker run --shm-size=2g"
        raise UserError(f"a process that reads images was killed, {mend}") from error


# ---- the report


def print_overview(data: Path) -> None:
    """Print classes, counts, sizes, and what is odd but no error.  Raises UserError like check_images()."""
    sizes, listed = check_images(data), list_images(data)
    print(f"{'class':<24}{'train':>7}{'test':>7}   size in px (narrowest x lowest .. widest x highest)")
    for name in sorted(listed["train"]):
        train, test = (listed[split].get(name, []) for split in SPLITS)
        widths, heights = zip(*(sizes[path] for path in train + test), strict=True)
        span = f"{min(widths)}x{min(heights)} .. {max(widths)}x{max(heights)}"
        print(f"{name:<24}{len(train):>7}{len(test):>7}   {span}")
    train, test = (sum(map(len, listed[split].values())) for split in SPLITS)
    marked = ", sample data drawn by datasets.py" if is_sample(data) else ""
    print(f"{'all':<24}{train:>7}{test:>7}   fingerprint {fingerprint(data)}{marked}")
    for name in sorted(listed["train"].keys() - listed["test"].keys()):
        print(f"note: {data / 'test' / name} has no images: the accuracy says nothing about this class")
    if other := sorted(set(files_of(data)) - set(sizes)):
        cause = "since they are no images in a class folder"
        print(f"note: {len(other)} files aren't used, {cause}: {', '.join(map(str, other[:5]))}")
    first = {}
    for path, digest in zip(sizes, content_hashes(list(sizes)), strict=True):
        if first.setdefault(digest, path) != path:
            print(f"note: {path} is the same image as {first[digest]}")


def main() -> None:
    about = "say what images there are, or draw the sample heroes where there are none"
    parser = argparse.ArgumentParser(description=about)
    folders = "folder with train/<class>/ and test/<class>/"
    parser.add_argument("--data", type=Path, default=Path("data"), help=folders)
    draw = "draw the sample heroes; only where there are no images yet"
    parser.add_argument("--draw-sample", action="store_true", help=draw)
    parser.add_argument("--seed", type=int, default=0, help="of the drawn sample")
    args = parser.parse_args()
    if args.draw_sample:
        draw_sample(args.data, args.seed)
    elif not has_data(args.data):
        there = sorted(path.name for path in images.visible(args.data))
        holds = f", which holds {', '.join(there)}" if there else ""
        draw = "or draw the sample: python datasets.py --draw-sample"
        raise UserError(f"no images in {args.data}{holds}; {LAYOUT.format(data=args.data)}, {draw}")
    print_overview(args.data)


if __name__ == "__main__":
    run_main(main)
