"""Native TensorRT, 8.6 to 11: build an engine from the ONNX export, keep it in weights/, run it on tensors.

Reads weights/best_resnet18_<size>.pth, writes its ONNX export, the engine
weights/resnet18_<size>_<batches>_<precision>.engine, what it was made from beside it, and TensorRT's timings.
--static: an engine for each batch size alone; --int8: its scales come from images of data/train.

    python trt.py --image-sizes 224 --batch-sizes 1 8 16
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)
import bisect
import functools
from pathlib import Path
from types import SimpleNamespace

import torch

from utils import onnx_export
from utils.backend import EngineFile, build_engines, workspace_bytes
from utils.utils import run_main

OLD_PARSER_OPSET = 17  # TensorRT 8.6 misreads ReduceMean from opset 18 on, where the axes are an input


class NativeEngine(EngineFile):
    """A native engine's file.  It has a profile for each batch size, whose kernels TensorRT chooses for that
    one; it also serves the batches down to the next smaller one.  `static`: it takes one batch size alone."""

    PACKAGES = ["tensorrt", "onnx"]
    MADE_WITH = ["torch", "onnx", "onnxscript"]
    suffix = "engine"

    def __init__(self, *asked, **options):
        super().__init__(*asked, **options)
        sizes = self.batch_sizes
        self.profiles = [[low + 1, size, size] for low, size in zip([0, *sizes], sizes, strict=False)]
        self.kind = "-".join(map(str, sizes))
        if self.static:
            self.profiles, self.kind = [sizes * 3], f"static{sizes[0]}"

    def facts(self) -> dict:
        return super().facts() | (onnx_export.facts_of_int8(self.data) if self.int8 else {})

    def make(self, path: Path, timings: bytes) -> bytes:
        import tensorrt

        typed, network, ranges = is_strongly_typed(tensorrt), "FP16", None
        if self.int8 and typed:
            network = "INT8_TENSORRT"
        elif self.int8:
            network = "FP32"
            ranges = onnx_export.activation_ranges(self.checkpoint, self.image_size, self.data)
        source, _, _ = onnx_export.export(self.checkpoint, self.image_size, network, self.data)
        batch = self.batch_sizes[0] if self.static else None
        model = onnx_for(tensorrt.__version__, source, batch, halved=self.int8 and typed)
        plan, timings = build_plan(model, self.profiles, self.image_size, timings, ranges)
        path.write_bytes(plan)
        return timings

    def open(self):
        return Engine(self.path.read_bytes())


# ---- building


@functools.lru_cache
def logger():
    """TensorRT's logger, one for the process since it keeps the first it is given; collects `errors`."""
    import tensorrt

    class Collector(tensorrt.ILogger):
        errors = []

        def log(self, severity, message):
            if severity in (tensorrt.ILogger.ERROR, tensorrt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Collector()


def failed(what: str) -> RuntimeError:
    """An exception with everything that TensorRT logged as an error since the last one."""
    errors = list(dict.fromkeys(logger().errors))
    logger().errors.clear()
    return RuntimeError("\n".join([what, *errors]))


def onnx_for(tensorrt_version: str, path: Path, batch: int | None, halved: bool = False) -> bytes:
    """The export as this TensorRT's parser reads it, with the free batch axis fixed to `batch` if given.

    `halved`: from FP32 to FP16, as a strongly typed engine wants it.
    """
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
    if halved:
        onnx_export.halve(model.graph)
    if batch:
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


def configure(tensorrt, config, network, ranges) -> None:
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, workspace_bytes())
    if is_strongly_typed(tensorrt):
        return
    sharing = getattr(tensorrt.PreviewFeature, "PROFILE_SHARING_0806", None)
    if sharing is not None:  # two contexts may use one profile, as they always may from 10 on
        config.set_preview_feature(sharing, True)
    config.set_flag(tensorrt.BuilderFlag.FP16)  # 8.6 takes a network's types for a wish: FP32 kernels without
    sources = config.get_tactic_sources()
    for gone in ("CUBLAS", "CUBLAS_LT", "CUDNN"):  # not in 10 any more
        sources &= ~(1 << int(getattr(tensorrt.TacticSource, gone)))
    config.set_tactic_sources(sources)
    set_precisions(tensorrt, config, network, ranges)


def build_plan(model: bytes, profiles, image_size: int, timings: bytes, ranges=None) -> tuple[bytes, bytes]:
    """A serialised engine for `profiles` of batch sizes, and the timing cache.

    `ranges`: of TensorRT 8.6's INT8, see set_precisions().  Raises RuntimeError with all reasons.
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
    configure(tensorrt, config, network, ranges)
    for batches in profiles if network.get_input(0).shape[0] == -1 else []:
        profile = builder.create_optimization_profile()
        profile.set_shape("input", *[(batch, 3, image_size, image_size) for batch in batches])
        config.add_optimization_profile(profile)
    cache = config.create_timing_cache(timings)
    if cache is None or not config.set_timing_cache(cache, False):  # unreadable: start from nothing
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise failed("TensorRT could not build the engine:")
    return bytes(plan), bytes(config.get_timing_cache().serialize())


def set_precisions(tensorrt, config, network, ranges: dict[str, float] | None) -> None:
    """Tell TensorRT 8.6 each layer's precision, so that it times no kernels of others: half, or INT8 up to
    the last convolution, with 127 steps a side of the largest value; then input and output are half."""
    config.set_flag(tensorrt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    k, half = tensorrt.LayerType, tensorrt.DataType.HALF
    computing = [k.CONVOLUTION, k.ACTIVATION, k.POOLING, k.ELEMENTWISE, k.REDUCE, k.MATRIX_MULTIPLY]
    precision = half if ranges is None else tensorrt.DataType.INT8
    if ranges is not None:
        config.set_flag(tensorrt.BuilderFlag.INT8)
        network.get_input(0).dtype = network.get_output(0).dtype = half
        outputs = [layer.get_output(0) for layer in layers]
        tensors = {tensor.name: tensor for tensor in [network.get_input(0), *outputs]}
        for name, largest in ranges.items():
            tensors[name].set_dynamic_range(-(largest or 1), largest or 1)
    for layer in [layer for layer in layers if layer.type in computing]:
        if layer.type == k.REDUCE:  # the mean, which the classifier follows
            precision = half
        layer.precision = precision
        if precision == half:
            layer.set_output_type(0, half)


# ---- running


class Engine:
    """A plan on the GPU.  Calling it enqueues on the current stream.

    Each shape has a context of its own, so that what a CUDA graph has captured stays as it was; its logits
    hold until the next call with that shape.  All contexts compute in the same memory, one after another.
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
        self.memory, self.bound = None, {}  # shape of the input -> context, logits, address of the input read

    def profile_for(self, batch: int) -> int:
        """The profile that this batch size falls into; the last where none is, and TensorRT says why."""
        last = self.engine.num_optimization_profiles - 1
        largest = [self.engine.get_tensor_profile_shape("input", index)[2][0] for index in range(last)]
        return bisect.bisect_left(largest, batch)

    def bind(self, shape: torch.Size) -> SimpleNamespace:
        """A context for this shape, in the memory that all share, which is taken with the first."""
        import tensorrt

        if hasattr(tensorrt, "ExecutionContextAllocationStrategy"):  # from 10 on
            strategy = tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self.engine.create_execution_context(strategy)
        else:
            context = self.engine.create_execution_context_without_device_memory()
        if context is None:
            raise failed("TensorRT could not make an execution context:")
        if self.memory is None:
            bytes_ = getattr(self.engine, "device_memory_size_v2", None) or self.engine.device_memory_size
            self.memory = torch.empty(max(bytes_, 256), dtype=torch.uint8, device="cuda")
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self.memory.data_ptr(), self.memory.numel())
        else:
            context.device_memory = self.memory.data_ptr()
        stream, index = torch.cuda.current_stream(), self.profile_for(shape[0])
        if not context.set_optimization_profile_async(index, stream.cuda_stream):
            raise failed(f"TensorRT could not choose profile {index}:")
        stream.synchronize()
        if not context.set_input_shape("input", tuple(shape)):
            raise failed(f"the engine was not built for an input of shape {tuple(shape)}:")
        size = tuple(context.get_tensor_shape("logits"))
        logits = torch.empty(size, dtype=self.logits_dtype, device="cuda")
        context.set_tensor_address("logits", logits.data_ptr())
        self.bound[shape] = bound = SimpleNamespace(context=context, logits=logits, address=0)
        return bound

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, 3, S, S) on the GPU, contiguous, of the engine's dtype -> logits (N, classes)."""
        bound = self.bound.get(x.shape) or self.bind(x.shape)
        if x.dtype != self.dtype or not x.is_cuda or not x.is_contiguous():
            given = f"{x.dtype} on {x.device} with strides {x.stride()}"
            raise ValueError(f"the engine takes contiguous {self.dtype} on the GPU, not {given}")
        if bound.address != x.data_ptr():
            bound.address = x.data_ptr()
            bound.context.set_tensor_address("input", bound.address)
        if not bound.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise failed("TensorRT could not run the engine:")
        return bound.logits


if __name__ == "__main__":
    run_main(lambda: build_engines(__doc__, NativeEngine, "static", "int8"))
