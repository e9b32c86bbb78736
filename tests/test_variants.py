"""Every backend computes what the baseline computes, or says why it can't; PyTorch's variants."""

import contextlib
import importlib

import numpy as np
import pytest
import torch
from conftest import load_test_images

import backends
import model
import pytorch_inference
from utils.backend import Unavailable
from utils.measure import accuracy, worker

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OTHERS = [name for name in backends.SCRIPTS if name != "pytorch"]


@pytest.fixture(scope="module")
def pictures(project):
    return load_test_images(project / "data", 64, known(project))[0][:4]


def known(project) -> list[str]:
    return model.load_facts(project / "weights" / "best_resnet18_64.pth")["classes"]


def in_its_place(device: str):
    """On a GPU a stream of its own, as a graph's capture wants it."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_a_backend_computes_what_the_baseline_computes(project, pictures, name):
    backend = backends.make(name)
    if reason := backend.why_unavailable(DEVICE):
        pytest.skip(reason)
    checkpoint, backend.data = project / "weights" / "best_resnet18_64.pth", project / "data"
    with torch.inference_mode(), in_its_place(DEVICE):
        expected = model.load(checkpoint, "cpu")[0](pictures).numpy()
        several = name != "torch-compile" or DEVICE == "cuda"  # on a CPU each takes it a quarter of a minute
        backend.load(checkpoint, 64, [1, 4] if several else [4], DEVICE)
        for batch in (1, 4, 1) if several else (4,):
            logits = backend.predict(backend.prepare(pictures[:batch].to(DEVICE))).float().cpu().numpy()
            difference = np.abs(logits - expected[:batch]).max()
            assert difference <= accuracy.TOLERANCE[backend.precision] * np.abs(expected).max()


def test_cudnn_chooses_by_trial_for_tuned_variants_and_not_for_the_baseline(project):
    checkpoint = project / "weights" / "best_resnet18_64.pth"
    before = torch.backends.cudnn.benchmark
    for backend, expected in [
        (pytorch_inference.PyTorch(tuned=True), True),
        (pytorch_inference.PyTorch(), False),
    ]:
        backend.load(checkpoint, 64, [1], "cpu")
        assert torch.backends.cudnn.benchmark is expected
    torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("name", backends.SCRIPTS)
def test_every_variant_says_in_one_clause_what_it_adds_and_plain_methods_add_nothing(name):
    adds = backends.make(name).adds
    plain = name in ("pytorch", "onnx", "openvino", "torch-tensorrt", "tensorrt")
    assert (adds == "") == plain
    assert len(adds) < 110 and "\n" not in adds and not adds.endswith(".")
    assert adds.endswith("replayed as one CUDA graph") == name.endswith("-graph")
    assert ("INT8" in adds) == ("int8" in name)


@pytest.mark.parametrize("name", ["pytorch-channels-last", "pytorch-bf16"])
def test_cpu_variants_say_so_on_a_gpu(name):
    reason = pytorch_inference.BACKENDS[name]().why_unavailable("cuda")
    assert reason.endswith("is measured on the CPU only; this run is on a GPU")


def test_openvino_says_where_it_does_not_run():
    assert "NVIDIA GPU (use --device cpu)" in backends.make("openvino").why_unavailable("cuda")
    import openvino

    if not any(name.startswith("GPU") for name in openvino.Core().available_devices):
        assert "finds no Intel GPU here, only CPU" in backends.make("openvino-fp16").why_unavailable("cpu")


def test_openvino_takes_the_tensor_that_prepare_gave_last(project):
    backend, images = backends.make("openvino"), torch.rand(2, 3, 64, 64)
    backend.load(project / "weights" / "best_resnet18_64.pth", 64, [2], "cpu")
    first, second = backend.prepare(images), backend.prepare(images.clone())
    backend.predict(second)
    with pytest.raises(ValueError, match="the tensor that prepare"):
        backend.predict(first)


def test_bf16_is_only_measured_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr(pytorch_inference, "has_native_bfloat16", lambda: False)
    assert "no BF16 arithmetic" in pytorch_inference.BACKENDS["pytorch-bf16"]().why_unavailable("cpu")


def test_without_a_compiler_torch_compile_says_which_one_it_looks_for(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    reason = pytorch_inference.BACKENDS["torch-compile"]().why_unavailable("cpu")
    assert "no-such-compiler -O2 is not there; install one or set CXX" in reason


def compiled_without_inductor(monkeypatch, project, checkpoint="best_resnet18_64.pth"):
    """torch-compile, loaded, whose compiler gives the graph back as it is: it takes no time."""
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda graph, examples: graph.forward)
    torch._dynamo.reset()
    backend = pytorch_inference.BACKENDS["torch-compile"]()
    backend.load(project / "weights" / checkpoint, 64, list(range(1, 11)), "cpu")
    return backend


def test_more_batch_sizes_than_the_compilers_limit_are_all_compiled(project, monkeypatch):
    backend = compiled_without_inductor(monkeypatch, project)
    with torch.inference_mode():
        for batch in [*range(1, 11), 3]:
            backend.predict(backend.prepare(torch.zeros(batch, 3, 32, 32)))
    assert backend.graphs == 10


def test_torch_compile_that_compiled_nothing_is_unavailable(project, monkeypatch):
    monkeypatch.setenv(switch := "TORCHDYNAMO_DISABLE", "1")
    with (
        torch.inference_mode(),
        pytest.raises(Unavailable, match=f"compiled nothing.*unset {switch}") as found,
    ):
        compiled_without_inductor(monkeypatch, project).prepare(torch.zeros(2, 3, 32, 32))
    assert worker.problem_of(found.value).status == "unavailable"


@pytest.mark.parametrize("suppressed", [True, False])
def test_a_compiler_that_fails_is_unavailable_even_where_errors_are_suppressed(
    project, monkeypatch, suppressed
):
    def fails(graph, examples):
        raise RuntimeError("g++: internal compiler error")

    backend = compiled_without_inductor(monkeypatch, project)
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: fails)
    suppressing = torch._dynamo.config.patch(suppress_errors=suppressed)
    with suppressing, torch.inference_mode(), pytest.raises(Unavailable, match="compile"):
        backend.prepare(torch.zeros(2, 3, 32, 32))


def test_a_gpu_without_tf32_and_a_variable_that_overrides_it_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "no TF32 arithmetic" in pytorch_inference.BACKENDS["pytorch-tf32"]().why_unavailable("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name, value in (("pytorch-tf32", "0"), ("pytorch", "1")):
        backend = pytorch_inference.BACKENDS[name]()
        assert backend.why_unavailable("cuda") is None
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", value)
        assert f"NVIDIA_TF32_OVERRIDE={value} keeps" in backend.why_unavailable("cuda")
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")


def test_the_registry_names_exactly_what_the_scripts_make():
    for script, names in backends.NAMES.items():
        assert list(importlib.import_module(script).BACKENDS) == names
