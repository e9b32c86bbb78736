"""Raw records -> rows, against hand-worked cases."""

import json
import shutil

import pandas as pd
import pytest
from conftest import ROOT

from utils import records
from utils.utils import COLUMNS

WORK = {"flops": 10**9, "activations": 2 * 10**6, "weights": 8 * 10**6}


def record(
    backend="pytorch", round_=0, host_ms=(10.0,) * 10, key="k", settings_key="s", time="2026-01-01", **changes
) -> dict:
    """One raw record with a single batch size of 4, as measure.py writes it."""
    environment = {
        **{
            "gpu": None,
            "cpu": "a CPU",
            "cores": 2,
            "os": "an OS",
            "python": "3.11",
            "packages": {"torch": "2.14.1"},
            "commit": "c",
            "clean": True,
        },
        **{"date": "2026-01-01", "command": "python benchmark.py", "data": "f", "sample_data": True},
    }
    batch = {
        "status": "ok",
        "reason": "",
        "max_abs_diff": 0.01,
        "host_ms": list(host_ms),
        "enqueue_ms": [],
        "gpu_ms": [],
    }
    batch |= {
        "gpu_memory_mb": None,
        "memory_of": None,
        "torch_memory_mb": None,
        "host_memory_mb": 500.0,
        "sustained": None,
    }
    made = {
        **{
            "key": key,
            "settings_key": settings_key,
            "time": time,
            "run": "main",
            "backend": backend,
            "precision": "FP32",
            "device": "cpu",
        },
        **{"image_size": 64, "round": round_, "status": "ok", "reason": "", "work": dict(WORK)},
        "request": {
            "batch_sizes": [4],
            "runs": 10,
            "backends": ["pytorch", "onnx"],
            "environment": environment,
        },
        "build": {"seconds": 1.5, "from_cache": round_ > 0, "artefact_mb": 40.0},
        "process": {"threads": 2},
        "batches": {"4": batch},
    }
    if round_ == 0:
        made["check"] = {"images": 100, "different": 1, "correct": 90, "max_abs_diff": 0.02, "tolerance": 0.1}
    return made | changes


def test_a_row_against_hand_worked_figures():
    rounds = [record(round_=k) for k in range(3)] + [record("onnx", k, host_ms=(5.0,) * 10) for k in range(3)]
    base, onnx = records.rows_of(rounds)
    assert (base.backend, onnx.backend) == ("pytorch", "onnx")
    assert onnx.mean_ms == 5 and onnx.fps == 800 and onnx.runs == 30 and onnx.rounds == 3
    assert (
        onnx.speedup == 2 and onnx.speedup_low == pytest.approx(2) and onnx.speedup_high == pytest.approx(2)
    )
    assert onnx.tflops == pytest.approx(800 * 1e9 / 1e12)
    assert onnx.agreement == 0.99 and onnx.accuracy == 0.9 and onnx.max_abs_diff == 0.02
    assert onnx.build_s == 1.5 and onnx.status == "ok"
    assert (
        onnx.gpu_memory_mb is None and onnx.power_w is None and onnx.limit is None
    )  # what can't be read is empty


def test_what_the_device_did_against_hand_worked_figures():
    gpu = {"gpu": "NVIDIA H200", "compute_capability": [9, 0], "sm_count": 100, "boost_clock_mhz": 1000.0}
    rounds = [record(round_=k, device="cuda", precision="FP16") for k in range(3)]
    for one in rounds:
        one["request"]["environment"] |= gpu
        one["batches"]["4"] |= {
            "gpu_ms": [9.0] * 10,
            "enqueue_ms": [1.0] * 10,
            "gpu_memory_mb": 900.0,
            "memory_of": "device",
        }
    watched = {
        "gpu_util_pct": 99.0,
        "power_w": 500.0,
        "sm_clock_mhz": 1000.0,
        "temperature_c": 40.0,
        "throttled": "no",
    }
    rounds[0]["batches"]["4"] |= {
        "busy_ms": 6.0,
        "sustained": {**watched, "energy_j": 1500.0, "calls": 250, "loop_s": 2.0},
    }
    (row,) = records.rows_of(rounds, {"tflops": {"FP16": 8.0}, "gb_per_s": 10.0})
    assert row.tflops == pytest.approx(400 * 1e9 / 1e12)
    assert row.pct_peak == pytest.approx(100 * 0.4 / (100 * 1e9 * 2048 * 2 / 1e12))
    assert row.pct_measured_peak == pytest.approx(100 * 0.4 / 8)
    assert row.flops_per_byte == pytest.approx(
        1e9 / (2 * (2e6 + 8e6 / 4))
    )  # 250 FLOP/B x 10 GB/s = 2.5 TFLOP/s < 8
    assert row.limit == "memory" and row.sustained_fps == 500 and row.mj_per_image == 1500
    assert row.temperature_c == 40 and row.host_memory_mb == 500 and "device memory" in row.notes
    rounds[0]["batches"]["4"]["busy_ms"] = 4.0  # of 10 ms
    assert records.rows_of(rounds, {"tflops": {"FP16": 8.0}, "gb_per_s": 10.0})[0].limit == "launch"
    assert records.rows_of(rounds)[0].limit is None  # no ceilings measured


@pytest.mark.parametrize(
    "changes, status, reason",
    [
        (
            {"check": {"images": 100, "different": 2, "correct": 90, "max_abs_diff": 0.02, "tolerance": 0.1}},
            "mismatch",
            "2 of 100 test images",
        ),
        (
            {"check": {"images": 100, "different": 0, "correct": 90, "max_abs_diff": 0.2, "tolerance": 0.1}},
            "mismatch",
            "0.2, more than 0.1",
        ),
        (
            {
                "check": {
                    "images": 100,
                    "different": 0,
                    "correct": 90,
                    "max_abs_diff": float("nan"),
                    "tolerance": 0.1,
                }
            },
            "mismatch",
            "nan",
        ),
        ({"status": "unavailable", "reason": "no GPU", "batches": {}}, "unavailable", "no GPU"),
        ({"batches": {}}, "failed", "interrupted"),
    ],
)
def test_the_gate_and_every_other_reason_not_to_win(changes, status, reason):
    row = records.rows_of([record("onnx", **changes)])[0]
    assert row.status == status and reason in row.reason and row.speedup is None


def test_one_bad_round_spoils_the_row():
    bad = record("onnx", 1, batches={"4": {"status": "out_of_memory", "reason": "round 2 had no room"}})
    assert records.rows_of([record("onnx", 0), bad])[0].status == "out_of_memory"


def test_records_of_other_settings_or_another_checkpoint_are_not_mixed_in(tmp_path):
    folder = tmp_path / "raw" / "main"
    folder.mkdir(parents=True)
    stale = [
        record("onnx", 0, settings_key="old", time="2025"),
        record("pytorch", 1, key="old checkpoint", time="2025"),
    ]
    for name, content in [
        ("a_64_round0", stale[0]),
        ("b_64_round1", stale[1]),
        ("c_64_round0", record(time="2026")),
    ]:
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "d_64_round2.json").write_text('{"cut', encoding="utf-8")
    rows = records.read_rows(tmp_path)
    assert rows.backend.tolist() == ["pytorch"] and rows.rounds.tolist() == [1]


def test_the_csv_is_a_pure_function_of_the_raw_records(tmp_path):
    folder = tmp_path / "raw" / "main"
    folder.mkdir(parents=True)
    for k in range(3):
        for backend, ms in (("pytorch", 10.0 + k), ("onnx", 5.0)):
            path = folder / f"{backend}_64_round{k}.json"
            path.write_text(
                json.dumps(record(backend, k, host_ms=[ms + i / 10 for i in range(40)])), encoding="utf-8"
            )
    first = records.write_csv(tmp_path)
    text = (tmp_path / "benchmark_results.csv").read_bytes()
    records.write_csv(tmp_path)
    assert (tmp_path / "benchmark_results.csv").read_bytes() == text
    assert list(first.columns) == COLUMNS == text.decode().splitlines()[0].split(",")
    pd.testing.assert_frame_equal(first, records.read_csv(tmp_path))
    assert "2 threads, torch 2.14.1" in (tmp_path / "environment.json").read_text(encoding="utf-8")


def test_every_command_that_made_a_run_is_named_once_in_their_order(tmp_path):
    folder = tmp_path / "raw" / "main"
    folder.mkdir(parents=True)
    commands = ["python benchmark.py --backends pytorch", "python benchmark.py --backends onnx"]
    for k in range(2):
        for when, (backend, command) in enumerate(zip(["pytorch", "onnx"], commands, strict=True)):
            one = record(backend, k, time=f"2026-01-0{1 + when}")
            one["request"]["environment"]["command"] = command
            (folder / f"{backend}_64_round{k}.json").write_text(json.dumps(one), encoding="utf-8")
    records.write_csv(tmp_path)
    assert json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))["main"][
        "command"
    ] == " && ".join(commands)


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "results" / "published").glob("*")), ids=lambda folder: folder.name
)
def test_published_tables_can_be_recomputed_from_their_raw_samples(folder, tmp_path):
    shutil.copytree(folder / "raw", tmp_path / "raw")
    records.write_csv(tmp_path)
    for name in ("benchmark_results.csv", "environment.json"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (folder / name).read_text(encoding="utf-8")
