"""From files to logits: the same pixels as training reads, in order, whatever lies among the files."""

import contextlib
import datetime
import itertools
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import psutil
import pytest
import test_compare
import torch
from conftest import load_test_images, noise, run_here, run_script
from PIL import Image
from torchvision.transforms import v2

import backends
import datasets
import end_to_end
import model
from utils import environment, images
from utils.backend import inference
from utils.images import load_rgb
from utils.measure.worker import whole_call
from utils.report import tables
from utils.serve import dali, decoder, pipeline, throughput

SIZE, BATCH = 32, 4
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
WITH_DALI = pytest.mark.skipif(bool(dali.why_no_dali()), reason="DALI is not installed")


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> dict[str, Path]:
    """Readable files that DALI must not get, by what is odd about them."""
    folder = tmp_path_factory.mktemp("odd")
    plain, rgba = Image.fromarray(noise()), Image.fromarray(noise(channels=4), "RGBA")
    paths = {name: folder / name for name in ("rotated.jpg", "cmyk.jpg", "alpha.png", "deep.png", "bits.png")}
    paths |= {name: folder / name for name in ("palette.png", "moving.gif", "moving.png", "plain.webp")}
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    plain.save(paths["rotated.jpg"], exif=exif)
    plain.convert("CMYK").save(paths["cmyk.jpg"])
    rgba.save(paths["alpha.png"])
    Image.fromarray(noise()[..., 0].astype(np.uint16) * 257).save(paths["deep.png"])
    plain.convert("1").save(paths["bits.png"])
    plain.convert("P").save(paths["palette.png"], transparency=0)
    for name in ("moving.gif", "moving.png"):
        plain.save(paths[name], save_all=True, append_images=[plain.rotate(90)])
    plain.save(paths["plain.webp"])
    paths["trailing.jpg"] = folder / "trailing.jpg"
    plain.save(paths["trailing.jpg"])
    with paths["trailing.jpg"].open("ab") as file:
        file.write(b"more bytes")
    return paths


def as_training_reads(path) -> np.ndarray:
    return np.asarray(v2.Resize((SIZE, SIZE), antialias=True)(load_rgb(path)))


def opened(kind: str, batch_size: int = BATCH, device: str = "cpu", few: bool = True):
    """A decoder; `few` files are decoded by threads."""
    files = dali.open_decoder(kind, SIZE, batch_size, device, ["a.png", "b.jpg"], 9 if few else None)
    files.get_ready(device)
    return files


def read(kind: str, paths, few: bool = True, device: str = "cpu") -> tuple[np.ndarray, dict[str, str]]:
    """All pixels in order, and what could not be read."""
    found, problems, seen = [], {}, []
    with contextlib.closing(opened(kind, device=device, few=few)) as files:
        for batch in files.batches(map(str, paths)):
            found.append(torch.as_tensor(batch.pixels).cpu().numpy().copy())
            problems |= {batch.paths[k]: why for k, why in batch.problems.items()}
            seen += batch.paths
    assert seen == list(map(str, paths))
    return np.concatenate(found), problems


@pytest.fixture(scope="module")
def files(project) -> list[Path]:
    return sorted((project / "data" / "test").rglob("*.*"))[:45]


@pytest.mark.parametrize("few", [True, False], ids=["threads", "processes"])
def test_pillow_gives_the_pixels_that_training_reads_in_order(files, odd, few):
    paths = [*files[:21], *odd.values(), *files[21:]]  # no multiple of the batch
    pixels, problems = read("pillow", paths, few)
    assert not problems
    np.testing.assert_array_equal(pixels, [as_training_reads(path) for path in paths])


def test_the_first_files_are_decoded_before_they_are_asked_for(files, monkeypatch):
    begun, decode = threading.Event(), decoder.decode

    def watched(*arguments):
        begun.set()
        return decode(*arguments)

    monkeypatch.setattr(decoder, "decode", watched)
    with contextlib.closing(opened("pillow")) as reader:
        reader.batches(map(str, files))
        assert begun.wait(timeout=30)


def test_processes_that_decode_leave_ctrl_c_to_the_one_that_started_them():
    with contextlib.closing(decoder.Pillow(SIZE, 16)) as reader:
        assert reader.pool.submit(signal.getsignal, signal.SIGINT).result() is signal.SIG_IGN


def test_there_are_no_more_workers_than_the_files_need(monkeypatch):
    monkeypatch.setattr(decoder, "cores", lambda: 64)
    monkeypatch.setattr(decoder, "MOST_WORKERS", 61)  # as on Windows
    wanted = []
    monkeypatch.setattr(decoder, "ThreadPoolExecutor", lambda workers, **options: wanted.append(workers))
    monkeypatch.setattr(decoder, "FEW", 10**9)  # threads, so that nothing is started
    for count in (1, 20, 100, 10_000):
        decoder.Pillow(SIZE, 16, count)
    assert wanted == [1, 3, 13, 61]


def test_every_broken_file_is_named_and_costs_no_other(files, broken):
    paths = [path for pair in zip(files, broken.values(), strict=False) for path in pair]
    pixels, problems = read("pillow", paths)
    assert set(problems) == set(map(str, broken.values())) and len(broken) == 10
    assert all(": " in why for why in problems.values())
    for index in range(0, len(paths), 2):
        np.testing.assert_array_equal(pixels[index], as_training_reads(paths[index]))


@pytest.mark.parametrize("kind", ["pillow", pytest.param("dali", marks=WITH_DALI)])
def test_an_endless_list_of_files_is_read_no_further_than_the_memory_reaches(files, kind):
    taken = itertools.count()
    endless = (str(path) for path in itertools.cycle(files) if next(taken) >= 0)
    with contextlib.closing(opened(kind)) as reader:
        with contextlib.closing(reader.batches(endless)) as batches:
            for _ in range(5):
                next(batches)
        assert next(taken) <= (5 + reader.slots) * BATCH
        (again,) = reader.batches([str(files[0])])  # what was broken off leaves the memory free
        difference = np.abs(
            torch.as_tensor(again.pixels[0]).numpy().astype(int) - as_training_reads(files[0])
        )
        assert difference.max() == 0 if kind == "pillow" else difference.mean() < 1
        assert list(reader.batches([])) == []


def test_only_whole_upright_8_bit_files_are_left_to_dali(files, odd, broken):
    assert all(decoder.is_plain(str(path)) for path in files)
    assert {path.suffix for path in files} == {".jpg", ".png"}
    wrong = [*odd.values(), *broken.values(), Path("missing.jpg")]
    assert [path.name for path in wrong if decoder.is_plain(str(path))] == []


@pytest.mark.skipif(os.name == "nt", reason="processes that stand still are POSIX's")
def test_broken_off_it_ends_though_all_workers_die(files):
    reader = decoder.Pillow(SIZE, 64)  # of a batch some files wait where they could be cancelled
    batches = reader.batches(map(str, itertools.cycle(files)))
    next(batches)
    workers = [
        process for process in psutil.Process().children(recursive=True) if process.ppid() != os.getpid()
    ]
    for worker in workers:
        worker.suspend()
    end = threading.Thread(target=lambda: (batches.close(), reader.close()), daemon=True)
    end.start()
    time.sleep(0.5)
    for worker in workers:
        worker.kill()
    end.join(timeout=60)
    assert workers and not end.is_alive()


@WITH_DALI
@pytest.mark.parametrize("device", DEVICES)
def test_dali_gives_nearly_the_same_pixels_and_leaves_odd_files_to_pillow(files, odd, broken, device):
    wrong = list(broken.values())
    paths = [*files[:6], *odd.values(), *wrong, *files[6:]]
    pixels, problems = read("dali", paths, device=device)
    assert set(problems) == set(map(str, wrong))
    for path, found in zip(paths, pixels, strict=True):
        if path in odd.values():
            np.testing.assert_array_equal(found, as_training_reads(path))
        elif path in files:
            difference = np.abs(found.astype(int) - as_training_reads(path))
            assert difference.mean() < 1 and np.quantile(difference, 0.99) <= 8, path


@WITH_DALI
@pytest.mark.parametrize("device", DEVICES)
def test_where_dali_fails_pillow_decodes_and_dali_goes_on(files, broken, monkeypatch, capfd, device):
    wrong = broken["text.jpg"]
    monkeypatch.setattr(decoder, "is_plain", lambda path: True)  # as if its header had looked right
    paths = [*files[:9], wrong, *files[9:40]]
    pixels, problems = read("dali", paths, device=device)
    assert set(problems) == {str(wrong)}
    assert "DALI failed, Pillow decodes" in capfd.readouterr().err
    for path, found in zip(paths, pixels, strict=True):
        if path != wrong:
            assert np.abs(found.astype(int) - as_training_reads(path)).mean() < 1


@WITH_DALI
@pytest.mark.parametrize("device", DEVICES)
def test_where_dali_fails_again_and_again_pillow_decodes_the_rest(files, broken, monkeypatch, capfd, device):
    """What starting it anew costs, seconds and memory on a GPU, is bounded."""
    wrong = broken["text.jpg"]
    monkeypatch.setattr(decoder, "is_plain", lambda path: True)
    paths = [*files, *([wrong] * 5), *files, *([wrong] * 40), *files, wrong, *files]
    with contextlib.closing(opened("dali", device=device)) as reader:
        for _ in range(2):  # it is as good as new afterwards, also where it was left in the middle
            found = list(reader.batches(map(str, paths)))
            said = capfd.readouterr().err
            assert said.count("DALI failed") == 3 and said.count("all that is left") == 1
            assert [path for batch in found for path in batch.paths] == list(map(str, paths))
            named = [path for batch in found for path in map(batch.paths.__getitem__, batch.problems)]
            assert named == [str(wrong)] * 46
            with contextlib.closing(reader.batches(map(str, paths))) as batches:
                while "DALI failed" not in capfd.readouterr().err:
                    next(batches)
        (again,) = reader.batches([str(files[0])])
        assert np.abs(again.pixels[0].cpu().numpy().astype(int) - as_training_reads(files[0])).mean() < 1


@pytest.mark.parametrize("name", ["pytorch", "onnx"])
def test_logits_from_files_are_those_of_the_test_set(project, name):
    checkpoint = project / "weights" / "best_resnet18_64.pth"
    classes = model.load_facts(checkpoint)["classes"]
    images, labels = load_test_images(project / "data", 64, classes)
    listed = datasets.list_images(project / "data")["test"].values()
    paths = [str(path) for of_class in listed for path in of_class]
    backend = backends.make(name)
    with inference("cpu"), contextlib.closing(decoder.Pillow(64, 8, 100)) as reader:
        backend.load(checkpoint, 64, [8], "cpu")
        network, waited = pipeline.Network(backend, [8], 64, "cpu"), {}
        found = [
            (batch.paths, logits)
            for batch, logits in pipeline.classify(reader.batches(paths), network, waited)
        ]
        torch.testing.assert_close(
            network.normalise(torch.tensor(next(reader.batches(paths)).pixels)), images[:8], rtol=0, atol=0
        )
        expected = [whole_call(backend)(chunk).numpy() for chunk in images.split(8)]
    assert [path for part, _ in found for path in part] == paths and len(labels) == len(paths)
    logits = np.concatenate([logits for _, logits in found])
    np.testing.assert_allclose(logits, np.concatenate(expected), atol=1e-4)
    assert waited["decoding"] > 0 and waited["inference"] > 0


# ---- end_to_end.py


def test_end_to_end_writes_a_row_for_every_backend_and_decoder(measured, tmp_path, monkeypatch):
    results = Path(shutil.copytree(measured / "results" / "quick", tmp_path / "quick"))
    path, decoders = results / "end_to_end.csv", ["pillow"] if dali.why_no_dali() else ["pillow", "dali"]
    short = ["--results", results, "--seconds", 0.1]
    asked = ["--rounds", 2, "--backends", "onnx", "--decoders", *decoders]
    said = run_script("end_to_end.py", *short, *asked, cwd=measured).stdout
    table = pd.read_csv(path)
    assert list(table) == [*end_to_end.COLUMNS, "cores", "date"]
    assert list(table.decoder) == decoders
    assert set(table.status) == {"ok"} and "Bottleneck" in said and said.count("ONNX Runtime") == len(table)
    row = table.iloc[0]
    assert row.agreement == 1 and row.max_abs_diff < 1e-4 and 0 < row.accuracy <= 1
    assert row.images_per_s_low < row.images_per_s < row.images_per_s_high
    assert row.limit in ("decode", "inference")

    photos = next((measured / "data" / "test").iterdir())
    asked = ["--rounds", 1, "--backends", "pytorch", "--images", photos]
    monkeypatch.setattr(end_to_end, "in_fresh_process", lambda function, *asked: function(*asked))
    monkeypatch.setattr(throughput, "WARM_UP_SECONDS", 0.01)
    done = run_here("end_to_end.py", *short, *asked, cwd=measured)
    assert "25 files in " in done.stdout
    table = pd.read_csv(path)
    rows = sorted(table.backend + table.images)
    assert rows == [*(["onnxtest set"] * len(decoders)), "pytorchphotos", "pytorchtest set"]
    assert table[table.backend == "pytorch"].images_per_s_low.isna().all()  # one round has no interval
    row = table[table.images == "photos"].iloc[0]
    assert row.files == 25 and 0 < row.start_s < row.whole_s and row.images_per_s > 0


@pytest.mark.parametrize(("any_batch", "serving"), [(True, [1, 2, 4, 8, 16, 24]), (False, [1, 24])])
def test_what_serves_is_loaded_for_the_batch_sizes_it_was_measured_with(
    any_batch, serving, tmp_path, monkeypatch
):
    """An engine has a profile for each of these: another list is another engine, which takes minutes."""
    cells = [("pytorch", 64, batch, 1.0) for batch in (1, 4)]
    cells += [("tensorrt", 64, 1, 9.0), ("tensorrt", 64, 24, 99.0), ("tensorrt", 64, 96, 98.0)]
    rows = test_compare.table(*cells, ("tensorrt", 128, 8, 5.0))
    results = test_compare.write(tmp_path / "results", rows)
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", "--results", str(results), "--image-sizes", "64"])
    one, other = end_to_end.make_asked(end_to_end.parse())
    asked = one if one.backend == "tensorrt" else other
    assert {one.batch_sizes, other.batch_sizes} == {(1, 4), (1, 24, 96)} and asked.batch_size == 24
    backend = SimpleNamespace(any_batch=any_batch, load=Mock())
    monkeypatch.setattr(backends, "make", lambda name: backend)
    monkeypatch.setattr(throughput, "Network", lambda backend, sizes, *others: sorted(sizes))
    assert throughput.open_network(asked) == [24]
    assert throughput.open_network(asked, under_load=True) == serving
    assert [call.args[2] for call in backend.load.call_args_list] == [[1, 24, 96]] * 2


def test_rates_and_overlap_are_put_together_by_round():
    asked = throughput.Asked(
        "main", "onnx", "FP32", 64, 4, "cpu", (4,), ("pillow",), Path(), Path(), Path(), 1.0
    )
    one = {"images_per_s": 50.0, "decode_images_per_s": 100.0, "infer_images_per_s": 100.0, "overlap": 1.0}
    one |= {"limit": "decode", "precision": "FP32", "agreement": 1.0}
    one |= {"decoder": "pillow"}
    two = one | {"images_per_s": 100.0, "overlap": 0.9, "limit": "inference"}
    row = end_to_end.row_of(asked, [one, two, two])
    assert row["images_per_s"] == pytest.approx(3000 / (20 + 10 + 10))  # the mean of ms per image
    assert (row["overlap"], row["limit"], row["status"]) == (0.9, "inference", "ok")
    failed = end_to_end.row_of(asked, [one, {"status": "failed", "reason": "it died"}])
    assert (failed["status"], failed["reason"]) == ("failed", "it died")
    assert failed["images_per_s_low"] is None


def test_a_missing_table_is_one_sentence(tmp_path):
    done = run_here("end_to_end.py", "--results", tmp_path, ok=False)
    assert done.returncode == 2 and "python benchmark.py" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "\0\0"])
def test_a_damaged_table_of_serving_is_set_aside_and_made_anew(tmp_path, content, capsys):
    path = tmp_path / "end_to_end.csv"
    path.write_text(content, encoding="utf-8")
    blank = dict.fromkeys(end_to_end.COLUMNS) | {"sweep": "2.10", "decoder": "pillow", "images": "test set"}
    rows = [blank | {"backend": name, "image_size": 64, "batch_size": 4} for name in ("onnx", "pytorch")]
    end_to_end.write_table(rows, path)
    assert (tmp_path / "end_to_end.csv.1").read_text(encoding="utf-8") == content
    assert "was renamed to" in capsys.readouterr().err
    end_to_end.write_table(rows[1:], path)
    table = tables.read_serving(path)
    assert table.backend.tolist() == ["onnx", "pytorch"] and set(table.sweep) == {"2.10"}
    assert set(table.cores) == {environment.cores()} and set(table.date) == {str(datetime.date.today())}
    assert sorted(found.name for found in tmp_path.iterdir()) == ["end_to_end.csv", "end_to_end.csv.1"]


def test_where_the_network_was_trained_on_other_images_end_to_end_says_so(
    project, tmp_path, monkeypatch, capsys
):
    what = "main", "onnx", "FP32", 64, 4, "cpu", (4,), ("pillow",)
    asked = throughput.Asked(*what, tmp_path, project / "weights", tmp_path, 1.0)
    monkeypatch.setattr(end_to_end, "make_asked", lambda args: [asked])
    monkeypatch.setattr(end_to_end, "measure_rounds", lambda asked, rounds: [])
    monkeypatch.setattr(end_to_end, "write_table", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["end_to_end.py"])
    end_to_end.main()
    assert "best_resnet18_64.pth was trained on other images" in capsys.readouterr().err
