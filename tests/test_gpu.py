"""What the driver says of the GPU, against nvidia-smi and against the clock.  Needs an NVIDIA GPU."""

import contextlib
import itertools
import os
import subprocess
import sys
import time

import numpy as np
import pynvml
import pytest
import torch
from conftest import ROOT

import backends
import model
from utils import environment
from utils.measure import gpu, roofline, timing
from utils.report.rows import read_rows
from utils.serve import dali

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def call():
    """A function that makes the call to time: PyTorch FP32 at an image size and a batch size."""
    network = model.build(4).eval().cuda()

    def make(image_size: int, batch_size: int):
        torch.cuda.empty_cache()
        x = torch.rand(batch_size, 3, image_size, image_size, device="cuda")

        def run():
            with torch.inference_mode():
                return network(x)

        run()
        torch.cuda.synchronize()
        return run

    return make


def new_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def smi_memory_mb() -> dict[int, float]:
    """What nvidia-smi says of each process that it lists."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    found = [[part.strip() for part in line.split(",")] for line in listed]
    return {int(number): float(used) for number, used in found if used.isdecimal()}


def test_memory_is_what_nvidia_smi_says_of_this_process(call):
    kept = call(512, 16)
    found, source = gpu.memory_mb()
    if source != "process":
        pytest.skip("the driver keeps this process's memory to itself")
    assert found == pytest.approx(smi_memory_mb()[os.getpid()], rel=0.1)
    assert kept is not None


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("backend", ["pytorch", "onnx", "torch-tensorrt", "tensorrt"])
def test_a_rows_memory_is_what_nvidia_smi_saw_of_its_process(project, tmp_path, backend, batch):
    script = backends.SCRIPTS[backend]
    if reason := backends.make(backend).why_unavailable("cuda"):
        pytest.skip(reason)
    folders = ["--data", project / "data", "--weights", project / "weights", "--results", tmp_path]
    what = ["--backends", backend, "--image-sizes", 64, "--batch-sizes", batch]
    what += ["--min-seconds", 3, "--sustain-seconds", 0]
    command = [sys.executable, ROOT / f"{script}.py", *what, *folders]
    peaks = {}  # of each process: the backend's, and the baseline's beside it
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        while process.poll() is None:
            for pid, used in smi_memory_mb().items():
                peaks[pid] = max(used, peaks.get(pid, 0))
            time.sleep(0.1)
        said = process.stdout.read().decode("utf-8", errors="replace")
    assert process.returncode == 0, said
    (row,) = read_rows(tmp_path).itertuples()
    assert row.status == "ok", row.reason
    if not peaks:
        pytest.skip("nvidia-smi does not list a process's memory here")
    assert any(row.gpu_memory_mb == pytest.approx(peak, rel=0.1) for peak in peaks.values()), peaks


def test_memory_grows_with_the_batch_and_is_not_the_last_ones(call):
    readings = {}
    for batch in (1, 16, 1):
        kept = call(512, batch)
        readings.setdefault(batch, []).append(gpu.memory_mb()[0])
        del kept
    assert readings[16][0] > readings[1][0] + 100
    assert readings[1][1] == pytest.approx(readings[1][0], rel=0.1)


def test_runs_with_and_without_nvml_beside_them_agree(call):
    run, means = call(224, 16), {True: [], False: []}
    timing.warm_up(run, torch.cuda.synchronize, 50, 1.0, 5.0)
    for watched in [False, True, True, False] * 3:
        if watched:
            gpu.sustain(run, torch.cuda.synchronize, 0.3)
            gpu.memory_mb()
        else:
            timing.warm_up(run, torch.cuda.synchronize, 1, 0.3, 1.0)
        samples = timing.sample(run, torch.cuda.synchronize, 100, new_event)
        means[watched].append(timing.trimmed_mean(samples["host_ms"]))
    noise = max(np.ptp(values) / np.mean(values) for values in means.values())
    assert np.mean(means[True]) == pytest.approx(np.mean(means[False]), rel=max(0.02, noise))


def test_the_sustained_loop_reads_everything(call):
    seen = gpu.sustain(call(224, 16), torch.cuda.synchronize, 1.0)
    assert seen["calls"] > 10 and seen["loop_s"] >= 1.0 and seen["energy_j"] > 10
    assert all(
        seen[name] is not None
        for name in ("gpu_util_pct", "power_w", "sm_clock_mhz", "temperature_c", "throttled")
    )


def test_busy_time_lies_within_the_time_of_a_call(call):
    run = call(224, 16)
    timing.warm_up(run, torch.cuda.synchronize, 10, 0.3, 5.0)
    samples = timing.sample(run, torch.cuda.synchronize, 50, new_event)
    assert 0.2 < gpu.busy_ms(run) / timing.trimmed_mean(samples["gpu_ms"]) < 1.1


def test_measured_rates_stay_under_the_theoretical_peaks():
    found, known = roofline.measure("cuda"), environment.describe()
    for precision, tflops in found["tflops"].items():
        peak = roofline.peak_tflops(known, precision)
        assert peak is None or 0.2 * peak < tflops < 1.05 * peak


@pytest.mark.skipif(dali.why_no_dali() is not None, reason="needs NVIDIA DALI")
def test_the_jpeg_engine_decodes_most_of_every_batch(project):
    if torch.cuda.get_device_capability() not in [(8, 0), (9, 0), (10, 0)]:
        pytest.skip("needs a GPU with a JPEG engine: A100, H100, H200, B200")
    jpegs = sorted(map(str, (project / "data" / "test").rglob("*.jpg")))
    with contextlib.closing(dali.open_decoder("dali", 224, 256, "cuda", jpegs)) as decoder:
        decoder.get_ready("cuda")
        busy, start = [], time.perf_counter()
        for _ in decoder.batches(itertools.cycle(jpegs)):
            busy.append(pynvml.nvmlDeviceGetJpgUtilization(environment.gpu_handle())[0])
            if time.perf_counter() - start > 3:
                break
    assert max(busy) > 20  # % of its time; 3 where it gets no more than 7 files of a batch
