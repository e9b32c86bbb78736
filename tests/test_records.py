"""Raw records -> rows, against hand-worked cases."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from utils.measure import jobs, records
from utils.measure.schema import Job, Record, Settings
from utils.report import rows, tables
from utils.report.rows import COLUMNS, Row
from utils.utils import UserError, write_json

WORK = {"flops": 10**9, "activations": 2 * 10**6, "weights": 8 * 10**6}
ENVIRONMENT = {"gpu": None, "cpu": "a CPU", "cores": 2, "packages": {"torch": "2.14.1"}, "date": "2026-01-01"}
ENVIRONMENT |= {"command": "python benchmark.py", "data": "f", "sample_data": True}


def record(backend="pytorch", round_=0, host_ms=(10.0,) * 10, batch=None, **changes) -> Record:
    """One raw record with a single batch size of 4, as measure.py writes it."""
    timed = {"batch_size": 4, "status": "ok", "reason": "", "max_abs_diff": 0.01, "host_ms": list(host_ms)}
    timed |= {"enqueue_ms": [], "gpu_ms": [], "gpu_memory_mb": None, "memory_of": None}
    timed |= {"torch_memory_mb": None, "host_memory_mb": 500.0, "sustained": None}
    timed |= {"first_call_ms": 100.0 - round_, "block_runs": [len(host_ms)], "baseline_ms": None}
    made = {"sweep": "main", "backend": backend, "precision": "FP32", "device": "cpu", "image_size": 64}
    made |= {"round": round_, "batch_sizes": [4], "runs": 10, "key": "k", "settings_key": "s"}
    made |= {"time": "2026-01-01", "build": {"seconds": 1.5, "from_cache": round_ > 0, "artefact_mb": 40.0}}
    made["build"]["load_s"] = 1.5 if round_ == 0 else 0.2
    made |= {"process": {"threads": 2}, "work": dict(WORK), "batches": [timed | (batch or {})]}
    if round_ == 0:
        made["check"] = passed()
    return Record(**made | changes)


def passed(**changes) -> dict:
    """What a pass over the test set that fits the gate leaves."""
    return {"images": 100, "different": 1, "correct": 90, "max_abs_diff": 0.02, "tolerance": 0.1} | changes


def rows_of(found: list[Record], limits=None, **environment) -> list[Row]:
    return rows.rows_of(found, {"environment": ENVIRONMENT | environment}, limits)


def write_record(path, record: Record) -> None:
    write_json(path, dataclasses.asdict(record))


def keep(folder, *found: Record, commands=("python benchmark.py",)) -> None:
    """Write records as a sweep does, and its sweep.json."""
    for one in found:
        name = f"{one.backend}_{one.image_size}_round{one.round}_{one.key[:3]}.json"
        write_record(folder / name, one)
    note = {"settings": {}, "environment": ENVIRONMENT, "commands": list(commands)}
    write_json(folder / "sweep.json", {"s": note})


def test_a_row_against_hand_worked_figures():
    rounds = [record(round_=k) for k in range(3)] + [record("onnx", k, host_ms=(5.0,) * 10) for k in range(3)]
    base, onnx = rows_of(rounds)
    assert (base.backend, onnx.backend) == ("pytorch", "onnx")
    assert onnx.mean_ms == 5 and onnx.fps == 800 and onnx.runs == 30 and onnx.rounds == 3
    assert (
        onnx.speedup == 2 and onnx.speedup_low == pytest.approx(2) and onnx.speedup_high == pytest.approx(2)
    )
    assert onnx.tflops == pytest.approx(800 * 1e9 / 1e12)
    assert onnx.agreement == 0.99 and onnx.accuracy == 0.9 and onnx.max_abs_diff == 0.02
    assert onnx.build_s == 1.5 and onnx.load_s == 0.2 and onnx.first_call_ms == 99 and onnx.status == "ok"
    assert (
        onnx.gpu_memory_mb is None and onnx.power_w is None and onnx.limit is None
    )  # what can't be read is empty


def test_what_the_device_did_against_hand_worked_figures():
    gpu = {"gpu": "NVIDIA H200", "compute_capability": [9, 0], "sm_count": 100, "boost_clock_mhz": 1000.0}
    seen = {"gpu_ms": [9.0] * 10, "enqueue_ms": [1.0] * 10, "gpu_memory_mb": 900.0, "memory_of": "device"}
    rounds = [record(round_=k, batch=seen, device="cuda", precision="FP16") for k in range(3)]
    watched = {"gpu_util_pct": 99.0, "power_w": 500.0, "sm_clock_mhz": 1000.0, "temperature_c": 40.0}
    watched |= {"throttled": "no", "energy_j": 1500.0, "calls": 250, "loop_s": 2.0}
    rounds[0].batches[0] |= {"busy_ms": 6.0, "sustained": watched}
    limits = {"tflops": {"FP16": 8.0}, "gb_per_s": 10.0}
    (row,) = rows_of(rounds, limits, **gpu)
    assert row.tflops == pytest.approx(400 * 1e9 / 1e12)
    assert row.pct_peak == pytest.approx(100 * 0.4 / (100 * 1e9 * 2048 * 2 / 1e12))
    assert row.pct_measured_peak == pytest.approx(100 * 0.4 / 8)
    assert row.flops_per_byte == pytest.approx(1e9 / (2 * (2e6 + 8e6 / 4)))  # 250 x 10 GB/s = 2.5 TFLOP/s < 8
    assert row.limit == "memory" and row.sustained_fps == 500 and row.mj_per_image == 1500
    assert row.temperature_c == 40 and row.host_memory_mb == 500
    assert any("device memory" in note for note in row.notes)
    rounds[0].batches[0]["busy_ms"] = 4.0  # of 10 ms
    assert rows_of(rounds, limits, **gpu)[0].limit == "launch"
    assert rows_of(rounds, **gpu)[0].limit is None  # no roofline measured


def test_the_baseline_beside_a_row_gives_its_speedup_whatever_the_baselines_own_row_says():
    base = [record(round_=k) for k in range(3)]
    seen = {"baseline_ms": [12.0, 24.0], "block_runs": [5, 5]}
    own = [record("onnx", k, host_ms=[4.0] * 5 + [8.0] * 5, batch=seen) for k in range(3)]
    row = rows_of(base + own)[1]
    assert row.speedup == row.speedup_low == row.speedup_high == pytest.approx(3)
    assert rows_of(own)[0].speedup == pytest.approx(3)


def test_a_single_round_has_no_interval_and_what_missed_its_target_says_by_how_much():
    (one,) = rows_of([record()])
    assert one.fps_low is None and one.speedup_low is None and one.notes[0].startswith("one round: ")
    own = [record("onnx", k, batch={"baseline_ms": [10.0 + k], "block_runs": [10]}) for k in range(3)]
    note = {"environment": ENVIRONMENT, "precision_pct": 5.0}
    (row,) = rows.rows_of(own, note)
    width = rows.width_pct(row)
    assert 20 < width < 30 and row.notes[0].startswith(f"noisy: speedup ±{width:.2g} %, target 5 %, ")
    assert rows.rows_of(own, note | {"precision_pct": 30})[0].notes == [
        "40.0 MB",
        "built in 1.5 s",
        "from the cache in 1.50 s",
    ]
    assert not any("shared core" in said for said in row.notes)
    wild = [record("onnx", k, batch={"baseline_ms": [10.0 * 2**k], "block_runs": [10]}) for k in range(3)]
    assert rows.rows_of(wild, note)[0].notes[0].startswith("noisy: speedup ±459 %, ")  # exp(4.303 ln 2 / √3)
    for one in own:
        one.batches[0]["core_ms"] = [0.01] * 5 + [0.02] * 5
    assert (
        rows.rows_of(own, note)[0].notes[1].startswith("shared core: a core was 2 times as slow at times, ")
    )
    assert rows.rows_of(own, note | {"precision_pct": 30})[0].notes[0] == "40.0 MB"


def test_a_further_round_adds_to_a_row_and_takes_nothing_away():
    rounds = [record(round_=k) for k in range(3)]
    failed = {"batch_size": 4, "status": "failed", "reason": "killed"}
    killed = record(round_=3, further=True, batches=[failed])
    (row,) = rows_of([*rounds, killed])
    assert row.status == "ok" and row.rounds == 3
    (row,) = rows_of([*rounds, record(round_=3, further=True, batch_sizes=[4])])
    assert row.status == "ok" and row.rounds == 4


@pytest.mark.parametrize(
    "changes, status, reason",
    [
        ({"check": passed(different=2)}, "mismatch", "2 of 100 test images"),
        ({"check": passed(max_abs_diff=0.2)}, "mismatch", "0.2, more than 0.1"),
        ({"check": passed(max_abs_diff=float("nan"))}, "mismatch", "nan"),
        ({"status": "unavailable", "reason": "no GPU", "batches": []}, "unavailable", "no GPU"),
        ({"batches": []}, "failed", "interrupted"),
    ],
)
def test_the_gate_and_every_other_reason_not_to_win(changes, status, reason):
    row = rows_of([record("onnx", **changes)])[0]
    assert row.status == status and reason in row.reason and row.speedup is None


def test_one_bad_round_spoils_the_row():
    full = [{"batch_size": 4, "status": "out_of_memory", "reason": "round 2 had no room"}]
    assert rows_of([record("onnx", 0), record("onnx", 1, batches=full)])[0].status == "out_of_memory"


def test_records_of_other_settings_or_another_checkpoint_are_not_mixed_in(tmp_path):
    folder = tmp_path / "raw" / "main"
    other_settings = record("onnx", 0, settings_key="old", time="2025")
    other_checkpoint = record("pytorch", 1, key="older", time="2025")
    keep(folder, other_settings, other_checkpoint, record(time="2026"))
    (folder / "d_64_round2.json").write_text('{"cut', encoding="utf-8")
    table = rows.read_rows(tmp_path)
    assert table.backend.tolist() == ["pytorch"] and table.rounds.tolist() == [1]


def test_a_record_comes_back_as_it_was_written_its_samples_on_one_line(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, record(host_ms=(1.5, 2.25, 3.125)))
    assert records.read_record(path) == record(host_ms=(1.5, 2.25, 3.125))
    assert '"host_ms": [1.5, 2.25, 3.125],' in path.read_text(encoding="utf-8")
    path.write_text('["of another kind"]', encoding="utf-8")
    assert records.read_record(path) is None and records.read_record(tmp_path / "missing") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found["batches"][0].pop("host_ms"),
        lambda found: found["batches"][0].pop("batch_size"),
        lambda found: found["batches"].append("4"),
        lambda found: found["batches"][0].update(status="oj"),
        lambda found: found["check"].pop("images"),
        lambda found: found.update(batches=None),
        lambda found: found.update(status=1),
        lambda found: found.update(build=3),
    ],
)
def test_a_record_that_is_damaged_but_still_json_is_none(tmp_path, damage):
    path = tmp_path / "record.json"
    found = dataclasses.asdict(record())
    damage(found)
    write_json(path, found)
    assert records.read_record(path) is None


def test_a_record_is_validated_without_computing_a_statistic(tmp_path, monkeypatch):
    write_record(tmp_path / "record.json", record())
    monkeypatch.delattr("utils.measure.timing.summarize")
    assert records.read_record(tmp_path / "record.json") == record()


def test_what_older_records_call_otherwise_is_read(tmp_path):
    new, path = record(batch={"baseline_ms": [12.0], "block_runs": [10]}), tmp_path / "record.json"
    old = dataclasses.asdict(new)
    old["batches"][0]["baseline_ms"] = old["batches"][0].pop("baseline_ms")
    old["batches"][0]["block_runs"] = old["batches"][0].pop("block_runs")
    write_json(path, old)
    assert records.read_record(path) == new


def test_what_was_measured_last_is_noted_and_no_clock_decides_it(tmp_path):
    """The clock was a year ahead when an earlier network was measured."""
    folder = tmp_path / "raw" / "main"
    newer = [record(time="2026-01-01", key="k2"), record("onnx", time="2026-01-01", key="k2")]
    keep(folder, record(time="2027-01-01", key="k1"), *newer)
    assert rows.read_rows(tmp_path).backend.tolist() == ["pytorch"]  # as sweeps without the note are read
    note = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    note["s"]["keys"] = {"64": "k2"}
    write_json(folder / "sweep.json", note | {"last": "s"})
    assert sorted(rows.read_rows(tmp_path).backend) == ["onnx", "pytorch"]
    keep(folder, record(time="2028-01-01", settings_key="other", key="k3"))
    write_json(folder / "sweep.json", note | {"last": "s"})
    assert {one.settings_key for one in records.read_sweep(folder)[0]} == {"s"}


def job(key: str, settings_key: str = "s") -> Job:
    known = dict.fromkeys(("sweep", "script", "checkpoint", "data"), "main")
    known |= {"settings": Settings(6, 3, 1, 0.0, 1.0, 0.0, 0), "results": Path("results")}
    known |= {"environment": {"command": "python benchmark.py"}, "round": 0}
    known |= {"backend": "pytorch", "image_size": 64, "batch_sizes": (4,), "device": "cpu"}
    return Job(**known, key=key, settings_key=settings_key)


def test_records_of_another_checkpoint_are_put_away_and_come_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = job("k1").record
    write_record(path, record(key="k1"))
    records.archive_stale_records([job("k2")])
    assert not path.is_file() and "1 records of other settings or checkpoints" in capsys.readouterr().err
    write_record(path, record(key="k2"))
    records.archive_stale_records([job("k1")])
    assert records.read_record(path) == record(key="k1")
    records.archive_stale_records([job("k3", "t")])
    assert not path.is_file() and len(list(path.parent.glob("*/*.json"))) == 2


def test_a_sweep_packed_into_one_file_gives_the_same_rows_and_can_be_gone_on_with(
    tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "raw" / "tensorrt-8.6"
    keep(folder, *(record(name, k) for k in range(3) for name in ("pytorch", "onnx")))
    files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.iterdir()}
    tables.write_table(tmp_path)
    table, facts = ((tmp_path / name).read_bytes() for name in ("benchmark_results.csv", "environment.json"))
    monkeypatch.setattr(sys, "argv", ["records", str(tmp_path)])
    records.main()
    packed = tmp_path / "raw" / "tensorrt-8.6.zip"
    assert [path.name for path in (tmp_path / "raw").iterdir()] == [packed.name]
    content = packed.read_bytes()
    tables.write_table(tmp_path)
    assert (tmp_path / "benchmark_results.csv").read_bytes() == table
    assert (tmp_path / "environment.json").read_bytes() == facts
    records.unpack(folder)
    assert not packed.exists()
    assert {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.iterdir()} == files
    assert records.pack(folder).read_bytes() == content


def test_a_packed_sweep_that_is_damaged_names_its_file_and_the_command_that_restores_it(tmp_path):
    path = tmp_path / "raw" / "main.zip"
    keep(path.with_suffix(""), record())
    content = records.pack(path.with_suffix("")).read_bytes()
    for damaged in (b"PK cut short", content[:-30], content[:90] + b"damage" + content[96:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path.name} is damaged.*git checkout"):
            rows.read_rows(tmp_path)
        with pytest.raises(UserError, match=f"{path.name} is damaged.*git checkout"):
            records.unpack(path.with_suffix(""))


def test_a_packed_sweep_replaces_nothing_in_a_folder_beside_it(tmp_path):
    folder = tmp_path / "raw" / "main"
    keep(folder, record(), record("onnx"))
    records.pack(folder)
    name = "pytorch_64_round0_k.json"
    write_record(folder / name, record(runs=99))
    assert rows.read_rows(tmp_path).backend.tolist() == ["pytorch"]  # the folder is newer
    records.unpack(folder)
    assert records.read_record(folder / name).runs == 99 and len(list(folder.glob("*_round*"))) == 2


@pytest.mark.parametrize("note", [1, {"environment": {}}])
def test_damaged_notes_of_a_sweep_are_as_good_as_none(tmp_path, note, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = job("k").record.parent
    keep(folder, record())
    for content in ([note], {"s": note, "last": [1]}):
        write_json(folder / "sweep.json", content)
        for limits in ([], {"settings_key": "t"}):
            write_json(folder / "ceilings.json", limits)
            found, known, roofline = records.read_sweep(folder)
            assert len(rows.rows_of(found, known, roofline)) == 1 and roofline is None
        assert records.note_sweep([job("k")], spent_s=2.5)["commands"] == ["python benchmark.py"]
    assert records.note_sweep([job("k")])["spent_s"] == 2.5
    written = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    assert written["last"] == "s" and written["s"]["keys"] == {"64": "k"}


def test_the_csv_is_a_pure_function_of_the_raw_records(tmp_path):
    folder = tmp_path / "raw" / "main"
    for k in range(3):
        for backend, ms in (("pytorch", 10.0 + k), ("onnx", 5.0)):
            keep(folder, record(backend, k, host_ms=[ms + i / 10 for i in range(40)]))
    first, _ = tables.write_table(tmp_path)
    text = (tmp_path / "benchmark_results.csv").read_bytes()
    tables.write_table(tmp_path)
    assert (tmp_path / "benchmark_results.csv").read_bytes() == text
    assert list(first.columns) == COLUMNS == text.decode().splitlines()[0].split(",")
    pd.testing.assert_frame_equal(first, tables.read_table(tmp_path)[0])
    assert "2 threads, torch 2.14.1" in (tmp_path / "environment.json").read_text(encoding="utf-8")


def test_every_command_that_made_a_sweep_is_named_once_in_their_order(tmp_path):
    commands = ["python benchmark.py --backends pytorch", "python benchmark.py --backends onnx"]
    keep(tmp_path / "raw" / "main", record(), record("onnx"), commands=commands)
    tables.write_table(tmp_path)
    known = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
    assert known["main"]["command"] == " && ".join(commands)


def test_the_key_changes_with_settings_machine_and_data_but_not_with_the_commit(monkeypatch):
    def key(runs=100, **known) -> str:
        settings = Settings(runs, 3, 10, 1.5, 3.0, 1.5, 0)
        return jobs.staleness_key(settings, "cpu", ENVIRONMENT | known)

    assert key() == key(commit="another", date="2027-01-01", command="python onnx_inference.py")
    assert len({key(), key(runs=50), key(cpu="another"), key(data="another")}) == 4
    monkeypatch.setattr(jobs, "DECISIVE", ["model.py", "modle.py"])
    with pytest.raises(FileNotFoundError, match="modle.py"):
        key()


PUBLISHED = sorted(path.parent for path in (ROOT / "results" / "published").glob("*/raw"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_tables_can_be_recomputed_from_their_raw_samples(folder, tmp_path):
    shutil.copytree(folder / "raw", tmp_path / "raw")
    tables.write_table(tmp_path)
    for name in ("benchmark_results.csv", "environment.json"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (folder / name).read_text(encoding="utf-8")


def test_what_a_limit_on_processor_time_held_back_is_a_warning_and_in_the_caption(tmp_path):
    held = [record(round_=k, batch={"held_back_s": 0.4}) for k in range(2)]
    (row,) = rows_of(held)
    assert any(note.startswith("CPU limit: for 0.8 s, a limit on processor time") for note in row.notes)
    assert not any("CPU limit" in note for note in rows_of([record()])[0].notes)
    caption = tables.short(ENVIRONMENT | {"threads": 2, "cpu_quota": 0.5})
    assert "2 threads within 0.5 cores' time" in caption
