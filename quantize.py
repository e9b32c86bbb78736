"""INT8 for every runtime that wants it: training images to calibrate with, and networks in ONNX's QDQ form.

A QDQ network keeps its layers and says beside each how its tensors are rounded to 8 bits.  The scales of
activations come from the largest values that the FP32 network shows for training images: the test images
stay unseen.
"""

import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import datasets
from utils import images
from utils.utils import UserError, is_fresh, sha256, store

MAX_IMAGES = 256  # a few hundred do (Krishnamoorthi, Quantizing deep convolutional networks, 2018, section 3)
BATCH = 8  # images at once
ADDS = "INT8 calibrated on training images"  # what a rung adds


def calibration_files(data: Path) -> list[Path]:
    """Training images, evenly spread over all in the order of their names.  Raises UserError."""
    files = [path for paths in images.list_images(data)["train"].values() for path in paths]
    if not files:
        raise UserError(f"{data / 'train'} holds no images to calibrate INT8 with; see: python datasets.py")
    return files[:: -(-len(files) // MAX_IMAGES)]


def calibration_batches(data: Path, image_size: int) -> Iterator[torch.Tensor]:
    """float32 (BATCH, 3, S, S), normalised as for testing; the last is filled up from the beginning."""
    files, transform = calibration_files(data), datasets.test_transform(image_size)
    endless = itertools.cycle(files)
    for _ in range(-(-len(files) // BATCH)):
        chosen = itertools.islice(endless, BATCH)
        yield torch.stack([transform(datasets.load_rgb(path)) for path in chosen])


def fingerprint(data: Path) -> str:
    """Of the images' contents, in order."""
    return sha256(*images.content_hashes(calibration_files(data)))[:16]


# ---- for ONNX Runtime on CPUs


def for_cpu(source: Path, image_size: int, data: Path) -> tuple[Path, bool]:
    """The FP32 export `source` in INT8 beside it, and whether a fresh file was there."""
    import onnxruntime

    path = source.with_name(f"resnet18_{image_size}_int8.onnx")
    facts = {"onnx": sha256(source), "images": fingerprint(data), "precision": "INT8"}
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
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feed = ({"input": batch.numpy()} for batch in batches)
    reader = SimpleNamespace(get_next=lambda: next(feed, None))
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared)
        quantize_static(prepared, path, reader, per_channel=True, **how)


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
