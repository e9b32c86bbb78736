"""trt.py, torch_trt.py and tensorrt_inference.py.  What needs TensorRT is skipped, saying why, where there
is none."""

import json
import logging
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
from utils import environment, onnx_export, utils
from utils.backend import build_engines, builds_ahead, is_fresh, store, why_no_tensorrt
from utils.measure import accuracy
from utils.utils import UserError

FACTS = {"onnx": "abc", "tensorrt": "8.6.0", "gpu": "NVIDIA H200", "profiles": [[1, 4, 4]]}
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


# ---- the cache


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "resnet18_64_max4_fp16.engine"
    store(path, FACTS, lambda temporary: temporary.write_bytes(b"a plan"))
    return path


def test_a_whole_file_made_from_the_same_is_fresh(engine, capsys):
    assert is_fresh(engine, json.loads(json.dumps(FACTS)))
    assert sorted(path.name for path in engine.parent.iterdir()) == [engine.name, f"{engine.name}.json"]
    assert capsys.readouterr().err == ""


def test_a_missing_file_is_no_surprise(tmp_path, capsys):
    assert not is_fresh(tmp_path / "none.engine", FACTS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"a pla", b"a plan!", b"b plan"])
def test_a_damaged_file_is_noticed(engine, content, capsys):
    engine.write_bytes(content)
    assert not is_fresh(engine, FACTS)
    assert capsys.readouterr().err == f"{engine} is damaged; building it anew\n"


@pytest.mark.parametrize("name", FACTS)
def test_a_file_made_from_anything_else_is_a_miss_and_says_what_differs(engine, name, capsys):
    assert not is_fresh(engine, {**FACTS, name: "other"})
    assert capsys.readouterr().err == f"{engine} was made for another {name}; building it anew\n"


@pytest.mark.parametrize("note", [None, b"", b'{"made_from', b"[]", b"{}", b"\xff\xfe"])
def test_a_file_without_a_readable_note_is_a_miss(engine, note, capsys):
    path = engine.with_name(engine.name + ".json")
    path.unlink() if note is None else path.write_bytes(note)
    assert not is_fresh(engine, FACTS)
    assert capsys.readouterr().err == f"{engine} does not say what it was made from; building it anew\n"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("save failed")]
)
def test_an_interrupted_write_leaves_the_old_file_and_no_half_one(engine, error):
    def write(temporary):
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        store(engine, {**FACTS, "onnx": "new"}, write)
    assert len(list(engine.parent.iterdir())) == 2
    assert is_fresh(engine, FACTS)


class Small(trt.NativeEngine):
    """Needs no GPU: its engine is a few bytes, and "a plan" does not load."""

    def facts(self):
        return {"tensorrt": "8.6.0", "gpu": "NVIDIA H200", "compute_capability": "9.0"}

    def make(self, path, timings):
        path.write_bytes(b"new")
        return b"timings"

    def open(self):
        if self.path.read_bytes() == b"a plan":
            raise RuntimeError("TensorRT can't load the engine")
        return "engine"


def test_an_engine_that_does_not_load_is_built_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.backend.in_fresh_process", lambda function: function())
    checkpoint = tmp_path / "best_resnet18_64.pth"
    checkpoint.write_bytes(b"weights")
    recipe = Small(checkpoint, 64, [4], None)
    store(recipe.path, recipe.facts(), lambda file: file.write_bytes(b"a plan"))
    engine, seconds, from_cache = recipe.load_or_build()
    assert engine == "engine" and seconds > 0 and not from_cache
    assert "TensorRT can't load the engine); building it anew" in capsys.readouterr().err
    assert recipe.load_or_build()[2] is True
    assert recipe.load_or_build(force=True)[2] is False
    assert (tmp_path / "tensorrt.timings").read_bytes() == b"timings"


def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="python train.py --image-sizes 64"):
        trt.NativeEngine(tmp_path / "best_resnet18_64.pth", 64, [4], None).load_or_build()


def test_builds_ahead_are_known_without_loading_anything(tmp_path):
    checkpoint = tmp_path / "best_resnet18_64.pth"
    checkpoint.write_bytes(b"weights")
    weights = {"checkpoint": utils.sha256(checkpoint)}
    backend = tensorrt_inference.BACKENDS["tensorrt-int8-static-graph"]()
    paths = backend.artefacts(checkpoint, 64, [1, 4], "cuda")
    assert [path.name for path in paths] == [f"resnet18_64_static{batch}_int8.engine" for batch in (1, 4)]
    assert builds_ahead(paths, checkpoint) == dict.fromkeys(paths)
    for path in paths:
        store(path, weights, lambda file: (time.sleep(0.02), file.write_bytes(b"a plan")))
    assert builds_ahead(paths, checkpoint) == {}
    note, whole = paths[1].with_name(paths[1].name + ".json"), paths[1].read_bytes()
    for damage in (lambda: note.write_text("[1]"), lambda: note.write_text('{"made_from": 5}')):
        told = note.read_bytes()
        damage()
        assert list(builds_ahead(paths, checkpoint)) == [paths[1]]
        note.write_bytes(told)
    paths[1].write_bytes(b"half")
    assert list(builds_ahead(paths, checkpoint)) == [paths[1]]
    paths[1].write_bytes(whole)
    paths[0].unlink()
    ((path, seconds),) = builds_ahead(paths, checkpoint).items()
    assert path == paths[0] and 0.02 <= seconds < 5
    checkpoint.write_bytes(b"other weights")
    assert list(builds_ahead(paths, checkpoint)) == paths


# ---- reasons


def test_without_a_gpu_the_reason_is_the_gpu(monkeypatch):
    assert why_no_tensorrt(["tensorrt"], "cpu") == "TensorRT needs an NVIDIA GPU; this run is on the CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in why_no_tensorrt(["tensorrt"], "cuda")


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = why_no_tensorrt(["no_such_package"], "cuda")
    assert reason.startswith(
        "no_such_package is not installed; run: pip install -r requirements-tensorrt.txt"
    )


def test_a_package_that_does_not_load_is_quoted(monkeypatch, tmp_path):
    (tmp_path / "broken_tensorrt.py").write_text(
        "raise OSError('libnvinfer.so.8: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = why_no_tensorrt(["broken_tensorrt"], "cuda")
    assert "installed but does not load: OSError: libnvinfer.so.8: cannot open shared object file" in reason


@pytest.mark.parametrize("distribution", ["tensorrt", "tensorrt_cu12", "tensorrt_cu13"])
def test_tensorrts_version_is_found_under_each_name_of_its_distribution(monkeypatch, tmp_path, distribution):
    if distribution != "tensorrt" and environment.package_version("tensorrt"):
        pytest.skip("a TensorRT is installed here by its first name, which wins")
    folder = tmp_path / f"{distribution}-11.1.0.106.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 11.1.0.106\n")
    (tmp_path / "tensorrt.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = why_no_tensorrt(["tensorrt"], "cuda")
    assert reason.startswith("tensorrt 11.1.0.106 is installed but does not load: OSError: libcuda.so.1")
    assert environment.environment("cuda")["packages"][distribution.replace("_", "-")] == "11.1.0.106"


@pytest.mark.parametrize("make", tensorrt_inference.BACKENDS.values(), ids=tensorrt_inference.BACKENDS)
def test_every_backend_says_why_it_is_unavailable_on_a_cpu(make):
    backend = make()
    assert "GPU" in backend.why_unavailable("cpu")
    assert backend.precision == ("INT8" if "int8" in backend.adds.lower() else "FP16")


@pytest.mark.parametrize("kind", [trt.NativeEngine, torch_trt.Module])
def test_the_scripts_say_why_they_cannot_build(kind, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["trt.py", "--image-sizes", "64"])
    with pytest.raises(SystemExit) as stop:
        utils.run_main(lambda: build_engines("", kind))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: TensorRT needs an NVIDIA GPU")


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
    trt.configure(tensorrt, config)
    assert config.told.get("flag") == precision and config.told.get("sharing", False) == (version == 8)
    assert config.sources == sources
    assert config.told["workspace"] == 3 << 28  # a quarter of what is free
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (140 << 30, 141 << 30))
    trt.configure(tensorrt, config)
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
        trt.build_plan(b"", FACTS["profiles"], 64, b"")
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
    monkeypatch.setattr(torch_trt, "is_torchscript", lambda: torchscript)
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


def test_of_torch_tensorrts_warnings_only_the_false_one_is_silent(caplog):
    logger = logging.getLogger("torch_tensorrt.dynamo._compiler")
    logger.addFilter(torch_trt.is_true)
    try:
        # in the words of Torch-TensorRT 2.14's _compiler.py
        logger.warning("%s Input.min_shape=1 ... The compiled engine's min will be 2.", "Input 'x' dim 0:")
        logger.warning("%s Input.min_shape (1) is below the exported program's min", "Input 'x' dim 0:")
    finally:
        logger.removeFilter(torch_trt.is_true)
    assert len(caplog.messages) == 1 and "is below" in caplog.messages[0]


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
    monkeypatch.setattr(torch_trt, "operations", lambda module: steps)
    if fine:
        torch_trt.check_one_engine(None)
    else:
        with pytest.raises(RuntimeError, match=steps[-1] if steps else "none"):
            torch_trt.check_one_engine(None)


def test_operations_left_to_pytorch_are_seen():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    module = (
        torch.jit.trace(network, torch.zeros(1, 2))
        if torch_trt.is_torchscript()
        else torch.fx.symbolic_trace(network)
    )
    if torch_trt.is_torchscript():
        module = torch.jit.freeze(module.eval())
    assert len(torch_trt.operations(module)) == 2


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
        trt.build_plan(b"not an ONNX file", FACTS["profiles"], 64, b"")


def test_a_corrupt_timing_cache_does_not_break_a_build(checkpoint):
    needs("tensorrt")
    import tensorrt

    path, _, _ = onnx_export.export(checkpoint, 64, "FP16")
    onnx = trt.onnx_for(tensorrt.__version__, path, None)
    plan, timings = trt.build_plan(onnx, [[1, 2, 2]], 64, b"corrupt")
    assert trt.Engine(plan)(torch.zeros(2, 3, 64, 64).half().cuda()).shape == (2, 3) and timings
