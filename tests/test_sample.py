"""The drawn sample: the same for the same seed, marked, and never over a user's images."""

import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import paint

import datasets
from utils import sample_images
from utils.utils import UserError

FEW = {"train": 2, "test": 1}


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    datasets.draw_sample(folder, seed=3, counts=FEW)
    return folder


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
    } == {split: dict.fromkeys(sorted(sample_images.HEROES), count) for split, count in FEW.items()}
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
    assert (
        list(datasets.list_images(folder)["train"]) == ["A", "B"] and "drawing" not in capsys.readouterr().out
    )


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


def test_an_interrupted_drawing_leaves_no_half_data_set(tmp_path, monkeypatch):
    def draw_and_stop(*what):
        draw_file(*what)
        raise KeyboardInterrupt

    draw_file = sample_images.draw_file
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample_images, "draw_file", draw_and_stop)
        datasets.draw_sample(tmp_path, seed=3, counts=FEW)
    assert list(tmp_path.glob("sample.part/train/*/*"))
    assert not datasets.has_data(tmp_path) and not (tmp_path / "SAMPLE.txt").exists()
    datasets.draw_sample(tmp_path, seed=3, counts=FEW)
    assert len(datasets.all_images(tmp_path)) == 12 and not (tmp_path / "sample.part").exists()


def test_a_drawing_interrupted_while_it_moved_into_place_is_made_good(sample, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(sample, folder)
    (folder / "sample.part").mkdir()
    (folder / "test").rename(folder / "sample.part" / "test")
    assert not datasets.has_data(folder)
    datasets.draw_sample(folder, seed=3, counts=FEW)
    assert (
        datasets.fingerprint(folder) == datasets.fingerprint(sample) and not (folder / "sample.part").exists()
    )


def test_hidden_classes_are_a_users_too(tmp_path, monkeypatch):
    for split in datasets.SPLITS:
        for name in (".a", ".b"):
            paint(tmp_path / "data" / split / name / "x.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="train holds no class folders"):
        datasets.ensure_data(Path("data"))
    assert not (tmp_path / "data" / "SAMPLE.txt").exists()
