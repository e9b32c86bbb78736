"""predict.py: a folder of images -> labels.csv, whatever lies among them and however it is interrupted."""

import contextlib
import csv
import functools
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, load_test_images, run_script
from filelock import FileLock
from PIL import Image
from test_choices import table
from test_pipeline import broken  # noqa: F401  (a fixture)

import model
import predict
from utils import environment
from utils.backend import Backend, Unavailable
from utils.serve import choices, labels
from utils.utils import UserError, sha256


def label(folder: Path, project: Path, *arguments, ok: bool = True, out: str = "labels.csv"):
    """Run predict.py's main() here on a folder; what it did and the rows it left."""
    out = folder.parent / out
    options = {"weights": project / "weights", "results": folder.parent / "no results", "device": "cpu"}
    for name, value in zip(arguments[::2], arguments[1::2], strict=False):
        options.pop(str(name).removeprefix("--"), value)
    given = [text for name, value in options.items() for text in (f"--{name}", value)]
    said, wrong = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", list(map(str, ["predict.py", folder, "--out", out, *given, *arguments])))
        with contextlib.redirect_stderr(wrong), pytest.raises(SystemExit) as left:
            predict.main()
    done = types.SimpleNamespace(returncode=left.value.code, stdout=said.getvalue(), stderr=wrong.getvalue())
    assert not ok or done.returncode == 0, done
    return done, read(out)


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def photos(project, tmp_path) -> Path:
    return Path(shutil.copytree(project / "data" / "test", tmp_path / "photos"))


@pytest.fixture(scope="module")
def expected(project) -> list[str]:
    """The class of every test image by PyTorch FP32 on the loader's tensors, in the order of their paths."""
    network, facts = model.load(project / "weights" / "best_resnet18_64.pth", "cpu")
    images, _ = load_test_images(project / "data", 64, facts["classes"])
    return [facts["classes"][k] for k in network(images).argmax(1)]


def test_every_image_has_its_row_in_order(project, photos, expected):
    done, rows = label(photos, project, "--probabilities")
    assert [Path(row["path"]) for row in rows] == sorted(path for path in photos.rglob("*") if path.is_file())
    assert [row["class"] for row in rows] == expected
    classes = model.load_facts(project / "weights" / "best_resnet18_64.pth")["classes"]
    for row in rows:
        shares = {name: float(row[name]) for name in classes}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert max(shares, key=shares.get) == row["class"] and shares[row["class"]] == float(
            row["probability"]
        )
    assert "100 images in" in done.stdout and "bottleneck: " in done.stdout
    assert sorted(path.name for path in photos.parent.iterdir()) == ["labels.csv", "photos"]


def test_broken_files_are_named_and_the_exit_code_is_1(project, photos, expected, broken):  # noqa: F811
    for path in broken.values():
        target = photos / "deep" / "er" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            shutil.copy(path, target)
    done, rows = label(photos, project, ok=False)
    assert done.returncode == 1 and len(rows) == 100
    assert [row["class"] for row in rows] == expected
    named = [line for line in done.stderr.splitlines() if line.startswith("  ") and ": " in line]
    assert len(named) == 9 and "9 files or folders can't be read" in done.stderr


def test_interrupted_at_any_byte_it_goes_on(project, photos, expected):
    _, whole = label(photos, project)
    out = photos.parent / "again.csv"
    text = (photos.parent / "labels.csv").read_bytes().split(b"\n", 1)[1]
    started = start(project, photos, out)
    key_part = wait_for_part(out)
    started.kill()
    started.wait()
    key_part.write_bytes(text[: len(text) * 2 // 3])  # cut within a row, as a full disk would
    done, rows = label(photos, project, out="again.csv")
    assert "resuming: 6" in done.stdout and rows == whole
    assert not list(photos.parent.glob("*.part*"))


def start(project: Path, photos: Path, out: Path, stderr=subprocess.DEVNULL) -> subprocess.Popen:
    command = [sys.executable, ROOT / "predict.py", photos, "--out", out, "--weights", project / "weights"]
    command += ["--results", photos.parent / "no results", "--device", "cpu"]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=stderr)


def wait_for_part(out: Path, size: int = 0) -> Path:
    for _ in range(2400):
        parts = list(out.parent.glob(f"{out.name}.*.part0"))
        if parts and parts[0].stat().st_size >= size:
            return parts[0]
        time.sleep(0.05)
    raise AssertionError("no part file")


@pytest.mark.skipif(os.name == "nt", reason="signals to one process are POSIX's")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])  # Windows lacks one
def test_no_worker_outlives_it(project, photos, how):
    many = photos.parent / "many"  # more than a few: decoded by processes
    for k in range(4):
        shutil.copytree(photos, many / str(k))
    started = start(project, many, photos.parent / "many.csv")
    wait_for_part(photos.parent / "many.csv", size=1)
    workers = psutil.Process(started.pid).children(recursive=True)
    assert len(workers) >= 2
    started.send_signal(getattr(signal, how))
    started.wait(60)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []


def test_a_killed_worker_is_one_sentence_and_the_rows_stay(project, photos):
    many, out = photos.parent / "many", photos.parent / "many.csv"
    for k in range(12):
        shutil.copytree(photos, many / str(k))
    started = start(project, many, out, stderr=subprocess.PIPE)
    part = wait_for_part(out, size=1)
    started_by_server = (
        p for p in psutil.Process(started.pid).children(recursive=True) if p.ppid() != started.pid
    )
    next(started_by_server).kill()
    _, said = started.communicate(timeout=60)
    assert started.returncode == 2 and part.stat().st_size
    assert said.decode().startswith("error: a worker process was killed") and said.count(b"\n") == 1


def test_other_settings_start_anew_and_another_folders_rows_stay(project, photos):
    out = photos.parent / "labels.csv"
    started = start(project, photos, out)
    own = wait_for_part(out)
    started.kill()
    started.wait()
    source, _, settings = own.name.removeprefix("labels.csv.").removesuffix(".part0").partition("-")
    part, others = (out.with_name(f"labels.csv.{key}.part0") for key in (f"{source}-0", f"0-{settings}"))
    for path in (part, others):  # of another checkpoint, backend or option; of another folder
        path.write_text("photos/a.jpg,Nobody,0.9\n", encoding="utf-8")
    own.unlink(missing_ok=True)
    done, rows = label(photos, project)
    assert "resuming" not in done.stdout and len(rows) == 100 and not part.exists() and others.exists()


def test_a_second_run_for_the_same_table_is_refused(project, photos, monkeypatch, capsys):
    out = photos.parent / "labels.csv"
    arguments = ["predict.py", str(photos), "--out", str(out), "--weights", str(project / "weights")]
    monkeypatch.setattr(
        sys, "argv", [*arguments, "--device", "cpu", "--results", str(photos.parent / "none")]
    )
    monkeypatch.setattr(labels, "alone_at", functools.partial(labels.alone_at, patience=0.1))
    with FileLock(f"{out}.lock"), pytest.raises(UserError, match="another process is writing labels.csv"):
        predict.main()
    assert not out.exists()


def test_a_file_that_changed_meanwhile_is_read_anew(project, photos):
    _, whole = label(photos, project)
    out = photos.parent / "again.csv"
    started = start(project, photos, out)
    part = wait_for_part(out)
    started.kill()
    started.wait()
    part.write_bytes((photos.parent / "labels.csv").read_bytes().split(b"\n", 1)[1])
    first, other = whole[0], next(row for row in whole if row["class"] != whole[0]["class"])
    time.sleep(0.1)
    shutil.copyfile(other["path"], first["path"])
    done, rows = label(photos, project, out="again.csv")
    assert "resuming: 99" in done.stdout and rows[0]["class"] == other["class"] and rows[1:] == whole[1:]


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
    command = [sys.executable, ROOT / "predict.py", photos, "--out", photos.parent / "ascii.csv"]
    command += ["--weights", project / "weights", "--results", photos.parent / "none", "--device", "cpu"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(list(map(str, command)), env={**os.environ, **locale}, timeout=300, check=True)
    table = (photos.parent / "ascii.csv").read_bytes()
    assert table == (photos.parent / "labels.csv").read_bytes() and "Пудж".encode() in table


def test_processes_share_images_by_lot():
    images = [f"{k:04d}.{'png' if k % 2 else 'jpg'}" for k in range(1000)]
    for of in (1, 2, 3):
        shares = [predict.share_of(images, rank, of) for rank in range(of)]
        assert sorted(sum(shares, [])) == images and all(share == sorted(share) for share in shares)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for share in shares:
            assert 0.4 < sum(path.endswith(".png") for path in share) / len(share) < 0.6
    assert predict.share_of([], 1, 2) == [] and predict.share_of(["a"], 1, 2) == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux's alone")
def test_processes_keep_to_shares_of_the_cores_that_part_no_core(monkeypatch):
    cpus, kept = set(range(32)), []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, share: kept.append(sorted(share)))
    for index in range(2):
        environment.keep_to_share(index, 2)
    assert kept == [[*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]]
    for cpus, of in ((set(range(32)), 3), ({1, 4, 5}, 2), ({0, 1}, 2), ({7}, 3), ({2, 3}, 1)):
        kept.clear()
        for index in range(of):
            environment.keep_to_share(index, of)
        assert set().union(*kept) == cpus and all(kept)
        assert sum(map(len, kept)) == len(cpus) or len(cpus) < of


def test_two_processes_share_the_files_and_one_table_comes_out(project, photos):
    _, alone = label(photos, project)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "predict.py", photos, "--out", photos.parent / "two.csv", "--device", "cpu"]
    command += ["--weights", project / "weights", "--results", photos.parent / "no results"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    two = read(photos.parent / "two.csv")
    assert [row["path"] for row in two] == [row["path"] for row in alone]
    assert [row["class"] for row in two] == [row["class"] for row in alone]
    assert done.stdout.count("written: ") == 1 and not list(photos.parent.glob("*.part*"))


@pytest.mark.skipif(os.name == "nt", reason="signals to a group of processes are POSIX's")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_the_others_ends_when_told(tmp_path, how):
    script = tmp_path / "waits.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\n\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nimport predict\n\n"
        f"Path({str(tmp_path)!r}, f'here {{predict.RANK}}').touch()\n"
        "if predict.RANK == 0:\n    time.sleep(60)\n"
        "predict.run_main(lambda: predict.gather(None))\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    started = subprocess.Popen(list(map(str, command)), **quiet)
    try:
        while len(list(tmp_path.glob("here *"))) < 2 and started.poll() is None:
            time.sleep(0.1)
        time.sleep(5)  # by then the second one waits inside torch
        os.killpg(started.pid, how)
        assert started.wait(timeout=15) != 0  # torchrun waits 30 s before it kills
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], "missing is not there"),
        (["weights"], "holds no images"),
        (["data/test", "--backend", "fastest"], "--backend fastest is not one of pytorch"),
        (
            ["data/test", "--backend", "pytorch-fp16-graph"],
            "pytorch-fp16-graph can't serve: CUDA graphs need",
        ),
        (["data/test", "--weights", "data"], "holds no checkpoint; train one: python train.py"),
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
    done = run_script("predict.py", "--out", "no.csv", "--device", "cpu", *arguments, cwd=project, ok=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert (
        not list(project.glob("no.csv*")) and sha256(project / "weights" / "best_resnet18_64.pth") == before
    )


def test_the_last_line_says_where_the_time_went(project, photos):
    timings = photos.parent / "timings.json"
    done, _ = label(photos, project, "--timings", timings)
    assert re.search(
        r"100 images in [\d.]+ s: start [\d.]+ s, decoding [\d.]+ s, inference [\d.]+ s", done.stdout
    )
    assert re.search(r"\nbottleneck: (start|decoding|inference)\n", done.stdout)
    told = json.loads(timings.read_text("utf-8"))
    assert told["images"] == 100 and told["start"] + told["decoding"] + told["inference"] <= told["seconds"]


def test_readings_of_a_clock_that_are_equal_are_no_division_by_zero(tmp_path, capsys):
    told = {"images": 3, "problems": {}, "seconds": 1.0, "spent": dict.fromkeys(predict.STEPS, 1.0)}
    predict.summarise([told], 3, tmp_path / "labels.csv", None)
    assert "3 images in 1.0 s" in capsys.readouterr().out


def test_where_int8_has_no_images_to_be_made_of_the_next_fastest_serves(project, photos, tmp_path):
    results, weights = tmp_path / "results", Path(shutil.copytree(project / "weights", tmp_path / "weights"))
    results.mkdir()
    table(results, **{"onnx-int8": 9e9, "pytorch": 9.0})
    where = {"--results": results, "--weights": weights, "--data": tmp_path / "none"}
    done, rows = label(photos, project, *itertools.chain(*where.items()))
    assert "onnx-int8 can't serve: " in done.stdout and "the next one by the table is pytorch" in done.stdout
    assert len(rows) == 100


@pytest.mark.parametrize(
    ("measured", "named", "asked"),
    [(True, None, [None]), (True, "onnx-int8", [None, "data"]), (False, None, ["data"])],
)
def test_int8_serves_as_it_was_measured_whatever_images_came_since(measured, named, asked):
    class Int8(Backend):
        def load(self, *_):
            seen.append(self.data)
            raise Unavailable("no INT8 network of this checkpoint is there")

        def predict(self, x):
            return x

    seen, args = [], types.SimpleNamespace(backend=named, data="data")
    choice = choices.Choice("onnx-int8", 4, (4,), measured)
    run = predict.Run(args, Path("best_resnet18_64.pth"), {"image_size": 64}, choice, "cpu", "pillow")
    with pytest.raises(Unavailable):
        run.load(Int8())
    assert seen == asked


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
    assert len(rows) == 100 and asked[:4] == [15, 7, 3, 3]
    assert "batch 15 does not fit into the memory; trying 7" in done.stdout
    with pytest.raises(UserError, match="batch 8: CUDA out of memory.*go on with a smaller --batch-size"):
        predict_main(photos, project, "--batch-size", 8)
    measured = choices.Choice("onnx", 256, (1, 16, 256))
    assert measured.smaller() == choices.Choice("onnx", 16, (16,))


def predict_main(folder: Path, project: Path, *arguments) -> None:
    """main() as run_main() calls it."""
    where = ["--weights", project / "weights", "--out", folder.parent / "labels.csv", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, ["predict.py", folder, *where, *arguments])))
        predict.main()


def test_what_is_no_picture_or_can_not_be_read_is_said(project, photos, monkeypatch):
    shutil.copy(next(photos.rglob("*.jpg")), photos / "without suffix")
    for name in ("a.CR2", "b.jxl", "notes.txt", ".hidden.jpg"):
        (photos / name).write_bytes(b"something")
    done, rows = label(photos, project, ok=False)
    assert done.returncode == 1 and len(rows) == 101
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


@pytest.mark.slow
def test_ten_thousand_files_of_which_a_hundred_are_broken(project, tmp_path, broken):  # noqa: F811
    folder, random = tmp_path / "photos 1", np.random.default_rng(0)
    originals = sorted(path for path in (project / "data" / "test").rglob("*") if path.is_file())
    for k in range(9_900):
        path = folder / f"{k // 2_500}" / f"{k:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(originals[k % 100]) as image:
            image.convert("RGB").resize((64, 64)).save(path, quality=int(random.integers(75, 95)))
    ways = [path for path in broken.values() if path.is_file()]
    for k in range(100):
        shutil.copy(ways[k % len(ways)], folder / f"{k % 4}" / f"broken {k} {ways[k % len(ways)].name}")
    most = 27 if torch.cuda.is_available() else 9  # a GPU is done with fewer before its buffers have grown
    folders = {k: tmp_path / f"photos {k}" for k in (1, 3, 9, 27) if k <= most}
    for k in list(folders)[1:]:
        for part in "abc":
            shutil.copytree(folders[k // 3], folders[k] / part, copy_function=os.link)
    peaks = [peak_mb(more, project, tmp_path / f"{k}.csv", 9_900 * k, 100 * k) for k, more in folders.items()]
    print(f"MB of all its processes: {np.round(peaks)} for {list(folders)} times the files")
    assert peaks[-2] < 1.25 * peaks[-3]  # buffers still grow for some seconds, DALI's more than Pillow's
    assert peaks[-1] < 1.1 * peaks[-2]  # then it does not grow with the files


def peak_mb(folder: Path, project: Path, out: Path, right: int, wrong: int) -> float:
    """MB at most of a run that writes so many rows and names so many broken files."""
    command = [sys.executable, ROOT / "predict.py", folder, "--out", out, "--weights", project / "weights"]
    command += ["--results", out.parent]
    with out.with_suffix(".stderr").open("w") as errors:
        started = subprocess.Popen(list(map(str, command)), stderr=errors)
        peak = 0.0
        while started.poll() is None:
            peak = max(peak, memory(started.pid))
            time.sleep(0.2)
    said = out.with_suffix(".stderr").read_text("utf-8")
    assert started.returncode == 1 and "Traceback" not in said
    assert f"{wrong:,} files or folders can't be read" in said
    rows = read(out)
    assert len(rows) == right and not [row for row in rows if "broken" in row["path"]]
    return peak


def memory(pid: int) -> float:
    """MB that a process and its children hold, shared pages counted once."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(process.memory_full_info().pss for process in family) / 2**20
    except psutil.Error:
        return 0.0
