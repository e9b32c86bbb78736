"""Engines and exports as files in weights/: which are fresh, when they are built, and why they can't be."""

import json
import sys

import pytest
import torch

import tensorrt_inference
import torch_trt
import trt
from utils import environment, utils
from utils.backend import build_engines, is_fresh, store, why_no_tensorrt
from utils.utils import UserError

FACTS = {"onnx": "abc", "tensorrt": "8.6.0", "gpu": "NVIDIA H200", "profiles": [[1, 4, 4]]}


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "resnet18_64_max4_fp16.engine"
    store(path, FACTS, lambda temporary: temporary.write_bytes(b"a plan"))
    return path


def test_a_whole_file_made_from_the_same_is_fresh(engine, capsys):
    assert is_fresh(engine, json.loads(json.dumps(FACTS)))
    assert sorted(path.name for path in engine.parent.iterdir()) == [engine.name, f"{engine.name}.json"]
    assert capsys.readouterr().err == ""


def test_a_missing_file_is_no_surprise(tmp_path, capsys):
    assert not is_fresh(tmp_path / "none.engine", FACTS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"a pla", b"a plan!", b"b plan"])
def test_a_damaged_file_is_noticed(engine, content, capsys):
    engine.write_bytes(content)
    assert not is_fresh(engine, FACTS)
    assert capsys.readouterr().err == f"{engine} is damaged; building it anew\n"


@pytest.mark.parametrize("name", FACTS)
def test_a_file_made_from_anything_else_is_a_miss_and_says_what_differs(engine, name, capsys):
    assert not is_fresh(engine, {**FACTS, name: "other"})
    assert capsys.readouterr().err == f"{engine} was made for another {name}; building it anew\n"


@pytest.mark.parametrize("note", [None, b"", b'{"made_from', b"[]", b"{}", b"\xff\xfe"])
def test_a_file_without_a_readable_note_is_a_miss(engine, note, capsys):
    path = engine.with_name(engine.name + ".json")
    path.unlink() if note is None else path.write_bytes(note)
    assert not is_fresh(engine, FACTS)
    assert capsys.readouterr().err == f"{engine} does not say what it was made from; building it anew\n"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("save failed")]
)
def test_an_interrupted_write_leaves_the_old_file_and_no_half_one(engine, error):
    def write(temporary):
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        store(engine, {**FACTS, "onnx": "new"}, write)
    assert len(list(engine.parent.iterdir())) == 2
    assert is_fresh(engine, FACTS)


class Small(trt.NativeEngine):
    """Needs no GPU: its engine is a few bytes, and "a plan" does not load."""

    def facts(self):
        return {"tensorrt": "8.6.0", "gpu": "NVIDIA H200", "compute_capability": "9.0"}

    def make(self, path, timings):
        path.write_bytes(b"new")
        return b"timings"

    def open(self):
        if self.path.read_bytes() == b"a plan":
            raise RuntimeError("TensorRT can't load the engine")
        return "engine"


def test_an_engine_that_does_not_load_is_built_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.backend.in_fresh_process", lambda function: function())
    checkpoint = tmp_path / "best_resnet18_64.pth"
    checkpoint.write_bytes(b"weights")
    recipe = Small(checkpoint, 64, [4], None)
    store(recipe.path, recipe.facts(), lambda file: file.write_bytes(b"a plan"))
    engine, seconds, from_cache = recipe.load_or_build()
    assert engine == "engine" and seconds > 0 and not from_cache
    assert "TensorRT can't load the engine); building it anew" in capsys.readouterr().err
    assert recipe.load_or_build()[2] is True
    assert (tmp_path / "tensorrt.timings").read_bytes() == b"timings"


def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.backend.why_no_tensorrt", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["trt.py", "--image-sizes", "64", "--weights", str(tmp_path)])
    with pytest.raises(UserError, match="python train.py --image-sizes 64"):
        build_engines("", trt.NativeEngine)


def test_a_static_backend_has_a_file_for_each_batch_size(tmp_path):
    checkpoint = tmp_path / "best_resnet18_64.pth"
    files = trt.NativeEngine.files(checkpoint, 64, [1, 4], None, static=True, int8=True)
    assert [file.path.name for file in files] == [f"resnet18_64_static{n}_int8.engine" for n in (1, 4)]
    (file,) = trt.NativeEngine.files(checkpoint, 64, [1, 4], None)
    assert file.path.name == "resnet18_64_1-4_fp16.engine"


def test_without_a_gpu_the_reason_is_the_gpu():
    assert why_no_tensorrt(["tensorrt"], "cpu") == "TensorRT needs an NVIDIA GPU; this run is on the CPU"


def test_a_missing_package_names_the_command_that_installs_it():
    reason = why_no_tensorrt(["no_such_package"], "cuda")
    assert reason.startswith(
        "no_such_package is not installed; run: pip install -r requirements-tensorrt.txt"
    )


def test_a_package_that_does_not_load_is_quoted(monkeypatch, tmp_path):
    (tmp_path / "broken_tensorrt.py").write_text(
        "raise OSError('libnvinfer.so.8: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = why_no_tensorrt(["broken_tensorrt"], "cuda")
    assert "installed but does not load: OSError: libnvinfer.so.8: cannot open shared object file" in reason


@pytest.mark.parametrize("distribution", ["tensorrt", "tensorrt_cu12", "tensorrt_cu13"])
def test_tensorrts_version_is_found_under_each_name_of_its_distribution(monkeypatch, tmp_path, distribution):
    folder = tmp_path / f"{distribution}-11.1.0.106.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 11.1.0.106\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert environment.environment("cuda")["packages"][distribution.replace("_", "-")] == "11.1.0.106"


@pytest.mark.parametrize("make", tensorrt_inference.BACKENDS.values(), ids=tensorrt_inference.BACKENDS)
def test_every_backend_says_why_it_is_unavailable_on_a_cpu(make):
    backend = make()
    assert "GPU" in backend.why_unavailable("cpu")
    assert backend.precision == ("INT8" if "int8" in backend.adds.lower() else "FP16")


@pytest.mark.parametrize("kind", [trt.NativeEngine, torch_trt.Module])
def test_the_scripts_say_why_they_cannot_build(kind, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["trt.py", "--image-sizes", "64"])
    with pytest.raises(SystemExit) as stop:
        utils.run_main(lambda: build_engines("", kind))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: TensorRT needs an NVIDIA GPU")
