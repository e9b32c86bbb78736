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
import shutil
import signal
import sys
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path

from utils.images import (
    LAYOUT,
    MEAN,
    SPLITS,
    STD,
    all_images,
    check_nothing_else,
    content_hashes,
    draw_sample,
    fingerprint,
    has_data,
    image_or_problem,
    in_threads,
    is_sample,
    list_images,
    load_known,
    unfinished_sample,
    unread_pictures,
    visible,
    visible_files,
)
from utils.images import load_rgb as load_rgb
from utils.utils import UserError, check_folder, file_lock, run_main, uninterrupted

DEFAULT = Path("data")


def check_folders(data: Path) -> None:
    """Raise UserError unless every class has images and every test class was trained; decodes nothing."""
    listed = list_images(data)
    again = "then: python datasets.py"
    lost = [str(path) for split in SPLITS for path in visible(data / split) if not path.exists()]
    if lost:
        raise UserError(f"{', '.join(lost)} is a link that leads nowhere; mend or remove it, {again}")
    for split, classes in listed.items():
        if not classes:
            hidden = ", ".join(path.name for path in visible(data / split) if path.is_dir())
            cause = f"holds hidden folders only ({hidden})" if hidden else "holds no class folders"
            raise UserError(f"{data / split} {cause}; {LAYOUT.format(data=data)}")
    for split, classes in listed.items():
        empty = [data / split / name for name, images in classes.items() if not images]
        if empty:
            unread = unread_pictures(itertools.chain(*map(visible_files, empty)))
            cause = f" but {len(unread)} in formats that are not read, as {unread[0]}" if unread else ""
            mend = f"put some there, as JPEG for instance, or remove the folder, {again}"
            raise UserError(f"no images in {', '.join(map(str, empty))}{cause}; {mend}")
    unknown = [str(data / "test" / name) for name in listed["test"] if name not in listed["train"]]
    if unknown:
        mend = f"add {data / 'train'}/<the same name>/ or remove it, {again}"
        raise UserError(f"{', '.join(unknown)} has no counterpart to learn from; {mend}")
    if len(listed["train"]) < 2:
        cause = "holds one class only, and a network learns to tell classes apart"
        raise UserError(f"{data / 'train'} {cause}; {LAYOUT.format(data=data)}")


def image_size_of(path: Path) -> tuple[int, int] | str:
    """(width, height) after really decoding the file, or what is wrong with it."""
    found = image_or_problem(path)
    return found if isinstance(found, str) else found.size


def check_images(data: Path) -> dict[Path, tuple[int, int]]:
    """Decode every image, return their sizes; raise UserError naming all the broken ones at once."""
    check_folders(data)
    images = all_images(data)
    found = dict(zip(images, in_threads(image_size_of, images, "checking images"), strict=True))
    broken = [f"{path} ({problem})" for path, problem in found.items() if isinstance(problem, str)]
    if broken:
        count = f"{len(broken)} of {len(images)} images can't be read"
        raise UserError("\n  ".join([f"{count}; replace or delete them, then: python datasets.py", *broken]))
    if unread := unread_pictures(itertools.chain(*(visible_files(data / split) for split in SPLITS))):
        cause = "are in formats that are not read; convert them, to JPEG for instance, to use them"
        print(f"note: {len(unread)} pictures {cause}: {', '.join(unread[:5])}", file=sys.stderr)
    return found


def ensure_data(data: Path, seed: int = 0) -> None:
    """Check the folders; draw the sample if the default one holds nothing at all.  Raises UserError."""
    if unfinished_sample(data) or not has_data(data):
        if data != DEFAULT and not unfinished_sample(data):
            what = "holds no images" if data.exists() else "does not exist"
            draw = f"or draw the sample there: python datasets.py --draw-sample --data {data}"
            raise UserError(f"{data} {what}; {LAYOUT.format(data=data)}, {draw}")
        draw_once(data, seed)
    check_folders(data)


def draw_once(data: Path, seed: int) -> None:
    """Draw the sample, or wait for another process that is drawing it.  Raises UserError."""
    check_folder(data, room_mb=50)
    check_nothing_else(data)
    with file_lock(data / ".draw.lock", "drawing the sample", patience=300):
        if unfinished_sample(data) or not has_data(data):
            where = f"your own: {LAYOUT.format(data=data)}"
            print(f"no images in {data}: drawing the sample heroes ({where})", flush=True)
            draw_sample(data, seed)


def class_names(data: Path) -> list[str]:
    """The classes in the order of a network's outputs."""
    return sorted(list_images(data)["train"])


def describe(data: Path) -> dict:
    """What a checkpoint says of the images it was trained on."""
    listed = list_images(data)
    counts = {f"{split}_images": sum(map(len, classes.values())) for split, classes in listed.items()}
    return counts | {"fingerprint": fingerprint(data), "sample": is_sample(data)}


# ---- pictures -> tensors


def compose(*first):
    """torchvision transforms, after which the picture becomes float32 (3, S, S), normalised."""
    import torch
    from torchvision.transforms import v2

    mean, std = ([255 * value for value in values] for values in (MEAN, STD))  # on 0..255: spares a pass
    last = [v2.ToImage(), v2.ToDtype(torch.float32), v2.Normalize(mean, std, inplace=True)]
    return v2.Compose([*first, *last])


def test_transform(image_size: int):
    """PIL RGB image -> float32 (3, S, S), normalised; squeezed into the square: nothing is cut off."""
    from torchvision.transforms import v2

    return compose(v2.Resize((image_size, image_size), antialias=True))


test_transform.__test__ = False  # its name is part of the interface, pytest must not take it for a test


def train_transform(image_size: int):
    """The same with mild augmentation: on a CPU the readers take their time from the training itself."""
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(image_size, scale=(0.75, 1.0), ratio=(0.9, 1.1), antialias=True)
    return compose(crop, v2.RandomHorizontalFlip())


class Pictures:
    """One split as (float32 (3, S, S), label), the label by the class's place in `classes`.

    With a seed, chance is decided by it and the number asked for: epoch * len + index.  So a training that
    was interrupted sees the same pictures as one that was not, with any number of workers.
    """

    def __init__(self, data: Path, split: str, classes: list[str], transform, seed: int | None = None):
        listed = list_images(data)[split]
        if unknown := sorted(set(listed) - set(classes)):
            mend = f"remove it, or train on it: python train.py --force --data {data}"
            raise UserError(f"{data / split / unknown[0]} is a class that the network never saw; {mend}")
        self.transform, self.seed = transform, seed
        self.files = [(path, classes.index(name)) for name, images in listed.items() for path in images]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple:
        path, label = self.files[number % len(self.files)]
        if self.seed is not None:
            import torch

            torch.default_generator.manual_seed((self.seed * 1_000_003 + number) % 2**32)
        return self.transform(load_known(path)), label


class EpochSampler:
    """DistributedSampler's indices as numbers that tell the epoch, too: see Pictures."""

    def __init__(self, dataset: Pictures, world_size: int, rank: int, seed: int):
        from torch.utils.data.distributed import DistributedSampler

        options: dict = {"shuffle": True, "seed": seed}
        self.indices = DistributedSampler(typing.cast(typing.Any, dataset), world_size, rank, **options)
        self.set_epoch, self.images = self.indices.set_epoch, len(dataset)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return (self.indices.epoch * self.images + index for index in self.indices)


def make_loaders(
    data: Path,
    image_size: int,
    batch_size: int,
    num_workers=4,
    seed=0,
    rank=0,
    world_size=1,
    pin_memory=False,
) -> tuple:
    """(train loader, test loader, classes): float32 (N, 3, S, S) normalised and int64 (N,).

    `batch_size` is that of one process.  Call train_loader.sampler.set_epoch(epoch) before each epoch.  Of
    `world_size` processes each gets its own part: of the training images as many as the others
    (DistributedSampler repeats some), of the test images every one exactly once.
    """
    check_folders(data)
    classes = class_names(data)
    train = Pictures(data, "train", classes, train_transform(image_size), seed)
    test = Pictures(data, "test", classes, test_transform(image_size))
    sampler = EpochSampler(train, world_size, rank, seed)
    # A last batch of one image has no variance for batch norm: it is left out, another one in every epoch.
    drop_last = len(sampler) > batch_size and len(sampler) % batch_size == 1
    workers = affordable_workers(num_workers, world_size, batch_size, image_size)
    common = {"seed": seed, "pin_memory": pin_memory}
    train_loader = loader(train, batch_size, workers, sampler=sampler, drop_last=drop_last, **common)
    test_loader = loader(test, batch_size, workers, sampler=range(rank, len(test), world_size), **common)
    return train_loader, test_loader, classes


def make_test_loader(data: Path, image_size: int, batch_size: int, classes: list[str], num_workers=0):
    """The test set in a fixed order: float32 (N, 3, S, S) normalised, int64 (N,) indices in `classes`.

    Raises UserError.
    """
    check_folders(data)
    test = Pictures(data, "test", classes, test_transform(image_size))
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


class Loader:
    """torch's DataLoader; Ctrl-C waits while its workers start: they and half an iterator would complain."""

    def __init__(self, dataset, **options):
        from torch.utils.data import DataLoader

        self.batches = DataLoader(dataset, **options)
        self.dataset, self.sampler = dataset, self.batches.sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        with uninterrupted():
            return iter(self.batches)


def loader(dataset, batch_size: int, num_workers: int, seed: int, **options) -> Loader:
    import torch

    # Workers beyond the cores only wait here; the warning would meet every user of a small machine.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    options["generator"] = torch.Generator().manual_seed(seed)
    options["persistent_workers"] = num_workers > 0  # starting them anew costs seconds on Windows and macOS
    return Loader(dataset, batch_size=batch_size, num_workers=num_workers, worker_init_fn=be_quiet, **options)


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
            mend = (
                "since /dev/shm is full; use --workers 0, or give a container more: docker run --shm-size=2g"
            )
        raise UserError(f"a process that reads images was killed, {mend}") from error


# ---- the report


def print_overview(data: Path) -> None:
    """Print classes, counts, sizes, and what is odd but no error.  Raises UserError like check_images()."""
    sizes, listed = check_images(data), list_images(data)
    print(f"{'class':<24}{'train':>7}{'test':>7}   size in px (narrowest x lowest .. widest x highest)")
    for name in sorted(listed["train"]):
        images = listed["train"][name] + listed["test"].get(name, [])
        widths, heights = zip(*(sizes[path] for path in images), strict=True)
        count = [len(listed[split].get(name, [])) for split in SPLITS]
        span = f"{min(widths)}x{min(heights)} .. {max(widths)}x{max(heights)}"
        print(f"{name:<24}{count[0]:>7}{count[1]:>7}   {span}")
    total = [sum(map(len, listed[split].values())) for split in SPLITS]
    marked = ", sample data drawn by datasets.py" if is_sample(data) else ""
    print(f"{'all':<24}{total[0]:>7}{total[1]:>7}   fingerprint {fingerprint(data)}{marked}")
    for problem in oddities(data, listed):
        print(f"note: {problem}")


def oddities(data: Path, listed: dict[str, dict[str, list[Path]]]) -> list[str]:
    untested = [data / "test" / name for name in listed["train"] if name not in listed["test"]]
    found = [f"{path} has no images: the accuracy says nothing about this class" for path in untested]
    images = all_images(data)
    visible = itertools.chain(*(visible_files(data / split) for split in SPLITS))
    if other := sorted(set(visible) - set(images)):
        cause = "since they are no images in a class folder"
        found.append(f"{len(other)} files aren't used, {cause}: {', '.join(map(str, other[:5]))}")
    first = {}
    for path, digest in zip(images, content_hashes(images), strict=True):
        if first.setdefault(digest, path) != path:
            found.append(f"{path} is the same image as {first[digest]}")
    return found


def main() -> None:
    about = "say what images there are, or draw the sample heroes where there are none"
    parser = argparse.ArgumentParser(description=about)
    folders = "folder with train/<class>/ and test/<class>/"
    parser.add_argument("--data", type=Path, default=Path("data"), help=folders)
    draw = "draw the sample heroes; only where there are no images yet"
    parser.add_argument("--draw-sample", action="store_true", help=draw)
    parser.add_argument("--seed", type=int, default=0, help="of the drawn sample")
    args = parser.parse_args()
    if unfinished_sample(args.data) or (args.draw_sample and not is_sample(args.data)):
        check_folder(args.data, room_mb=50)
        with file_lock(args.data / ".draw.lock", "drawing the sample"):
            draw_sample(args.data, args.seed)
    if not has_data(args.data):
        check_nothing_else(args.data)
        draw = "or draw the sample: python datasets.py --draw-sample"
        raise UserError(f"no images in {args.data}; {LAYOUT.format(data=args.data)}, {draw}")
    print_overview(args.data)


if __name__ == "__main__":
    run_main(main)
