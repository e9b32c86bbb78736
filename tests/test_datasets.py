"""Class folders with awkward names, pictures of every mode, every mistake a user can make, and the drawn
sample."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load_test_images, run_script
from PIL import Image, ImageOps, PngImagePlugin
from test_run_main import start

import datasets
from utils import images
from utils.sample_images import HEROES
from utils.utils import UserError

posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and names of POSIX")
FEW = {"train": 2, "test": 1}
NAMES = ["Ёж Герой", "Пудж"]


def paint(path: Path, colour=(200, 40, 40), size=(40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """Two classes with Cyrillic names and spaces, three training images and one test image each."""
    for number, name in enumerate(NAMES):
        for index in range(3):
            paint(tmp_path / "train" / name / f"фото {index}.png", (40 + 90 * number, 60 * index, 90))
        paint(tmp_path / "test" / name / "проба 1.jpg", (40 + 90 * number, 10, 90))
    return tmp_path


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    datasets.draw_sample(folder, seed=3, counts=FEW)
    return folder


# ---------------------------------------------------------------------------------------------------- names
# and loaders


def test_a_class_is_the_same_in_both_normal_forms(data):
    decomposed = unicodedata.normalize("NFD", NAMES[0])
    assert decomposed != NAMES[0]
    (data / "test" / NAMES[0]).rename(data / "test" / decomposed)
    datasets.ensure_data(data)
    images, labels = load_test_images(data, 32, NAMES)
    assert (
        images.shape == (2, 3, 32, 32) and images.dtype == torch.float32 and sorted(labels.tolist()) == [0, 1]
    )
    _, _, classes = datasets.make_loaders(data, 32, 2, num_workers=0)
    assert classes == NAMES and all(unicodedata.is_normalized("NFC", name) for name in classes)


def test_labels_follow_the_classes_of_the_checkpoint(data):
    _, labels = load_test_images(data, 32, NAMES)
    _, turned = load_test_images(data, 32, NAMES[::-1])
    assert labels.tolist() == [0, 1] and turned.tolist() == [1, 0]
    with pytest.raises(UserError, match="Пудж"):
        load_test_images(data, 32, NAMES[:1])


def test_worker_processes_read_the_same_test_images(data):
    alone, together = (load_test_images(data, 48, NAMES, num_workers=count) for count in (0, 2))
    assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])


def test_test_transform_squeezes_and_normalises():
    picture = Image.new("RGB", (300, 200), (255, 0, 0))
    tensor = datasets.test_transform(64)(picture)
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor(datasets.MEAN)) / torch.tensor(datasets.STD)
    assert tensor.shape == (3, 64, 64) and tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[:, 10, 10], expected)


def test_no_batch_of_a_single_image_reaches_batch_norm(data):
    for batch_size, batches in (
        (5, [5]),
        (4, [4, 2]),
        (100, [6]),
    ):  # six images; five and one: the one waits for another epoch
        loader, _, _ = datasets.make_loaders(data, 32, batch_size, num_workers=0)
        assert [len(labels) for _, labels in loader] == batches


def test_processes_share_the_test_images_without_repeating_any(data):
    paint(data / "test" / "Пудж" / "ещё.png")
    counts = [
        sum(len(labels) for _, labels in datasets.make_loaders(data, 32, 2, 0, 0, rank, 2)[1])
        for rank in (0, 1)
    ]
    assert counts == [2, 1]


# -----------------------------------------------------------------------------------------------------------
# pictures


def pixel(path: Path, at=(0, 0)) -> tuple:
    image = datasets.load_rgb(path)
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


def test_what_is_no_number_or_transparent_in_deep_grey(tmp_path):
    values = np.array([[0.5, np.nan, np.inf, -np.inf, 0, 1]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "f.tif")
    assert [pixel(tmp_path / "f.tif", (x, 0))[0] for x in range(6)] == [128, 0, 255, 0, 0, 255]
    Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16)).save(tmp_path / "t.png")
    whole = (tmp_path / "t.png").read_bytes()
    chunk = b"tRNS" + struct.pack(">H", 257)  # the grey level that is transparent, put behind the header
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "t.png").write_bytes(whole[:33] + chunk + whole[33:])
    assert [pixel(tmp_path / "t.png", (x, 0))[0] for x in range(3)] == [0, 255, 255]


def test_the_pixels_decoded_at_a_time_are_bounded(tmp_path, monkeypatch):
    paths = [paint(tmp_path / f"{index}.png", size=(300, 300)) for index in range(12)]
    budget, least = images.Budget(200_000), []
    monkeypatch.setattr(images, "pixels", budget)
    really = images.to_rgb

    def slowly(image):
        least.append(budget.free)
        time.sleep(0.02)
        return really(image)

    monkeypatch.setattr(images, "to_rgb", slowly)
    assert set(images.in_threads(datasets.image_size_of, paths)) == {(300, 300)}
    assert len(least) == 12 and min(least) == 200_000 - 2 * 90_000 and budget.free == 200_000
    large = paint(tmp_path / "large.png", size=(1000, 1000))  # larger than the whole budget: alone
    assert datasets.image_size_of(large) == (1000, 1000) and budget.free == 200_000


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
    turned = datasets.load_rgb(tmp_path / "r.png")
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
    turned = datasets.load_rgb(tmp_path / "r.jpg")
    assert turned.size == (8, 16) and turned.getpixel((4, 1))[0] > 200 and turned.getpixel((4, 14))[0] < 50
    image.save(tmp_path / "d.jpg", exif=b"Exif\0\0 no TIFF at all")
    assert datasets.load_rgb(tmp_path / "d.jpg").size == (16, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "r.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "r.png"))
    assert datasets.load_rgb(tmp_path / "r.png").tobytes() == expected.tobytes()


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


# ------------------------------------------------------------------------------------------------------------
# files of every kind


def test_files_without_a_suffix_are_known_by_their_content(data):
    folder = data / "train" / "Пудж"
    paint(folder / "photo.png").rename(folder / "photo")
    (folder / "notes").write_text("no picture")
    listed = [path.name for path in datasets.all_images(data)]
    assert "photo" in listed and "notes" not in listed


def test_pictures_of_formats_that_are_not_read_are_named(data, capsys):
    for name in ("a.CR2", "b.jxl", "c.txt"):
        (data / "train" / "Пудж" / name).write_bytes(b"x")
    datasets.check_images(data)
    said = capsys.readouterr().err
    assert "2 pictures are in formats that are not read" in said and "a.CR2" in said and "c.txt" not in said
    (data / "train" / "Новый").mkdir()
    (data / "train" / "Новый" / "x.nef").write_bytes(b"x")
    with pytest.raises(
        UserError, match="no images in .*Новый but 1 in formats that are not read, as .*x.nef"
    ):
        datasets.check_folders(data)


@pytest.fixture
def denied(data):
    """A folder within a class that may not be listed; also root is kept out, by another effective user."""
    folder = data / "train" / "Пудж" / "ещё"
    paint(folder / "a.png")
    for path in (data, *data.parents[:-1]):
        path.chmod(0o755)
    folder.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)


@posix
def test_a_folder_that_may_not_be_listed_is_named_and_not_skipped(data, denied):
    for look in (datasets.list_images, datasets.check_folders, datasets.fingerprint):
        with pytest.raises(UserError, match="ещё: access is denied; change its permissions"):
            look(data)
    found = []
    assert len(images.files_below(data / "train", found)) == 6 and found == [str(denied)]


def test_a_file_where_a_split_belongs_is_called_a_file(data):
    shutil.rmtree(data / "test")
    (data / "test").touch()
    with pytest.raises(UserError, match="test: a file is where a folder belongs"):
        datasets.ensure_data(data)


def test_a_small_dev_shm_is_named_and_fewer_processes_read(data, monkeypatch, capsys):
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=64e6))
    assert datasets.affordable_workers(4, 1, 8, 512) == 0  # 25 MB a batch
    assert datasets.affordable_workers(4, 1, 8, 224) == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "/dev/shm has 64 MB free, so 0 instead of 4 processes" in said
    assert "--shm-size" in said


@posix
def test_links_are_followed_once_and_never_round(data, tmp_path_factory):
    elsewhere = paint(tmp_path_factory.mktemp("photos") / "far.png").parent
    (elsewhere / "round").symlink_to(elsewhere)
    before = len(datasets.all_images(data))
    folder = data / "train" / "Пудж"
    for number, target in enumerate((".", "..", data, Path("/"), elsewhere, elsewhere)):
        (folder / f"link {number}").symlink_to(target)
    assert len(datasets.all_images(data)) == before + 1  # far.png alone, once


@posix
def test_links_that_lead_nowhere_are_named_and_not_skipped(data):
    (data / "train" / "Ушедший").symlink_to(data / "gone")
    with pytest.raises(UserError, match="Ушедший is a link that leads nowhere"):
        datasets.ensure_data(data)
    (data / "train" / "Ушедший").rename(data / "train" / "Пудж" / "album")  # of a disk that is not mounted
    with pytest.raises(UserError, match="1 of 9 images can't be read.*\n.*album"):
        datasets.check_images(data)


@posix
def test_pipes_and_hidden_files_are_no_images_and_nothing_waits_for_them(data):
    before = datasets.all_images(data)
    os.mkfifo(data / "train" / "Пудж" / "pipe.png")
    shutil.copy(before[0], data / "train" / "Пудж" / ".hidden.png")
    for folder in (".ipynb_checkpoints", ".cache/deep"):
        (data / "train" / "Пудж" / folder).mkdir(parents=True)
        shutil.copy(before[0], data / "train" / "Пудж" / folder / "hidden.png")
    assert datasets.all_images(data) == before
    datasets.print_overview(data)


@posix
def test_names_may_be_any_bytes(data, capsys):
    name = os.fsdecode("Кафе".encode("cp1251"))
    for split in datasets.SPLITS:
        paint(data / split / name / os.fsdecode(b"\xff.png"))
    assert name in datasets.list_images(data)["train"] and len(datasets.fingerprint(data)) == 16
    environment = {**os.environ, "LC_ALL": "C"}
    command = [sys.executable, ROOT / "datasets.py", "--data", data]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"\\udcca\\udce0" in done.stdout


# ------------------------------------------------------------------------------------------------------------
# mistakes


def test_an_image_that_vanishes_is_one_sentence_also_from_a_worker_process(data):
    for workers in (0, 1):
        loader, _, _ = datasets.make_loaders(data, 32, 2, num_workers=workers)
        path = data / "train" / "Пудж" / "фото 0.png"
        content = path.read_bytes()
        path.unlink()
        sentence = "^.*фото 0.png can't be read any more.*again$"
        with pytest.raises(UserError, match=sentence) as raised, datasets.readable_errors():
            list(loader)
        assert "\n" not in str(raised.value)
        path.write_bytes(content)


def test_no_class_folders(data):
    shutil.rmtree(data / "test")
    with pytest.raises(UserError, match="test.*no class folders.*put images into"):
        datasets.ensure_data(data)


def test_an_empty_class(data):
    (data / "train" / "Пустой").mkdir()
    (data / "train" / "Пустой" / ".DS_Store").touch()
    with pytest.raises(UserError, match="no images in .*Пустой.*python datasets.py"):
        datasets.ensure_data(data)


def test_a_test_class_that_was_never_trained(data):
    paint(data / "test" / "Чужой" / "a.png")
    with pytest.raises(UserError, match="Чужой.*python datasets.py"):
        datasets.ensure_data(data)


def test_a_single_class(data):
    for split in datasets.SPLITS:
        shutil.rmtree(data / split / NAMES[0])
    with pytest.raises(UserError, match="one class only"):
        datasets.ensure_data(data)


def test_all_broken_images_are_named_at_once(data):
    (data / "train" / "Пудж" / "битый.jpg").write_bytes(b"no picture")
    whole = (data / "test" / "Пудж" / "проба 1.jpg").read_bytes()
    (data / "test" / "Пудж" / "обрезан.jpg").write_bytes(whole[: len(whole) // 2])
    done = run_script("datasets.py", "--data", data, ok=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "2 of 10 images can't be read" in done.stderr and "python datasets.py" in done.stderr
    assert str(data / "train" / "Пудж" / "битый.jpg") in done.stderr and "обрезан.jpg" in done.stderr


def test_the_report_counts_and_notes_what_is_odd(data, capsys):
    shutil.copy(data / "train" / "Пудж" / "фото 0.png", data / "test" / "Пудж" / "копия.png")
    (data / "train" / "Пудж" / "список.txt").write_text("?", encoding="utf-8")
    paint(data / "train" / "Новый" / "a.bmp", size=(300, 20))
    datasets.print_overview(data)
    said = capsys.readouterr().out
    assert "Новый                         1      0   300x20 .. 300x20" in said
    assert "копия.png is the same image as" in said and "список.txt" in said and "sample" not in said
    assert "Новый has no images: the accuracy says nothing" in said


# ----------------------------------------------------------------------------------------------------------
# the sample


def test_the_sample_is_drawn_the_same_for_the_same_seed(sample, tmp_path):
    datasets.draw_sample(tmp_path / "same", seed=3, counts=FEW)
    datasets.draw_sample(tmp_path / "other", seed=4, counts=FEW)
    assert (
        datasets.fingerprint(tmp_path / "same")
        == datasets.fingerprint(sample)
        != datasets.fingerprint(tmp_path / "other")
    )
    listed = datasets.list_images(sample)
    assert {
        split: {name: len(images) for name, images in classes.items()} for split, classes in listed.items()
    } == {split: dict.fromkeys(sorted(HEROES), count) for split, count in FEW.items()}
    assert all(200 <= side <= 700 for size in datasets.check_images(sample).values() for side in size)


def test_sample_data_is_marked_as_long_as_one_drawn_image_remains(sample, data, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(sample, folder)
    assert datasets.is_sample(folder) and not datasets.is_sample(data)
    before = datasets.fingerprint(folder)
    paint(folder / "train" / "Пудж" / "own.png")
    assert datasets.is_sample(folder) and datasets.fingerprint(folder) != before
    for image in datasets.all_images(folder):
        if image.name != "own.png":
            image.unlink()
    assert not datasets.is_sample(folder)


def test_the_sample_never_touches_own_images(data):
    before = datasets.fingerprint(data)
    with pytest.raises(UserError, match="already holds images"):
        datasets.draw_sample(data, counts=FEW)
    datasets.ensure_data(data)
    assert datasets.fingerprint(data) == before and not (data / "SAMPLE.txt").exists()
    shutil.rmtree(data / "test")
    (data / "train" / "Пудж" / "фото.heic").touch()  # not readable, and still the user's
    with pytest.raises(UserError):
        datasets.ensure_data(data)
    assert not (data / "test").exists()


def test_an_unfinished_sample_is_never_finished_over_own_images(sample, tmp_path, capsys):
    folder = tmp_path / "mixed"
    (folder / "sample.part").mkdir(parents=True)
    shutil.copytree(sample / "train", folder / "sample.part" / "train")
    shutil.copy(sample / "SAMPLE.txt", folder)
    for split in datasets.SPLITS:
        for name in "AB":
            paint(folder / split / name / "own.png", (90, 200, 10 if name == "A" else 90))
    datasets.ensure_data(folder)
    assert datasets.class_names(folder) == ["A", "B"] and "drawing" not in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="a second disk is needed")
def test_the_sample_is_drawn_onto_another_disk_too(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (tmp_path / "train").symlink_to(elsewhere)
        datasets.draw_sample(tmp_path, seed=3, counts=FEW)
        assert len(datasets.all_images(tmp_path)) == 12 and not (tmp_path / "sample.part").exists()


def test_what_cannot_be_drawn_is_not_begun(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="train: a file is where a folder belongs"):
        datasets.ensure_data(Path("data"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["train"]


def test_hidden_classes_are_a_users_too(tmp_path, monkeypatch):
    for split in datasets.SPLITS:
        for name in (".a", ".b"):
            paint(tmp_path / "data" / split / name / "x.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"train holds hidden folders only \(.a, .b\)"):
        datasets.ensure_data(Path("data"))
    assert not (tmp_path / "data" / "SAMPLE.txt").exists()


def test_an_interrupted_drawing_leaves_no_half_data_set(tmp_path):
    drawing = subprocess.Popen(
        [sys.executable, str(ROOT / "datasets.py"), "--draw-sample", "--data", str(tmp_path)],
        stderr=subprocess.PIPE,
    )
    while not list(tmp_path.glob("sample.part/train/*/*")) and drawing.poll() is None:
        time.sleep(0.05)
    drawing.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
    drawing.communicate(timeout=60)
    assert (
        drawing.returncode != 0 and not datasets.has_data(tmp_path) and not (tmp_path / "SAMPLE.txt").exists()
    )
    datasets.draw_sample(tmp_path, seed=3, counts=FEW)
    assert len(datasets.all_images(tmp_path)) == 12 and not (tmp_path / "sample.part").exists()


def test_a_drawing_interrupted_while_it_moved_into_place_is_finished(sample, tmp_path, capsys):
    folder = tmp_path / "half"
    shutil.copytree(sample, folder)
    (folder / "sample.part").mkdir()
    (folder / "test").rename(folder / "sample.part" / "test")
    datasets.ensure_data(folder, seed=3)
    assert (
        datasets.fingerprint(folder) == datasets.fingerprint(sample) and not (folder / "sample.part").exists()
    )


@pytest.mark.skipif(sys.platform != "linux", reason="worker processes are forked on Linux only")
def test_ctrl_c_while_worker_processes_start_is_quiet():
    process = start(
        """import datasets, time
from multiprocessing.process import BaseProcess
run = BaseProcess.run
BaseProcess.run = lambda self: (print("ready", flush=True), time.sleep(1), run(self))
for _ in datasets.loader(range(4), 1, num_workers=1, seed=0):
    time.sleep(20)""",
        start_new_session=True,
    )
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the worker hears it, too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == b"interrupted: run the same command again\n"
