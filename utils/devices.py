"""Which device a script uses, and what training needs in several processes; --help needs no PyTorch."""

import os
import re
import signal
import time

from utils.environment import cpu_name, nvml, read_driver, torch_is_at_least
from utils.utils import UserError


def choose_device(wanted: str) -> str:
    """ "cuda" or "cpu", for "auto", "cuda" or "cpu": the GPU where there is one.

    Never silently the CPU: raises UserError, with the cause and the cure, if "cuda" was asked for, or if the
    NVIDIA driver knows a GPU that PyTorch can't use.
    """
    if wanted == "cpu":
        return "cpu"
    import torch

    on_purpose = "to use the CPU all the same: --device cpu"
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
    """Whether this PyTorch has no code for GPUs of this compute capability; where it is unknown: no."""
    import torch

    # Code for sm_75 runs on 7.x from 7.5 on, code for compute_75 on all that is newer.
    known = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in torch.cuda.get_arch_list()]
    if capability is None or not all(known):  # AMD's are called gfx90a
        return False
    built = [(found[1], (int(found[2]), int(found[3]))) for found in known if found]
    runs = [kind == "compute" or at[0] == capability[0] for kind, at in built if at <= tuple(capability)]
    return not any(runs)


def why_not_usable(capability: tuple[int, int] | None) -> str:
    """Why PyTorch can't use the GPU that the driver lists, and the command that cures it."""
    import torch

    version, cuda, cure = torch.__version__, torch.version.cuda, "run: python install.py"
    if cuda is None:
        return f"torch {version} is a build for CPUs only; {cure}"
    number = getattr(nvml(), "nvmlSystemGetCudaDriverVersion", lambda: 0)()  # 12020 is CUDA 12.2; 0: unknown
    if 0 < number // 1000 < int(cuda.split(".")[0]):
        supports = f"{number // 1000}.{number % 1000 // 10}"
        return f"its driver is for CUDA {supports}, torch {version} is for {cuda}; update it, or {cure}"
    if lacks_kernels(capability):
        built = " ".join(torch.cuda.get_arch_list())
        return f"torch {version} is built for {built}, not for compute capability {capability}; {cure}"
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden} hides it; unset this variable"
    return f"CUDA does not start; restart this machine, or {cure}"


# ---- training, in one process or in several, which torchrun numbers


def torchrun_number(name: str, alone: int) -> int:
    """A number that torchrun gives each of its processes; `alone` where it has not started this one."""
    return int(os.environ.get(name) or alone) if "MASTER_PORT" in os.environ else alone


RANK, PROCESSES = torchrun_number("RANK", 0), torchrun_number("WORLD_SIZE", 1)


def start_processes(wanted: str):
    """The torch.device of this process; joins the others where torchrun started it.  Raises UserError."""
    import torch
    import torch.distributed

    device = torch.device(choose_device(wanted))
    if device.type == "cuda":
        device = torch.device("cuda", torchrun_number("LOCAL_RANK", 0))
        if device.index >= (count := torch.cuda.device_count()):
            raise UserError(f"there are {count} GPUs here; start as many processes: --nproc-per-node {count}")
        torch.cuda.set_device(device)
    if PROCESSES > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # one that waits for the others in torch hears no other
        told = device.type == "cuda" and torch_is_at_least(2, 3)  # NCCL guesses the device where it isn't
        known: dict = {"device_id": device} if told else {}
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", **known)
    return device


def leave_processes() -> None:
    """Destroy the process group, else Gloo's threads may abort this process while it ends."""
    import torch.distributed

    if not torch_is_at_least(2, 8):
        time.sleep(0.1)  # lets Gloo's threads take the GIL: the next line holds it until they have ended
    torch.distributed.destroy_process_group()


def print_rank0(text: str) -> None:
    """Print from the first process alone."""
    if RANK == 0:
        print(text, flush=True)


def wait_for_all() -> None:
    if PROCESSES > 1:
        import torch.distributed

        torch.distributed.barrier()


def sum_over_ranks(*values, device) -> list[float]:
    """The sums of numbers or scalar tensors over all processes."""
    import torch

    total = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
    if PROCESSES > 1:
        torch.distributed.all_reduce(total)
    return total.tolist()


def average_statistics(network) -> None:
    """Each process saw other images: give all the mean of their statistics, or each tests another network."""
    import torch

    for buffer in network.buffers():
        if PROCESSES > 1 and buffer.is_floating_point():
            torch.distributed.all_reduce(buffer)
            buffer /= PROCESSES


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
    """Whether this CPU calculates in bfloat16 itself (AVX512_BF16); PyTorch 2.2 does not say."""
    import torch

    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def hardware(device) -> str:
    """The GPU's name, or the CPU's with the number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
