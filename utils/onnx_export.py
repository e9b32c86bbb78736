"""A checkpoint as ONNX: FP32, FP16 and INT8.

INT8 is a network in ONNX's QDQ form: it keeps its layers and says beside each how its tensors are rounded to
8 bits.  The scales of activations come from the largest values that the FP32 network shows for training
images: the test images stay unseen.  The classifier after the last convolution is left as it is: it takes no
time, and a rare image whose features are twice as large as any seen lost half of its logits there.
"""

import functools
import itertools
import tempfile
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import datasets
import model
from utils import images
from utils.backend import Unavailable, is_fresh, store, why_not_importable
from utils.environment import package_version, torch_is_at_least
from utils.utils import UserError, sha256

MAX_BATCH = 1024  # of the exported graph's free batch axis
OLD_EXPORTER_OPSET = 17  # torch before 2.5 has no dependable dynamo exporter
NAMES: dict = {"input_names": ["input"], "output_names": ["logits"]}
MAX_IMAGES = 256  # a few hundred do (Krishnamoorthi, Quantizing deep convolutional networks, 2018, section 3)
BATCH = 8  # images at once
PRECISION = "INT8 by the largest values, classifier as it is"


def export_path(checkpoint: Path, image_size: int, precision: str) -> Path:
    return checkpoint.with_name(f"resnet18_{image_size}_{precision.lower()}.onnx")


def export(checkpoint: Path, image_size: int, precision: str) -> tuple[Path, float, bool]:
    """The checkpoint as an ONNX file with a free batch axis: "input" (N, 3, S, S), "logits" (N, classes).

    Batch normalisation is folded in FP32; "FP16" then halves weights, input and output.  Returns the path,
    the seconds it took and whether a fresh file was there already.  Raises Unavailable where a package for it
    is missing.
    """
    start = time.perf_counter()
    path = export_path(checkpoint, image_size, precision)
    facts = {name: package_version(name) for name in ("torch", "onnx", "onnxscript")}
    facts |= {"checkpoint": sha256(checkpoint), "precision": precision}
    fresh = is_fresh(path, facts)
    if not fresh:
        for package in ["onnx", "onnxscript"] if torch_is_at_least(2, 5) else ["onnx"]:
            if reason := why_not_importable(package, "pip install -r requirements.txt"):
                raise Unavailable(f"the export to ONNX needs {package}: {reason}")
        with torch.inference_mode(False), torch.no_grad():  # exporters can't trace inference tensors
            store(path, facts, lambda file: write_onnx(checkpoint, image_size, precision, file))
    return path, time.perf_counter() - start, fresh


def write_onnx(checkpoint: Path, image_size: int, precision: str, path: Path) -> None:
    """Export to `path`: by the dynamo exporter, or with torch before 2.5 by the older one."""
    network = model.fold_batch_norm(model.load(checkpoint, "cpu")[0])
    example = torch.zeros(2, 3, image_size, image_size)  # a batch of 1 would be taken for a constant
    if precision == "FP16":
        network, example = network.half(), example.half()
    if torch_is_at_least(2, 5):
        batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
        free: dict = {"dynamic_shapes": ({0: batch},), "dynamo": True}
        torch.onnx.export(network, (example,), path, external_data=False, verbose=False, **free, **NAMES)
        return
    if precision == "FP16" and torch.cuda.is_available():  # it runs the network; CPUs had no half convolution
        network, example = network.cuda(), example.cuda()
    free = {"dynamic_axes": {"input": {0: "batch"}, "logits": {0: "batch"}}}
    torch.onnx.export(network, (example,), str(path), opset_version=OLD_EXPORTER_OPSET, **free, **NAMES)


# ---- the images that INT8 is calibrated on


def calibration_files(data: Path | None) -> list[Path]:
    """Training images, evenly spread over all in the order of their names.

    Raises UserError where there are none, Unavailable where the caller has none to give.
    """
    if data is None:
        raise Unavailable("no INT8 network of this checkpoint is there; make it: python benchmark.py")
    files = [path for paths in images.list_images(data)["train"].values() for path in paths]
    if not files:
        raise UserError(f"{data / 'train'} holds no images to calibrate INT8 with; see: python datasets.py")
    return files[:: -(-len(files) // MAX_IMAGES)]


def calibration_batches(data: Path | None, image_size: int) -> Iterator[torch.Tensor]:
    """float32 (BATCH, 3, S, S), normalised as for testing; the last is filled up from the beginning.

    Raises UserError with the path of an image that can't be read, and as calibration_files() does.
    """
    files = calibration_files(data)
    endless = itertools.cycle(files)
    for _ in range(-(-len(files) // BATCH)):
        chosen = itertools.islice(endless, BATCH)
        yield torch.stack([datasets.to_normalised(images.load_known(path), image_size) for path in chosen])


def fingerprint(data: Path | None) -> str:
    """Of the images' contents, in order."""
    return sha256(*images.content_hashes(calibration_files(data)))[:16]


def facts_of_int8(data: Path | None) -> dict:
    """What an INT8 file depends on besides the network: the way it is rounded, and the images.

    Without `data` any images will do: what was measured is used as long as its file is there.
    """
    return {"precision": PRECISION} | ({"images": fingerprint(data)} if data else {})


# ---- for CPUs: ONNX Runtime and OpenVINO


def files_for_cpu(checkpoint: Path, image_size: int, int8: bool) -> list[Path]:
    """What export_for_cpu() leaves; the last is what a runtime loads."""
    return [export_path(checkpoint, image_size, name) for name in (["FP32", "INT8"] if int8 else ["FP32"])]


def export_for_cpu(checkpoint: Path, image_size: int, int8: bool, data: Path | None):
    """The checkpoint in FP32, or `int8` calibrated on `data`, as export() gives it: path, seconds, fresh."""
    source, seconds, fresh = export(checkpoint, image_size, "FP32")
    if not int8:
        return source, seconds, fresh
    start = time.perf_counter()
    path, fresh = for_cpu(source, checkpoint, image_size, data)
    return path, seconds + time.perf_counter() - start, fresh


def for_cpu(source: Path, checkpoint: Path, image_size: int, data: Path | None) -> tuple[Path, bool]:
    """The checkpoint's FP32 export `source` in INT8 beside it, and whether a fresh file was there."""
    if reason := why_not_importable("onnxruntime", "pip install -r requirements.txt"):
        raise Unavailable(f"ONNX Runtime makes the INT8 network: {reason}")
    import onnxruntime

    path = export_path(checkpoint, image_size, "INT8")
    facts = {"checkpoint": sha256(checkpoint), "onnx": sha256(source), **facts_of_int8(data)}
    facts |= {"onnxruntime": onnxruntime.__version__, "reduce_range": saturates()}
    fresh = is_fresh(path, facts)
    if not fresh:
        batches = calibration_batches(data, image_size)
        store(path, facts, lambda file: write_for_cpu(source, batches, facts["reduce_range"], file))
    return path, fresh


def write_for_cpu(source: Path, batches: Iterator[torch.Tensor], reduce_range: bool, path: Path) -> None:
    """8-bit activations with a zero point, 8-bit weights with a scale for each channel, by ONNX Runtime.

    After the folding and shape inference that quantize_static() asks for.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feed = ({"input": batch.numpy()} for batch in batches)
    reader: typing.Any = SimpleNamespace(get_next=lambda: next(feed, None))
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)  # 1.18's fails on newer exports
        nodes = onnx.load(prepared).graph.node
        kept = [node.name for node in nodes if node.op_type == "Gemm"]
        quantize_static(prepared, path, reader, nodes_to_exclude=kept, reduce_range=reduce_range, **types)


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime's 8-bit products saturate here, as they do on x86 processors without VNNI.

    These add pairs of products in 16 bits: 255 * 127 twice doesn't fit.  Weights of 7 bits do
    ("reduce_range").  Multiplying just these tells it for any processor and version.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    describe = helper.make_tensor_value_info
    inputs = [describe("a", TensorProto.UINT8, [16, 64]), describe("b", TensorProto.INT8, [64, 16])]
    node = helper.make_node("MatMulInteger", ["a", "b"], ["sums"])
    graph = helper.make_graph([node], "probe", inputs, [describe("sums", TensorProto.INT32, [16, 16])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"a": np.full((16, 64), 255, np.uint8), "b": np.full((64, 16), 127, np.int8)}
    return bool(np.any(session.run(None, feed)[0] != 64 * 255 * 127))


# ---- for TensorRT


def for_tensorrt(source: Path, checkpoint: Path, image_size: int, data: Path | None) -> tuple[Path, bool]:
    """The checkpoint's FP32 export `source` as QDQ network in FP32, and whether a fresh file was there."""
    path = source.with_name(f"resnet18_{image_size}_int8_tensorrt.onnx")
    facts = {"checkpoint": sha256(checkpoint), "onnx": sha256(source), **facts_of_int8(data)}
    fresh = is_fresh(path, facts)
    if not fresh:
        largest = largest_values(checkpoint, calibration_batches(data, image_size))
        store(path, facts, lambda file: write_for_tensorrt(source, largest, file))
    return path, fresh


class Largest(torch.fx.Interpreter):
    """Runs a traced network and keeps the largest magnitude that each of its nodes has given."""

    def __init__(self, network):
        super().__init__(network)
        self.seen = {}

    def run_node(self, node):
        result = super().run_node(node)
        self.seen[node] = max(self.seen.get(node, 0.0), float(result.abs().max()))
        return result


def largest_values(checkpoint: Path, batches: Iterator[torch.Tensor]) -> list[tuple[str, float]]:
    """(operator in ONNX, largest magnitude) of the input and of all before the mean over pixels, in order."""
    network = model.fold_batch_norm(model.load(checkpoint, "cpu")[0])
    watched = Largest(typing.cast(typing.Any, network))
    with torch.inference_mode():
        for batch in batches:
            watched.run(batch)
    kinds = {torch.nn.Conv2d: "Conv", torch.nn.ReLU: "Relu", torch.nn.MaxPool2d: "MaxPool"}
    found = []
    for node, value in watched.seen.items():
        kind = {"placeholder": "input", "call_function": "Add" if "add" in node.name else ""}.get(node.op)
        if node.op == "call_module":
            kind = kinds.get(type(network.get_submodule(node.target)))
        found += [(kind, value)] if kind else []
    return found


def write_for_tensorrt(source: Path, largest: list[tuple[str, float]], path: Path) -> None:
    """Rounded, with zero points 0, right before each convolution and on the shortcut into each sum.

    So TensorRT fuses a convolution with the sum and ReLU after it (TensorRT's developer guide, "Q/DQ
    layer-placement recommendations").  All else is as it was, biases too.
    """
    import onnx

    network = onnx.load(source)
    graph = network.graph
    body = [node for node in graph.node if node.op_type in ("Conv", "Relu", "MaxPool", "Add")]
    if ["input", *(node.op_type for node in body)] != [kind for kind, _ in largest]:
        raise RuntimeError(f"{source} is not the network whose values were observed")
    names = [graph.input[0].name, *(node.output[0] for node in body)]
    rounding = Rounding(graph, {name: value for name, (_, value) in zip(names, largest, strict=True)})
    nodes = list(graph.node)
    maker = {name: node for node in nodes for name in node.output}
    del graph.node[:]
    for node in nodes:
        if node.op_type == "Conv":
            node.input[0] = rounding.of_values(node.input[0])
            node.input[1] = rounding.of_weights(node.input[1])
        elif node.op_type == "Add":
            for i, name in enumerate(node.input):
                if not is_main_path(maker[name]):
                    node.input[i] = rounding.of_values(name)
        graph.node.append(node)
    del graph.value_info[:]
    onnx.checker.check_model(network, full_check=True)
    onnx.save(network, path)


def is_main_path(node) -> bool:
    """Whether this ends a block's main path, which a 3 x 3 convolution does: its sum takes it unrounded."""
    sizes = [list(attribute.ints) for attribute in node.attribute if attribute.name == "kernel_shape"]
    return node.op_type == "Conv" and sizes == [[3, 3]]


class Rounding:
    """Adds to a graph the pairs of nodes that round tensors to 127 steps a side, each tensor once."""

    def __init__(self, graph, largest: dict[str, float]):
        from onnx import numpy_helper

        self.graph, self.largest, self.rounded = graph, largest, {}
        self.weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def of_values(self, name: str) -> str:
        """The name of the rounded tensor; one scale, from the largest value that was observed."""
        return self.rounded.get(name) or self.add(name, np.array(self.largest[name], np.float32))

    def of_weights(self, name: str) -> str:
        """The name of the rounded weights; a scale for each output channel."""
        return self.rounded.get(name) or self.add(name, np.abs(self.weights[name]).max((1, 2, 3)), axis=0)

    def add(self, name: str, largest, **axis) -> str:
        from onnx import helper, numpy_helper

        scale = np.asarray(np.where(largest > 0, largest, 1) / 127, np.float32)
        for part, value in (("scale", scale), ("zero", np.zeros(scale.shape, np.int8))):
            self.graph.initializer.append(numpy_helper.from_array(value, f"{name}_{part}"))
        steps = [f"{name}_scale", f"{name}_zero"]
        for kind, given, made in (
            ("Quantize", name, f"{name}_int8"),
            ("Dequantize", f"{name}_int8", f"{name}_rounded"),
        ):
            self.graph.node.append(helper.make_node(f"{kind}Linear", [given, *steps], [made], **axis))
        self.rounded[name] = f"{name}_rounded"
        return self.rounded[name]


def halve(graph) -> None:
    """Weights, scales, input and output from FP32 to FP16: what a strongly typed engine computes in.

    Scales in FP16 need opset 19.
    """
    from onnx import TensorProto, numpy_helper

    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            half = values.astype(np.float16)
            half[(half == 0) & (values > 0)] = np.float16(2**-24)  # a scale must not vanish
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del graph.value_info[:]  # they still say FP32
