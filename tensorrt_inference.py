"""Backends: TensorRT through Torch-TensorRT and natively, each with and without a CUDA graph; FP16 and INT8.

Reads weights/best_resnet18_<size>.pth and engines in weights/ (built where they are missing or stale),
leaves raw records in results/raw/ and prints their table.

    python tensorrt_inference.py --image-sizes 224 --batch-sizes 1 8 16 --backends all
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)
from pathlib import Path

import torch

import torch_trt
import trt
from utils.backend import Backend, CudaGraph, EngineFile, why_no_tensorrt
from utils.utils import run_main


class TensorRT(Backend):
    """ResNet-18 by TensorRT: one engine for all batch sizes, or with `static` one for each.

    `kind` is the route: trt.NativeEngine, or torch_trt.Module through Torch-TensorRT.  With `apart` the file
    is opened anew for every batch size: a CUDA graph is only good while the module's state stays as captured.
    """

    def __init__(self, kind: type[EngineFile] = trt.NativeEngine, apart: bool = False, **options: bool):
        self.kind, self.apart, self.options = kind, apart, options
        self.precision = "INT8" if options.get("int8") else "FP16"
        self.any_batch = not options.get("static")
        meaning = {"int8": "INT8 calibrated on training images", "static": "an engine for each batch size"}
        self.adds = ", ".join(text for name, text in meaning.items() if options.get(name))

    def why_unavailable(self, device: str) -> str | None:
        return why_no_tensorrt(self.kind.PACKAGES, device)

    def load(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> None:
        self.build_s, self.from_cache, self.engines = 0.0, True, {}
        for file in self.kind.files(checkpoint, image_size, batch_sizes, self.data, **self.options):
            engine, seconds, from_cache = file.load_or_build()
            self.file, self.artefact = file, file.path
            self.build_s += seconds
            self.from_cache &= from_cache
            self.engines |= dict.fromkeys(file.batch_sizes[:1] if self.apart else file.batch_sizes, engine)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        if self.apart and len(images) not in self.engines:
            self.engines[len(images)] = self.file.open()
        return images.half().contiguous()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes); a native engine's hold until the next call with the same batch size."""
        # The engine for the largest takes a batch size that was not asked for, or says why not.
        batch = len(x) if len(x) in self.engines else max(self.engines)
        return self.engines[batch](x)


BACKENDS = {
    "torch-tensorrt": lambda: TensorRT(torch_trt.Module),
    "torch-tensorrt-graph": lambda: CudaGraph(TensorRT(torch_trt.Module, apart=True)),
    "tensorrt": TensorRT,
    "tensorrt-graph": lambda: CudaGraph(TensorRT()),
    "tensorrt-static": lambda: TensorRT(static=True),
    "tensorrt-static-graph": lambda: CudaGraph(TensorRT(static=True)),
    "tensorrt-int8": lambda: TensorRT(int8=True),
    "tensorrt-int8-graph": lambda: CudaGraph(TensorRT(int8=True)),
    "tensorrt-int8-static-graph": lambda: CudaGraph(TensorRT(int8=True, static=True)),
}

if __name__ == "__main__":
    from benchmark import measure_script

    run_main(lambda: measure_script(__doc__, "tensorrt_inference", BACKENDS))
