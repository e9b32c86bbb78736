"""Torch-TensorRT 2.2 and 2.11 to 2.14: compile a checkpoint into one TensorRT engine inside a PyTorch module, keep it in weights/.

Reads weights/best_resnet18_<size>.pth, writes weights/resnet18_<size>_max<batch>_fp16.pt2 (by Torch-TensorRT 2.2: .ts), beside it a .json
that says what it was made from, and a timing cache for the next compilation.

    python torch_trt.py --image-sizes 224 --batch-sizes 1 8 16

The module serves every batch up to the largest asked for.  An operation that would fall back to PyTorch is an error.
"""

import argparse
import operator
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

import model
import trt
from utils.utils import (
    BATCH_SIZES,
    IMAGE_SIZES,
    UserError,
    add_path_arguments,
    checkpoint_path,
    run_main,
    sha256,
)


def is_torchscript() -> bool:
    """2.2 compiles TorchScript, since its dynamo route fails on a free batch axis; 2.11 to 2.14 compile exported programs."""
    return tuple(map(int, torch.__version__.split(".")[:2])) < (2, 3)


def compile_network(network: torch.nn.Module, shapes: list[list[int]], timings: Path):
    """`network`, in half on the GPU, as a module around one TensorRT engine.  Which version needs what:

    2.2        the scripted module, and `enabled_precisions`, without which TensorRT 8.6 builds FP32 kernels
    from 2.11  the module itself; weights and input say the precision, and `enabled_precisions` is refused or ignored;
               a timing cache of our own, since the default one lies in the temporary folder and can be anybody's
    """
    import torch_tensorrt

    workspace = min(trt.WORKSPACE_BYTES, torch.cuda.mem_get_info()[0] // 4)
    common = {"inputs": [input_range(shapes)], "require_full_compilation": True, "workspace_size": workspace}
    if is_torchscript():
        return torch_tensorrt.compile(
            torch.jit.script(network), ir="ts", enabled_precisions={torch.half}, **common
        )
    return torch_tensorrt.compile(network, ir="dynamo", timing_cache_path=str(timings), **common)


def input_range(shapes: list[list[int]]):
    """The input's shapes in Torch-TensorRT's terms; the name is the one in forward(), from which the free axis gets its own."""
    import torch_tensorrt

    smallest, best, largest = map(tuple, shapes)
    return torch_tensorrt.Input(
        min_shape=smallest, opt_shape=best, max_shape=largest, dtype=torch.half, name="x"
    )


def save(module, path: Path, shapes: list[list[int]]) -> None:
    """Write TorchScript by 2.2, which has no torch_tensorrt.save yet; else an exported program, told the shapes to keep its axis free."""
    import torch_tensorrt

    if is_torchscript():
        torch.jit.save(module, str(path))
    else:
        torch_tensorrt.save(
            module, str(path), output_format="exported_program", arg_inputs=[input_range(shapes)]
        )


def load(path: Path):
    """The module that save() wrote.  Its engine checks shapes itself, so the exported program's checks in Python are left out."""
    import torch_tensorrt

    with torch.inference_mode(False), torch.no_grad():
        return (
            torch.jit.load(str(path))
            if is_torchscript()
            else torch_tensorrt.load(str(path)).module(check_guards=False)
        )


def operations(module) -> list[str]:
    """What a compiled module does, step by step, leaving out the packing of inputs and outputs: an engine, if all went into one."""
    if is_torchscript():
        return [node.kind() for node in module.graph.nodes() if not node.kind().startswith("prim::")]
    steps = [node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    return [str(node.target) for node in steps if node.target is not operator.getitem]


def check_one_engine(module) -> None:
    """Raises RuntimeError, naming the operations, unless the whole network went into one engine."""
    found = operations(module)
    if len(found) != 1 or not ("execute_engine" in found[0] or "_run_on_acc" in found[0]):
        raise RuntimeError(
            f"Torch-TensorRT did not put the whole network into one engine, but made: {', '.join(found) or 'none'}"
        )


def facts(checkpoint: Path, shapes: list[list[int]]) -> dict:
    """What a compiled module depends on.  Torch-TensorRT's own cache ignores weights, versions and the GPU."""
    import tensorrt
    import torch_tensorrt

    versions = {
        "torch": torch.__version__,
        "torch_tensorrt": torch_tensorrt.__version__,
        "tensorrt": tensorrt.__version__,
    }
    return {
        "checkpoint": sha256(checkpoint),
        **versions,
        **trt.gpu_facts(),
        "shapes": shapes,
        "options": trt.OPTIONS,
    }


def module_path(checkpoint: Path, shapes: list[list[int]]) -> Path:
    return checkpoint.with_name(trt.file_name(shapes, "ts" if is_torchscript() else "pt2"))


def find(checkpoint: Path, shapes: list[list[int]]) -> Path | None:
    """The file for `shapes` if it is there and made from this checkpoint, by these versions, for this GPU."""
    path = module_path(checkpoint, shapes)
    return path if path.is_file() and trt.is_fresh(path, facts(checkpoint, shapes)) else None


def build(checkpoint: Path, shapes: list[list[int]]) -> tuple[Path, float]:
    """Compile and write the file.  Returns its path and the seconds that this took."""
    import torch_tensorrt

    start = time.perf_counter()
    path, made_from = module_path(checkpoint, shapes), facts(checkpoint, shapes)
    print(
        f"compiling {path} with Torch-TensorRT {torch_tensorrt.__version__}; this can take a minute",
        file=sys.stderr,
        flush=True,
    )
    timings, timed_with = trt.timing_cache(checkpoint, made_from)
    with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        network = (
            model.fold_batch_norm(model.load(checkpoint, "cpu")[0]).half().cuda()
        )  # folded in FP32, then halved
        working = Path(folder) / "timings"
        if not is_torchscript() and trt.is_fresh(timings, timed_with):
            working.write_bytes(timings.read_bytes())
        module = compile_network(network, shapes, working)
        check_one_engine(module)
        trt.store(path, made_from, lambda temporary: save(module, temporary, shapes))
        if working.is_file():
            trt.store(timings, timed_with, lambda temporary: temporary.write_bytes(working.read_bytes()))
    return path, time.perf_counter() - start


def main() -> None:
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-sizes", nargs="+", type=int, default=IMAGE_SIZES)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--force", action="store_true", help="compile even where a fresh file is there")
    add_path_arguments(parser)
    args = parser.parse_args()
    if reason := trt.why_unavailable(["torch_tensorrt"], "cuda"):
        raise UserError(reason)
    for size in args.image_sizes:
        checkpoint, shapes = checkpoint_path(args.weights, size), trt.profile(args.batch_sizes, size)
        trt.report(*trt.load_or_build(find, build, load, checkpoint, shapes, args.force)[1:])
        print("every operation is in one engine")  # else build() had raised


if __name__ == "__main__":
    run_main(main)
