"""Image folders -> batches of tensors; draws four sample heroes where there is no data at all.

Reads data/train/<class>/* and data/test/<class>/*: images of any size, in any format that Pillow reads.
Writes only to draw the sample into a folder without images; data/SAMPLE.txt then says that they are drawn.

    python datasets.py                  what is there: classes, counts, sizes, problems
    python datasets.py --draw-sample    draw the sample heroes (train.py does it where there is no data)
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)

import argparse
import collections
import itertools
import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils import images
from utils.images import MEAN, SPLITS, STD, all_images, content_hashes, fingerprint, is_sample, list_images
from utils.sample_images import LAYOUT, draw_sample, has_data
from utils.utils import UserError, run_main

DEFAULT = Path("data")


def check_folders(data: Path) -> None:
    """Raise UserError unless every class has images and every test class was trained; decodes nothing."""
    listed = list_images(data)
    for split, classes in listed.items():
        if (data / split).is_file():
            raise UserError(f"{data / split}: a file is where a folder belongs; move it away")
        if not classes:
            raise UserError(f"{data / split} holds no class folders; {LAYOUT.format(data=data)}")
        if empty := [str(data / split / name) for name, paths in classes.items() if not paths]:
            mend = "put some there, as JPEG for instance, or remove the folder, then: python datasets.py"
            raise UserError(f"no images in {', '.join(empty)}; {mend}")
    if unknown := [str(data / "test" / name) for name in listed["test"] if name not in listed["train"]]:
        mend = f"add {data / 'train'}/<the same name>/ or remove it, then: python datasets.py"
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
    return found


def ensure_data(data: Path, seed: int = 0) -> None:
    """Check the folders; draw the sample if the default one holds nothing at all.  Raises UserError."""
    if not has_data(data):
        if data != DEFAULT:
            draw = f"or draw the sample there: python datasets.py --draw-sample --data {data}"
            raise UserError(f"{data} holds no images; {LAYOUT.format(data=data)}, {draw}")
        draw_sample(data, seed)
    check_folders(data)


def describe(data: Path) -> dict:
    """What a checkpoint says of the images it was trained on."""
    listed = list_images(data)
    counts = {f"{split}_images": sum(map(len, classes.values())) for split, classes in listed.items()}
    return counts | {"fingerprint": fingerprint(data), "sample": is_sample(data)}


# ---- pictures -> tensors


def to_normalised(picture: Image.Image, image_size: int, rng: random.Random | None = None):
    """RGB image -> float32 (3, S, S), normalised; squeezed into the square: nothing is cut off.

    With a generator it is a random part of the picture, mirrored or not.
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
    mean, std = (np.array([255 * value for value in values], np.float32) for values in (MEAN, STD))
    return torch.from_numpy((np.asarray(square, dtype=np.float32) - mean) / std).permute(2, 0, 1)


class Loader:
    """One split in batches, read ahead by threads: float32 (N, 3, S, S) normalised, int64 (N,) labels.

    A label is the class's place in `classes`.  With a seed, order and pictures are varied at random, by that
    and by `epoch` alone, which the caller sets: a training that was interrupted sees the same as one that was
    not.  `part` is (rank, how many processes): each gets its own images, with a seed as many as the others,
    without one every image exactly once.  Raises UserError.
    """

    def __init__(
        self,
        data: Path,
        split: str,
        classes,
        image_size: int,
        batch_size: int,
        threads=4,
        seed=None,
        part=(0, 1),
    ):
        check_folders(data)
        listed = list_images(data)[split]
        if unknown := sorted(set(listed) - set(classes)):
            mend = f"remove it, or train on it: python train.py --force --data {data}"
            raise UserError(f"{data / split / unknown[0]} is a class that the network never saw; {mend}")
        self.files = [(path, classes.index(name)) for name, paths in listed.items() for path in paths]
        self.image_size, self.batch_size, self.threads = image_size, batch_size, threads
        self.seed, self.epoch, (self.rank, self.world_size) = seed, 0, part

    def read(self, number: int) -> tuple:
        """The picture of that number, which tells the epoch, too: epoch * images + index."""
        path, label = self.files[number % len(self.files)]
        rng = None if self.seed is None else random.Random(f"{self.seed}/{number}")
        return to_normalised(images.load_known(path), self.image_size, rng), label

    def batches(self) -> list[list[int]]:
        """The numbers of this epoch's pictures."""
        count, size = len(self.files), self.batch_size
        numbers = np.arange(count)[self.rank :: self.world_size]
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(count)
            shared = np.resize(order, -(-count // self.world_size) * self.world_size)  # as many for each
            numbers = self.epoch * count + shared[self.rank :: self.world_size]
        found = [numbers[at : at + size].tolist() for at in range(0, len(numbers), size)]
        # Batch norm needs two images: a last one alone is left out, another one in every epoch.
        return found[:-1] if self.seed is not None and len(found) > 1 and len(found[-1]) == 1 else found

    def __len__(self) -> int:
        return len(self.batches())

    def __iter__(self) -> Iterator[tuple]:
        import torch

        pool = ThreadPoolExecutor(max(1, self.threads))
        reads = ([pool.submit(self.read, number) for number in batch] for batch in self.batches())
        waiting = collections.deque(itertools.islice(reads, 2))  # batches that are read ahead
        try:
            while waiting:
                pictures, labels = zip(*(read.result() for read in waiting.popleft()), strict=True)
                waiting.extend(itertools.islice(reads, 1))
                yield torch.stack(pictures), torch.tensor(labels)
        finally:
            pool.shutdown(cancel_futures=True)


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
    files = itertools.chain(*(images.visible_files(data / split) for split in SPLITS))
    for path in sorted(set(files) - set(sizes)):
        print(f"note: {path} is not used, since it is no image in a class folder")
    first = {}
    for path, digest in zip(sizes, content_hashes(list(sizes)), strict=True):
        if first.setdefault(digest, path) != path:
            print(f"note: {path} is the same image as {first[digest]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=DEFAULT, help="folder of train/<class>/ and test/<class>/")
    add("--draw-sample", action="store_true", help="draw the sample heroes where there are no images yet")
    add("--seed", type=int, default=0, help="of the drawn sample")
    args = parser.parse_args()
    if args.draw_sample:
        draw_sample(args.data, args.seed)
    print_overview(args.data)


if __name__ == "__main__":
    run_main(main)
