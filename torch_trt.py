"""Torch-TensorRT 2.2 and 2.11 to 2.14: compile a checkpoint into one TensorRT engine inside a PyTorch
module, keep it in weights/.

Reads weights/best_resnet18_<size>.pth, writes weights/resnet18_<size>_max<batch>_fp16.pt2 (by
Torch-TensorRT 2.2: .ts), beside it a .json that says what it was made from, and a timing cache for the next
compilation.

    python torch_trt.py --image-sizes 224 --batch-sizes 1 8 16

The module serves every batch up to the largest asked for.  An operation that would fall back to PyTorch is
an error.
"""

import operator
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

import model
import trt
from utils.utils import UserError, checkpoint_path, is_fresh, run_main, sha256, store


def is_torchscript() -> bool:
    """2.2 compiles TorchScript, since its dynamo route fails on a free batch axis; 2.11 to 2.14 compile
    exported programs."""
    return tuple(map(int, torch.__version__.split(".")[:2])) < (2, 3)


def compile_network(network: torch.nn.Module, shapes: list[list[int]], timings: Path):
    """`network`, in half on the GPU, as a module around one TensorRT engine.  Which version needs what:

    2.2        the scripted module, and `enabled_precisions`, without which TensorRT 8.6 builds FP32 kernels
    from 2.11  the module itself; weights and input say the precision, and `enabled_precisions` is refused
    or ignored;
               a timing cache of our own, since the default one lies in the temporary folder and can be
               anybody's
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
    """The input's shapes; its name is the one in forward(), from which the free axis gets its own."""
    import torch_tensorrt

    smallest, best, largest = map(tuple, shapes)
    ranges = dict(min_shape=smallest, opt_shape=best, max_shape=largest)
    return torch_tensorrt.Input(**ranges, dtype=torch.half, name="x")


def save(module, path: Path, shapes: list[list[int]]) -> None:
    """Write TorchScript by 2.2; else an exported program, told the shapes to keep its axis free."""
    import torch_tensorrt

    if is_torchscript():
        torch.jit.save(module, str(path))
    else:
        inputs = [input_range(shapes)]
        torch_tensorrt.save(module, str(path), output_format="exported_program", arg_inputs=inputs)


def open_module(path: Path):
    """The module that save() wrote.  Its engine checks shapes itself: the program's checks are left out."""
    import torch_tensorrt

    with torch.inference_mode(False), torch.no_grad():
        if is_torchscript():
            return torch.jit.load(str(path))
        return torch_tensorrt.load(str(path)).module(check_guards=False)


def operations(module) -> list[str]:
    """What a compiled module does, without packing inputs and outputs: an engine, if all went into one."""
    if is_torchscript():
        return [node.kind() for node in module.graph.nodes() if not node.kind().startswith("prim::")]
    steps = [node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    return [str(node.target) for node in steps if node.target is not operator.getitem]


def check_one_engine(module) -> None:
    """Raises RuntimeError, naming the operations, unless the whole network went into one engine."""
    found = operations(module)
    if len(found) != 1 or not ("execute_engine" in found[0] or "_run_on_acc" in found[0]):
        made = ", ".join(found) or "none"
        raise RuntimeError(f"Torch-TensorRT did not put the whole network into one engine, but made: {made}")


def facts(checkpoint: Path, shapes: list[list[int]]) -> dict:
    """What a compiled module depends on; Torch-TensorRT's own cache ignores weights, versions and the GPU."""
    import tensorrt
    import torch_tensorrt

    versions = {"torch": torch.__version__, "tensorrt": tensorrt.__version__}
    versions["torch_tensorrt"] = torch_tensorrt.__version__
    made_from = {"checkpoint": sha256(checkpoint), "shapes": shapes, "options": trt.OPTIONS}
    return made_from | versions | trt.gpu_facts()


def module_path(checkpoint: Path, shapes: list[list[int]]) -> Path:
    return checkpoint.with_name(trt.file_name(shapes, "ts" if is_torchscript() else "pt2"))


def find(checkpoint: Path, shapes: list[list[int]]) -> Path | None:
    """The file for `shapes` if it is there and made from this checkpoint, by these versions, for this GPU."""
    path = module_path(checkpoint, shapes)
    return path if path.is_file() and is_fresh(path, facts(checkpoint, shapes)) else None


def build(checkpoint: Path, shapes: list[list[int]]) -> tuple[Path, float]:
    """Compile and write the file; its path and the seconds that this took."""
    import torch_tensorrt

    start = time.perf_counter()
    path, made_from = module_path(checkpoint, shapes), facts(checkpoint, shapes)
    wait = f"compiling {path} with Torch-TensorRT {torch_tensorrt.__version__}; this can take a minute"
    print(wait, file=sys.stderr, flush=True)
    timings, timed_with = trt.timing_cache(checkpoint, made_from)
    with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        network = model.fold_batch_norm(model.load(checkpoint, "cpu")[0])  # in FP32, then halved
        working = Path(folder) / "timings"
        if not is_torchscript() and is_fresh(timings, timed_with):
            working.write_bytes(timings.read_bytes())
        module = compile_network(network.half().cuda(), shapes, working)
        check_one_engine(module)
        store(path, made_from, lambda file: save(module, file, shapes))
        if working.is_file():
            store(timings, timed_with, lambda file: file.write_bytes(working.read_bytes()))
    return path, time.perf_counter() - start


def main() -> None:
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    args = trt.parser_for(__doc__, "compile even where a fresh file is there").parse_args()
    if reason := trt.why_unavailable(["torch_tensorrt"], "cuda"):
        raise UserError(reason)
    for size in args.image_sizes:
        checkpoint, shapes = checkpoint_path(args.weights, size), trt.profile_shapes(args.batch_sizes, size)
        trt.print_artefact(*trt.load_or_build(find, build, open_module, checkpoint, shapes, args.force)[1:])
        print("every operation is in one engine")  # else build() had raised


if __name__ == "__main__":
    run_main(main)
