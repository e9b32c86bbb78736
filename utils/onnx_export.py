"""A checkpoint as ONNX: FP32, FP16 and INT8.

INT8 is a network in ONNX's QDQ form: it says beside each layer how its tensors are rounded to 8 bits.  The
scales of activations come from the largest values that the FP32 network shows for training images.  The
classifier is left as it is: docs/method.md says why.
"""

import functools
import tempfile
import time
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import datasets
import model
from utils import images
from utils.backend import Unavailable, is_fresh, store, why_not_importable
from utils.environment import package_version, torch_is_at_least
from utils.utils import UserError, read_dict, sha256, write_json

MAX_BATCH = 1024  # of the exported graph's free batch axis
MAX_IMAGES = 256  # a few hundred do (Krishnamoorthi, Quantizing deep convolutional networks, 2018, section 3)
BATCH = 8  # images at once
ROUNDING = "INT8 by the largest values, classifier as it is"


def export(checkpoint: Path, image_size: int, precision: str, data=None) -> tuple[Path, float, bool]:
    """The checkpoint as an ONNX file with a free batch axis: "input" (N, 3, S, S), "logits" (N, classes).

    `precision` is FP32; FP16, with weights, input and output halved; or, in FP32 with rounding calibrated on
    `data`, INT8 for CPUs or INT8_TENSORRT.  Returns the path, the seconds it took and whether a fresh file
    was there already.  Raises Unavailable where packages or images for it are missing.
    """
    start = time.perf_counter()
    path = checkpoint.with_name(f"resnet18_{image_size}_{precision.lower()}.onnx")
    facts = {"checkpoint": sha256(checkpoint), "precision": precision}
    if precision.startswith("INT8"):
        source = export(checkpoint, image_size, "FP32")[0]
        facts |= {"onnx": sha256(source), **facts_of_int8(data)}
        if precision == "INT8":
            import onnxruntime

            facts |= {"onnxruntime": onnxruntime.__version__, "reduce_range": saturates()}
            write = functools.partial(write_for_cpu, source, calibration_batches(data, image_size))
        else:
            write = functools.partial(write_for_tensorrt, checkpoint, image_size, data)
    else:
        facts |= {name: package_version(name) for name in ("torch", "onnx", "onnxscript")}
        write = functools.partial(write_onnx, checkpoint, image_size, precision)
    fresh = is_fresh(path, facts)
    if not fresh:
        store(path, facts, write)
    return path, time.perf_counter() - start, fresh


def write_onnx(checkpoint: Path, image_size: int, precision: str, path: Path) -> None:
    """Export to `path` by the dynamo exporter, or with torch before 2.5 by the older one."""
    dynamo = torch_is_at_least(2, 5)
    for package in ["onnx", "onnxscript"] if dynamo else ["onnx"]:
        if reason := why_not_importable(package, "pip install -r requirements.txt"):
            raise Unavailable(f"the export to ONNX needs {package}: {reason}")
    network = model.fold_batch_norm(model.load(checkpoint, "cpu")[0])  # in FP32, then halved
    example = torch.zeros(2, 3, image_size, image_size)  # a batch of 1 would be taken for a constant
    if precision == "FP16":
        network, example = network.half(), example.half()
    how: dict = {"input_names": ["input"], "output_names": ["logits"]}
    with torch.inference_mode(False), torch.no_grad():  # exporters can't trace inference tensors
        if dynamo:
            batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
            how |= {"dynamic_shapes": ({0: batch},), "dynamo": True, "external_data": False, "verbose": False}
        else:
            how |= {"dynamic_axes": {"input": {0: "batch"}, "logits": {0: "batch"}}, "opset_version": 17}
            if precision == "FP16" and torch.cuda.is_available():  # it runs the network: CPUs lacked half
                network, example = network.cuda(), example.cuda()
        torch.onnx.export(network, (example,), str(path), **how)


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

    Raises as calibration_files(), and UserError with the path of an image that can't be read.
    """
    files = calibration_files(data)
    for start in range(0, len(files), BATCH):
        chosen = (files[i % len(files)] for i in range(start, start + BATCH))
        yield torch.stack([datasets.to_normalised(images.load_known(path), image_size) for path in chosen])


def facts_of_int8(data: Path | None) -> dict:
    """What an INT8 file depends on besides the network: how it is rounded, and the images' contents."""
    if data is None:  # any images will do: what was measured is used as long as its file is there
        return {"precision": ROUNDING}
    return {"precision": ROUNDING, "images": sha256(*images.content_hashes(calibration_files(data)))[:16]}


# ---- for CPUs: ONNX Runtime and OpenVINO


def write_for_cpu(source: Path, batches: Iterator[torch.Tensor], path: Path) -> None:
    """8-bit activations with a zero point, 8-bit weights with a scale for each channel, by ONNX Runtime."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feed = ({"input": batch.numpy()} for batch in batches)
    reader: typing.Any = SimpleNamespace(get_next=lambda: next(feed, None))
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"  # folded and with shapes, as quantize_static() asks for
        quant_pre_process(source, prepared, skip_symbolic_shape=True)  # 1.18's fails on newer exports
        nodes = onnx.load(prepared).graph.node
        kept = [node.name for node in nodes if node.op_type == "Gemm"]
        quantize_static(prepared, path, reader, nodes_to_exclude=kept, reduce_range=saturates(), **types)


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime's 8-bit products saturate here, as on x86 without VNNI: it adds pairs of products
    in 16 bits, and 255 * 127 twice doesn't fit, where weights of 7 bits do ("reduce_range")."""
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


def activation_ranges(checkpoint: Path, image_size: int, data: Path | None) -> dict[str, float]:
    """Each activation's largest magnitude in the FP32 network, for training images; kept in weights/."""
    source = export(checkpoint, image_size, "FP32")[0]
    path = checkpoint.with_name(f"resnet18_{image_size}_ranges.json")
    facts = {"onnx": sha256(source), **facts_of_int8(data)}
    if not is_fresh(path, facts):
        batches = calibration_batches(data, image_size)
        store(path, facts, lambda file: write_json(file, largest_values(source, batches)))
    return read_dict(path)


def largest_values(source: Path, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """The largest magnitude of the input and of each activation up to the last sum, by name."""
    import onnx
    import onnxruntime

    network = onnx.load(source)
    kinds = "Conv", "Relu", "MaxPool", "Add"
    names = [node.output[0] for node in network.graph.node if node.op_type in kinds]
    network.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = dict.fromkeys(["input", *names], 0.0)
    for batch in batches:
        x = batch.numpy()
        for name, values in zip(largest, [x, *session.run(names, {"input": x})], strict=True):
            largest[name] = max(largest[name], float(np.abs(np.asarray(values)).max()))
    return largest


def write_for_tensorrt(checkpoint: Path, image_size: int, data: Path | None, path: Path) -> None:
    """Rounded to 127 steps a side right before each convolution and on the shortcut into each sum.

    So TensorRT fuses a convolution with the sum and ReLU after it (TensorRT's developer guide, "Q/DQ
    layer-placement recommendations"); the main path, which a 3 x 3 convolution ends, enters a sum unrounded.
    """
    import onnx
    from onnx import numpy_helper

    ranges = activation_ranges(checkpoint, image_size, data)
    network = onnx.load(export(checkpoint, image_size, "FP32")[0])
    graph, nodes = network.graph, list(network.graph.node)
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    main_paths = {node.output[0] for node in convolutions if weights[node.input[1]].shape[2:] == (3, 3)}
    largest: dict = {name: top for name, top in ranges.items() if name not in main_paths}
    largest |= {node.input[1]: np.abs(weights[node.input[1]]).max((1, 2, 3)) for node in convolutions}
    del graph.node[:]
    done = set()
    for node in nodes:
        for i, name in enumerate(node.input):
            if name in largest and node.op_type in ("Conv", "Add"):
                if name not in done:
                    add_rounding(graph, name, largest[name])
                    done.add(name)
                node.input[i] = f"{name}_rounded"
        graph.node.append(node)
    del graph.value_info[:]
    onnx.checker.check_model(network, full_check=True)
    onnx.save(network, path)


def add_rounding(graph, name: str, largest) -> None:
    """Append the two nodes that make `{name}_rounded` of a tensor; zero points are 0."""
    from onnx import helper, numpy_helper

    scale = np.asarray(np.where(largest > 0, largest, 1) / 127, np.float32)
    for part, value in (("scale", scale), ("zero", np.zeros(scale.shape, np.int8))):
        graph.initializer.append(numpy_helper.from_array(value, f"{name}_{part}"))
    axis: dict = {"axis": 0} if scale.ndim else {}
    for kind, given, made in (("Quantize", name, "int8"), ("Dequantize", f"{name}_int8", "rounded")):
        inputs = [given, f"{name}_scale", f"{name}_zero"]
        graph.node.append(helper.make_node(f"{kind}Linear", inputs, [f"{name}_{made}"], **axis))


def halve(graph) -> None:
    """Weights, scales (from opset 19 on), input and output to FP16: what a strongly typed engine wants."""
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
