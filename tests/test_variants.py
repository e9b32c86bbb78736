"""What PyTorch alone can do: every rung computes what the baseline computes, or says why it can't."""

import contextlib

import numpy as np
import pytest
import torch
from conftest import load_test_images

import backends
import model
import pytorch_inference
from utils.measure import accuracy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNGS = [name for name in pytorch_inference.BACKENDS if name != "pytorch"]


@pytest.fixture(scope="module")
def pictures(project):
    return load_test_images(project / "data", 64, known(project))[0][:4]


def known(project) -> list[str]:
    return model.load_facts(project / "weights" / "best_resnet18_64.pth")["classes"]


def in_its_place(device: str):
    """On a GPU a stream of its own, as a graph's capture wants it."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_computes_what_the_baseline_computes(project, pictures, name):
    backend = pytorch_inference.BACKENDS[name]()
    if reason := backend.why_unavailable(DEVICE):
        pytest.skip(reason)
    checkpoint = project / "weights" / "best_resnet18_64.pth"
    with torch.inference_mode(), in_its_place(DEVICE):
        expected = model.load(checkpoint, "cpu")[0](pictures).numpy()
        backend.load(checkpoint, 64, [1, 4], DEVICE)
        for batch in (1, 4, 1):
            logits = backend.predict(backend.prepare(pictures[:batch].to(DEVICE))).float().cpu().numpy()
            difference = np.abs(logits - expected[:batch]).max()
            assert difference <= accuracy.TOLERANCE[backend.precision] * np.abs(expected).max()


def test_cudnn_chooses_by_trial_for_tuned_rungs_and_not_for_the_baseline(project):
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
    plain = name in ("pytorch", "onnx", "torch-tensorrt", "tensorrt")
    assert (adds == "") == plain
    assert len(adds) < 110 and "\n" not in adds and not adds.endswith(".")
    assert adds.endswith("replayed as one CUDA graph") == name.endswith("-graph")
    assert ("INT8" in adds) == ("int8" in name)


@pytest.mark.parametrize("name", ["pytorch-channels-last", "pytorch-bf16"])
def test_cpu_rungs_say_so_on_a_gpu(name):
    reason = pytorch_inference.BACKENDS[name]().why_unavailable("cuda")
    assert reason.endswith("is measured on the CPU only; this run is on a GPU")


def test_bf16_is_only_measured_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr(pytorch_inference, "has_native_bfloat16", lambda: False)
    assert "no BF16 arithmetic" in pytorch_inference.BACKENDS["pytorch-bf16"]().why_unavailable("cpu")


def test_without_a_compiler_torch_compile_says_which_one_it_looks_for(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    reason = pytorch_inference.BACKENDS["torch-compile"]().why_unavailable("cpu")
    assert "no-such-compiler -O2 is not there; install one or set CXX" in reason


@pytest.mark.filterwarnings("ignore")
def test_more_batch_sizes_than_the_compilers_limit_are_all_compiled(project):
    backend = pytorch_inference.BACKENDS["torch-compile"]()
    if reason := backend.why_unavailable("cpu"):
        pytest.skip(reason)
    backend.load(project / "weights" / "best_resnet18_64.pth", 64, list(range(1, 11)), "cpu")
    compiled = []

    def count(graph, example):
        compiled.append(len(example))
        return graph.forward

    torch._dynamo.reset()
    network = torch.compile(backend.network._orig_mod, backend=count, dynamic=False)
    with torch.inference_mode():
        for batch in range(1, 11):
            network(torch.zeros(batch, 3, 32, 32))
    torch._dynamo.reset()
    assert len(compiled) == 10
