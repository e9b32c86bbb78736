"""trt.py, torch_trt.py and tensorrt_inference.py.  What needs TensorRT is skipped, saying why, where there
is none."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch

import model
import tensorrt_inference
import torch_trt
import trt
from utils import onnx_export
from utils.backend import why_no_tensorrt
from utils.measure import accuracy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKPOINT = Path("weights") / "best_resnet18_64.pth"
NATIVE = why_no_tensorrt(["tensorrt", "onnx"], DEVICE)
TORCH = why_no_tensorrt(["torch_tensorrt"], DEVICE)


@pytest.mark.parametrize(
    ("kind", "batches", "static", "expected"),
    [
        (trt.NativeEngine, [1, 8, 16], False, [[1, 1, 1], [2, 8, 8], [9, 16, 16]]),
        (trt.NativeEngine, [16, 4, 16], False, [[1, 4, 4], [5, 16, 16]]),
        (trt.NativeEngine, [8], True, [[8, 8, 8]]),
        (torch_trt.Module, [1, 8, 16], False, [[1, 16, 16]]),
        (torch_trt.Module, [1], False, [[1, 2, 2]]),
    ],
)
def test_every_batch_up_to_the_largest_has_a_profile_and_those_asked_for_are_its_best(
    kind, batches, static, expected
):
    assert kind(CHECKPOINT, 64, batches, None, static=static).profiles == expected


@pytest.mark.parametrize(("apart", "modules"), [(True, 3), (False, 1)])
def test_a_module_whose_state_a_graph_captures_serves_one_batch_size(apart, modules):
    opened = []

    def open_module():
        opened.append(Mock(side_effect=lambda x: x.sum((1, 2, 3))))
        return opened[-1]

    file = SimpleNamespace(path=Path("module"), batch_sizes=[1, 4], open=open_module)
    file.load_or_build = lambda: (file.open(), 0.1, True)
    backend = tensorrt_inference.TensorRT(SimpleNamespace(files=lambda *asked: [file]), apart=apart)
    backend.load(CHECKPOINT, 64, [1, 4], "cuda")
    for batch in (1, 4, 2, 4, 1):  # 2 was not asked for: it is served all the same
        assert backend.predict(backend.prepare(torch.ones(batch, 3, 4, 4))).tolist() == [48.0] * batch
    assert len(opened) == modules and sum(module.call_count for module in opened) == 5


def test_a_batch_takes_the_profile_that_it_falls_into():
    engine = trt.Engine.__new__(trt.Engine)
    profiles = [[(low, 3, 4, 4), (best, 3, 4, 4), (best, 3, 4, 4)] for low, best in ((1, 1), (2, 8), (9, 16))]
    read = SimpleNamespace(get_tensor_profile_shape=lambda name, index: profiles[index])
    engine.engine = SimpleNamespace(num_optimization_profiles=3, **vars(read))
    assert [engine.profile_for(batch) for batch in (1, 2, 8, 9, 16, 17)] == [0, 1, 1, 2, 2, 2]


def test_every_size_largest_batch_kind_and_route_has_a_file_of_its_own():
    recipes = [torch_trt.Module(CHECKPOINT, size, [batch], None) for batch in (4, 8) for size in (64, 96)]
    for batch in (4, 8):
        for size in (64, 96):
            recipes += [
                trt.NativeEngine(CHECKPOINT, size, [batch], None, static=static, int8=int8)
                for static in (False, True)
                for int8 in (False, True)
            ]
    assert len({recipe.path for recipe in recipes}) == len(recipes)


# ---- what each version is given


def small_onnx(path, opset):
    """input (batch, 3, 4, 4) -> mean over the image -> logits (batch, 3); from opset 18 on the axes are an
    input, as exporters write it."""
    onnx = pytest.importorskip("onnx")
    make = onnx.helper
    axes = [make.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3])] if opset >= 18 else []
    inputs, more = (["input", "axes"], {"noop_with_empty_axes": 0}) if axes else (["input"], {"axes": [2, 3]})
    mean = make.make_node("ReduceMean", inputs, ["logits"], keepdims=0, **more)
    value = [
        make.make_tensor_value_info(*described)
        for described in (("input", 1, ["batch", 3, 4, 4]), ("logits", 1, ["batch", 3]))
    ]
    graph = make.make_graph([mean], "small", value[:1], value[1:], axes)
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", opset)], ir_version=8), path)
    return onnx


@pytest.mark.parametrize(
    ("version", "opset", "given"),
    [("8.6.0", 20, 17), ("8.6.1", 17, 17), ("10.15.1.29", 20, 20), ("11.1.0", 20, 20)],
)
@pytest.mark.parametrize("batch", [None, 4])
def test_each_tensorrt_is_given_onnx_that_it_can_read(tmp_path, version, opset, given, batch):
    onnx = small_onnx(tmp_path / "small.onnx", opset)
    network = onnx.load_from_string(trt.onnx_for(version, tmp_path / "small.onnx", batch))
    onnx.checker.check_model(network)
    assert network.opset_import[0].version == given
    assert len(network.graph.node[0].input) == (1 if given == 17 else 2)
    first = network.graph.input[0].type.tensor_type.shape.dim[0]
    assert (first.dim_value or first.dim_param) == (batch or "batch")
    from onnx.reference import ReferenceEvaluator

    x = np.arange(4 * 3 * 4 * 4, dtype=np.float32).reshape(4, 3, 4, 4)
    assert np.allclose(ReferenceEvaluator(network).run(None, {"input": x})[0], x.mean((2, 3)))


class Config:
    """Stands in for a builder's configuration: keeps what it is told."""

    def __init__(self):
        self.told, self.sources = {}, 0b11111

    def set_memory_pool_limit(self, pool, size):
        self.told[pool] = size

    def set_flag(self, flag):
        self.told["flag"] = flag

    def set_preview_feature(self, feature, wanted):
        self.told[feature] = wanted

    def get_tactic_sources(self):
        return self.sources

    def set_tactic_sources(self, sources):
        self.sources = sources


def fake_tensorrt(version):
    kinds = {
        8: {"EXPLICIT_BATCH": 0},
        10: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1},
        11: {"STRONGLY_TYPED": 1},
    }[version]
    parts = {
        "NetworkDefinitionCreationFlag": SimpleNamespace(**kinds),
        "MemoryPoolType": SimpleNamespace(WORKSPACE="workspace"),
    }
    if version < 11:
        parts["PreviewFeature"] = SimpleNamespace(PROFILE_SHARING_0806="sharing")
        parts["BuilderFlag"] = SimpleNamespace(FP16="FP16")
        parts["TacticSource"] = SimpleNamespace(CUBLAS=0, CUBLAS_LT=1, CUDNN=2)
    return SimpleNamespace(**parts)


@pytest.mark.parametrize(
    ("version", "flags", "precision", "sources"),
    [(8, 1, "FP16", 0b11000), (10, 2, None, 0b11111), (11, 2, None, 0b11111)],
)
def test_each_tensorrt_is_told_the_precision_in_its_own_way(version, flags, precision, sources, monkeypatch):
    tensorrt, config = fake_tensorrt(version), Config()
    assert trt.network_flags(tensorrt) == flags
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 4 << 30))
    told = Mock()
    monkeypatch.setattr(trt, "set_precisions", told)
    trt.configure(tensorrt, config, "network", "ranges")
    assert told.call_args_list == [((tensorrt, config, "network", "ranges"),)] * (version == 8)
    assert config.told.get("flag") == precision and config.told.get("sharing", False) == (version == 8)
    assert config.sources == sources
    assert config.told["workspace"] == 3 << 28  # a quarter of what is free
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (140 << 30, 141 << 30))
    trt.configure(tensorrt, config, None, None)
    assert config.told["workspace"] == 1 << 30


def test_a_failed_build_says_everything_that_tensorrt_said(monkeypatch):
    class Builder:
        def __init__(self, logger):
            self.logger = logger
            self.create_network = self.create_builder_config = self.create_optimization_profile = lambda *_: (
                MagicMock()
            )

        def build_serialized_network(self, network, config):
            self.logger.log("error", "CUDA error out of memory")
            self.logger.log("warning", "tactics skipped")
            self.logger.log("error", "Error Code 10: could not find any implementation")

    ilogger = type("ILogger", (), {"ERROR": "error", "INTERNAL_ERROR": "internal error"})
    fake = SimpleNamespace(Builder=Builder, OnnxParser=lambda *_: Mock(), ILogger=ilogger)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    monkeypatch.setattr(trt, "network_flags", Mock())
    monkeypatch.setattr(trt, "configure", Mock())
    trt.logger.cache_clear()
    with pytest.raises(RuntimeError) as error:
        trt.build_plan(b"", [[1, 4, 4]], 64, b"")
    trt.logger.cache_clear()
    told = "CUDA error out of memory\nError Code 10: could not find any implementation"
    assert str(error.value) == f"TensorRT could not build the engine:\n{told}"


@pytest.mark.filterwarnings("ignore")  # scripting is deprecated from 2.10 on, where only this test does it
@pytest.mark.parametrize(
    ("torchscript", "ir", "precisions", "timings"),
    [(True, "ts", {torch.half}, None), (False, "dynamo", None, "timings")],
)
def test_each_torch_tensorrt_is_given_what_it_needs(monkeypatch, torchscript, ir, precisions, timings):
    fake = SimpleNamespace(compile=Mock(), Input=lambda **ranges: ranges)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    monkeypatch.setattr(torch_trt, "TORCHSCRIPT", torchscript)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 << 30, 4 << 30))
    network = model.fold_batch_norm(model.build(3)).half()
    shapes = [(1, 3, 64, 64), (4, 3, 64, 64), (4, 3, 64, 64)]
    torch_trt.compile_network(network, shapes, "timings")
    (module,), given = fake.compile.call_args
    assert isinstance(module, torch.jit.ScriptModule) == torchscript
    assert (given["ir"], given.get("enabled_precisions"), given.get("timing_cache_path")) == (
        ir,
        precisions,
        timings,
    )
    assert given["require_full_compilation"] is True and given["workspace_size"] == 1 << 29
    smallest, best, largest = shapes
    assert given["inputs"] == [
        {"min_shape": smallest, "opt_shape": best, "max_shape": largest, "dtype": torch.half, "name": "x"}
    ]


@pytest.mark.parametrize(
    ("steps", "fine"),
    [
        (["_run_on_acc_0"], True),
        (["_run_on_acc_0", "_run_on_gpu_1", "_run_on_acc_2"], False),
        (["aten.relu.default"], False),
        ([], False),
    ],
)
def test_anything_but_one_engine_is_an_error(monkeypatch, steps, fine):
    monkeypatch.setattr(torch_trt, "TORCHSCRIPT", False)
    nodes = [SimpleNamespace(op="call_module", target=step) for step in steps]
    module = SimpleNamespace(graph=SimpleNamespace(nodes=nodes))
    if fine:
        torch_trt.check_one_engine(module)
    else:
        with pytest.raises(RuntimeError, match=steps[-1] if steps else "none"):
            torch_trt.check_one_engine(module)


def test_operations_left_to_pytorch_are_named():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    module = (
        torch.jit.trace(network, torch.zeros(1, 2))
        if torch_trt.TORCHSCRIPT
        else torch.fx.symbolic_trace(network)
    )
    if torch_trt.TORCHSCRIPT:
        module = torch.jit.freeze(module.eval())
    with pytest.raises(RuntimeError, match=r"made: [^,]+, [^,]+$"):
        torch_trt.check_one_engine(module)


# ---- with TensorRT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "best_resnet18_64.pth"
    model.save(path, model.build(3), classes=["a", "b", "c"], image_size=64)
    return path


def needs(name):
    if reason := TORCH if name.startswith("torch") else NATIVE:
        pytest.skip(reason)


@pytest.mark.parametrize("name", tensorrt_inference.BACKENDS)
def test_logits_agree_with_pytorch_and_the_second_load_is_from_the_cache(checkpoint, project, name):
    needs(name)
    images = torch.rand(4, 3, 64, 64, device="cuda")
    network, _ = model.load(checkpoint, "cuda")
    torch.cuda.synchronize()
    loaded = []
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            backend = tensorrt_inference.BACKENDS[name]()
            backend.data = project / "data"
            backend.load(checkpoint, 64, [1, 4], "cuda")
            loaded.append((backend.from_cache, backend.build_s > 0, backend.artefact.is_file()))
            for batch in (1, 4, 1):
                logits = backend.predict(backend.prepare(images[:batch])).float()
                expected = network(images[:batch])
                assert logits.shape == (batch, 3)
                assert (logits - expected).abs().max() <= accuracy.TOLERANCE[
                    backend.precision
                ] * expected.abs().max()
    assert loaded[1] == (True, True, True)


@pytest.mark.parametrize("name", ["torch-tensorrt", "tensorrt", "tensorrt-int8"])
def test_a_damaged_engine_is_rebuilt_with_one_line(checkpoint, project, name, capfd):
    needs(name)
    backend = tensorrt_inference.BACKENDS[name]()
    backend.data = project / "data"
    backend.load(checkpoint, 64, [1, 4], "cuda")
    backend.artefact.write_bytes(backend.artefact.read_bytes()[:-100])
    capfd.readouterr()
    start = time.perf_counter()
    backend.load(checkpoint, 64, [1, 4], "cuda")
    assert not backend.from_cache and 0 < backend.build_s < time.perf_counter() - start
    assert capfd.readouterr().err.count("is damaged; building it anew") == 1


def test_a_native_engine_refuses_what_it_was_not_built_for(checkpoint):
    needs("tensorrt")
    backend = tensorrt_inference.TensorRT()
    backend.load(checkpoint, 64, [1, 4], "cuda")
    for wrong, words in [
        (torch.zeros(5, 3, 64, 64).half().cuda(), r"not built for an input of shape \(5, 3, 64, 64\):\n.+"),
        (torch.zeros(1, 3, 64, 64).cuda(), "torch.float32"),
        (
            torch.zeros(1, 3, 64, 64)
            .half()
            .cuda()
            .to(memory_format=torch.channels_last)
            .expand(4, -1, -1, -1),
            "strides",
        ),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=words):
            backend.predict(wrong)


def test_the_parser_s_errors_are_passed_on_in_full():
    needs("tensorrt")
    with pytest.raises(RuntimeError, match="can't read the ONNX file:\n.+"):
        trt.build_plan(b"not an ONNX file", [[1, 4, 4]], 64, b"")


def test_a_corrupt_timing_cache_does_not_break_a_build(checkpoint):
    needs("tensorrt")
    import tensorrt

    path, _, _ = onnx_export.export(checkpoint, 64, "FP16")
    onnx = trt.onnx_for(tensorrt.__version__, path, None)
    plan, timings = trt.build_plan(onnx, [[1, 2, 2]], 64, b"corrupt")
    assert trt.Engine(plan)(torch.zeros(2, 3, 64, 64).half().cuda()).shape == (2, 3) and timings
