"""Backends that fail in every way a real one can: for tests/test_faults.py, run by benchmark.py like any
other."""

import os
import signal
import time

import torch

from pytorch_inference import PyTorch


class Faulty(PyTorch):
    """PyTorch FP32 until it is given a batch of two."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def predict(self, x):
        return self.fault(super().predict(x)) if len(x) == 2 else super().predict(x)


def killed(logits):
    os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


def hangs(logits):
    time.sleep(3600)


def takes_all_memory(logits):
    return torch.empty(1 << 60)


def raises(logits):
    raise RuntimeError("the kernel was\nnot found")


BACKENDS = {
    "killed": lambda: Faulty(killed),
    "hangs": lambda: Faulty(hangs),
    "takes-all-memory": lambda: Faulty(takes_all_memory),
    "raises": lambda: Faulty(raises),
    "wrong": lambda: Faulty(lambda logits: logits.roll(1, dims=1)),
    "not-a-number": lambda: Faulty(lambda logits: logits * float("nan")),
}
