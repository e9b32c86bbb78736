"""INT8: the images it is calibrated on, networks for ONNX Runtime and TensorRT, the gate that guards them."""

import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_test_images
from PIL import Image

import backends
import model
import onnx_inference
import trt
from utils import images, onnx_export
from utils.backend import Unavailable
from utils.environment import torch_is_at_least
from utils.measure import accuracy, worker
from utils.utils import UserError, sha256


def write_images(folder: Path, count: int) -> list[Path]:
    """Images of one colour each, for two classes, the first with twice as many as the second."""
    paths = []
    for i in range(count):
        path = folder / "train" / ("Batman" if i % 3 else "Robin") / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (i % 256, i // 256, 7)).save(path)
        paths.append(path)
    return paths


@pytest.mark.parametrize(("there", "used"), [(1, 1), (256, 256), (257, 129), (600, 200)])
def test_calibration_takes_training_images_evenly_and_always_the_same(tmp_path, there, used):
    write_images(tmp_path, there)
    chosen = onnx_export.calibration_files(tmp_path)
    everything = images.list_images(tmp_path)["train"]
    ordered = [path for paths in everything.values() for path in paths]
    assert len(chosen) == used <= onnx_export.MAX_IMAGES
    assert (
        chosen
        == ordered[:: ordered.index(chosen[1]) if used > 1 else 1]
        == onnx_export.calibration_files(tmp_path)
    )


def test_the_last_batch_is_filled_up_from_the_beginning(tmp_path):
    write_images(tmp_path, 10)
    first, last = onnx_export.calibration_batches(tmp_path, 32)
    assert first.shape == last.shape == (onnx_export.BATCH, 3, 32, 32)
    assert torch.equal(last[2:], first[:6]) and not torch.equal(last[:2], first[:2])


def test_the_fingerprint_follows_the_contents(tmp_path):
    path = write_images(tmp_path, 3)[1]
    before = onnx_export.facts_of_int8(tmp_path)
    Image.new("RGB", (40, 30), "white").save(path)
    assert onnx_export.facts_of_int8(tmp_path) != before == onnx_export.facts_of_int8(None) | before


def test_without_training_images_the_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="train holds no images to calibrate INT8 with"):
        onnx_export.facts_of_int8(tmp_path)


CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.is_file() or "vnni" not in CPUINFO.read_text(), reason="no VNNI listed here")
def test_a_processor_with_vnni_does_not_saturate():
    assert onnx_export.saturates() is False


# ---- ONNX Runtime on the CPU


def for_cpu(exported: Path, data: Path | None) -> tuple[Path, bool]:
    """The quantised network of an export, and whether it was there already."""
    path, _, fresh = onnx_export.export(exported.with_name("best_resnet18_64.pth"), 64, "INT8", data)
    return path, fresh


def test_the_quantised_network_is_kept_and_made_anew_when_damaged(project, exported, capsys):
    path, _ = for_cpu(exported, project / "data")
    assert for_cpu(exported, project / "data") == (path, True)
    before = sha256(path)
    capsys.readouterr()
    path.write_bytes(path.read_bytes()[:-1])
    assert for_cpu(exported, project / "data") == (path, False)
    assert capsys.readouterr().err == f"{path} is damaged; building it anew\n"
    assert sha256(path) == before  # the same network again, to the byte


def test_the_classifier_is_left_as_it_is(project, exported):
    """Rounded like the rest it clips the features of a rare image, and with them half of its logits."""
    import onnx

    path, _ = for_cpu(exported, project / "data")
    nodes = onnx.load(path).graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    (gemm,) = (node for node in nodes if node.op_type == "Gemm")
    assert "DequantizeLinear" in made_by.values()
    first, *weights = [made_by.get(name) for name in gemm.input]
    assert first in ("Reshape", "Flatten") and weights == [None, None]  # by exporter


def test_a_training_image_that_broke_meanwhile_is_named(project, exported, tmp_path):
    data = Path(shutil.copytree(project / "data", tmp_path / "data"))
    broken = onnx_export.calibration_files(data)[-1]
    broken.write_bytes(b"hi")
    with pytest.raises(UserError, match=f"{re.escape(str(broken))} can't be read any more"):
        for_cpu(exported, data)


def test_a_network_calibrated_on_other_images_is_made_anew(exported, tmp_path, capsys):
    write_images(tmp_path / "a", 8)
    write_images(tmp_path / "b", 9)
    path, _ = for_cpu(exported, tmp_path / "a")
    capsys.readouterr()
    assert for_cpu(exported, tmp_path / "b") == (path, False)
    assert capsys.readouterr().err == f"{path} was made for another images; building it anew\n"


def test_without_images_the_network_that_is_there_is_used_and_none_is_made(exported, tmp_path):
    write_images(tmp_path, 8)
    path, _ = for_cpu(exported, tmp_path)
    whole = path.read_bytes()
    assert for_cpu(exported, None) == (path, True)
    path.unlink()
    backend, checkpoint = backends.make("onnx-int8"), exported.with_name("best_resnet18_64.pth")
    with pytest.raises(Unavailable, match="python benchmark.py"):
        backend.load(checkpoint, 64, [1], "cpu")
    path.write_bytes(whole)
    backend.load(checkpoint, 64, [1], "cpu")
    assert backend.from_cache and backend.artefact == path


@pytest.mark.parametrize(
    ("module", "status"),
    [("onnxscript", "unavailable: the export to ONNX needs onnxscript"), (None, "failed")],
)
def test_an_export_that_cannot_be_written_says_what_mends_it(project, tmp_path, monkeypatch, module, status):
    checkpoint = Path(shutil.copy(project / "weights" / "best_resnet18_64.pth", tmp_path))
    if module:
        if not torch_is_at_least(2, 5):
            pytest.skip("the exporter of PyTorch before 2.5 does without onnxscript")
        monkeypatch.setitem(sys.modules, module, None)
    else:
        (tmp_path / "resnet18_64_fp32.onnx").mkdir()
    with pytest.raises((Unavailable, OSError)) as error:
        onnx_export.export(checkpoint, 64, "FP32")
    problem = worker.problem_of(error.value)
    assert f"{problem.status}: {problem.reason}".startswith(status)
    assert "run: pip install" in problem.reason or "a folder is where a file belongs" in problem.reason


def spoil(data: Path, kind: str) -> None:
    """Replace what every training image shows; the files' names and numbers stay."""
    random = np.random.default_rng(0)
    for path in (data / "train").rglob("*.*g"):
        grey = np.full((64, 64, 3), 124, np.uint8)
        pixels = grey if kind == "constant" else random.integers(118, 130, grey.shape, np.uint8)
        Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("kind", ["real", "constant", "noise"])
def test_int8_calibrated_on_constant_images_or_noise_is_a_mismatch(project, exported, tmp_path, kind):
    data, folder = project / "data", exported.parent
    if kind != "real":
        data, folder = Path(shutil.copytree(data, tmp_path / "data")), tmp_path
        spoil(data, kind)
        for name in ("best_resnet18_64.pth", exported.name, f"{exported.name}.json"):
            shutil.copy(exported.with_name(name), folder)
    checkpoint = folder / "best_resnet18_64.pth"
    network, facts = model.load(checkpoint, "cpu")
    pictures, labels = load_test_images(data, 64, facts["classes"])
    backend = backends.make("onnx-int8")
    backend.data = data
    with torch.inference_mode():
        backend.load(checkpoint, 64, [len(pictures)], "cpu")
        logits, expected = backend.predict(backend.prepare(pictures)), network(pictures)
    found = {
        "images": len(labels),
        "different": int((logits.argmax(1) != expected.argmax(1)).sum()),
        "correct": int((logits.argmax(1) == labels).sum()),
        "correct_fp32": int((expected.argmax(1) == labels).sum()),
        "max_abs_diff": float((logits - expected).abs().max()),
        "tolerance": accuracy.TOLERANCE["INT8"] * float(expected.abs().max()),
    }
    assert ("PyTorch FP32" in accuracy.mismatch(found)) if kind != "real" else not accuracy.mismatch(found)


@pytest.mark.parametrize(
    ("correct", "different", "reason"),
    [
        (980, 0, ""),
        (970, 10, ""),
        (969, 11, "classifies 11 of 1000 test images fewer correctly than PyTorch FP32"),
        (975, 11, "another class than PyTorch FP32 on 11 of 1000 test images"),
    ],
)
def test_a_point_of_accuracy_is_the_most_that_may_be_lost(correct, different, reason):
    found = {"images": 1000, "correct": correct, "correct_fp32": 980, "different": different}
    assert accuracy.mismatch({**found, "max_abs_diff": 0.1, "tolerance": 1.0}) == reason


def test_on_a_gpu_it_says_what_to_use_instead():
    reason = onnx_inference.OnnxRuntime(int8=True).why_unavailable("cuda")
    assert "tensorrt-int8" in reason and "--device cpu" in reason


# ---- TensorRT: a QDQ network


def need_scales_in_fp16(exported: Path) -> None:
    import onnx

    opsets = {entry.domain: entry.version for entry in onnx.load(exported).opset_import}
    if opsets[""] < 19:
        pytest.skip("scales in FP16 need opset 19: TensorRT 10 and 11 go with newer versions of torch")


@pytest.fixture(scope="module")
def rounded(project, exported) -> Path:
    checkpoint = exported.with_name("best_resnet18_64.pth")
    return onnx_export.export(checkpoint, 64, "INT8_TENSORRT", project / "data")[0]


def test_what_tensorrt_fuses_is_left_alone_and_all_else_is_rounded(rounded):
    import onnx
    from onnx import TensorProto

    graph = onnx.load(rounded).graph
    maker = {name: node for node in graph.node for name in node.output}
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["Conv"] == 20 and kinds["Add"] == 8
    for conv in (node for node in graph.node if node.op_type == "Conv"):
        assert [maker[name].op_type for name in conv.input[:2]] == ["DequantizeLinear"] * 2
        assert conv.input[2] not in maker  # the bias, as it is
    for add in (node for node in graph.node if node.op_type == "Add"):
        assert sorted(maker[name].op_type for name in add.input) == ["Conv", "DequantizeLinear"]
        (main,) = (maker[name] for name in add.input if maker[name].op_type == "Conv")
        assert next(list(a.ints) for a in main.attribute if a.name == "kernel_shape") == [3, 3]
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in (node for node in graph.node if node.op_type.endswith("quantizeLinear")):
        scale, zero = (stored[name] for name in node.input[1:])
        assert scale.data_type == TensorProto.FLOAT and zero.data_type == TensorProto.INT8
        assert not np.frombuffer(zero.raw_data, np.int8).any()


@pytest.mark.parametrize("version", ["8.6.0", "11.1.0"])
def test_it_chooses_the_classes_that_pytorch_chooses(project, exported, rounded, version):
    import onnxruntime

    if halved := version != "8.6.0":
        need_scales_in_fp16(exported)
    network = trt.onnx_for(version, rounded, None, halved=halved)
    pytorch, facts = model.load(exported.with_name("best_resnet18_64.pth"), "cpu")
    pictures, _ = load_test_images(project / "data", 64, facts["classes"])
    with torch.inference_mode():
        expected = pytorch(pictures).numpy()
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": pictures.numpy().astype(np.float16 if halved else np.float32)})
    assert (logits.argmax(1) == expected.argmax(1)).mean() >= 0.99
    tolerance = accuracy.TOLERANCE["INT8"] * np.abs(expected).max()
    assert np.abs(logits - expected).max() <= tolerance


def test_a_scale_too_small_for_half_does_not_vanish():
    from onnx import TensorProto, helper, numpy_helper

    values = np.array([1e-9, 0.0, 0.25], np.float32)
    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(values, "scale")])
    onnx_export.halve(graph)
    assert graph.initializer[0].data_type == TensorProto.FLOAT16
    assert numpy_helper.to_array(graph.initializer[0]).tolist() == [2**-24, 0.0, 0.25]
