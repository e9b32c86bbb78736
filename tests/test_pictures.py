"""Pictures of every mode and format as the loader reads them."""

import struct
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import paint
from PIL import Image, ImageOps, PngImagePlugin

import datasets
from utils import images


def pixel(path: Path, at=(0, 0)) -> tuple:
    image = images.load_rgb(path)
    assert image.mode == "RGB"
    return image.getpixel(at)


def test_transparent_pixels_become_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.putpixel((0, 0), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    image.save(tmp_path / "a.png")
    assert [pixel(tmp_path / "a.png", (x, 0)) for x in range(3)] == [
        (255, 255, 255),
        (255, 127, 127),
        (255, 0, 0),
    ]
    Image.new("LA", (8, 8), (90, 0)).save(tmp_path / "la.png")
    assert pixel(tmp_path / "la.png") == (255, 255, 255)


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "p.png")
    image.save(tmp_path / "t.png", transparency=0)
    assert [pixel(tmp_path / "p.png", (x, 0)) for x in range(2)] == [(0, 0, 0), (10, 200, 30)]
    assert [pixel(tmp_path / "t.png", (x, 0)) for x in range(2)] == [(255, 255, 255), (10, 200, 30)]


def test_grey_of_8_and_16_bits(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "l.png")
    assert pixel(tmp_path / "l.png") == (77, 77, 77)
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert [pixel(tmp_path / name, (x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_pixels_that_are_no_whole_numbers_are_refused_in_a_sentence(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "f.tif")
    assert "floating-point numbers; save it with 8 or 16 bits" in images.image_or_problem(tmp_path / "f.tif")


def test_huge_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    paths = [paint(tmp_path / f"{index}.png", size=(300, 300)) for index in range(6)]
    monkeypatch.setattr(images, "HUGE", 80_000)
    really, going, most = images.to_rgb, [], []

    def slowly(image):
        going.append(image)
        time.sleep(0.02)
        most.append(len(going))
        return really(going.pop())

    monkeypatch.setattr(images, "to_rgb", slowly)
    assert set(images.in_threads(datasets.image_size_of, paths)) == {(300, 300)}
    assert most == [1] * 6


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.tif")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=95)
    assert pixel(tmp_path / "c.tif") == (255, 0, 0)
    assert np.abs(np.subtract(pixel(tmp_path / "c.jpg"), (255, 0, 0))).max() < 6


def test_exif_rotation(tmp_path):
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))  # the left half; orientation 6 means: turn clockwise to look at it
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "r.png", exif=exif)
    turned = images.load_rgb(tmp_path / "r.png")
    assert (
        turned.size == (8, 16)
        and turned.getpixel((4, 1)) == (255, 255, 255)
        and turned.getpixel((4, 14)) == (0, 0, 0)
    )


def test_odd_exif_turns_the_picture_and_is_left_alone(tmp_path):
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    # A TIFF header; orientation 6, and XResolution as a BYTE, which Pillow reads but can't write again.
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x011A, 1, 1, 7)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    image.save(tmp_path / "r.jpg", exif=exif, quality=95)
    turned = images.load_rgb(tmp_path / "r.jpg")
    assert turned.size == (8, 16) and turned.getpixel((4, 1))[0] > 200 and turned.getpixel((4, 14))[0] < 50
    image.save(tmp_path / "d.jpg", exif=b"Exif\0\0 no TIFF at all")
    assert images.load_rgb(tmp_path / "d.jpg").size == (16, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "r.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "r.png"))
    assert images.load_rgb(tmp_path / "r.png").tobytes() == expected.tobytes()


def test_long_texts_and_profiles_in_a_png_are_no_hindrance(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("history", "edited " * 400_000, zip=True)
    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "a.png", pnginfo=texts, icc_profile=bytes(3_000_000))
    assert pixel(tmp_path / "a.png") == (9, 8, 7)


def test_photos_of_an_iphone_are_read(data):
    pillow_heif = pytest.importorskip("pillow_heif")
    path = data / "train" / "Пудж" / "IMG_0001.HEIC"
    picture = Image.new("RGB", (64, 48), (200, 40, 40))
    pillow_heif.from_pillow(picture).save(path, quality=95)
    assert path in datasets.all_images(data)
    assert np.abs(np.subtract(pixel(path, (20, 20)), (200, 40, 40))).max() < 8
    renamed = path.rename(path.with_name("photo.jpg"))  # as some programs call it
    assert datasets.image_size_of(renamed) == (64, 48)
