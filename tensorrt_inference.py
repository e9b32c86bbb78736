"""Backends: TensorRT in FP16, through Torch-TensorRT and natively from the ONNX export, each with and
without a CUDA graph.

"tensorrt" serves every batch up to the largest asked for with one engine; "tensorrt-static" has an engine
for each batch size, so that the difference between the two is what a free batch size costs.

Reads weights/best_resnet18_<size>.pth and engines in weights/ (built where they are missing or stale),
leaves raw records in results/raw/ and prints their table.

    python tensorrt_inference.py --image-sizes 224 --batch-sizes 1 8 16 --backends all
"""

from pathlib import Path

import torch

import torch_trt
import trt
from pytorch_inference import CudaGraph
from utils import jobs
from utils.schema import Backend
from utils.utils import run_main


class TorchTensorRT(Backend):
    """ResNet-18 compiled by Torch-TensorRT, with a free batch size.

    With `graphs` every batch size gets a module of its own: a CUDA graph is only good while TensorRT's
    bindings stay as captured.
    """

    precision = "FP16"

    def __init__(self, graphs: bool = False):
        self.graphs = graphs

    def why_unavailable(self, device: str) -> str | None:
        return trt.why_unavailable(["torch_tensorrt"], device)

    def load(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> None:
        shapes = trt.profile_shapes(batch_sizes, image_size)
        loaded = trt.load_or_build(torch_trt.find, torch_trt.build, torch_trt.open_module, checkpoint, shapes)
        self.module, self.artefact, self.build_s, self.from_cache = loaded
        self.modules = {}

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        return images.half().contiguous()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        if not self.graphs:
            return self.module(x)
        if len(x) not in self.modules:
            self.modules[len(x)] = torch_trt.open_module(self.artefact) if self.modules else self.module
        return self.modules[len(x)](x)


class TensorRT(Backend):
    """ResNet-18 as a native engine: one for all batch sizes, or with `static` one for each.

    With `graphs` every batch size gets an engine of its own, for the same reason as above.
    """

    precision = "FP16"

    def __init__(self, static: bool = False, graphs: bool = False):
        self.static, self.graphs = static, graphs

    def why_unavailable(self, device: str) -> str | None:
        return trt.why_unavailable(["tensorrt", "onnx"], device)

    def load(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> None:
        self.build_s, self.from_cache, self.engines = 0.0, True, {}
        for batches in [[batch] for batch in batch_sizes] if self.static else [batch_sizes]:
            shapes = trt.profile_shapes(batches, image_size, self.static)
            engine, self.artefact, seconds, cached = trt.load_or_build(
                trt.find, trt.build, trt.open_engine, checkpoint, shapes
            )
            self.build_s += seconds
            self.from_cache &= cached
            for batch in batches:
                self.engines[batch] = (
                    trt.open_engine(self.artefact) if self.graphs and self.engines else engine
                )

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        return images.half().contiguous()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes); they hold until the next call with the same batch size."""
        engine = self.engines.get(len(x))
        if engine is None:  # not a batch size asked for: the engine for the largest takes it or says why not
            engine = self.engines[max(self.engines)]
        return engine(x)


BACKENDS = {
    "torch-tensorrt": TorchTensorRT,
    "torch-tensorrt-graph": lambda: CudaGraph(TorchTensorRT(graphs=True)),
    "tensorrt": TensorRT,
    "tensorrt-graph": lambda: CudaGraph(TensorRT(graphs=True)),
    "tensorrt-static": lambda: TensorRT(static=True),
    "tensorrt-static-graph": lambda: CudaGraph(TensorRT(static=True)),
}

if __name__ == "__main__":
    run_main(lambda: jobs.main(__doc__, "tensorrt_inference", BACKENDS))
