"""Native TensorRT, 8.6 to 11: build an engine from the ONNX export, keep it in weights/, run it on PyTorch's tensors.

Reads weights/best_resnet18_<size>.pth through onnx_inference.py's export, writes weights/resnet18_<size>_<batches>_fp16.engine, beside it
a .json that says what it was made from, and a timing cache for the next build.

    python trt.py --image-sizes 224 --batch-sizes 1 8 16

One engine per image size serves every batch up to the largest asked for; with --static, one engine for each batch size and for it alone.
"""

import argparse
import functools
import importlib
import importlib.util
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import onnx_inference
from utils.utils import (
    BATCH_SIZES,
    IMAGE_SIZES,
    UserError,
    add_path_arguments,
    checkpoint_path,
    package_version,
    read_json,
    run_main,
    sha256,
    write_json,
)

WORKSPACE_BYTES = (
    1 << 30
)  # at most; a quarter of the free memory where that is less, so that a 4 GB card can build
OLD_PARSER_OPSET = 17  # TensorRT 8.6 misreads ReduceMean from opset 18 on, where the axes are an input
OPTIONS = {
    "precision": "FP16",
    "workspace_bytes": WORKSPACE_BYTES,
}  # part of an engine's facts, like everything it is made from


# ---- what both routes to TensorRT share: reasons, shapes, files that say what they were made from


def why_unavailable(packages: list[str], device: str) -> str | None:
    """None if `packages` load and there is a GPU to run on, else one sentence that says what to do."""
    if device != "cuda":
        return "TensorRT needs an NVIDIA GPU; this run is on the CPU"
    if not torch.cuda.is_available():
        return "TensorRT needs an NVIDIA GPU, and PyTorch finds none; check that nvidia-smi lists one"
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; run: pip install -r requirements-tensorrt.txt (Python 3.10: requirements-tensorrt86.txt)"
        try:
            importlib.import_module(package)
        except (
            Exception
        ) as error:  # a missing library, the wrong CUDA or driver: each loader has exceptions of its own
            words = " ".join(f"{type(error).__name__}: {error}".split())
            return f"{package} {package_version(package) or ''} is installed but does not load: {words}"
    return None


def profile(batch_sizes: list[int], image_size: int, static: bool = False) -> list[list[int]]:
    """Smallest, best and largest input shape.  The best batch is at least 2: exporters take a batch of 1 for a constant."""
    largest = max(batch_sizes)
    batches = [largest] * 3 if static else [1, max(largest, 2), max(largest, 2)]
    return [[batch, 3, image_size, image_size] for batch in batches]


def file_name(shapes: list[list[int]], suffix: str) -> str:
    kind = "static" if shapes[0] == shapes[2] else "max"
    return f"resnet18_{shapes[2][2]}_{kind}{shapes[2][0]}_fp16.{suffix}"


def gpu_facts() -> dict:
    return {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability()),
    }


def is_fresh(path: Path, facts: dict) -> bool:
    """Whether `path` is whole and was made from exactly `facts`; if it is there but not that, one line on stderr says what is wrong."""
    if not path.is_file():
        return False
    try:
        record = read_json(path.with_name(path.name + ".json"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("made_from"), dict):
        wrong = "does not say what it was made from"
    elif others := sorted(name for name in facts if record["made_from"].get(name) != facts[name]):
        wrong = f"was made for another {', '.join(others)}"
    elif record.get("sha256") != sha256(path):
        wrong = "is damaged"
    else:
        return True
    print(f"{path} {wrong}; building it anew", file=sys.stderr, flush=True)
    return False


def store(path: Path, facts: dict, write) -> None:
    """Have `write(path)` write a temporary file, then put it in place with a note of what it was made from: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        digest = sha256(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(path.with_name(path.name + ".json"), {"made_from": facts, "sha256": digest})


def load_or_build(find, build, load, checkpoint: Path, shapes: list[list[int]], force: bool = False):
    """What `load` makes of the file for `shapes`, the file's path, the seconds it took and whether the file was there.

    A file that does not load is built anew.  Building has a process of its own, so that nothing of it stays in this one's GPU memory.
    """
    if not checkpoint.is_file():
        raise UserError(
            f"{checkpoint} is missing; train it first: python train.py --image-sizes {shapes[0][2]}"
        )
    start = time.perf_counter()
    if path := None if force else find(checkpoint, shapes):
        try:
            return load(path), path, time.perf_counter() - start, True
        except Exception as error:  # whole and made from the same, yet refused, in whatever words
            print(f"{path} does not load ({error}); building it anew", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        path, seconds = pool.submit(build, checkpoint, shapes).result()
    return load(path), path, seconds, False


def timing_cache(checkpoint: Path, facts: dict) -> tuple[Path, dict]:
    """The file of TensorRT's kernel timings, and what it depends on: timings hold for every network, by this TensorRT on this GPU."""
    return checkpoint.with_name("tensorrt.timings"), {
        name: facts[name] for name in ("tensorrt", "gpu", "compute_capability")
    }


# ---- building


@functools.lru_cache
def logger():
    """TensorRT's logger, one for the process since TensorRT keeps the first it is given.  It collects errors in `errors`."""
    import tensorrt

    class Collector(tensorrt.ILogger):
        def __init__(self):
            tensorrt.ILogger.__init__(self)
            self.errors = []

        def log(self, severity, message):
            if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Collector()


def failed(what: str) -> RuntimeError:
    """An exception with everything that TensorRT logged as an error since the last one."""
    errors = list(dict.fromkeys(logger().errors))
    logger().errors.clear()
    return RuntimeError("\n".join([what, *errors]))


def onnx_for(tensorrt_version: str, path: Path, batch: int | None) -> bytes:
    """The export as this TensorRT's parser reads it, with the free batch axis fixed to `batch` if given."""
    import onnx
    import onnx.version_converter

    model = onnx.load(path)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if int(tensorrt_version.split(".")[0]) < 10 and opset > OLD_PARSER_OPSET:
        model = onnx.version_converter.convert_version(model, OLD_PARSER_OPSET)
        for node in model.graph.node:  # the converter leaves an attribute that opset 17 does not know
            kept = [attribute for attribute in node.attribute if attribute.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
    if batch is not None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
        del model.graph.value_info[:]  # they still have the free axis
    return model.SerializeToString()


def network_flags(tensorrt) -> int:
    """8.6 has to be told of the batch axis; from 10 on the network's own types hold if one asks for it, in 11 always."""
    kinds = tensorrt.NetworkDefinitionCreationFlag
    return 1 << int(kinds.STRONGLY_TYPED if hasattr(kinds, "STRONGLY_TYPED") else kinds.EXPLICIT_BATCH)


def configure(tensorrt, config, free_bytes: int) -> None:
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, min(WORKSPACE_BYTES, free_bytes // 4))
    if hasattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return
    config.set_flag(
        tensorrt.BuilderFlag.FP16
    )  # 8.6 takes a network's types for a wish and builds FP32 kernels without this
    gone = [
        tensorrt.TacticSource.CUBLAS,
        tensorrt.TacticSource.CUBLAS_LT,
        tensorrt.TacticSource.CUDNN,
    ]  # not in 10 any more
    config.set_tactic_sources(config.get_tactic_sources() & ~sum(1 << int(source) for source in gone))


def build_plan(model: bytes, shapes: list[list[int]], timings: bytes) -> tuple[bytes, bytes]:
    """A serialised engine for `shapes`, and the timing cache grown by what building it measured.  Raises RuntimeError with all reasons."""
    import tensorrt

    logger().errors.clear()
    builder = tensorrt.Builder(logger())
    network = builder.create_network(network_flags(tensorrt))
    parser = tensorrt.OnnxParser(network, logger())
    if not parser.parse(model):
        raise failed(
            "TensorRT can't read the ONNX file:\n"
            + "\n".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        )
    config = builder.create_builder_config()
    configure(tensorrt, config, torch.cuda.mem_get_info()[0])
    if shapes[0] != shapes[2]:
        ranges = builder.create_optimization_profile()
        ranges.set_shape("input", *map(tuple, shapes))
        config.add_optimization_profile(ranges)
    cache = config.create_timing_cache(timings)
    if cache is None or not config.set_timing_cache(cache, False):  # unreadable: start from nothing
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise failed("TensorRT could not build the engine:")
    return bytes(plan), bytes(config.get_timing_cache().serialize())


def engine_facts(onnx_path: Path, shapes: list[list[int]]) -> dict:
    import tensorrt

    return {
        "onnx": sha256(onnx_path),
        "tensorrt": tensorrt.__version__,
        **gpu_facts(),
        "shapes": shapes,
        "options": OPTIONS,
    }


def find(checkpoint: Path, shapes: list[list[int]]) -> Path | None:
    """The engine file for `shapes` if it is there and made from this checkpoint, by this TensorRT, for this GPU."""
    path = checkpoint.with_name(file_name(shapes, "engine"))
    if not path.is_file():
        return None
    with torch.inference_mode(False), torch.no_grad():
        onnx_path, _, _ = onnx_inference.export(checkpoint, shapes[0][2], "FP16")
    return path if is_fresh(path, engine_facts(onnx_path, shapes)) else None


def build(checkpoint: Path, shapes: list[list[int]]) -> tuple[Path, float]:
    """Export if stale, build, and write the engine file.  Returns its path and the seconds that all this took."""
    import tensorrt

    start = time.perf_counter()
    path = checkpoint.with_name(file_name(shapes, "engine"))
    print(
        f"building {path} with TensorRT {tensorrt.__version__}; this can take a minute",
        file=sys.stderr,
        flush=True,
    )
    onnx_path, _, _ = onnx_inference.export(checkpoint, shapes[0][2], "FP16")
    facts = engine_facts(onnx_path, shapes)
    timings, timed_with = timing_cache(checkpoint, facts)
    model = onnx_for(tensorrt.__version__, onnx_path, shapes[0][0] if shapes[0] == shapes[2] else None)
    plan, measured = build_plan(model, shapes, timings.read_bytes() if is_fresh(timings, timed_with) else b"")
    store(path, facts, lambda temporary: temporary.write_bytes(plan))
    store(timings, timed_with, lambda temporary: temporary.write_bytes(measured))
    return path, time.perf_counter() - start


# ---- running


class Engine:
    """A plan on the GPU.  Calling it enqueues on PyTorch's current stream; the logits are its own and hold until the next call.

    It binds itself anew when the batch size changes; for several CUDA graphs use one Engine each, since a graph keeps its bindings.
    """

    def __init__(self, plan: bytes):
        import tensorrt

        logger().errors.clear()
        self.runtime = tensorrt.Runtime(logger())
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise failed("TensorRT can't load the engine:")
        fixed = tuple(self.engine.get_tensor_shape("input"))
        shapes = self.engine.get_tensor_profile_shape("input", 0) if -1 in fixed else [fixed] * 3
        self.smallest, _, self.largest = map(tuple, shapes)
        kinds = {tensorrt.DataType.HALF: torch.float16, tensorrt.DataType.FLOAT: torch.float32}
        self.dtype, self.logits_dtype = (
            kinds[self.engine.get_tensor_dtype(name)] for name in ("input", "logits")
        )
        self.context = self.shape = self.address = None
        self.outputs = {}  # shape of the input -> logits

    def bind(self, shape: torch.Size) -> None:
        check_shape(shape, self.smallest, self.largest)
        if self.context is None:  # only now, since it takes the memory for the largest shape
            self.context = self.engine.create_execution_context()
            if self.context is None:
                raise failed("TensorRT could not make an execution context:")
        if not self.context.set_input_shape("input", tuple(shape)):
            raise failed(f"TensorRT refuses the input shape {tuple(shape)}:")
        if shape not in self.outputs:
            self.outputs[shape] = torch.empty(
                tuple(self.context.get_tensor_shape("logits")), dtype=self.logits_dtype, device="cuda"
            )
        self.logits = self.outputs[shape]
        self.context.set_tensor_address("logits", self.logits.data_ptr())
        self.shape, self.address = shape, None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, 3, S, S) on the GPU, contiguous, of the engine's dtype -> logits (N, classes).  Raises ValueError for any other x."""
        if x.shape != self.shape:
            self.bind(x.shape)
        if x.dtype != self.dtype or not x.is_cuda or not x.is_contiguous():
            raise ValueError(
                f"the engine takes contiguous {self.dtype} on the GPU, not {x.dtype} on {x.device} with strides {x.stride()}"
            )
        address = x.data_ptr()
        if address != self.address:
            self.context.set_tensor_address("input", address)
            self.address = address
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise failed("TensorRT could not run the engine:")
        return self.logits


def check_shape(shape, smallest, largest) -> None:
    """Raises ValueError with both shapes unless `shape` lies between `smallest` and `largest` on every axis."""
    fits = len(shape) == len(smallest) and all(
        low <= n <= high for low, n, high in zip(smallest, shape, largest, strict=True)
    )
    if not fits:
        raise ValueError(
            f"input of shape {tuple(shape)} is outside the engine's profile, {tuple(smallest)} to {tuple(largest)}"
        )


def load(path: Path) -> Engine:
    return Engine(path.read_bytes())


def report(path: Path, seconds: float, from_cache: bool) -> None:
    """One line about a file, as trt.py and torch_trt.py print it."""
    print(
        f"{path}: {'from the cache' if from_cache else 'built'} in {seconds:.1f} s, {path.stat().st_size / 2**20:.1f} MB",
        flush=True,
    )


def main() -> None:
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-sizes", nargs="+", type=int, default=IMAGE_SIZES)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument(
        "--static", action="store_true", help="an engine for each batch size and for it alone"
    )
    parser.add_argument("--force", action="store_true", help="build even where a fresh engine is there")
    add_path_arguments(parser)
    args = parser.parse_args()
    if reason := why_unavailable(["tensorrt", "onnx"], "cuda"):
        raise UserError(reason)
    for size in args.image_sizes:
        checkpoint = checkpoint_path(args.weights, size)
        for batches in [[batch] for batch in args.batch_sizes] if args.static else [args.batch_sizes]:
            report(
                *load_or_build(
                    find, build, load, checkpoint, profile(batches, size, args.static), args.force
                )[1:]
            )


if __name__ == "__main__":
    run_main(main)
