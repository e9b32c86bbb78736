"""Mutated image files: each is read or refused in a sentence; what is read is read again the same."""

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
from utils.images import image_or_problem

FORMATS = {
    "png": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"],
    "jpg": ["RGB", "L", "CMYK"],
    "gif": ["P"],
    "bmp": ["RGB", "L"],
    "tif": ["RGB", "F", "I;16"],
    "webp": ["RGB", "RGBA"],
}


def originals() -> list[tuple[str, bytes]]:
    """(suffix, content) of a small picture in every format and mode."""
    found = []
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    for suffix, modes in FORMATS.items():
        for mode in modes:
            if mode == "I;16":
                image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
            else:
                image = Image.fromarray(pixels).convert(mode)
            image.save(written := io.BytesIO(), Image.registered_extensions()[f".{suffix}"])
            found.append((suffix, written.getvalue()))
    return found


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, a piece cut out, doubled or zeroed, or the end missing."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, length = rng.randrange(len(data)), rng.randint(1, 24)
        kind = rng.choice(["byte", "bit", "cut", "double", "zero", "end"])
        if kind == "byte":
            data[at] = rng.randrange(256)
        elif kind == "bit":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


def fuzz(folder: Path, count: int, seed: int) -> tuple[int, int]:
    """How many mutations were read and how many refused."""
    rng, samples, read = random.Random(seed), originals(), 0
    for number in range(count):
        suffix, content = samples[number % len(samples)]
        path = folder / f"image.{suffix}"
        path.write_bytes(mutated(content, rng))
        found = image_or_problem(path)
        if isinstance(found, str):
            assert found.strip(), path
            continue
        read += 1
        assert found.mode == "RGB" and datasets.to_normalised(found, 32).isfinite().all()
        assert image_or_problem(path).tobytes() == found.tobytes()
    return read, count - read


@pytest.mark.parametrize(
    "count, seed", [(800, 0), pytest.param(40_000, 1, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_no_mutation_crashes_the_loader(tmp_path, count, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it then refuses or repairs
        read, refused = fuzz(tmp_path, count, seed)
    assert read > count / 20 and refused > count / 20  # both ways are really tried
