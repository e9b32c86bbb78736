"""The registry of backends: which script makes which, and which are measured where none is named.

A script is imported when one of its backends is asked for: what only needs the names loads no runtime.
"""

import importlib

from utils.backend import Backend

PYTORCH = ["pytorch", "pytorch-channels-last", "pytorch-bf16", "pytorch-tf32", "pytorch-fp16"]
PYTORCH += ["pytorch-fp16-graph", "torch-compile", "torch-compile-graph"]
TENSORRT = ["torch-tensorrt", "torch-tensorrt-graph", "tensorrt", "tensorrt-graph", "tensorrt-static"]
TENSORRT += ["tensorrt-static-graph", "tensorrt-int8", "tensorrt-int8-graph", "tensorrt-int8-static-graph"]
NAMES = {  # script -> the names in its BACKENDS
    "pytorch_inference": PYTORCH,
    "onnx_inference": ["onnx", "onnx-int8", "onnx-nhwc", "onnx-nhwc-graph"],
    "openvino_inference": ["openvino", "openvino-int8", "openvino-fp16"],
    "tensorrt_inference": TENSORRT,
}
SCRIPTS = {name: script for script, names in NAMES.items() for name in names}
DEFAULT = {
    "cuda": ["pytorch", "onnx", "torch-tensorrt", "tensorrt"],
    "cpu": ["pytorch", "onnx", "onnx-int8", "openvino-int8", "torch-tensorrt", "tensorrt"],
}


def make(name: str, script: str | None = None) -> Backend:
    """The backend of that name, not loaded yet; `script` makes it where the registry does not know it."""
    return importlib.import_module(script or SCRIPTS[name]).BACKENDS[name]()
