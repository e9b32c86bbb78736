"""The registry of backends: which script makes which, and which are measured where none is named.

A script is imported when one of its backends is asked for, not before: what only needs their names, such as
`benchmark.py --help`, loads no runtime.
"""

import importlib

from utils.backend import Backend

NAMES = {  # script -> the names in its BACKENDS
    "pytorch_inference": [
        "pytorch",
        "pytorch-channels-last",
        "pytorch-bf16",
        "pytorch-tf32",
        "pytorch-fp16",
        "pytorch-fp16-graph",
        "torch-compile",
        "torch-compile-graph",
    ],
    "onnx_inference": ["onnx", "onnx-int8", "onnx-nhwc", "onnx-nhwc-graph"],
    "openvino_inference": ["openvino", "openvino-int8", "openvino-fp16"],
    "tensorrt_inference": [
        "torch-tensorrt",
        "torch-tensorrt-graph",
        "tensorrt",
        "tensorrt-graph",
        "tensorrt-static",
        "tensorrt-static-graph",
        "tensorrt-int8",
        "tensorrt-int8-graph",
        "tensorrt-int8-static-graph",
    ],
}
SCRIPTS = {name: script for script, names in NAMES.items() for name in names}
DEFAULT = {
    "cuda": ["pytorch", "onnx", "torch-tensorrt", "tensorrt"],
    "cpu": ["pytorch", "onnx", "onnx-int8", "openvino-int8", "torch-tensorrt", "tensorrt"],
}


def make(name: str, script: str | None = None) -> Backend:
    """The backend of that name, not loaded yet; `script` makes it where the registry does not know it."""
    return importlib.import_module(script or SCRIPTS[name]).BACKENDS[name]()
