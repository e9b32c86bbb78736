"""Which device and precision training takes, in one process or in several that torchrun started."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from utils.environment import cpu_name
from utils.utils import UserError


def start_processes(name: str) -> torch.device:
    """The device of this process; joins the others where torchrun started it.  Raises UserError."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:  # a process that waits for the others inside torch would not hear torchrun's SIGTERM
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        mend = "run on the CPU: python train.py --device cpu"
        raise UserError(f"--device {name} can't be used here ({reason}); {mend}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if several and device.type == "cuda":
        new = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 3)  # NCCL guesses where it isn't told
        dist.init_process_group("nccl", **({"device_id": device} if new else {}))
    elif several:
        dist.init_process_group("gloo")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(*values: torch.Tensor | int, device: torch.device) -> list[float]:
    total = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def average_statistics(network: torch.nn.Module) -> None:
    """Each process saw other images: give all the mean of their statistics, or each tests another network."""
    if dist.is_initialized():
        for buffer in network.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


def choose_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware has it, since emulated it is slow; float16 on older GPUs, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and has_native_bfloat16():
        return torch.bfloat16
    return torch.float32


def has_native_bfloat16() -> bool:
    if hasattr(torch.cpu, "_is_avx512_bf16_supported"):  # not in torch 2.2
        return torch.cpu._is_avx512_bf16_supported()
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_bf16" in flags.read_text(encoding="utf-8")


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def named(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def is_out_of_memory(error: Exception) -> bool:
    said = "out of memory", "can't allocate memory", "not enough memory"  # on a GPU, on a CPU, on Windows
    return isinstance(error, MemoryError) or any(text in str(error) for text in said)
