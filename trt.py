"""Native TensorRT, 8.6 to 11: build an engine from the ONNX export, keep it in weights/, run it on tensors.

Reads weights/best_resnet18_<size>.pth through onnx_inference.py's export, writes
weights/resnet18_<size>_<batches>_fp16.engine, what it was made from beside it, and TensorRT's timings.

    python trt.py --image-sizes 224 --batch-sizes 1 8 16

One engine per image size serves every batch up to the largest; with --static, one for each batch size alone.
"""

import argparse
import functools
import importlib
import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
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
    is_fresh,
    package_version,
    run_main,
    sha256,
    store,
)

WORKSPACE_BYTES = 1 << 30  # at most; a quarter of the free memory where less, so that a 4 GB card can build
OLD_PARSER_OPSET = 17  # TensorRT 8.6 misreads ReduceMean from opset 18 on, where the axes are an input
OPTIONS = {"precision": "FP16", "workspace_bytes": WORKSPACE_BYTES}  # an engine is made from these too
DISTRIBUTIONS = ["tensorrt", "tensorrt-cu13", "tensorrt-cu12"]  # one module, by version of CUDA
INSTALL = "pip install -r requirements-tensorrt.txt (Python 3.10: requirements-tensorrt86.txt)"

# ---- what both routes to TensorRT share: reasons, shapes, files


def why_unavailable(packages: list[str], device: str) -> str | None:
    """None if `packages` load and there is a GPU to run on, else one sentence that says what to do."""
    if device != "cuda":
        return "TensorRT needs an NVIDIA GPU; this run is on the CPU"
    if not torch.cuda.is_available():
        return "TensorRT needs an NVIDIA GPU, and PyTorch finds none; check that nvidia-smi lists one"
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; run: {INSTALL}"
        try:
            importlib.import_module(package)
        except Exception as error:  # a missing library, the wrong CUDA or driver: loaders raise anything
            words = " ".join(f"{type(error).__name__}: {error}".split())
            names = DISTRIBUTIONS if package == "tensorrt" else [package]
            version = next(filter(None, map(package_version, names)), "")
            return f"{package} {version} is installed but does not load: {words}"
    return None


def profile_shapes(batch_sizes: list[int], image_size: int, static: bool = False) -> list[list[int]]:
    """Smallest, best and largest input shape: TensorRT's optimisation profile.

    The best batch is at least 2: exporters take a batch of 1 for a constant.
    """
    largest = max(batch_sizes)
    batches = [largest] * 3 if static else [1, max(largest, 2), max(largest, 2)]
    return [[batch, 3, image_size, image_size] for batch in batches]


def file_name(shapes: list[list[int]], suffix: str) -> str:
    kind = "static" if shapes[0] == shapes[2] else "max"
    return f"resnet18_{shapes[2][2]}_{kind}{shapes[2][0]}_fp16.{suffix}"


def gpu_facts() -> dict:
    major, minor = torch.cuda.get_device_capability()
    return {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}


def load_or_build(find: Callable, build: Callable, opened: Callable, checkpoint: Path, shapes, force=False):
    """What `opened` makes of the file for `shapes`, its path, the seconds and whether the file was there.

    A file that does not load is built anew.  Building has a process of its own, so that nothing of it stays
    in this one's GPU memory.
    """
    if not checkpoint.is_file():
        mend = f"train it first: python train.py --image-sizes {shapes[0][2]}"
        raise UserError(f"{checkpoint} is missing; {mend}")
    start = time.perf_counter()
    if path := None if force else find(checkpoint, shapes):
        try:
            return opened(path), path, time.perf_counter() - start, True
        except Exception as error:  # whole and made from the same, yet refused, in whatever words
            print(f"{path} does not load ({error}); building it anew", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        path, seconds = pool.submit(build, checkpoint, shapes).result()
    return opened(path), path, seconds, False


def timing_cache(checkpoint: Path, facts: dict) -> tuple[Path, dict]:
    """The file of TensorRT's kernel timings, and what they depend on: they hold for every network."""
    kept = {name: facts[name] for name in ("tensorrt", "gpu", "compute_capability")}
    return checkpoint.with_name("tensorrt.timings"), kept


def print_artefact(path: Path, seconds: float, from_cache: bool) -> None:
    """One line about a file, as trt.py and torch_trt.py print it."""
    how = "from the cache" if from_cache else "built"
    print(f"{path}: {how} in {seconds:.1f} s, {path.stat().st_size / 2**20:.1f} MB", flush=True)


# ---- building


@functools.lru_cache
def logger():
    """TensorRT's logger, one for the process since it keeps the first it is given; collects `errors`."""
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
    """8.6 must be told of the batch axis; from 10 on the network's own types hold if asked for, in 11
    always."""
    kinds = tensorrt.NetworkDefinitionCreationFlag
    return 1 << int(kinds.STRONGLY_TYPED if hasattr(kinds, "STRONGLY_TYPED") else kinds.EXPLICIT_BATCH)


def configure(tensorrt, config, free_bytes: int) -> None:
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, min(WORKSPACE_BYTES, free_bytes // 4))
    if hasattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return
    config.set_flag(tensorrt.BuilderFlag.FP16)  # 8.6 takes a network's types for a wish: FP32 kernels without
    sources = config.get_tactic_sources()
    for gone in ("CUBLAS", "CUBLAS_LT", "CUDNN"):  # not in 10 any more
        sources &= ~(1 << int(getattr(tensorrt.TacticSource, gone)))
    config.set_tactic_sources(sources)


def build_plan(model: bytes, shapes: list[list[int]], timings: bytes) -> tuple[bytes, bytes]:
    """A serialised engine for `shapes`, and the timing cache with what building it measured.

    Raises RuntimeError with all reasons.
    """
    import tensorrt

    logger().errors.clear()
    builder = tensorrt.Builder(logger())
    network = builder.create_network(network_flags(tensorrt))
    parser = tensorrt.OnnxParser(network, logger())
    if not parser.parse(model):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise failed("\n".join(["TensorRT can't read the ONNX file:", *errors]))
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

    facts = {"onnx": sha256(onnx_path), "tensorrt": tensorrt.__version__, **gpu_facts()}
    return facts | {"shapes": shapes, "options": OPTIONS}


def find(checkpoint: Path, shapes: list[list[int]]) -> Path | None:
    """The engine file for `shapes` if it is there and made from this checkpoint, by this TensorRT and GPU."""
    path = checkpoint.with_name(file_name(shapes, "engine"))
    if not path.is_file():
        return None
    onnx_path, _, _ = onnx_inference.export(checkpoint, shapes[0][2], "FP16")
    return path if is_fresh(path, engine_facts(onnx_path, shapes)) else None


def build(checkpoint: Path, shapes: list[list[int]]) -> tuple[Path, float]:
    """Export if stale, build, write the engine file; its path and the seconds that all this took."""
    import tensorrt

    start, version = time.perf_counter(), tensorrt.__version__
    path = checkpoint.with_name(file_name(shapes, "engine"))
    wait = f"building {path} with TensorRT {version}; this can take a minute"
    print(wait, file=sys.stderr, flush=True)
    onnx_path, _, _ = onnx_inference.export(checkpoint, shapes[0][2], "FP16")
    facts = engine_facts(onnx_path, shapes)
    timings, timed_with = timing_cache(checkpoint, facts)
    known = timings.read_bytes() if is_fresh(timings, timed_with) else b""
    model = onnx_for(version, onnx_path, shapes[0][0] if shapes[0] == shapes[2] else None)
    plan, timed = build_plan(model, shapes, known)
    store(path, facts, lambda file: file.write_bytes(plan))
    store(timings, timed_with, lambda file: file.write_bytes(timed))
    return path, time.perf_counter() - start


# ---- running


class Engine:
    """A plan on the GPU.  Calling it enqueues on the current stream; its logits hold until the next call.

    It binds itself anew when the batch size changes; CUDA graphs need one Engine each, since a graph keeps
    its bindings.
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
        self.dtype = kinds[self.engine.get_tensor_dtype("input")]
        self.logits_dtype = kinds[self.engine.get_tensor_dtype("logits")]
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
            size = tuple(self.context.get_tensor_shape("logits"))
            self.outputs[shape] = torch.empty(size, dtype=self.logits_dtype, device="cuda")
        self.logits = self.outputs[shape]
        self.context.set_tensor_address("logits", self.logits.data_ptr())
        self.shape, self.address = shape, None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, 3, S, S) on the GPU, contiguous, of the engine's dtype -> logits (N, classes).  Raises
        ValueError."""
        if x.shape != self.shape:
            self.bind(x.shape)
        if x.dtype != self.dtype or not x.is_cuda or not x.is_contiguous():
            given = f"{x.dtype} on {x.device} with strides {x.stride()}"
            raise ValueError(f"the engine takes contiguous {self.dtype} on the GPU, not {given}")
        address = x.data_ptr()
        if address != self.address:
            self.context.set_tensor_address("input", address)
            self.address = address
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise failed("TensorRT could not run the engine:")
        return self.logits


def check_shape(shape, smallest, largest) -> None:
    """Raises ValueError with both shapes unless `shape` lies between `smallest` and `largest` on every
    axis."""
    pairs = zip(smallest, shape, largest, strict=False)
    if len(shape) != len(smallest) or not all(low <= n <= high for low, n, high in pairs):
        ends = f"{tuple(smallest)} to {tuple(largest)}"
        raise ValueError(f"input of shape {tuple(shape)} is outside the engine's profile, {ends}")


def open_engine(path: Path) -> Engine:
    return Engine(path.read_bytes())


def parser_for(description: str, anew: str) -> argparse.ArgumentParser:
    """What trt.py and torch_trt.py are told."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    parser.add_argument("--image-sizes", nargs="+", type=int, default=IMAGE_SIZES)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--force", action="store_true", help=anew)
    add_path_arguments(parser)
    return parser


def main() -> None:
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    parser = parser_for(__doc__, "build even where a fresh engine is there")
    parser.add_argument("--static", action="store_true", help="an engine for each batch size alone")
    args = parser.parse_args()
    if reason := why_unavailable(["tensorrt", "onnx"], "cuda"):
        raise UserError(reason)
    for size in args.image_sizes:
        checkpoint = checkpoint_path(args.weights, size)
        for batches in [[batch] for batch in args.batch_sizes] if args.static else [args.batch_sizes]:
            shapes = profile_shapes(batches, size, args.static)
            print_artefact(*load_or_build(find, build, open_engine, checkpoint, shapes, args.force)[1:])


if __name__ == "__main__":
    run_main(main)
