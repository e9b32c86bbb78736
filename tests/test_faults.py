"""A backend that dies, hangs, runs out of memory or is wrong costs exactly its own rows."""

from argparse import Namespace

import faulty_inference
import pytest
from conftest import shorten_benchmark

import benchmark
from utils.measure import jobs
from utils.report import tables

SETTINGS = {"device": "cpu", "runs": 5, "warmup": 1, "min_seconds": 0.0, "max_seconds": 1.0}
TIMEOUT_S = 10  # twice it is waited for the one that hangs


@pytest.fixture(scope="module")
def rows(tiny, tmp_path_factory):
    """The table of PyTorch and every faulty backend at 64 px, each in a process of its own: batch 1 works,
    batch 2 does not."""
    results = tmp_path_factory.mktemp("faults")
    backends = {
        "pytorch": "pytorch_inference",
        **dict.fromkeys(faulty_inference.BACKENDS, "faulty_inference"),
    }
    asked = dict(backends=list(backends), image_sizes=[64], batch_sizes=[1, 2], rounds=1, sweep="main")
    folders = dict(data=tiny / "data", weights=tiny / "weights", results=results)
    args = Namespace(**SETTINGS, **asked, **folders, sustain_seconds=3.0, seed=0, quick=False)
    with pytest.MonkeyPatch.context() as patch:
        shorten_benchmark(patch)
        wanted = jobs.make_jobs(args, backends, {})
        benchmark.sweep(wanted, timeout=TIMEOUT_S, ci_width=3, budget_minutes=0)
    return tables.write_table(results)[0].set_index(["backend", "batch_size"])


def test_everything_else_is_complete(rows):
    assert len(rows) == 2 * 7
    assert (rows.xs(1, level="batch_size").status == "ok").all()
    assert rows.loc["pytorch", 2].status == "ok" and rows.loc["pytorch", 2].mean_ms > 0


@pytest.mark.parametrize(
    "backend, status, reason",
    [
        ("killed", "failed", "signal 9"),
        ("hangs", "failed", f"stopped after {TIMEOUT_S} s; allow more: --timeout {2 * TIMEOUT_S}"),
        ("takes-all-memory", "out_of_memory", "memory"),
        ("raises", "failed", "RuntimeError: the kernel was not found"),
        ("wrong", "mismatch", "logits differ from PyTorch FP32 by"),
        ("not-a-number", "mismatch", "logits differ from PyTorch FP32 by nan"),
    ],
)
def test_a_fault_costs_its_own_row_and_says_why(rows, backend, status, reason):
    row = rows.loc[backend, 2]
    assert row.status == status
    assert reason in row.reason
