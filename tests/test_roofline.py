"""Peaks against data sheets, operations against known figures, the limit of a row against hand-worked
cases."""

import os
from types import SimpleNamespace

import pytest
import torch

import model
from utils import environment
from utils.measure import gpu, roofline


@pytest.mark.parametrize(
    "name, capability, sm_count, clock_mhz, tflops",  # data sheets; dense, FP16 with FP16 sums
    [
        (
            "NVIDIA GeForce GTX 1650",
            (7, 5),
            14,
            1665,
            {"FP32": 2.98, "FP16": 5.97, "TF32": None, "INT8": 11.9},
        ),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), 24, 1770, {"FP32": 5.44, "FP16": 10.9, "INT8": 21.7}),
        ("Tesla T4", (7, 5), 40, 1590, {"FP32": 8.14, "FP16": 65.1, "INT8": 130}),
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5), 68, 1635, {"FP32": 14.2, "FP16": 113.8}),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1410, {"FP32": 19.5, "TF32": 156, "FP16": 312, "INT8": 624}),
        ("NVIDIA GeForce RTX 3090", (8, 6), 82, 1695, {"FP32": 35.6, "TF32": 35.6, "FP16": 142, "INT8": 284}),
        ("NVIDIA RTX A6000", (8, 6), 84, 1800, {"FP32": 38.7, "TF32": 77.4, "FP16": 154.8}),
        (
            "NVIDIA GeForce RTX 4090",
            (8, 9),
            128,
            2520,
            {"FP32": 82.6, "TF32": 82.6, "FP16": 330.3, "INT8": 660.6},
        ),
        ("NVIDIA L40S", (8, 9), 142, 2520, {"FP32": 91.6, "TF32": 183, "FP16": 366, "INT8": 733}),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, 1830, {"TF32": 494.7, "FP16": 989.4, "INT8": 1979}),
        ("NVIDIA B200", (10, 0), 148, 1850, {"TF32": 1121, "FP16": 2243, "INT8": 4500}),
        (
            "NVIDIA GeForce RTX 5090",
            (12, 0),
            170,
            2407,
            {"FP32": 104.8, "TF32": 104.8, "FP16": 419, "INT8": 838},
        ),
    ],
)
def test_the_theoretical_peak_is_the_data_sheets(name, capability, sm_count, clock_mhz, tflops):
    known = {
        "gpu": name,
        "compute_capability": list(capability),
        "sm_count": sm_count,
        "boost_clock_mhz": clock_mhz,
    }
    for precision, expected in tflops.items():
        found = roofline.peak_tflops(known, precision)
        assert found is None if expected is None else found == pytest.approx(expected, rel=0.005)


def test_an_unknown_gpu_has_no_peak():
    assert roofline.peak_tflops({"gpu": None}, "FP32") is None
    assert (
        roofline.peak_tflops(
            {"gpu": "X", "compute_capability": [99, 0], "sm_count": 1, "boost_clock_mhz": 1}, "FP32"
        )
        is None
    )


@pytest.mark.parametrize(
    "size, flops", [(224, 3_628_146_688), (256, 4_738_490_368), (384, 10_660_323_328), (512, 18_950_889_472)]
)
def test_operations_are_the_known_ones(size, flops):
    assert model.count_work(size)["flops"] == flops
    assert model.count_work(size)["weights"] == 11_689_512


def test_the_profiler_counts_the_same_operations():
    with (
        torch.inference_mode(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profiler,
    ):
        model.build(4).eval()(torch.zeros(1, 3, 64, 64))
    assert sum(event.flops for event in profiler.key_averages()) == model.count_work(64, 4)["flops"]


def test_activations_are_every_layers_input_and_output():
    planes = {
        2: 64 * 112**2,
        4: 64 * 56**2,
        8: 128 * 28**2,
        16: 256 * 14**2,
        32: 512 * 7**2,
    }  # numbers at each stride, 224 px
    stem = 3 * 224**2 + planes[2] + planes[2] + planes[4]  # the first convolution, the pooling
    first = 8 * planes[4] + 2 * planes[4]  # four convolutions, two residuals read
    later = sum(
        planes[k // 2] + planes[k] + 6 * planes[k] + planes[k // 2] + planes[k] + 2 * planes[k]
        for k in (8, 16, 32)
    )
    head = planes[32] + 512 + 512 + 1000
    assert model.count_work(224)["activations"] == stem + first + later + head
    traffic = roofline.bytes_per_image(model.count_work(224), "FP16", 16)
    assert traffic == 2 * (stem + first + later + head + 11_689_512 / 16)
    assert roofline.bytes_per_image(model.count_work(224), "BF16", 16) == traffic
    assert roofline.bytes_per_image(model.count_work(224), "INT8", 16) == traffic / 2
    assert roofline.bytes_per_image(model.count_work(224), "TF32", 16) == traffic * 2


@pytest.mark.parametrize(
    "idle, rate, flops_per_byte, limit",
    [
        (0.6, 500, 1000, "launch"),
        (0.4, 500, 1000, "compute"),
        (None, 500, 201, "compute"),
        (None, 500, 199, "memory"),
        (0.0, 5, 10, "memory"),
        (0.0, 3, 10, "latency"),
        (None, 79, 1000, "latency"),
        (0.6, 3, 10, "launch"),
    ],
)
def test_the_limit_is_the_lower_roof_unless_the_gpu_idles_or_stays_far_below(
    idle, rate, flops_per_byte, limit
):
    assert (
        roofline.limit(idle, rate, flops_per_byte, tflops=800, gb_per_s=4000) == limit
    )  # the roofs meet at 200 FLOP/B


def test_the_rates_of_this_cpu_are_of_its_order():
    found = roofline.measure("cpu")
    assert list(found["tflops"]) == ["FP32"]
    assert 0.001 < found["tflops"]["FP32"] < 50 and 0.5 < found["gb_per_s"] < 5000
    assert 1e12 * found["tflops"]["FP32"] > 1e9 * found["gb_per_s"] / 8  # more operations than numbers copied


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_read_and_nothing_is_zero():
    assert environment.describe() == {} and gpu.memory_mb() == (None, None)


class Device:
    """A driver that tells only the whole device's memory, as Windows' does; `used` is in MB."""

    used = 1000

    def read(self, name, *_):
        known = {"nvmlDeviceGetMemoryInfo": SimpleNamespace(used=self.used * gpu.MB)}
        return known.get(name)


@pytest.fixture
def device(monkeypatch):
    shared = Device()
    monkeypatch.setattr(gpu, "read_driver", shared.read)
    monkeypatch.setattr(gpu, "_risen", 0)
    return shared


def test_only_what_rises_in_a_processs_own_phases_is_its_memory(device):
    assert gpu.memory_mb() == (None, None)
    with gpu.own_phase():
        device.used += 300
    assert gpu.memory_mb() == (300, "device")
    device.used += 5000  # a neighbour loads
    assert gpu.memory_mb() == (300, "device")
    with gpu.own_phase():
        device.used -= 100  # it gives something back
    device.used -= 5000
    assert gpu.memory_mb() == (200, "device")


def test_a_phase_that_fails_counts_as_well(device):
    with pytest.raises(MemoryError), gpu.own_phase():
        device.used += 50
        raise MemoryError
    assert gpu.memory_mb() == (50, "device")


def test_the_drivers_own_count_comes_first(device, monkeypatch):
    mine = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=7 * gpu.MB)]
    listed = lambda name, *_: mine if "Processes" in name else device.read(name)  # noqa: E731
    monkeypatch.setattr(gpu, "read_driver", listed)
    with gpu.own_phase():
        device.used += 300
    assert gpu.memory_mb() == (7, "process")


def test_a_product_that_finds_no_memory_or_no_kernel_costs_its_own_figure(monkeypatch):
    def product(precision, n, device):
        if n > 1024:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return lambda: None

    monkeypatch.setattr(roofline, "_product", product)
    assert roofline.measure("cpu")["tflops"]["FP32"] > 0
