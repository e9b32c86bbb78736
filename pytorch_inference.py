"""Backend: PyTorch.  The baseline is FP32 with TF32 off; the variants show what PyTorch alone can do.

Reads weights/best_resnet18_<size>.pth, leaves raw records in results/raw/ and prints their table.

    python pytorch_inference.py --image-sizes 224 --batch-sizes 1 8 16
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

import model
from utils.backend import Backend, CudaGraph, Unavailable, why_not_importable
from utils.devices import has_native_bfloat16
from utils.environment import is_out_of_memory
from utils.utils import run_main

DTYPES = {"FP32": torch.float32, "TF32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}
TUNED = "channels last, batch norm folded"  # what a variant adds


class PyTorch(Backend):
    """ResNet-18 as trained; `tuned`: batch norm folded, channels last, cuDNN's kernels chosen by trial.

    `only` is the device that the variant is for.  Compiled, it is FP16 on a GPU and FP32 on a CPU.
    """

    torch_allocator = True  # its memory is PyTorch's own, so torch.cuda.max_memory_allocated() sees it

    def __init__(self, precision="FP32", only="", tuned=False, compiled=False, adds=""):
        self.precision, self.only, self.tuned = precision, only, tuned
        self.compiled, self.adds = compiled, adds

    def why_unavailable(self, device: str) -> str | None:
        if self.only and device != self.only:
            places = {"cuda": "a GPU", "cpu": "the CPU"}
            what = f"this form of PyTorch ({self.adds}) is measured on {places[self.only]} only"
            return f"{what}; this run is on {places[device]}"
        if self.precision == "BF16" and not has_native_bfloat16():
            return "this processor has no BF16 arithmetic (AVX512_BF16): emulated, it is slower than FP32"
        if self.precision == "TF32" and torch.cuda.get_device_capability() < (8, 0):
            return "this GPU has no TF32 arithmetic (from compute capability 8.0 on), but computes in FP32"
        forced = os.environ.get("NVIDIA_TF32_OVERRIDE")
        if device == "cuda" and forced and forced == {"FP32": "1", "TF32": "0"}.get(self.precision):
            return f"NVIDIA_TF32_OVERRIDE={forced} keeps PyTorch from computing in {self.precision}; unset it"
        if self.compiled and device == "cuda":
            return why_not_importable("triton", "pip install triton (triton-windows on Windows)")
        compiler = os.environ.get("CXX", {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++"))
        if self.compiled and shutil.which(compiler.split()[0]) is None:
            return f"torch.compile needs a C++ compiler, and {compiler} is not there; install one or set CXX"
        return None

    def load(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> None:
        if self.compiled and device == "cpu":
            self.precision = "FP32"
        tf32 = self.precision == "TF32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = self.tuned  # off for the baseline: as PyTorch gives it
        network, _ = model.load(checkpoint, "cpu")
        if self.tuned:
            network = model.fold_batch_norm(network).to(memory_format=torch.channels_last)
        self.network = network.to(device, DTYPES[self.precision])
        self.graphs, self.known = 0, set()  # compiled so far; the batch sizes that they are for
        if self.compiled:  # once for each batch size; beyond its limit, 8, it would run uncompiled
            torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
            self.network = torch.compile(self.network, dynamic=False, fullgraph=True, backend=self.compile)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self.tuned else torch.contiguous_format
        x = images.to(DTYPES[self.precision]).contiguous(memory_format=layout)
        if self.compiled and len(x) not in self.known:
            self.compile_for(x)
        return x

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)

    def compile(self, graph, examples):
        """torch.compile's default compiler, counted: with TORCHDYNAMO_DISABLE=1, say, it is never asked."""
        compiled = torch._dynamo.lookup_backend("inductor")(graph, examples)
        self.graphs += 1
        return compiled

    def compile_for(self, x: torch.Tensor) -> None:
        """Compile for x's batch size.  Raises Unavailable where that gave no compiled network."""
        before, leave = self.graphs, "or leave torch-compile out of --backends"
        try:
            self.network(x)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            words = " ".join(str(error).split())
            raise Unavailable(f"torch.compile failed; mend its compiler, {leave}: {words}") from error
        if self.graphs == before:
            raise Unavailable(f"torch.compile compiled nothing; unset TORCHDYNAMO_DISABLE, {leave}")
        self.known.add(len(x))


FP16 = partial(PyTorch, "FP16", "cuda", tuned=True, adds=f"FP16, {TUNED}, cuDNN's kernels chosen by trial")
# In the default mode: Inductor's other modes give the same kernels in a CUDA graph, or take minutes.
COMPILED = partial(PyTorch, "FP16", tuned=True, compiled=True, adds=f"compiled, {TUNED}, FP16 on a GPU")
BACKENDS = {
    "pytorch": PyTorch,
    "pytorch-channels-last": lambda: PyTorch("FP32", "cpu", tuned=True, adds=TUNED),
    "pytorch-bf16": lambda: PyTorch("BF16", "cpu", tuned=True, adds=f"BF16, {TUNED}"),
    "pytorch-tf32": lambda: PyTorch("TF32", "cuda", adds="TF32 on the tensor cores"),
    "pytorch-fp16": FP16,
    "pytorch-fp16-graph": lambda: CudaGraph(FP16()),
    "torch-compile": COMPILED,
    "torch-compile-graph": lambda: CudaGraph(COMPILED()),
}

if __name__ == "__main__":
    from benchmark import measure_script

    run_main(lambda: measure_script(__doc__, "pytorch_inference", BACKENDS))
