"""A round's own logic, with members that fail in every way: who is tried again, whose failure is noted."""

import dataclasses
from pathlib import Path

import pytest

import backends
from utils.measure import interleave
from utils.measure.interleave import InterleavedRound, Member, plan_blocks
from utils.measure.schema import Job, Problem, Settings
from utils.measure.sweep import new_record, resume
from utils.utils import UserError

SETTINGS = Settings(runs=6, rounds=3, warmup=1, min_seconds=0.0, max_seconds=3.0, sustain_seconds=0.0, seed=0)
OPENED = {"precision": "FP32", "build": {"seconds": 1.0, "from_cache": False, "artefact_mb": 1.0}}
JOB = Job(
    sweep="main",
    backend="onnx",
    script="onnx_inference",
    image_size=64,
    batch_sizes=(1, 8),
    round=0,
    device="cpu",
    settings=SETTINGS,
    environment={"command": "python benchmark.py"},
    data=Path("data"),
    checkpoint=Path("weights/best_resnet18_64.pth"),
    results=Path("results"),
    settings_key="s",
    key="k",
)


class Steps:
    """Stands for a process: it fails as it is told to, at a step of a batch size (None: open)."""

    seconds = None

    def __init__(self, fails: dict | None = None, run_ms: float = 2.0):
        self.fails, self.run_ms, self.asked, self.gone = fails or {}, run_ms, [], False

    def ask(self, step, *arguments):
        self.asked.append((step, *arguments))
        problem = self.fails.get((step, arguments[0] if arguments else None))
        if problem == "dies":
            self.gone = True
        if self.gone:
            raise Problem("failed", "its process ended with signal 9")
        if problem:
            raise problem
        timed = {"host_ms": [self.run_ms], "enqueue_ms": [], "gpu_ms": [], "block_runs": [1], "core_ms": []}
        found = {"open": OPENED, "end": {**timed, "sustained": None}}
        found |= {"begin": {"run_ms": self.run_ms, "max_abs_diff": 0.5}, "run": self.run_ms}
        return found[step]

    def is_gone(self) -> bool:
        return self.gone


def play(*members: Member, sequential: bool = False):
    kept = []
    round_ = InterleavedRound(list(members), kept.append, sequential)
    round_.play()
    return round_, kept


def member(fails=None, run_ms: float = 2.0, **changes) -> Member:
    script = backends.SCRIPTS[changes.get("backend", JOB.backend)]
    job = dataclasses.replace(JOB, script=script, **changes)
    return Member(job, Steps(fails, run_ms), new_record(job))


def statuses(one: Member) -> dict[int, str]:
    return {batch["batch_size"]: batch["status"] for batch in one.record.batches}


NO_MEMORY = Problem("out_of_memory", "CUDA out of memory")
BROKEN = Problem("failed", "the kernel was not found")


def test_members_are_timed_beside_the_baseline_block_by_block():
    base, onnx = member(backend="pytorch", run_ms=6.0), member()
    round_, kept = play(base, onnx)
    assert statuses(base) == statuses(onnx) == {1: "ok", 8: "ok"} and not round_.again
    assert onnx.record.batch(8)["baseline_ms"] and set(onnx.record.batch(8)["baseline_ms"]) == {6.0}
    assert base.record.batch(8)["baseline_ms"] is None and onnx.record.precision == "FP32"
    assert kept == [base, onnx]


def test_want_of_memory_beside_others_is_not_held_against_a_member_and_what_it_measured_is_kept():
    onnx = member({("begin", 8): NO_MEMORY})
    round_, _ = play(member(backend="pytorch"), onnx)
    assert round_.again == [onnx] and statuses(onnx) == {1: "ok"}
    alone = Member(JOB, Steps(), resume(JOB, onnx.record))
    round_, _ = play(alone, sequential=True)
    assert statuses(alone) == {1: "ok", 8: "ok"} and not round_.again
    assert ("begin", 1, True) not in alone.steps.asked  # only what lacks is measured


def test_want_of_memory_of_a_member_alone_is_its_result_with_the_reason():
    onnx = member({("begin", 8): NO_MEMORY})
    round_, _ = play(onnx, sequential=True)
    assert not round_.again and statuses(onnx) == {1: "ok", 8: "out_of_memory"}
    assert onnx.record.batch(8)["reason"] == "CUDA out of memory"
    loading = member({("open", None): NO_MEMORY})
    play(loading, sequential=True)
    assert loading.record.status == "out_of_memory" and not loading.record.batches


def test_batch_sizes_that_share_a_process_are_crowded_too():
    onnx = member({("begin", 8): NO_MEMORY})
    assert play(onnx)[0].again == [onnx] and statuses(onnx) == {1: "ok"}


@pytest.mark.parametrize("step", ["begin", "run", "end"])
def test_any_other_failure_costs_its_own_batch_size(step):
    onnx = member({(step, 8): BROKEN})
    round_, _ = play(member(backend="pytorch"), onnx)
    assert not round_.again and statuses(onnx) == {1: "ok", 8: "failed"}
    known = onnx.record.batch(8).get("max_abs_diff")
    assert known == (None if step == "begin" else 0.5)


def test_a_mismatch_keeps_the_difference_that_was_seen():
    onnx = member({("begin", 1): Problem("mismatch", "logits differ", 0.7)})
    play(onnx)
    assert onnx.record.batch(1)["max_abs_diff"] == 0.7 and statuses(onnx) == {1: "mismatch", 8: "ok"}


def test_a_process_that_dies_is_tried_again_and_then_its_missing_batch_sizes_have_failed():
    onnx = member({("run", 8): "dies"})
    round_, _ = play(member(backend="pytorch"), onnx)
    assert list(dict.fromkeys(round_.again)) == [onnx] and statuses(onnx) == {}
    alone = member({("run", 8): "dies"})
    round_, _ = play(alone, sequential=True)
    assert not round_.again and statuses(alone) == {1: "ok", 8: "failed"}
    assert "signal 9" in alone.record.batch(8)["reason"]


def test_a_further_round_that_fails_takes_nothing_away():
    onnx = member({("begin", 8): BROKEN}, round=3)
    play(onnx)
    assert statuses(onnx) == {1: "ok"} and onnx.record.further


def test_a_failure_does_not_replace_a_measurement():
    record = new_record(JOB)
    record.batches = [{"batch_size": 1, "status": "ok", "reason": "", "host_ms": [2.0]}]
    onnx = Member(JOB, Steps({("open", None): BROKEN}), record)
    play(onnx)
    assert onnx.record.status == "ok" and statuses(onnx) == {1: "ok", 8: "failed"}


def test_what_a_user_has_to_mend_ends_the_whole_round():
    with pytest.raises(UserError, match="train it again"):
        play(member({("open", None): UserError("train it again")}))


def test_blocks_share_the_runs_and_the_slowest_decides_how_often_they_change():
    blocks, runs = plan_blocks([1.0, 10.0], SETTINGS, "cpu")
    assert blocks == 1 and runs == [2, 2]
    many = dataclasses.replace(SETTINGS, runs=3000)
    blocks, runs = plan_blocks([1.0, 10.0], many, "cpu")
    assert blocks == 33 and runs == [31, 4]  # 1000 runs each, but no more than a second of the slower
    assert plan_blocks([], SETTINGS, "cpu") == (0, [])


def test_a_clock_that_gives_the_same_reading_twice_divides_nothing_by_zero():
    from utils.measure import timing

    assert timing.ms([1.0, 2.0], [1.0, 2.0]) == [timing.RESOLUTION_MS] * 2


def test_what_a_limit_on_processor_time_held_back_meanwhile_is_noted(monkeypatch):
    readings = iter([7.0, 7.4])
    monkeypatch.setattr(interleave, "throttled_s", lambda: next(readings))
    one = member()
    play(one)
    assert [batch["held_back_s"] for batch in one.record.batches] == [0.4, 0.4]
