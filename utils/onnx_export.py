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
NAMES = {"input_names": ["input"], "output_names": ["logits"]}
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
        free = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},), "dynamo": True}
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


def calibration_batches(data: Path, image_size: int) -> Iterator[torch.Tensor]:
    """float32 (BATCH, 3, S, S), normalised as for testing; the last is filled up from the beginning.

    Raises UserError with the path of an image that can't be read.
    """
    files, transform = calibration_files(data), datasets.test_transform(image_size)
    endless = itertools.cycle(files)
    for _ in range(-(-len(files) // BATCH)):
        chosen = itertools.islice(endless, BATCH)
        yield torch.stack([transform(images.load_known(path)) for path in chosen])


def fingerprint(data: Path) -> str:
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
    """8-bit activations with a zero point, 8-bit weights with a scale for each channel."""
    from onnxruntime.quantization import QuantType

    how = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "reduce_range": reduce_range}
    quantize(source, batches, path, **how)


def quantize(source: Path, batches: Iterator[torch.Tensor], path: Path, **how) -> None:
    """quantize_static() per channel with MinMax, after the folding and shape inference that it asks for."""
    import onnx
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feed = ({"input": batch.numpy()} for batch in batches)
    reader = SimpleNamespace(get_next=lambda: next(feed, None))
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)  # 1.18's fails on newer exports
        nodes = onnx.load(prepared).graph.node
        classifier = [node.name for node in nodes if node.op_type == "Gemm"]
        quantize_static(prepared, path, reader, per_channel=True, nodes_to_exclude=classifier, **how)


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
    return bool((session.run(None, feed)[0] != 64 * 255 * 127).any())


# ---- for TensorRT 10 and 11


def for_tensorrt(source: Path, image_size: int, data: Path) -> tuple[Path, bool]:
    """The FP32 export `source` as QDQ network for a strongly typed engine, and whether it was there."""
    import onnxruntime

    path = source.with_name(f"resnet18_{image_size}_int8_tensorrt.onnx")
    facts = {"onnx": sha256(source), "onnxruntime": onnxruntime.__version__, **facts_of_int8(data)}
    fresh = is_fresh(path, facts)
    if not fresh:
        batches = calibration_batches(data, image_size)
        store(path, facts, lambda file: write_for_tensorrt(source, batches, file))
    return path, fresh


def write_for_tensorrt(source: Path, batches: Iterator[torch.Tensor], path: Path) -> None:
    """Rounded, with zero points 0, right before each convolution and on the shortcut into each sum.

    So TensorRT fuses a convolution with the sum and ReLU after it (TensorRT's developer guide, "Q/DQ
    layer-placement recommendations").  All else is in half, with biases as they are.
    """
    import onnx
    from onnxruntime.quantization import QuantType

    types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    options = {"ActivationSymmetric": True, "QuantizeBias": False}
    options["OpTypesToExcludeOutputQuantization"] = ["Conv", "Add"]
    quantize(source, batches, path, op_types_to_quantize=["Conv", "Add"], extra_options=options, **types)
    network = onnx.load(path)
    for entry in [entry for entry in network.opset_import if entry.domain]:  # the optimiser's, all unused
        network.opset_import.remove(entry)
    leave_main_paths(network.graph)
    halve(network.graph)
    onnx.checker.check_model(network, full_check=True)
    onnx.save(network, path)


def leave_main_paths(graph) -> None:
    """Take back the rounding between the last convolution of a block, a 3 x 3 one, and the sum."""
    maker = {name: node for node in graph.node for name in node.output}
    for add in [node for node in graph.node if node.op_type == "Add"]:
        for i, name in enumerate(add.input):
            dequantize = maker[name]
            rounded = maker[dequantize.input[0]]
            last = maker[rounded.input[0]]
            sizes = [list(attribute.ints) for attribute in last.attribute if attribute.name == "kernel_shape"]
            if last.op_type == "Conv" and sizes == [[3, 3]]:
                add.input[i] = last.output[0]
                graph.node.remove(dequantize)
                graph.node.remove(rounded)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def halve(graph) -> None:
    """Weights, scales, input and output from FP32 to FP16: what a strongly typed engine computes in."""
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
