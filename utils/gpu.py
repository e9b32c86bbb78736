"""What the driver says of the GPU, through NVML: name, memory of a process, utilisation, power, energy, clocks, throttling.

Every reading that the driver does not give is None, never 0.  NVML is asked between timed runs, never within them.
"""

import contextlib
import functools
import os
import threading
import time

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


def describe() -> dict:
    """Name, driver, memory in MB, power limit in W and highest SM clock in MHz of the GPU; {} without one."""
    name = _read("nvmlDeviceGetName")
    if name is None:
        return {}
    nvml = _nvml()
    driver = nvml.nvmlSystemGetDriverVersion()
    power, memory = _read("nvmlDeviceGetPowerManagementLimit"), _read("nvmlDeviceGetMemoryInfo")
    return {
        "gpu": name if isinstance(name, str) else name.decode(),
        "driver": driver if isinstance(driver, str) else driver.decode(),
        "gpu_memory_mb": memory and round(memory.total / MB),
        "power_limit_w": power and power / 1000,
        "max_sm_clock_mhz": _read("nvmlDeviceGetMaxClockInfo", getattr(nvml, "NVML_CLOCK_SM", 1)),
    }


def process_memory_mb() -> float | None:
    """GPU memory that the driver counts for this process, in MB (context, libraries, arenas and tensors).

    None where the driver keeps it to itself (Windows, some containers).
    """
    for process in _read("nvmlDeviceGetComputeRunningProcesses") or []:
        if process.pid == os.getpid() and process.usedGpuMemory:
            return process.usedGpuMemory / MB
    return None


def device_memory_mb() -> float | None:
    """GPU memory in use by everyone, in MB."""
    memory = _read("nvmlDeviceGetMemoryInfo")
    return memory and memory.used / MB


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
        mean = {name: sum(values) / len(values) if values else None for name, values in self._seen.items() if name != "throttle"}
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
            "throttled": ", ".join(text for bit, text in THROTTLE.items() if bits & bit) or "no" if self._seen["throttle"] else None,
        }
