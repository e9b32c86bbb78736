"""What the driver says of the GPU, through NVML: name, memory of a process, utilisation, power, energy, clocks, throttling.

Every reading that the driver does not give is None, never 0.  NVML is asked between timed runs, never within them.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time

os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # so that the driver's GPU 0 is CUDA's
MB = 2**20
THROTTLE = {  # nvml.h, nvmlClocksEventReasons; idle, application clocks and display settings slow nothing down unasked
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


@functools.cache
def _nvml():
    """pynvml, initialised, or None where there is no NVIDIA driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, no permission: all mean that nothing can be read
        return None
    return pynvml


@functools.cache
def _handle():
    """The GPU that CUDA calls device 0 when CUDA_DEVICE_ORDER is PCI_BUS_ID, or None."""
    nvml = _nvml()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if nvml is None or visible in ("", "-1"):
        return None
    with contextlib.suppress(nvml.NVMLError):
        return (
            nvml.nvmlDeviceGetHandleByUUID(visible)
            if visible.startswith(("GPU-", "MIG-"))
            else nvml.nvmlDeviceGetHandleByIndex(int(visible))
        )


def _read(name: str, *arguments):
    """One NVML reading of the GPU, or None where the driver doesn't give it."""
    nvml, handle = _nvml(), _handle()
    if handle is None:
        return None
    try:
        return getattr(nvml, name)(handle, *arguments)
    except (nvml.NVMLError, AttributeError):
        return None


def _attribute(number: int) -> int | None:
    """A fact about CUDA's device 0 by its number in cuda.h (CUdevice_attribute), or None; asking makes no CUDA context."""
    with contextlib.suppress(OSError):
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        device, value = ctypes.c_int(), ctypes.c_int()
        done = (
            cuda.cuInit(0),
            cuda.cuDeviceGet(ctypes.byref(device), 0),
            cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device),
        )
        return value.value if not any(done) else None


def describe() -> dict:
    """Name, driver, memory in MB, power limit in W, compute capability, SMs and boost clock in MHz of the GPU; {} without one."""
    name = _read("nvmlDeviceGetName")
    if name is None:
        return {}
    driver = _nvml().nvmlSystemGetDriverVersion()
    power, memory = _read("nvmlDeviceGetPowerManagementLimit"), _read("nvmlDeviceGetMemoryInfo")
    clock_khz, sm_count, major, minor = (_attribute(number) for number in (13, 16, 75, 76))
    return {
        "gpu": name if isinstance(name, str) else name.decode(),
        "driver": driver if isinstance(driver, str) else driver.decode(),
        "gpu_memory_mb": memory and round(memory.total / MB),
        "power_limit_w": power and power / 1000,
        "compute_capability": major and [major, minor],
        "sm_count": sm_count,
        "boost_clock_mhz": clock_khz and clock_khz / 1000,
    }


def memory_mb() -> tuple[float | None, str | None]:
    """GPU memory of this process in MB (context, libraries, arenas and tensors), and whose reading it is.

    "process": what the driver counts for it.  "device", where the driver keeps that to itself (Windows, some containers): the rise of
    everyone's memory over level_before_context(), which holds what other programs took or gave back meanwhile.  (None, None): not known.
    """
    for process in _read("nvmlDeviceGetComputeRunningProcesses") or []:
        if process.pid == os.getpid() and process.usedGpuMemory:
            return process.usedGpuMemory / MB, "process"
    level, memory = level_before_context(), _read("nvmlDeviceGetMemoryInfo")
    return (
        ((memory.used - level) / MB, "device")
        if memory and level is not None and memory.used > level
        else (None, None)
    )


@functools.cache
def level_before_context() -> int | None:
    """Bytes of GPU memory that everyone used when this was first called: call it before anything touches CUDA."""
    memory = _read("nvmlDeviceGetMemoryInfo")
    return memory and memory.used


@functools.cache
def context_mb() -> float | None:
    """Make the CUDA context, if there is none, and say what it takes in MB, with PyTorch's kernels and before any tensor."""
    import torch

    level_before_context()
    torch.cuda.synchronize()
    return memory_mb()[0]


class Watch:
    """Samples what the GPU does beside a sustained loop: `with Watch() as watch: ...`, then `watch.result`."""

    PERIOD_S = 0.05

    def __enter__(self):
        self._done = threading.Event()
        self._seen = {"util": [], "power": [], "clock": [], "temperature": [], "throttle": []}
        self._energy, self._start = _read("nvmlDeviceGetTotalEnergyConsumption"), time.perf_counter()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def _poll(self):
        while not self._done.wait(self.PERIOD_S):
            use = _read("nvmlDeviceGetUtilizationRates")
            readings = {
                "util": use and use.gpu,
                "power": _read("nvmlDeviceGetPowerUsage"),
                "clock": _read("nvmlDeviceGetClockInfo", 1),
                "temperature": _read("nvmlDeviceGetTemperature", 0),
                "throttle": _read("nvmlDeviceGetCurrentClocksThrottleReasons"),
            }
            for name, value in readings.items():
                if value is not None:
                    self._seen[name].append(value)

    def __exit__(self, *_):
        seconds = time.perf_counter() - self._start
        energy = _read("nvmlDeviceGetTotalEnergyConsumption")
        self._done.set()
        self._thread.join()
        mean = {
            name: sum(values) / len(values) if values else None
            for name, values in self._seen.items()
            if name != "throttle"
        }
        joules = (energy - self._energy) / 1000 if energy is not None and self._energy is not None else None
        if joules is None and mean["power"] is not None:
            joules = mean["power"] / 1000 * seconds
        bits = 0
        for reasons in self._seen["throttle"]:
            bits |= reasons
        self.result = {
            "seconds": seconds,
            "gpu_util_pct": mean["util"],
            "power_w": joules and joules / seconds,
            "energy_j": joules,
            "sm_clock_mhz": mean["clock"],
            "temperature_c": mean["temperature"],
            "throttled": ", ".join(text for bit, text in THROTTLE.items() if bits & bit) or "no"
            if self._seen["throttle"]
            else None,
        }
