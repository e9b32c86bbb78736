"""Backend: PyTorch.  The baseline is FP32 with TF32 off; the variants show what PyTorch alone can do.

Reads weights/best_resnet18_<size>.pth, leaves raw records in results/raw/ and prints their table.

    python pytorch_inference.py --image-sizes 224 --batch-sizes 1 8 16
"""

from pathlib import Path

import torch

import model
from utils import jobs
from utils.schema import Backend
from utils.utils import run_main


class PyTorch(Backend):
    """ResNet-18 as trained; in FP16 with batch normalisation folded and channels_last."""

    torch_allocator = True  # its memory is PyTorch's own, so torch.cuda.max_memory_allocated() sees it

    def __init__(self, precision: str = "FP32", compiled: bool = False):
        self.precision, self.compiled = precision, compiled

    def why_unavailable(self, device: str) -> str | None:
        if device == "cpu" and self.precision != "FP32":
            return f"PyTorch {self.precision} is measured on CUDA GPUs only; this run is on the CPU"
        if self.compiled:
            try:
                import triton  # noqa: F401
            except ImportError:
                return "torch.compile needs triton; run: pip install triton (triton-windows on Windows)"
        return None

    def load(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> None:
        tf32 = self.precision == "TF32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = False  # as PyTorch gives it
        network, _ = model.load(checkpoint, "cpu")
        if self.precision == "FP16":
            network = model.fold_batch_norm(network).half().to(memory_format=torch.channels_last)
        self.network = network.to(device)
        if self.compiled:
            self.network = torch.compile(self.network, dynamic=False)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        if self.precision == "FP16":
            return images.half().contiguous(memory_format=torch.channels_last)
        return images.contiguous()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


class CudaGraph(Backend):
    """Any backend replayed from CUDA graphs, one for each batch size, captured when prepare() first meets it.

    Replaying launches the whole network at once: launching kernels one by one no longer bounds small batches.
    """

    WARM_UP = 3  # calls before the capture, so that algorithms are chosen and memory is allocated

    def __init__(self, backend: Backend):
        self.backend, self.precision = backend, backend.precision
        self.torch_allocator = backend.torch_allocator

    def why_unavailable(self, device: str) -> str | None:
        if device == "cpu":
            return "CUDA graphs need a CUDA GPU; this run is on the CPU"
        return self.backend.why_unavailable(device)

    def load(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> None:
        inner, self.graphs = self.backend, {}
        inner.load(checkpoint, image_size, batch_sizes, device)
        self.precision, self.build_s = inner.precision, inner.build_s
        self.from_cache, self.artefact = inner.from_cache, inner.artefact

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        prepared = self.backend.prepare(images)
        if len(images) not in self.graphs:
            fixed = prepared.clone()
            for _ in range(self.WARM_UP):
                self.backend.predict(fixed)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                logits = self.backend.predict(fixed)
            self.graphs[len(images)] = graph, fixed, logits
        fixed = self.graphs[len(images)][1]
        fixed.copy_(prepared)
        return fixed

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        graph, _, logits = self.graphs[len(x)]
        graph.replay()
        return logits


BACKENDS = {
    "pytorch": PyTorch,
    "pytorch-tf32": lambda: PyTorch("TF32"),
    "pytorch-fp16": lambda: PyTorch("FP16"),
    "pytorch-fp16-graph": lambda: CudaGraph(PyTorch("FP16")),
    "torch-compile": lambda: PyTorch("FP16", compiled=True),
}

if __name__ == "__main__":
    run_main(lambda: jobs.main(__doc__, "pytorch_inference", BACKENDS))
