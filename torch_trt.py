"""Torch-TensorRT 2.2 and 2.11 to 2.14: compile a checkpoint into one TensorRT engine inside a PyTorch module.

Reads weights/best_resnet18_<size>.pth, writes weights/resnet18_<size>_max<batch>_fp16.pt2 (by
Torch-TensorRT 2.2: .ts), what it was made from beside it, and TensorRT's timings for the next compilation.
The module serves every batch up to the largest.  An operation that would fall back to PyTorch is an error.

    python torch_trt.py --image-sizes 224 --batch-sizes 1 8 16
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)
import operator
import tempfile
from pathlib import Path

import torch

import model
from utils.backend import EngineFile, build_engines, workspace_bytes
from utils.environment import torch_is_at_least
from utils.utils import run_main

# 2.2 compiles TorchScript, as its other route fails on a free batch axis; later ones compile exports.
TORCHSCRIPT = not torch_is_at_least(2, 3)


class Module(EngineFile):
    """A module's file; Torch-TensorRT's own cache ignores weights, versions and the GPU."""

    PACKAGES = ["torch_tensorrt"]
    MADE_WITH = ["torch", "torch-tensorrt"]

    def __init__(self, *asked, **options):
        super().__init__(*asked, **options)
        largest = max(*self.batch_sizes, 2)  # exports fix a batch of 1
        self.profiles = [[1, largest, largest]]  # Torch-TensorRT takes no more
        self.kind, self.suffix = f"max{largest}", "ts" if TORCHSCRIPT else "pt2"

    def make(self, path: Path, timings: bytes) -> bytes:
        import torch_tensorrt

        with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            network = model.fold_batch_norm(model.load(self.checkpoint, "cpu")[0])  # in FP32, then halved
            cache = Path(folder) / "timings"
            cache.write_bytes(timings)
            shapes = [(batch, 3, self.image_size, self.image_size) for batch in self.profiles[0]]
            module = compile_network(network.half().cuda(), shapes, cache)
            check_one_engine(module)
            if TORCHSCRIPT:
                torch.jit.save(module, str(path))
            else:  # told the shapes to keep the batch axis free
                inputs = [input_range(shapes)]
                torch_tensorrt.save(module, str(path), output_format="exported_program", arg_inputs=inputs)
            return cache.read_bytes()

    def open(self):
        """The module.  Its engine checks shapes itself: the program's checks are left out."""
        import torch_tensorrt

        with torch.inference_mode(False), torch.no_grad():
            if TORCHSCRIPT:
                return torch.jit.load(str(self.path))
            return torch_tensorrt.load(str(self.path)).module(check_guards=False)


def compile_network(network: torch.nn.Module, shapes: list[tuple], timings: Path):
    """`network`, in half on the GPU, as a module around one TensorRT engine.

    2.2 wants it scripted, and `enabled_precisions`, without which TensorRT 8.6 builds FP32 kernels.  Later
    ones go by weights and input; their own timing cache lies in the temporary folder and can be anybody's.
    """
    import torch_tensorrt

    common = {"inputs": [input_range(shapes)], "require_full_compilation": True}
    common["workspace_size"] = workspace_bytes()
    if TORCHSCRIPT:
        network = torch.jit.script(network)
        return torch_tensorrt.compile(network, ir="ts", enabled_precisions={torch.half}, **common)
    return torch_tensorrt.compile(network, ir="dynamo", timing_cache_path=str(timings), **common)


def input_range(shapes: list[tuple]):
    """The input's shapes; its name is the one in forward(), from which the free axis gets its own."""
    import torch_tensorrt

    ranges = dict(zip(("min_shape", "opt_shape", "max_shape"), shapes, strict=True))
    return torch_tensorrt.Input(**ranges, dtype=torch.half, name="x")


def check_one_engine(module) -> None:
    """Raises RuntimeError, naming the operations, unless the whole network went into one engine."""
    if TORCHSCRIPT:
        found = [node.kind() for node in module.graph.nodes() if not node.kind().startswith("prim::")]
    else:  # without packing inputs and outputs
        steps = [node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
        found = [str(node.target) for node in steps if node.target is not operator.getitem]
    if len(found) != 1 or not ("execute_engine" in found[0] or "_run_on_acc" in found[0]):
        made = ", ".join(found) or "none"
        raise RuntimeError(f"Torch-TensorRT did not put the whole network into one engine, but made: {made}")


if __name__ == "__main__":
    run_main(lambda: build_engines(__doc__, Module))
