"""TensorRT's INT8: the calibrator of TensorRT 8.6, and which network each version is given."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_int8 import need_scales_in_fp16

import trt
from utils import onnx_export


@pytest.fixture
def tensorrt(monkeypatch):
    """As much of TensorRT 8.6 as a calibrator meets."""
    base = type("IInt8MinMaxCalibrator", (), {})
    flags = SimpleNamespace(INT8="INT8", PREFER_PRECISION_CONSTRAINTS="prefer")
    fake = SimpleNamespace(IInt8MinMaxCalibrator=base, BuilderFlag=flags)
    fake.DataType = SimpleNamespace(HALF="half")
    fake.LayerType = SimpleNamespace(REDUCE="reduce", MATRIX_MULTIPLY="product", ELEMENTWISE="sum")
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    return fake


class Layer:
    def __init__(self, kind: str):
        self.type, self.precision, self.outputs = kind, None, {}
        self.set_output_type = self.outputs.__setitem__


class Told:
    """Stands in for a builder's configuration, a network and its tensors: keeps what it is told."""

    def __init__(self):
        self.flags, self.profile, self.dtype, self.int8_calibrator = [], None, "float", None
        self.set_flag, self.get_input = self.flags.append, lambda index: self
        self.get_output = self.get_input
        kinds = ["convolution", "sum", "reduce", "shuffle", "constant", "product", "sum"]
        self.layers = [Layer(kind) for kind in kinds]
        self.num_layers, self.get_layer = len(kinds), self.layers.__getitem__

    def set_calibration_profile(self, profile):
        self.profile = profile


def test_a_calibrator_gives_every_batch_once_in_fp32_and_keeps_the_table(tensorrt):
    batches = [torch.full((onnx_export.BATCH, 3, 4, 4), float(i)) for i in range(3)]
    calibrator, config, network = trt.calibrator_of(batches), Told(), Told()
    calibrator.join(network, config, "profile")
    assert config.flags == ["INT8"] and config.int8_calibrator is calibrator and config.profile == "profile"
    assert network.dtype == "float"
    addresses = [calibrator.get_batch(["input"]) for _ in range(4)]
    assert addresses == [[batch.data_ptr()] for batch in batches] + [None]
    assert calibrator.get_batch_size() == onnx_export.BATCH and calibrator.read_calibration_cache() is None
    calibrator.write_calibration_cache(memoryview(b"scales"))
    assert calibrator.table == b"scales"


def test_with_a_known_table_nothing_is_calibrated_and_input_and_output_are_half(tensorrt):
    calibrator, config, network = trt.calibrator_of(table=b"scales"), Told(), Told()
    calibrator.join(network, config, "profile")
    assert calibrator.read_calibration_cache() == b"scales" and calibrator.get_batch(["input"]) is None
    assert config.profile is None and network.dtype == "half" and config.flags == ["INT8", "prefer"]
    asked = [(layer.type, layer.precision, layer.outputs) for layer in network.layers if layer.precision]
    assert asked == [(kind, "half", {0: "half"}) for kind in ("reduce", "product", "sum")]
    assert network.layers[1].precision is None  # a shortcut's sum


class WithoutGpu(trt.NativeEngine):
    """Without a GPU to name among the facts."""

    def facts(self):
        facts = {"tensorrt": sys.modules["tensorrt"].__version__, "profiles": self.profiles}
        return facts | onnx_export.facts_of_int8(self.data)


@pytest.fixture
def built(tensorrt, monkeypatch):
    """Instead of building: what each build was asked for.  A calibrating one leaves its table."""
    asked = []

    def build_plan(network, profiles, image_size, timings, int8=False, calibrator=None):
        known = calibrator and calibrator.table
        asked.append((network, profiles, known))
        if calibrator and not known:
            calibrator.write_calibration_cache(b"scales")
        return b"plan", timings + b"+"

    monkeypatch.setattr(trt, "build_plan", build_plan)
    return asked


@pytest.mark.parametrize(
    ("version", "kinds", "calibrated"),
    [
        ("8.6.0", {"EXPLICIT_BATCH": 0}, True),
        ("8.6.0", {"EXPLICIT_BATCH": 0}, False),
        ("11.1.0", {"STRONGLY_TYPED": 1}, True),
    ],
)
def test_each_tensorrt_is_given_its_own_kind_of_int8(
    tensorrt, built, project, exported, monkeypatch, version, kinds, calibrated
):
    import onnx

    if version != "8.6.0":
        need_scales_in_fp16(exported)
    tensorrt.__version__, tensorrt.NetworkDefinitionCreationFlag = version, SimpleNamespace(**kinds)
    monkeypatch.setattr(trt.NativeEngine, "calibrated", calibrated)
    checkpoint = exported.with_name("best_resnet18_64.pth")
    (exported.with_name("resnet18_64_int8.calibration")).unlink(missing_ok=True)
    file = WithoutGpu(checkpoint, 64, [1, 16], project / "data", int8=True)
    plan = checkpoint.with_name("plan")
    timings = file.make(plan, b"timings")
    assert plan.read_bytes() == b"plan"
    networks = [onnx.load_from_string(network) for network, _, _ in built]
    asked = [(profiles, known) for _, profiles, known in built]
    types = onnx.TensorProto.FLOAT if version == "8.6.0" else onnx.TensorProto.FLOAT16
    assert {network.graph.input[0].type.tensor_type.elem_type for network in networks} == {types}
    if version == "8.6.0":
        assert {network.opset_import[0].version for network in networks} == {17}
    if version == "8.6.0" and calibrated:
        assert asked == [([[onnx_export.BATCH] * 3], None), (file.profiles, b"scales")]
        assert timings == b"timings++"
    else:
        assert asked == [(file.profiles, None)] and timings == b"timings+"
        assert "QuantizeLinear" in {node.op_type for node in networks[0].graph.node}


def test_a_calibration_serves_every_engine_and_is_made_anew_when_damaged_or_foreign(
    tensorrt, built, project, exported, tmp_path, capsys
):
    tensorrt.__version__ = "8.6.0"
    checkpoint = Path(shutil.copy(exported.with_name("best_resnet18_64.pth"), tmp_path))
    for name in (exported.name, f"{exported.name}.json"):
        shutil.copy(exported.with_name(name), tmp_path)
    kept = tmp_path / "resnet18_64_int8.calibration"
    for batch, static in [(16, False), (1, True), (16, True)]:
        file = WithoutGpu(checkpoint, 64, [batch], project / "data", static=static, int8=True)
        assert file.calibration(b"")[0] == b"scales"
    assert len(built) == 1
    capsys.readouterr()
    kept.write_bytes(b"scale")
    assert file.calibration(b"")[0] == b"scales" and len(built) == 2
    tensorrt.__version__ = "8.6.1"
    assert file.calibration(b"")[0] == b"scales" and len(built) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if "anew" in line]
    reasons = ["is damaged", "was made for another tensorrt"]
    assert said == [f"{kept} {reason}; building it anew" for reason in reasons]
