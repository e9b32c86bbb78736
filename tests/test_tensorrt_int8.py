"""TensorRT's INT8: the ranges that TensorRT 8.6 is told, and which network each version is given."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_int8 import need_scales_in_fp16

import trt
from utils import onnx_export

FLAGS = SimpleNamespace(INT8="INT8", PREFER_PRECISION_CONSTRAINTS="prefer")
KINDS = SimpleNamespace(REDUCE="reduce", MATRIX_MULTIPLY="product", ELEMENTWISE="sum")
vars(KINDS).update(CONVOLUTION="convolution", ACTIVATION="relu", POOLING="pooling")
TYPES = SimpleNamespace(HALF="half", INT8="int8")
TENSORRT = SimpleNamespace(BuilderFlag=FLAGS, LayerType=KINDS, DataType=TYPES)


class Tensor:
    def __init__(self, name: str):
        self.name, self.dtype, self.range = name, "float", None

    def set_dynamic_range(self, low: float, high: float):
        self.range = low, high


class Layer:
    def __init__(self, kind: str, name: str):
        self.type, self.precision, self.outputs, self.tensor = kind, None, {}, Tensor(name)
        self.set_output_type, self.get_output = self.outputs.__setitem__, lambda index: self.tensor


class Network:
    """Stands in for TensorRT's network: keeps what it is told."""

    def __init__(self):
        kinds = ["convolution", "sum", "reduce", "shuffle", "constant", "product", "sum"]
        self.layers = [Layer(kind, f"{kind}_{number}") for number, kind in enumerate(kinds)]
        self.tensors = {tensor.name: tensor for tensor in (layer.tensor for layer in self.layers)}
        self.input, self.output = Tensor("input"), self.layers[-1].tensor
        self.get_input, self.get_output = (lambda index: self.input), (lambda index: self.output)
        self.num_layers, self.get_layer = len(kinds), self.layers.__getitem__


def test_tensors_get_their_ranges_and_the_classifier_stays_half():
    network, flags = Network(), []
    ranges = {"input": 2.0, "convolution_0": 0.0, "sum_1": 5.5}
    trt.set_precisions(TENSORRT, SimpleNamespace(set_flag=flags.append), network, ranges)
    assert flags == ["prefer", "INT8"] and network.input.dtype == network.output.dtype == "half"
    told = {name: tensor.range for name, tensor in network.tensors.items() if tensor.range}
    assert told == {"convolution_0": (-1, 1), "sum_1": (-5.5, 5.5)} and network.input.range == (-2.0, 2.0)
    asked = [(layer.type, layer.precision, layer.outputs) for layer in network.layers if layer.precision]
    halves = [(kind, "half", {0: "half"}) for kind in ("reduce", "product", "sum")]
    assert asked == [("convolution", "int8", {}), ("sum", "int8", {}), *halves]  # a shortcut's sum


def test_in_fp16_every_layer_that_computes_is_half():
    network, flags = Network(), []
    trt.set_precisions(TENSORRT, SimpleNamespace(set_flag=flags.append), network, None)
    assert flags == ["prefer"] and network.input.dtype == "float"  # as it is in the file
    told = [layer.precision for layer in network.layers]
    assert told == ["half", "half", "half", None, None, "half", "half"]
    assert all(layer.outputs == ({0: "half"} if layer.precision else {}) for layer in network.layers)
    assert all(tensor.range is None for tensor in network.tensors.values())


def test_a_range_of_a_tensor_that_tensorrt_does_not_know_is_an_error():
    with pytest.raises(KeyError, match="elsewhere"):
        trt.set_precisions(TENSORRT, SimpleNamespace(set_flag=print), Network(), {"elsewhere": 1.0})


def test_ranges_are_those_of_the_network_itself(project, exported):
    """Against PyTorch: what enters the classifier is the last sum after its ReLU, averaged."""
    import torch

    import model

    checkpoint = exported.with_name("best_resnet18_64.pth")
    ranges = onnx_export.activation_ranges(checkpoint, 64, project / "data")
    network = model.load(checkpoint, "cpu")[0]
    batches = list(onnx_export.calibration_batches(project / "data", 64))
    seen = []
    last = network.get_submodule("layer4")
    last.register_forward_hook(lambda module, given, made: seen.append(made.abs().max().item()))
    with torch.inference_mode():
        for batch in batches:
            network(batch)
    assert ranges["input"] == pytest.approx(max(batch.abs().max().item() for batch in batches))
    assert any(top == pytest.approx(max(seen), rel=1e-3) for top in ranges.values())
    assert len(ranges) == 1 + 20 + 17 + 1 + 8  # convolutions, ReLUs, the pooling, sums


def test_ranges_serve_every_engine_and_are_made_anew_when_damaged(project, exported, tmp_path, capsys):
    checkpoint = Path(shutil.copy(exported.with_name("best_resnet18_64.pth"), tmp_path))
    found = onnx_export.activation_ranges(checkpoint, 64, project / "data")
    kept = tmp_path / "resnet18_64_ranges.json"
    written = kept.stat().st_mtime_ns
    assert onnx_export.activation_ranges(checkpoint, 64, project / "data") == found
    assert onnx_export.activation_ranges(checkpoint, 64, None) == found  # those that are there
    assert kept.stat().st_mtime_ns == written
    capsys.readouterr()
    kept.write_text("{}")
    assert onnx_export.activation_ranges(checkpoint, 64, project / "data") == found
    assert f"{kept} is damaged; building it anew" in capsys.readouterr().err


class WithoutGpu(trt.NativeEngine):
    """Without a GPU to name among the facts."""

    def facts(self):
        facts = {"tensorrt": sys.modules["tensorrt"].__version__, "profiles": self.profiles}
        return facts | onnx_export.facts_of_int8(self.data)


@pytest.mark.parametrize(
    ("version", "kinds"), [("8.6.0", {"EXPLICIT_BATCH": 0}), ("11.1.0", {"STRONGLY_TYPED": 1})]
)
def test_each_tensorrt_is_given_its_own_kind_of_int8(project, exported, monkeypatch, version, kinds):
    import onnx

    if version != "8.6.0":
        need_scales_in_fp16(exported)
    fake = SimpleNamespace(__version__=version, NetworkDefinitionCreationFlag=SimpleNamespace(**kinds))
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    built = []

    def build_plan(network, profiles, image_size, timings, ranges=None):
        built.append((onnx.load_from_string(network), profiles, ranges))
        return b"plan", timings + b"+"

    monkeypatch.setattr(trt, "build_plan", build_plan)
    checkpoint = exported.with_name("best_resnet18_64.pth")
    file, plan = WithoutGpu(checkpoint, 64, [1, 16], project / "data", int8=True), exported.with_name("plan")
    assert file.make(plan, b"timings") == b"timings+" and plan.read_bytes() == b"plan"
    [(network, profiles, ranges)] = built
    assert profiles == file.profiles
    element, kinds = (
        network.graph.input[0].type.tensor_type.elem_type,
        {node.op_type for node in network.graph.node},
    )
    if version == "8.6.0":
        assert element == onnx.TensorProto.FLOAT and network.opset_import[0].version == 17
        assert "QuantizeLinear" not in kinds
        assert ranges == onnx_export.activation_ranges(checkpoint, 64, project / "data")
        names = {"input"} | {name for node in network.graph.node for name in node.output}
        assert set(ranges) <= names  # also after the conversion to opset 17
    else:
        assert element == onnx.TensorProto.FLOAT16 and "QuantizeLinear" in kinds and ranges is None
