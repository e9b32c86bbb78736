"""The device every script takes: never silently the CPU where NVIDIA's driver knows a GPU; want of memory."""

import argparse
import shutil
import sys
import types
from pathlib import Path

import pytest
import test_compare
import torch
from conftest import run_here, run_script

import end_to_end
from utils import devices, environment
from utils.environment import is_out_of_memory
from utils.utils import UserError, number


@pytest.fixture
def driver(monkeypatch):
    """Have the driver list a GTX 1650 that PyTorch's CUDA can't start; returns a function that changes it."""
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetName = lambda handle: "NVIDIA GeForce GTX 1650"

    def listing(
        count=1, cuda=13000, capability=(7, 5), build="13.0", available=False, built=("sm_75", "sm_90")
    ):
        nvml.nvmlDeviceGetCount = lambda: count
        nvml.nvmlSystemGetCudaDriverVersion = lambda: cuda
        nvml.nvmlDeviceGetCudaComputeCapability = lambda handle: capability
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))
        forget_driver()

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    forget_driver()
    yield listing
    forget_driver()


def forget_driver() -> None:
    environment.nvml.cache_clear()
    environment.gpu_handle.cache_clear()


@pytest.mark.parametrize(
    "facts, cause",
    [
        ({"build": None}, "build for CPUs only"),
        ({"cuda": 12020}, "its driver is for CUDA 12.2, torch .* is for 13.0; update it"),
        ({"capability": (6, 1)}, r"built for sm_75 sm_90, not for compute capability \(6, 1\)"),
        ({"capability": (6, 1), "available": True}, "not for compute capability"),
        ({}, "CUDA does not start"),
    ],
)
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_gpu_that_pytorch_cannot_use_is_an_error_with_its_cause_and_cure(driver, facts, cause, wanted):
    driver(**facts)
    with pytest.raises(UserError, match=f"GeForce GTX 1650.*{cause}.*--device cpu") as raised:
        devices.choose_device(wanted)
    assert "python install.py" in str(raised.value)
    assert devices.choose_device("cpu") == "cpu"


def test_a_hidden_gpu_says_what_hides_it(driver, monkeypatch):
    driver()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES= hides it; unset"):
        devices.choose_device("auto")


def test_the_gpu_is_taken_where_it_can_be_and_the_cpu_where_there_is_none(driver):
    driver(available=True)
    assert devices.choose_device("auto") == devices.choose_device("cuda") == "cuda"
    driver(count=0)
    assert devices.choose_device("auto") == "cpu"
    with pytest.raises(UserError, match="no NVIDIA driver lists a GPU.*--device cpu"):
        devices.choose_device("cuda")


def test_end_to_end_does_not_begin_on_a_gpu_that_pytorch_cannot_use(driver, tmp_path, monkeypatch):
    driver(build=None)
    rows = test_compare.table(("pytorch", 64, 1, 100.0))
    test_compare.write(tmp_path / "cpu", rows)
    test_compare.write(tmp_path / "gpu", rows.assign(device="cuda"))
    monkeypatch.setattr(sys, "argv", ["end_to_end.py"])
    args = end_to_end.parse()
    args.results = tmp_path / "cpu"
    assert [one.device for one in end_to_end.make_asked(args)] == ["cpu"]
    args.results = tmp_path / "gpu"
    with pytest.raises(UserError, match="GTX 1650: torch .* build for CPUs only; run: python install.py"):
        end_to_end.make_asked(args)


@pytest.mark.parametrize(
    "built, capability, lacks",
    [
        (["sm_75", "sm_80"], (8, 9), False),  # 8.x from 8.0 on
        (["sm_86"], (8, 0), True),
        (["sm_90"], (10, 0), True),
        (["sm_90", "compute_90"], (12, 0), False),  # compiled by the driver at first use
        (["sm_90a"], (9, 0), False),
        (["gfx90a"], (9, 0), False),
        (["sm_75"], None, False),
    ],
)
def test_kernels_run_from_their_own_minor_version_on(monkeypatch, built, capability, lacks):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    assert devices.lacks_kernels(capability) == lacks


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[ONNXRuntimeError] : 1 : FAIL : " + "x" * 2000 + " CUDNN_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA failure 2: out of memory ; GPU=0",
        "bfc_arena.cc:376 onnxruntime::BFCArena::AllocateRawInternal Failed to allocate memory for 33554432",
        "cudaErrorMemoryAllocation",
        "std::bad_alloc",
        "bad allocation",
        "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
        "Error Code 2: OutOfMemory (Requested size was 8 bytes.)",
        "Requested amount of GPU memory (1024 bytes) could not be allocated.",
    ],
)
def test_want_of_memory_is_recognised_in_every_runtimes_words(words):
    assert is_out_of_memory(RuntimeError(words)) and is_out_of_memory(words)


def test_other_errors_are_not_want_of_memory():
    assert is_out_of_memory(MemoryError())
    for words in (
        "CUDA error 200: invalid image",
        "an illegal memory access was encountered",
        "no such file",
    ):
        assert not is_out_of_memory(RuntimeError(words))


@pytest.mark.parametrize("kind, text", [(int, "0"), (int, "1.5"), (int, "x"), (float, "nan"), (float, "inf")])
def test_a_number_out_of_range_is_one_sentence(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="number from 1 to 9 is needed, not"):
        number(kind, 1, 9)(text)
    assert number(int, 1, 9)("9") == 9 and number(float, 1, 9)("1.5") == 1.5


def test_a_process_is_alone_unless_all_is_there_by_which_processes_meet(monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)  # left over from another program
    assert devices.torchrun_number("RANK", 0) == 0 and devices.torchrun_number("WORLD_SIZE", 1) == 1
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert devices.torchrun_number("RANK", 0) == 3 and devices.torchrun_number("WORLD_SIZE", 1) == 4
    assert devices.torchrun_number("LOCAL_RANK", 0) == 0


# ---- each script, beside a driver that lists a GTX 1650 and a PyTorch without CUDA


@pytest.mark.parametrize(
    "script", ["train", "benchmark", "pytorch_inference", "onnx_inference", "tensorrt_inference"]
)
def test_no_script_runs_silently_on_the_cpu(script, driver, tiny):
    driver(build=None)
    refuses(run_here(f"{script}.py", "--quick", cwd=tiny, ok=False))


def refuses(done) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "GTX 1650" in done.stderr and "build for CPUs only" in done.stderr
    assert "run: python install.py" in done.stderr


COUNTERFEIT = """
import types
class NVMLError(Exception):
    pass
def nvmlInit():
    import torch
    torch.version.cuda = None
nvmlDeviceGetCount = lambda: 1
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetName = lambda handle: "NVIDIA GeForce GTX 1650"
nvmlSystemGetDriverVersion = lambda: "581.15"
nvmlSystemGetCudaDriverVersion = lambda: 13000
nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(total=2**32, used=2**28, free=2**32 - 2**28)
def __getattr__(name):
    def unsupported(*arguments):
        raise NVMLError("not supported")
    if name.startswith("nvmlDevice"):
        return unsupported
    raise AttributeError(name)
"""
MEASURE = ["benchmark.py", "--quick", "--backends", "pytorch", "--rounds", 1, "--runs", 4]
PREDICT = ["predict.py", Path("data", "test")]


@pytest.fixture
def beside_counterfeit(tiny, tmp_path):
    """Run a script in a fresh process in a copy of the project; its exit code and what it said."""
    (tmp_path / "pynvml.py").write_text(COUNTERFEIT, encoding="utf-8")
    shutil.copytree(tiny, tmp_path / "here", ignore=shutil.ignore_patterns("results"))

    def run(script: str, *arguments):
        return run_script(script, *arguments, cwd=tmp_path / "here", ok=False, PYTHONPATH=str(tmp_path))

    return run


def test_the_way_from_the_driver_to_the_sentence_is_whole(beside_counterfeit):
    """As in the test above, but nothing in the process is replaced."""
    refuses(beside_counterfeit(*PREDICT))


def test_what_the_cpu_made_names_no_gpu(beside_counterfeit, tmp_path):
    for command in (["train.py", "--quick", "--force", "--workers", 0], MEASURE, PREDICT):
        done = beside_counterfeit(*command, "--device", "cpu")
        assert done.returncode == 0, done.stderr
    written = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert any(path.name == "benchmark_results.csv" for path in written)
    assert not [path for path in written if b"GTX 1650" in path.read_bytes()]
