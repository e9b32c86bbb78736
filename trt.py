"""Native TensorRT, 8.6 to 11: build an engine from the ONNX export, keep it in weights/, run it on tensors.

Reads weights/best_resnet18_<size>.pth through onnx_inference.py's export, writes
weights/resnet18_<size>_<batches>_<precision>.engine, what it was made from beside it, and TensorRT's timings.

    python trt.py --image-sizes 224 --batch-sizes 1 8 16

One engine per image size serves every batch up to the largest; with --static, one for each batch size alone.
With --int8 it is calibrated on images of data/train; 8.6 keeps the scales in weights/ for the next engine.
"""

import argparse
import functools
import os
import sys
import time
from pathlib import Path

import torch

import onnx_inference
import quantize
from utils import environment, utils
from utils.utils import UserError, in_fresh_process, is_fresh, sha256, store

WORKSPACE_BYTES = 1 << 30  # at most; a quarter of the free memory where less, so that a 4 GB card can build
OLD_PARSER_OPSET = 17  # TensorRT 8.6 misreads ReduceMean from opset 18 on, where the axes are an input
DISTRIBUTIONS = ["tensorrt", "tensorrt-cu13", "tensorrt-cu12"]  # one module, by version of CUDA
INSTALL = "pip install -r requirements-tensorrt.txt (Python 3.10: requirements-tensorrt86.txt)"


def why_unavailable(packages: list[str], device: str) -> str | None:
    """None if `packages` load and there is a GPU to run on, else one sentence that says what to do."""
    if device != "cuda":
        return "TensorRT needs an NVIDIA GPU; this run is on the CPU"
    if not torch.cuda.is_available():
        return "TensorRT needs an NVIDIA GPU, and PyTorch finds none; check that nvidia-smi lists one"
    for package in packages:
        names = DISTRIBUTIONS if package == "tensorrt" else [package]
        if reason := onnx_inference.why_not_importable(package, INSTALL, names):
            return reason
    return None


def workspace_bytes() -> int:
    return min(WORKSPACE_BYTES, torch.cuda.mem_get_info()[0] // 4)


# ---- files


class Recipe:
    """An engine's file: what it is made from, for which shapes, how it is built and opened.

    `shapes` is TensorRT's optimisation profile: smallest, best and largest input.  The best batch is at
    least 2, since exporters take a batch of 1 for a constant.
    """

    PACKAGES = ["tensorrt", "onnx"]  # modules that it needs
    MADE_WITH = ["torch", "onnx", "onnxscript"]  # distributions whose version changes the file
    OPTIONS = {"static": "an engine for each batch size alone", "int8": "INT8, calibrated on data/train"}
    suffix = "engine"

    def __init__(self, checkpoint, image_size, batch_sizes, data: Path | None, static=False, int8=False):
        largest = max(batch_sizes)
        batches = [largest] * 3 if static else [1, max(largest, 2), max(largest, 2)]
        self.checkpoint, self.image_size, self.data = checkpoint, image_size, data
        self.static, self.int8 = static, int8
        self.shapes = [[batch, 3, image_size, image_size] for batch in batches]

    @property
    def path(self) -> Path:
        kind = f"{'static' if self.static else 'max'}{self.shapes[2][0]}"
        precision = "int8" if self.int8 else "fp16"
        return self.checkpoint.with_name(f"resnet18_{self.image_size}_{kind}_{precision}.{self.suffix}")

    def facts(self) -> dict:
        """What the file depends on."""
        import tensorrt

        major, minor = torch.cuda.get_device_capability()
        int8 = {}
        if self.int8:
            int8 = {"images": quantize.fingerprint(self.data), "precision": quantize.PRECISION}
        return int8 | {
            **{name: environment.package_version(name) for name in self.MADE_WITH},
            "checkpoint": sha256(self.checkpoint),
            "tensorrt": tensorrt.__version__,
            "gpu": torch.cuda.get_device_name(),
            "compute_capability": f"{major}.{minor}",
            "shapes": self.shapes,
            "workspace_bytes": WORKSPACE_BYTES,
        }

    def make(self, path: Path, timings: bytes) -> bytes:
        """Build and write `path`; the timing cache with what building has measured."""
        import tensorrt

        typed = is_strongly_typed(tensorrt)
        source = onnx_inference.export(self.checkpoint, self.image_size, "FP32" if self.int8 else "FP16")[0]
        calibrator = None
        if self.int8 and typed:
            source, _ = quantize.for_tensorrt(source, self.image_size, self.data)
        elif self.int8:
            table, timings = self.calibration(source, timings)
            calibrator = quantize.calibrator(table=table)
        model = onnx_for(tensorrt.__version__, source, self.shapes[0][0] if self.static else None)
        plan, timings = build_plan(model, self.shapes, timings, calibrator)
        path.write_bytes(plan)
        return timings

    def calibration(self, source: Path, timings: bytes) -> tuple[bytes, bytes]:
        """TensorRT 8.6's table of scales, kept in weights/, and the timing cache.

        It comes from a build of its own, in FP32 and with exactly the calibrator's batch: a network whose
        input is in half already is calibrated without an error, and wrongly.
        """
        import tensorrt

        path = self.checkpoint.with_name(f"resnet18_{self.image_size}_int8.calibration")
        facts = {name: value for name, value in self.facts().items() if name != "shapes"}
        if not is_fresh(path, facts):
            print(f"calibrating {path} on {self.data / 'train'}", file=sys.stderr, flush=True)
            calibrator = quantize.calibrator(quantize.calibration_batches(self.data, self.image_size))
            shape = [quantize.BATCH, 3, self.image_size, self.image_size]
            model = onnx_for(tensorrt.__version__, source, None)
            _, timings = build_plan(model, [shape] * 3, timings, calibrator)
            store(path, facts, lambda file: file.write_bytes(calibrator.table))
        return path.read_bytes(), timings

    def open(self):
        return Engine(self.path.read_bytes())

    def build(self) -> float:
        """Build and write the file; the seconds that it took.  TensorRT's timings serve every network."""
        start = time.perf_counter()
        print(f"building {self.path}; this can take a minute", file=sys.stderr, flush=True)
        facts = self.facts()
        timings = self.checkpoint.with_name("tensorrt.timings")
        timed_with = {name: facts[name] for name in ("tensorrt", "gpu", "compute_capability")}
        known, timed = timings.read_bytes() if is_fresh(timings, timed_with) else b"", []
        store(self.path, facts, lambda file: timed.append(self.make(file, known)))
        store(timings, timed_with, lambda file: file.write_bytes(timed[0]))
        return time.perf_counter() - start

    def load_or_build(self, force: bool = False) -> tuple[object, float, bool]:
        """What open() gives, the seconds and whether a fresh file was there.

        A file that does not load is built anew.  Building has a process of its own, so that nothing of it
        stays in this one's GPU memory.
        """
        if not self.checkpoint.is_file():
            mend = f"train it first: python train.py --image-sizes {self.image_size}"
            raise UserError(f"{self.checkpoint} is missing; {mend}")
        start = time.perf_counter()
        if not force and is_fresh(self.path, self.facts()):
            try:
                return self.open(), time.perf_counter() - start, True
            except Exception as error:  # whole and made from the same, yet refused, in whatever words
                print(f"{self.path} does not load ({error}); building it anew", file=sys.stderr, flush=True)
        seconds = in_fresh_process(self.build)
        return self.open(), seconds, False


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


def is_strongly_typed(tensorrt) -> bool:
    """From 10 on a network's own types hold, if that is asked for, and in 11 always; 8.6 has flags."""
    return hasattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def network_flags(tensorrt) -> int:
    kinds = tensorrt.NetworkDefinitionCreationFlag
    return 1 << int(kinds.STRONGLY_TYPED if is_strongly_typed(tensorrt) else kinds.EXPLICIT_BATCH)


def configure(tensorrt, config) -> None:
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, workspace_bytes())
    if is_strongly_typed(tensorrt):
        return
    config.set_flag(tensorrt.BuilderFlag.FP16)  # 8.6 takes a network's types for a wish: FP32 kernels without
    sources = config.get_tactic_sources()
    for gone in ("CUBLAS", "CUBLAS_LT", "CUDNN"):  # not in 10 any more
        sources &= ~(1 << int(getattr(tensorrt.TacticSource, gone)))
    config.set_tactic_sources(sources)


def build_plan(model: bytes, shapes: list[list[int]], timings: bytes, calibrator=None) -> tuple[bytes, bytes]:
    """A serialised engine for `shapes`, and the timing cache.  Raises RuntimeError with all reasons."""
    import tensorrt

    logger().errors.clear()
    builder = tensorrt.Builder(logger())
    network = builder.create_network(network_flags(tensorrt))
    parser = tensorrt.OnnxParser(network, logger())
    if not parser.parse(model):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise failed("\n".join(["TensorRT can't read the ONNX file:", *errors]))
    config = builder.create_builder_config()
    configure(tensorrt, config)
    profile = builder.create_optimization_profile()
    if network.get_input(0).shape[0] == -1:
        profile.set_shape("input", *map(tuple, shapes))
        config.add_optimization_profile(profile)
    if calibrator:
        calibrator.join(network, config, profile)
    cache = config.create_timing_cache(timings)
    if cache is None or not config.set_timing_cache(cache, False):  # unreadable: start from nothing
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise failed("TensorRT could not build the engine:")
    return bytes(plan), bytes(config.get_timing_cache().serialize())


# ---- running


class Engine:
    """A plan on the GPU.  Calling it enqueues on the current stream; its logits hold until the next call.

    It binds itself anew when the batch size changes.  CUDA graphs need one Engine each: a graph keeps its
    bindings.
    """

    def __init__(self, plan: bytes):
        import tensorrt

        logger().errors.clear()
        self.runtime = tensorrt.Runtime(logger())
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise failed("TensorRT can't load the engine:")
        kinds = {tensorrt.DataType.HALF: torch.float16, tensorrt.DataType.FLOAT: torch.float32}
        self.dtype = kinds[self.engine.get_tensor_dtype("input")]
        self.logits_dtype = kinds[self.engine.get_tensor_dtype("logits")]
        self.context = self.shape = self.address = None
        self.outputs = {}  # shape of the input -> logits

    def bind(self, shape: torch.Size) -> None:
        if self.context is None:  # only now, since it takes the memory for the largest shape
            self.context = self.engine.create_execution_context()
            if self.context is None:
                raise failed("TensorRT could not make an execution context:")
        if not self.context.set_input_shape("input", tuple(shape)):
            raise failed(f"the engine was not built for an input of shape {tuple(shape)}:")
        if shape not in self.outputs:
            size = tuple(self.context.get_tensor_shape("logits"))
            self.outputs[shape] = torch.empty(size, dtype=self.logits_dtype, device="cuda")
        self.logits = self.outputs[shape]
        self.context.set_tensor_address("logits", self.logits.data_ptr())
        self.shape, self.address = shape, None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, 3, S, S) on the GPU, contiguous, of the engine's dtype -> logits (N, classes)."""
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


def build_asked(about: str, recipe: type[Recipe]) -> None:
    """What trt.py and torch_trt.py do when they are run: build what is missing, a line for each file."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=form)
    parser.add_argument("--image-sizes", nargs="+", type=int, default=utils.IMAGE_SIZES)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=utils.BATCH_SIZES)
    parser.add_argument("--force", action="store_true", help="build even where a fresh file is there")
    for name, text in recipe.OPTIONS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    utils.add_path_arguments(parser)
    args = parser.parse_args()
    if reason := why_unavailable(recipe.PACKAGES, "cuda"):
        raise UserError(reason)
    options = {name: getattr(args, name) for name in recipe.OPTIONS}
    for size in args.image_sizes:
        for batches in [[n] for n in args.batch_sizes] if options.get("static") else [args.batch_sizes]:
            made = recipe(utils.checkpoint_path(args.weights, size), size, batches, args.data, **options)
            _, seconds, from_cache = made.load_or_build(args.force)
            how = "from the cache" if from_cache else "built"
            megabytes = made.path.stat().st_size / 2**20
            print(f"{made.path}: {how} in {seconds:.1f} s, {megabytes:.1f} MB", flush=True)


def main() -> None:
    build_asked(__doc__, Recipe)


if __name__ == "__main__":
    utils.run_main(main)
