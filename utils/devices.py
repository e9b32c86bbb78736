"""Which device a script uses, and what training needs to run in one process or in several.

PyTorch is imported inside the functions, so that --help need not wait for it.
"""

import os
import re
import signal
import sys
from pathlib import Path

from utils.environment import cpu_name, nvml, read_driver, torch_is_at_least
from utils.utils import UserError

OLDEST_DRIVER = {12: 525, 13: 580}  # by CUDA's major version: docs.nvidia.com/deploy/cuda-compatibility


def choose_device(wanted: str) -> str:
    """ "cuda" or "cpu", for "auto", "cuda" or "cpu": the GPU where there is one.

    Never silently the CPU: raises UserError, with the cause and the cure, if "cuda" was asked for, or if the
    NVIDIA driver knows a GPU that PyTorch can't use.
    """
    if wanted == "cpu":
        return "cpu"
    on_purpose = "to use the CPU all the same: --device cpu"
    if wanted not in ("auto", "cuda"):
        raise UserError(f"--device {wanted} is none of auto, cuda and cpu; {on_purpose}")
    import torch

    driver, capability = nvml(), read_driver("nvmlDeviceGetCudaComputeCapability")
    listed = driver and driver.nvmlDeviceGetCount()
    if torch.cuda.is_available() and not (listed and lacks_kernels(capability)):
        return "cuda"
    if listed:
        name = read_driver("nvmlDeviceGetName") or "NVIDIA GPU"
        raise UserError(f"PyTorch can't use the {name}: {why_not_usable(capability)}; {on_purpose}")
    if wanted == "cuda":
        mend = "install NVIDIA's driver, then: python install.py"
        raise UserError(f"--device cuda: no NVIDIA driver lists a GPU here; {mend}; {on_purpose}")
    return "cpu"


def lacks_kernels(capability: tuple[int, int] | None) -> bool:
    """Whether this PyTorch has no code for GPUs of this compute capability; where it is unknown: no.

    Code for sm_75 runs on 7.x from 7.5 on, code for compute_75 on all that is newer.
    """
    import torch

    known = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in torch.cuda.get_arch_list()]
    if capability is None or not all(known):  # AMD's are called gfx90a
        return False
    built = [(found[1], (int(found[2]), int(found[3]))) for found in known if found]
    runs = [kind == "compute" or at[0] == capability[0] for kind, at in built if at <= tuple(capability)]
    return not any(runs)


def why_not_usable(capability: tuple[int, int] | None) -> str:
    """Why PyTorch can't use the GPU that the driver lists, and the command that cures it."""
    import torch

    version, cuda, driver = torch.__version__, torch.version.cuda, nvml()
    number = getattr(driver, "nvmlSystemGetCudaDriverVersion", lambda: 0)()  # 12020 is CUDA 12.2; 0: unknown
    file = "requirements-windows-cuda.txt" if sys.platform == "win32" else "requirements.txt"
    if 0 < number < 13000 or (capability and tuple(capability) < (7, 5)):
        file = "requirements-cuda126.txt"
    cure = f"run: python install.py (or, by hand: python -m pip install --force-reinstall -r {file})"
    if cuda is None:
        return f"torch {version} is a build for CPUs only; {cure}"
    if 0 < number // 1000 < (major := int(cuda.split(".")[0])):
        supports = f"{number // 1000}.{number % 1000 // 10}"
        update = f"update it to {OLDEST_DRIVER.get(major, 'the newest')}"
        return f"its driver is for CUDA {supports}, torch {version} is for {cuda}; {update}, or {cure}"
    if lacks_kernels(capability):
        built = " ".join(torch.cuda.get_arch_list())
        return f"torch {version} is built for {built}, not for compute capability {capability}; {cure}"
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden} hides it; unset this variable"
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return f"CUDA does not start ({str(error).splitlines()[0]}); restart this machine, or {cure}"
    return "CUDA did not start at first; run the same command again"


# ---- training, in one process or in several, which torchrun numbers


def torchrun_number(name: str, alone: int) -> int:
    """A number that torchrun gives a process; `alone` where not all is there by which processes meet."""
    started = all(map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")))
    return int(os.environ.get(name) or alone) if started else alone


def rank() -> int:
    return torchrun_number("RANK", 0)


def process_count() -> int:
    return torchrun_number("WORLD_SIZE", 1)


def start_processes(name: str):
    """The torch.device of this process; joins the others where torchrun started it.  Raises UserError.

    `name` is auto, cpu, cuda, or one GPU of several, cuda:1.
    """
    import torch
    import torch.distributed as dist

    several = process_count() > 1
    if several:  # a process that waits for the others inside torch would not hear torchrun's SIGTERM
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    numbered = re.fullmatch(r"cuda:(\d+)", name)
    device = torch.device(choose_device("cuda" if numbered else name))
    if device.type == "cuda":
        device = torch.device("cuda", int(numbered[1]) if numbered else torchrun_number("LOCAL_RANK", 0))
        if device.index >= (count := torch.cuda.device_count()):
            mend = f"the last one is cuda:{count - 1}; start fewer processes or name another"
            raise UserError(f"--device {device}: there is no such GPU here, {mend}")
        torch.cuda.set_device(device)
    if several:
        told = device.type == "cuda" and torch_is_at_least(2, 3)  # NCCL guesses the device where it isn't
        known: dict = {"device_id": device} if told else {}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **known)
    return device


def end_processes() -> None:
    """Leave the others, now that all is done."""
    if process_count() > 1:
        import torch.distributed

        torch.distributed.destroy_process_group()


def print_rank0(text: str) -> None:
    """Print from the first process alone."""
    if rank() == 0:
        print(text, flush=True)


def wait_for_all() -> None:
    if process_count() > 1:
        import torch.distributed

        torch.distributed.barrier()


def sum_over_ranks(*values, device) -> list[float]:
    """The sums of numbers or scalar tensors over all processes."""
    import torch

    total = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
    if process_count() > 1:
        torch.distributed.all_reduce(total)
    return total.tolist()


def average_statistics(network) -> None:
    """Each process saw other images: give all the mean of their statistics, or each tests another network."""
    import torch

    for buffer in network.buffers():
        if process_count() > 1 and buffer.is_floating_point():
            torch.distributed.all_reduce(buffer)
            buffer /= process_count()


def choose_precision(device):
    """bfloat16 where the hardware has it, since emulated it is slow; float16 on older GPUs, else float32."""
    import torch

    if device.type == "cpu":
        return torch.bfloat16 if has_native_bfloat16() else torch.float32
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    # The GTX 16 series is known to compute NaN in FP16.
    return torch.float32 if "GTX 16" in torch.cuda.get_device_name(device) else torch.float16


def has_native_bfloat16() -> bool:
    """Whether this CPU calculates in bfloat16 itself (AVX512_BF16)."""
    import torch

    if hasattr(torch.cpu, "_is_avx512_bf16_supported"):  # not in torch 2.2
        return torch.cpu._is_avx512_bf16_supported()
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_bf16" in flags.read_text(encoding="utf-8")


def hardware(device) -> str:
    """The GPU's name, or the CPU's with the number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
