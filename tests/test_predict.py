"""predict.py: a folder of images -> labels.csv, whatever lies among them and however it is interrupted."""

import csv
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import torch
from conftest import images_of, load_test_images, run_here, run_script, start_script
from filelock import FileLock
from PIL import Image
from test_choices import table

import model
import predict
from utils.backend import Backend, Unavailable
from utils.serve import choices, labels
from utils.utils import sha256


def label(folder: Path, project: Path, *arguments, ok: bool = True, out: str = "labels.csv"):
    """Run predict.py's main() here on a folder; what it did and the rows it left."""
    given = {"weights": project / "weights", "results": folder.parent / "no results", "device": "cpu"}
    options = [text for name, value in given.items() for text in (f"--{name}", value)]
    out = folder.parent / out
    return run_here("predict.py", folder, "--out", out, *options, *arguments, ok=ok), read(out)


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def expected(project) -> list[str]:
    """The class of every photo by PyTorch FP32 on the loader's tensors, in the order of their paths."""
    network, facts = model.load(project / "weights" / "best_resnet18_64.pth", "cpu")
    images, _ = load_test_images(project / "data", 64, facts["classes"])
    with torch.inference_mode():
        return [facts["classes"][k] for k in network(images[::4]).argmax(1)]


def test_every_image_has_its_row_in_order(project, photos, expected):
    done, rows = label(photos, project, "--probabilities")
    assert [Path(row["path"]) for row in rows] == images_of(photos)
    assert [row["class"] for row in rows] == expected
    classes = model.load_facts(project / "weights" / "best_resnet18_64.pth")["classes"]
    for row in rows:
        shares = {name: float(row[name]) for name in classes}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert max(shares, key=shares.get) == row["class"] and shares[row["class"]] == float(
            row["probability"]
        )
    assert "25 images in" in done.stdout and "bottleneck: " in done.stdout
    assert sorted(path.name for path in photos.parent.iterdir()) == ["labels.csv", "photos"]


@pytest.mark.parametrize("bias", [float("nan"), float("inf")])
def test_what_a_network_gives_no_finite_numbers_for_is_named_and_has_no_row(project, photos, tmp_path, bias):
    weights = Path(shutil.copytree(project / "weights", tmp_path / "weights"))
    known = torch.load(str(weights / "best_resnet18_64.pth"), weights_only=True)
    known["model"]["fc.bias"][1] = bias
    torch.save(known, weights / "best_resnet18_64.pth")
    done, rows = label(photos / "Пудж", project, "--weights", weights, ok=False)
    assert done.returncode == 1 and rows == []
    told = ": the network gives no finite numbers for it; try --backend pytorch, or python train.py --force"
    assert done.stderr.count(told) == len(list((photos / "Пудж").iterdir())) > 0
    assert "Warning" not in done.stderr


def test_broken_files_are_named_and_the_exit_code_is_1(project, photos, expected, broken):
    for path in broken.values():
        target = photos / "deep" / "er" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            shutil.copy(path, target)
    done, rows = label(photos, project, ok=False)
    assert done.returncode == 1 and len(rows) == 25
    assert [row["class"] for row in rows] == expected
    named = [line for line in done.stderr.splitlines() if line.startswith("  ") and ": " in line]
    assert len(named) == 9 and "9 files or folders can't be read" in done.stderr


def interrupted(project: Path, photos: Path, out: str) -> Path:
    """The part that predict.py leaves where Ctrl-C comes after its first batch."""
    write_rows = labels.write_rows

    def write_and_stop(path, rows, mode="w"):
        write_rows(path, rows, mode)
        if mode == "a":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "write_rows", write_and_stop)
        assert label(photos, project, ok=False, out=out)[0].returncode == 130
    (part,) = photos.parent.glob(f"{out}.*.part0")
    return part


def test_interrupted_at_any_byte_it_goes_on(project, photos, expected):
    _, whole = label(photos, project)
    text = (photos.parent / "labels.csv").read_bytes().split(b"\n", 1)[1]
    part = interrupted(project, photos, "again.csv")
    assert 0 < part.stat().st_size < len(text) and text.startswith(part.read_bytes())
    part.write_bytes(text[: len(text) * 2 // 3])  # cut within a row, as a full disk would
    done, rows = label(photos, project, out="again.csv")
    assert re.search("resuming: 1[567] rows", done.stdout) and rows == whole
    assert not list(photos.parent.glob("*.part*"))


def test_a_killed_worker_is_one_sentence_and_the_rows_stay(project, photos):
    many, out = photos.parent / "many", photos.parent / "many.csv"
    for k in range(30):  # more than a few: decoded by processes
        shutil.copytree(photos, many / str(k))
    where = ["--out", out, "--weights", project / "weights", "--results", many, "--device", "cpu"]
    started = start_script("predict.py", many, *where, stderr=subprocess.PIPE)
    while not (parts := [part for part in out.parent.glob("many.csv.*.part0") if part.stat().st_size]):
        assert started.poll() is None
        time.sleep(0.02)
    family = psutil.Process(started.pid).children(recursive=True)
    next(process for process in family if process.ppid() != started.pid).kill()  # one that the server started
    _, said = started.communicate(timeout=60)
    assert started.returncode == 2 and parts[0].stat().st_size
    assert said.decode().startswith("error: a worker process was killed") and said.count(b"\n") == 1


def test_other_settings_start_anew_and_another_folders_rows_stay(project, photos):
    out = photos.parent / "labels.csv"
    own = interrupted(project, photos, out.name)
    source, _, settings = own.name.removeprefix("labels.csv.").removesuffix(".part0").partition("-")
    part, others = (out.with_name(f"labels.csv.{key}.part0") for key in (f"{source}-0", f"0-{settings}"))
    for path in (part, others):  # of another checkpoint, backend or option; of another folder
        path.write_text("photos/a.jpg,Nobody,0.9\n", encoding="utf-8")
    own.unlink()
    done, rows = label(photos, project)
    assert "resuming" not in done.stdout and len(rows) == 25 and not part.exists() and others.exists()


def test_a_second_run_for_the_same_table_is_refused(project, photos, monkeypatch):
    monkeypatch.setattr(labels, "alone_at", functools.partial(labels.alone_at, patience=0.1))
    with FileLock(photos.parent / "labels.csv.lock"):
        done, rows = label(photos, project, ok=False)
    assert done.returncode == 2 and "another process is writing labels.csv" in done.stderr and not rows


def test_a_file_that_changed_meanwhile_is_read_anew(project, photos):
    _, whole = label(photos, project)
    part = interrupted(project, photos, "again.csv")
    part.write_bytes((photos.parent / "labels.csv").read_bytes().split(b"\n", 1)[1])
    first, other = whole[0], next(row for row in whole if row["class"] != whole[0]["class"])
    time.sleep(0.1)
    shutil.copyfile(other["path"], first["path"])
    done, rows = label(photos, project, out="again.csv")
    assert "resuming: 24" in done.stdout and rows[0]["class"] == other["class"] and rows[1:] == whole[1:]


def test_names_that_csv_and_utf_8_find_hard(project, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    names = ['a "quoted", name.png', "Пудж.png", "e\u0301.png"]
    if sys.platform == "linux":
        names += ["two\nlines.png", "a\rb.png", os.fsdecode(b"\xff\xfe.png")]
    for name in names:
        Image.new("RGB", (9, 7), "red").save(folder / name)
    _, rows = label(folder, project)
    assert sorted(row["path"] for row in rows) == sorted(str(folder / name) for name in names)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names have one encoding")
def test_a_locale_without_cyrillic_gives_the_same_table(project, photos):
    label(photos, project)
    where = ["--out", photos.parent / "ascii.csv", "--weights", project / "weights"]
    run_script("predict.py", photos, *where, "--results", photos, "--device", "cpu", LC_ALL="C")
    table = (photos.parent / "ascii.csv").read_bytes()
    assert table == (photos.parent / "labels.csv").read_bytes() and "Пудж".encode() in table


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], "missing is not there"),
        (["weights"], "holds no images"),
        (["data/test", "--backend", "fastest"], "argument --backend: invalid choice: 'fastest'"),
        (
            ["data/test", "--backend", "pytorch-fp16-graph"],
            "pytorch-fp16-graph can't serve: CUDA graphs need",
        ),
        (["data/test", "--weights", "data"], "holds no checkpoint; train one: python train.py"),
        (["data/test", "--weights", "data/SAMPLE.txt"], "SAMPLE.txt holds no checkpoint; train one"),
        (["data/test", "--image-size", "96"], "python train.py --image-sizes 96"),
        (["data/test", "--batch-size", "0"], "--batch-size: a whole number from 1"),
        (
            ["data/test", "--out", "data"],
            f"data is a folder; name a file in it: --out {Path('data/labels.csv')}",
        ),
        (["data/test", "--out", ""], "is a folder; name a file in it: --out labels.csv"),
        (["data/test", "--out", "weights/best_resnet18_64.pth"], "pth is there and no table of this script"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_sentence(project, arguments, said):
    before = sha256(project / "weights" / "best_resnet18_64.pth")
    run = run_script if arguments == ["missing"] else run_here
    done = run("predict.py", "--out", "no.csv", "--device", "cpu", *arguments, cwd=project, ok=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not list(project.glob("no.csv*"))
    assert sha256(project / "weights" / "best_resnet18_64.pth") == before


def test_the_last_line_says_where_the_time_went(project, photos, monkeypatch):
    timings, clock = photos.parent / "timings.json", itertools.count(time.time(), -3600)
    monkeypatch.setattr(time, "time", lambda: next(clock))  # it is being set back
    done, _ = label(photos, project, "--timings", timings)
    assert re.search(
        r"25 images in [\d.]+ s: start [\d.]+ s, decoding [\d.]+ s, inference [\d.]+ s", done.stdout
    )
    assert re.search(r"\nbottleneck: (start|decoding|inference)\n", done.stdout)
    told = json.loads(timings.read_text("utf-8"))
    assert told["images"] == 25 and told["start"] + told["decoding"] + told["inference"] <= told["seconds"]


def test_readings_of_a_clock_that_are_equal_are_no_division_by_zero(tmp_path, capsys):
    told = {"images": 3, "problems": {}, "seconds": 1.0, "spent": dict.fromkeys(predict.STEPS, 1.0)}
    assert predict.report([told], 3, {}, tmp_path / "labels.csv", None) == 0
    assert "3 images in 1.0 s" in capsys.readouterr().out


def test_where_int8_has_no_images_to_be_made_of_the_next_fastest_serves(project, photos, tmp_path):
    results, weights = tmp_path / "results", Path(shutil.copytree(project / "weights", tmp_path / "weights"))
    results.mkdir()
    table(results, **{"onnx-int8": 9e9, "pytorch": 9.0})
    where = {"--results": results, "--weights": weights, "--data": tmp_path / "none"}
    done, rows = label(photos, project, *itertools.chain(*where.items()))
    assert "onnx-int8 can't serve: " in done.stdout and "the next one by the table is pytorch" in done.stdout
    assert len(rows) == 25


@pytest.mark.parametrize(("measured", "asked"), [(True, None), (False, "data")])
def test_int8_serves_as_it_was_measured_whatever_images_came_since(monkeypatch, measured, asked):
    class Int8(Backend):
        def load(self, *_):
            seen.append(self.data)
            raise Unavailable("no INT8 network of this checkpoint is there")

        def predict(self, x):
            return x

    seen, args = [], types.SimpleNamespace(data="data")
    monkeypatch.setattr(predict.backends, "make", lambda name: Int8())
    choice = choices.Choice("onnx-int8", 4, (4,), measured)
    run = predict.Run(args, Path("best_resnet18_64.pth"), {"image_size": 64}, choice, "cpu", "pillow")
    with pytest.raises(Unavailable):
        run.load()
    assert seen == [asked]


def test_a_batch_that_does_not_fit_into_memory_is_halved_until_it_does(project, photos, monkeypatch):
    from utils.serve.pipeline import Network

    enqueue, asked = Network.enqueue, []

    def short_of_memory(self, pixels):
        asked.append(len(pixels))
        if len(pixels) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return enqueue(self, pixels)

    monkeypatch.setattr(Network, "enqueue", short_of_memory)
    done, rows = label(photos, project)
    assert len(rows) == 25 and asked[:4] == [13, 6, 3, 3]
    assert "batch 13 does not fit into the memory; trying 6" in done.stdout
    done, _ = label(photos, project, "--batch-size", 8, ok=False)
    said = r"error: batch 8: CUDA out of memory.*go on with a smaller --batch-size"
    assert done.returncode == 2 and re.match(said, done.stderr)


def test_a_row_that_went_missing_on_the_way_is_said(project, photos, monkeypatch):
    write_rows, lost = labels.write_rows, []

    def lose_one(path, rows, mode="w"):
        rows = list(rows)
        lost.extend(rows[:1] if mode == "a" and not lost else [])
        write_rows(path, [row for row in rows if row not in lost], mode)

    monkeypatch.setattr(labels, "write_rows", lose_one)
    done, rows = label(photos, project, ok=False)
    assert done.returncode == 1 and len(rows) == 24
    assert f"{lost[0][0]}: its row is gone; run the same command again" in done.stderr


def test_what_is_no_picture_or_can_not_be_read_is_said(project, photos, monkeypatch):
    shutil.copy(next(photos.rglob("*.jpg")), photos / "without suffix")
    for name in ("a.CR2", "b.jxl", "notes.txt", ".hidden.jpg"):  # of these only pictures are named
        (photos / name).write_bytes(b"something")
    done, rows = label(photos, project, ok=False)
    assert done.returncode == 1 and len(rows) == 26
    assert "2 files or folders can't be read" in done.stderr
    assert "1 files in" in done.stdout and "are no pictures" in done.stdout
    assert "a.CR2: pictures of this format are not read here" in done.stderr and "b.jxl: " in done.stderr
    denied = photos / "closed"
    denied.mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path) == denied:  # root may list any folder
            raise PermissionError(13, "Permission denied", str(denied))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert choices.find_images(photos)[1][str(denied)].startswith("this folder can't be listed")


@pytest.mark.skipif(not importlib.util.find_spec("pillow_heif"), reason="pillow-heif is not installed")
def test_an_iphones_photos_are_labelled(project, photos, expected):
    import pillow_heif

    pillow_heif.register_heif_opener()
    folder = photos.parent / "iphone"
    folder.mkdir()
    with Image.open(next(photos.rglob("*.png"))) as image:
        image.convert("RGB").save(folder / "IMG_1.HEIC", quality=-1)
    _, rows = label(folder, project)
    assert [Path(row["path"]).name for row in rows] == ["IMG_1.HEIC"]


def test_a_byte_order_mark_for_excel_is_there_if_asked_for(project, photos):
    label(photos, project, "--excel")
    table = (photos.parent / "labels.csv").read_bytes()
    assert table.startswith(b"\xef\xbb\xbfpath,class,probability\n")
    label(photos, project)  # over it, since it is a table of this script
    assert (photos.parent / "labels.csv").read_bytes() == table[3:]
