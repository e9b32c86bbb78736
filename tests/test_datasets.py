"""Class folders with awkward names, loaders, files of every kind, and every mistake a user can make."""

import os
import shutil
import signal
import subprocess
import sys
import types
import unicodedata
from pathlib import Path, PurePath

import pytest
import torch
from conftest import NAMES, ROOT, load_test_images, paint, run_here
from PIL import Image
from test_run_main import start

import datasets
from utils import images
from utils.utils import UserError

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
    _, _, classes = datasets.make_loaders(data, 32, 2, num_workers=0)
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


def test_worker_processes_read_the_same_test_images(data):
    alone, together = (load_test_images(data, 48, NAMES, num_workers=count) for count in (0, 2))
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
        loader, _, _ = datasets.make_loaders(data, 32, batch_size, num_workers=0)
        assert [len(labels) for _, labels in loader] == batches


def test_processes_share_the_test_images_without_repeating_any(data):
    paint(data / "test" / "Пудж" / "ещё.png")
    counts = [
        sum(len(labels) for _, labels in datasets.make_loaders(data, 32, 2, 0, 0, rank, 2)[1])
        for rank in (0, 1)
    ]
    assert counts == [2, 1]


# ---- files of every kind


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
    words = "DataLoader worker (pid 7) is killed by signal: Bus error. It might be out of shared memory."
    with pytest.raises(UserError, match="/dev/shm is full; use --workers 0"), datasets.readable_errors():
        raise RuntimeError(words)


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


# ---- mistakes


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


class AnswerToCtrlC:
    """As a dataset: whether the process that reads it ignores Ctrl-C."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return int(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)


def test_processes_that_read_images_leave_ctrl_c_to_the_one_that_started_them():
    assert [told.item() for told in datasets.loader(AnswerToCtrlC(), 1, num_workers=1, seed=0)] == [1]


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
