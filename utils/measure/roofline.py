"""What this machine could do at most, in theory and as measured, and which of it limits a row."""

import functools
import re
import time
import timeit
from collections.abc import Callable

from utils.environment import is_out_of_memory

# Per SM and clock, by compute capability: FP32 lanes, then the tensor cores' dense multiply-adds in TF32,
# FP16 (with FP16 sums, the faster way) and INT8.  CUDA C++ Programming Guide, table "Throughput of Native
# Arithmetic Instructions"; tensor cores from NVIDIA's white papers on V100, TU102, A100, GA102, AD102, H100
# and GB202 and the HGX B200 data sheet.  V100's INT8 is that of DP4A, four for each lane of FP32; of 10.3,
# which has little INT8, no figure is published for one GPU.
LANES: dict[tuple, tuple] = {
    (7, 0): (64, None, 512, 256),
    (7, 5): (64, None, 512, 1024),
    (8, 0): (64, 512, 1024, 2048),
    (8, 6): (128, 256, 512, 1024),
    (8, 9): (128, 256, 512, 1024),
    (9, 0): (128, 1024, 2048, 4096),
    (10, 0): (128, 2048, 4096, 8192),
    (10, 3): (128, 2048, 4096, None),
    (12, 0): (128, 256, 512, 1024),
}
# Turing's small chips (TU116, TU117) have no tensor cores; FP16 runs in lanes of their own, two for each of
# FP32 (TU116's white paper).
NO_TENSOR_CORES = re.compile(r"GTX 16\d\d|MX[45]50|CMP 30HX|\bT(400|500|550|600|1000|1200|2000)\b")
BYTES = {"FP16": 2, "BF16": 2, "INT8": 1}  # of a number; 4 in FP32 and TF32
LAUNCH_BOUND = 0.5  # share of a call in which the GPU idles: above, launching and waiting take most of it
LATENCY_BOUND = 0.1  # share of the roof: below, a busy GPU waits neither for arithmetic nor for memory
SECONDS = 0.25  # of products or copies, at least, for each figure


def peak_tflops(environment: dict, precision: str) -> float | None:
    """The GPU's peak at its boost clock, in 10^12 multiplications and additions a second, or None.

    `environment` holds gpu, compute_capability, sm_count and boost_clock_mhz: see environment.describe().
    """
    gpu, clock, count = (environment.get(name) for name in ("gpu", "boost_clock_mhz", "sm_count"))
    major, minor = environment.get("compute_capability") or (0, 0)
    lanes = LANES.get((major, minor))
    if not (gpu and clock and count and lanes):
        return None
    fp32, tf32, fp16, int8 = lanes
    if NO_TENSOR_CORES.search(gpu):
        fp16, int8 = 2 * fp32, 4 * fp32
    if tf32 == 256 and "GeForce" in gpu:  # half of what the same chips have on professional cards
        tf32 //= 2
    per_clock = {"FP32": fp32, "TF32": tf32, "FP16": fp16, "INT8": int8}.get(precision)
    return per_clock and count * clock * 1e6 * per_clock * 2 / 1e12


def measure(device: str) -> dict:
    """The best matrix product in each precision, in TFLOP/s, and the best copy, in GB/s read and written."""
    import torch

    cuda = device == "cuda"
    precisions = ["FP32", "TF32", "FP16", "INT8"] if cuda else ["FP32"]
    if cuda and torch.cuda.get_device_capability() < (8, 0):
        precisions.remove("TF32")
    free = torch.cuda.mem_get_info()[0] if cuda else 2**31
    tflops = {}
    for precision in precisions:
        rates = []
        for n in (2048, 4096, 8192, 16384) if cuda else (1024, 2048):
            if 4 * n * n * 4 < free:
                try:
                    rates.append(2 * n**3 / 1e12 / _seconds(_product(precision, n, device), cuda))
                except RuntimeError as error:  # GPUs before Turing have no INT8 product: no such figure
                    if precision != "INT8" and not is_out_of_memory(error):
                        raise
        if rates:
            tflops[precision] = round(max(rates), 3)
    source = torch.ones(min(2**30, free // 8), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * len(source) / 1e9 / _seconds(functools.partial(target.copy_, source), cuda)
    return {"tflops": tflops, "gb_per_s": round(bandwidth, 1)}


def _product(precision: str, n: int, device: str) -> Callable:
    """A call that multiplies two n x n matrices; for INT8 the second lies column by column, as it must."""
    import torch

    if precision == "INT8":
        a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
        return functools.partial(vars(torch)["_int_mm"], a, b.t())
    torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
    dtype = torch.float16 if precision == "FP16" else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return functools.partial(torch.mm, a, b, out=torch.empty_like(a))


def _seconds(call, cuda: bool) -> float:
    """The shortest mean of five groups of calls, SECONDS in all; a GPU waits after each group."""
    import torch

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    timer = timeit.Timer(call, timer=clock)
    timer.timeit(2)
    calls = max(1, int(SECONDS / 5 / max(timer.timeit(1), 1e-6)))
    return max(min(timer.repeat(5, calls)), 1e-9) / calls  # a clock may give the same reading twice


def bytes_per_image(work: dict, precision: str, batch_size: int) -> float:
    """What an image must move at least: activations in and out, its share of weights (model.count_work())."""
    return (work["activations"] + work["weights"] / batch_size) * BYTES.get(precision, 4)


def limit(idle: float | None, rate: float, flops_per_byte: float, tflops: float, gb_per_s: float) -> str:
    """What limits a call that reaches `rate` TFLOP/s, given the measured rates of products and copies.

    The roof is the lower of the two (Williams, Waterman and Patterson, Roofline, 2009).  "launch": the GPU
    mostly idles.  "latency": far below the roof, as with small kernels.  Else "memory" or "compute".
    """
    roof = min(tflops, flops_per_byte * gb_per_s / 1000)
    if idle is not None and idle > LAUNCH_BOUND:
        return "launch"
    if rate < LATENCY_BOUND * roof:
        return "latency"
    return "memory" if roof < tflops else "compute"
