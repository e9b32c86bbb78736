"""Class folders with awkward names, loaders, files of every kind, and every mistake a user can make."""

import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path, PurePath

import pytest
import torch
from conftest import NAMES, ROOT, load_test_images, paint, run_here
from PIL import Image

import datasets
from utils import images
from utils.utils import UserError, sentence

posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and names of POSIX")


# ---- names and loaders


def test_a_class_is_the_same_in_both_normal_forms(data):
    decomposed = unicodedata.normalize("NFD", NAMES[0])
    assert decomposed != NAMES[0]
    (data / "test" / NAMES[0]).rename(data / "test" / decomposed)
    datasets.ensure_data(data)
    images, labels = load_test_images(data, 32, NAMES)
    assert (
        images.shape == (2, 3, 32, 32) and images.dtype == torch.float32 and sorted(labels.tolist()) == [0, 1]
    )
    classes = list(datasets.list_images(data)["train"])
    assert classes == NAMES and all(unicodedata.is_normalized("NFC", name) for name in classes)


def test_labels_follow_the_classes_of_the_checkpoint(data):
    _, labels = load_test_images(data, 32, NAMES)
    _, turned = load_test_images(data, 32, NAMES[::-1])
    assert labels.tolist() == [0, 1] and turned.tolist() == [1, 0]
    with pytest.raises(UserError, match="Пудж"):
        load_test_images(data, 32, NAMES[:1])


def test_images_come_in_the_same_order_where_paths_fold_case(data, monkeypatch):
    expected = datasets.all_images(data)

    def folded(one: Path, other: Path) -> bool:
        return str(one).lower() < str(other).lower()

    monkeypatch.setattr(PurePath, "__lt__", folded)
    assert datasets.all_images(data) == expected and "Ёж" in str(expected[0])


def test_any_number_of_threads_reads_the_same_test_images(data):
    alone, together = (load_test_images(data, 48, NAMES, threads=count) for count in (1, 4))
    assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])


def test_a_picture_is_squeezed_into_the_square_and_normalised():
    picture = Image.new("RGB", (300, 200), (255, 0, 0))
    tensor = datasets.to_normalised(picture, 64)
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor(datasets.MEAN)) / torch.tensor(datasets.STD)
    assert tensor.shape == (3, 64, 64) and tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[:, 10, 10], expected)


def test_a_picture_becomes_the_tensor_that_torchvision_makes_of_it():
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is what it is compared with")
    picture = Image.effect_noise((50, 33), 90).convert("RGB")
    moments = ([255 * x for x in of] for of in (datasets.MEAN, datasets.STD))
    resize, to_float = v2.Resize((24, 24), antialias=True), v2.ToDtype(torch.float32)
    theirs = v2.Compose([resize, v2.ToImage(), to_float, v2.Normalize(*moments, inplace=True)])
    assert torch.equal(datasets.to_normalised(picture, 24), theirs(picture))


def test_no_batch_of_a_single_image_reaches_batch_norm(data):
    for batch_size, batches in (
        (5, [5]),
        (4, [4, 2]),
        (100, [6]),
    ):  # six images; five and one: the one waits for another epoch
        loader = datasets.Loader(data, "train", NAMES, 32, batch_size, seed=0)
        assert len(loader) == len(batches) and [len(labels) for _, labels in loader] == batches


def test_processes_share_the_test_images_without_repeating_any(data):
    paint(data / "test" / "Пудж" / "ещё.png")
    parts = [datasets.Loader(data, "test", NAMES, 32, 2, part=(rank, 2)) for rank in (0, 1)]
    assert [sum(len(labels) for _, labels in part) for part in parts] == [2, 1]
    parts = [datasets.Loader(data, "train", NAMES, 32, 2, seed=0, part=(rank, 4)) for rank in range(4)]
    numbers = [number % 6 for part in parts for batch in part.batches() for number in batch]
    assert len(numbers) == 8 and set(numbers) == set(range(6))  # six images: two are repeated


def test_the_pictures_of_an_epoch_follow_from_its_number_alone(data):
    def epoch(number: int, threads: int) -> list:
        loader = datasets.Loader(data, "train", NAMES, 32, 3, threads, seed=7)
        loader.epoch = number
        return list(loader)

    first, again, other = epoch(1, 1), epoch(1, 4), epoch(2, 4)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(first[0][0], other[0][0])


# ---- files of every kind


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
        with pytest.raises(PermissionError) as raised:
            look(data)
        assert "ещё: access is denied; change its permissions" in sentence(raised.value)
    found = []
    assert len(images.files_below(data / "train", found)) == 6 and found == [str(denied)]


def test_a_file_where_a_split_belongs_is_called_a_file(data):
    shutil.rmtree(data / "test")
    (data / "test").touch()
    with pytest.raises(UserError, match="test: a file is where a folder belongs"):
        datasets.ensure_data(data)


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
    (data / "train" / "Пудж" / "album.png").symlink_to(data / "gone")  # of a disk that is not mounted
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


# ---- mistakes


def test_an_image_that_vanishes_is_one_sentence(data):
    loader = datasets.Loader(data, "train", NAMES, 32, 2)
    (data / "train" / "Пудж" / "фото 0.png").unlink()
    with pytest.raises(UserError, match="^.*фото 0.png can't be read any more.*again$"):
        list(loader)


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
    done = run_here("datasets.py", "--data", data, ok=False)
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


def test_files_without_a_suffix_are_known_by_their_content(data):
    folder = data / "train" / "Пудж"
    paint(folder / "photo.png").rename(folder / "photo")
    (folder / "notes").write_text("no picture")
    listed = [path.name for path in datasets.all_images(data)]
    assert "photo" in listed and "notes" not in listed
