"""One round at one image size: processes that are alive together are timed in turn, so that a machine whose
speed drifts drifts for all alike.

Everyone is loaded, checked and warmed up at every batch size; then small blocks of runs are timed in random
order, one process at work while the others wait, the blocks of each batch size spread over the whole time.
A block is later compared with the baseline's of the same pass.
"""

import functools
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from utils.environment import throttled_s
from utils.measure import records, timing
from utils.measure.schema import BASELINE, Job, Problem, Record, Settings
from utils.measure.worker import LONGEST_REASON, problem_of, serve
from utils.utils import UserError, fresh_processes

# Of a block at least: below, what the others left in the caches shows.  A core that shares its hardware with
# a neighbour's changes between two speeds several times a second, which shows where launching is the limit.
BLOCK_MS = {"cpu": 30.0, "cuda": 15.0}
MOST_BLOCKS = 48  # of a round, at each batch size: further rounds tell more than further blocks


class Remote:
    """A Measurement in a fresh process; its steps are asked for here and happen there."""

    def __init__(self, job: Job, log: Path, timeout: float):
        self.log, self.timeout, self.seconds = log, timeout, {}
        self.log_size_before = log.stat().st_size
        processes = fresh_processes()
        self.pipe, theirs = processes.Pipe()
        self.process = processes.Process(target=serve, args=(job, theirs, log, time.perf_counter()))
        self.process.start()
        theirs.close()

    def ask(self, step: str, *arguments):
        """What the step returns.  Raises its Problem or UserError, also where the process dies or hangs."""
        began = time.perf_counter()
        try:
            if not self.seconds:
                self.seconds["start"] = round(self.answer(), 2)
                began = time.perf_counter()
            self.pipe.send((step, arguments))
            result = self.answer()
        except (EOFError, OSError) as error:
            raise Problem("failed", self.last_words()) from error
        self.seconds[step] = round(self.seconds.get(step, 0.0) + time.perf_counter() - began, 2)
        if isinstance(result, Exception):
            raise result
        return result

    def answer(self):
        if not self.pipe.poll(self.timeout):
            self.process.kill()
            self.stop()
            more = f"allow more: --timeout {self.timeout * 2:g}"
            raise Problem("failed", f"its process was stopped after {self.timeout:g} s; {more}")
        return self.pipe.recv()

    def last_words(self) -> str:
        """How the process ended, and the end of what it wrote into the log."""
        self.stop()
        code = self.process.exitcode or 0
        reason = f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
        written = self.log.read_bytes()[self.log_size_before :].decode("utf-8", errors="replace").split("\n")
        lines = [line.strip() for line in written if line.strip()]
        more = f": {lines[-1][-LONGEST_REASON:]}" if lines else ""
        return f"{reason}{more}; {self.log} says more; run the same command to try again"

    def is_gone(self) -> bool:
        return self.process.exitcode is not None

    def stop(self) -> None:
        """Let the process end: it does so when its pipe is closed, or is made to."""
        self.pipe.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()


class Member:
    """A backend in a round: where its steps happen, and the record that grows by what they return.

    `record` is what the job goes on with, see records.resume(); None for a baseline that only runs beside
    others, whose figures are not wanted.
    """

    def __init__(self, job: Job, steps: Remote, record: Record | None):
        self.job, self.steps, self.recorded = job, steps, record is not None
        self.record = record or records.start(job)
        self.record.wall = steps.seconds
        self.begun = {}  # batch size -> what begin() returned

    def missing(self) -> list[int]:
        return [size for size in self.job.to_measure if not self.record.batch(size)]

    def open(self) -> None:
        for step in ("describe", "open"):
            vars(self.record).update(self.steps.ask(step))

    def begin(self, batch_size: int, only: bool) -> float:
        """Check and warm up; the milliseconds that a run takes."""
        self.begun[batch_size] = self.steps.ask("begin", batch_size, only)
        return self.begun[batch_size]["run_ms"]

    def run(self, batch_size: int, runs: int) -> float:
        return self.steps.ask("run", batch_size, runs, self.begun[batch_size]["run_ms"])

    def end(self, batch_size: int, **beside) -> None:
        """Note what one batch size gave, and `beside` it."""
        self.note(
            batch_size, "ok", "", **self.begun[batch_size], **self.steps.ask("end", batch_size), **beside
        )

    def note(self, batch_size: int, status: str, reason: str, **found) -> None:
        batch = {"batch_size": batch_size, "status": status, "reason": reason, **found}
        self.record.batches = sorted([*self.record.batches, batch], key=lambda one: one["batch_size"])

    def fail(self, batch_size: int | None, problem: Problem) -> None:
        """Note that a batch size gave no figures, or, at None or where its process is dead, all."""
        if batch_size is None and not self.record.batches:  # a measurement is not replaced by a failure
            self.record.status, self.record.reason = problem.status, problem.reason
            return
        lost = [batch_size] if batch_size and not self.steps.is_gone() else self.missing()
        for size in lost[:1] if self.job.auto else lost:
            known = self.begun.get(size, {}).get("max_abs_diff", problem.max_abs_diff)
            self.note(
                size, problem.status, problem.reason, **({} if known is None else {"max_abs_diff": known})
            )

    def profile(self, only: bool) -> None:
        """Ask for the time that the GPU works in a call, where that is watched."""
        if self.job.device == "cuda" and self.job.round == 0 and self.job.settings.sustain_seconds:
            for size in self.begun:
                batch = self.record.batch(size)
                if batch and batch["status"] == "ok" and not self.steps.is_gone():
                    busy_ms = attempt(self.steps.ask, "busy_ms", size, only)
                    batch["busy_ms"] = None if isinstance(busy_ms, Problem) else busy_ms


def attempt(step, *arguments):
    """What the step returns, or the Problem that it raised."""
    try:
        return step(*arguments)
    except UserError:
        raise
    except Exception as error:
        return problem_of(error)


class InterleavedRound:
    """Members at one image size.  play() fills their records with what was measured and what failed.

    `keep` is called with every member whose record has grown.  `sequential`: one batch size after another,
    each alone in memory.  `again` collects the members whose failure is not held against them yet: they ran
    out of memory beside others or other batch sizes, or their process ended though it was not sequential.
    """

    def __init__(self, members: list[Member], keep: Callable[[Member], object], sequential: bool = False):
        job = members[0].job
        self.members, self.keep, self.again = members, keep, []
        self.growing = job.auto and job.round == 0  # batch sizes are tried until throughput saturates
        self.sequential = sequential or self.growing
        self.job, self.rng = job, random.Random(f"{job.settings.seed} {job.image_size} {job.round}")

    def play(self) -> None:
        """Measure every member at every batch size that its record lacks."""
        missing = {}
        for member in self.members:
            problem = attempt(member.open)
            if isinstance(problem, Problem):
                self.handle_failure(member, problem)
            else:
                missing[member] = member.missing()
        opened = [member for member in missing if member.recorded]
        sizes = self.job.batch_sizes
        for together in [[size] for size in sizes] if self.sequential else [sizes]:
            if self.growing and all(has_saturated(member.record) for member in opened):
                break
            asked = {size: [member for member in missing if size in missing[member]] for size in together}
            asked = {size: them for size, them in asked.items() if any(member.recorded for member in them)}
            self.play_sizes(asked)
            for member in opened if self.sequential else []:
                self.keep(member)
        for member in opened:
            member.profile(self.sequential)
            if self.growing and member.record.batches:  # what the record holds is all that was wanted
                member.record.batch_sizes = [batch["batch_size"] for batch in member.record.batches]
        for member in self.members:
            if member.recorded:
                self.keep(member)

    def play_sizes(self, asked: dict[int, list[Member]]) -> None:
        """Batch size -> members: warm all up, then time their blocks, each spread over the whole time."""
        schedules = [BatchSchedule(self, size, members) for size, members in asked.items()]
        before = throttled_s()
        for number in range(max((schedule.blocks for schedule in schedules), default=0)):
            for schedule in self.rng.sample(schedules, len(schedules)):
                if number < schedule.blocks:
                    schedule.time_blocks()
        held_back_s = round(throttled_s() - before, 3)
        for schedule in schedules:
            schedule.end(held_back_s)

    def step(self, member: Member, batch_size: int, step, *arguments):
        """What the step returns, or None where it failed, which is noted."""
        result = attempt(step, batch_size, *arguments)
        if isinstance(result, Problem):
            self.handle_failure(member, result, batch_size)
            return None
        return result

    def handle_failure(self, member: Member, problem: Problem, batch_size: int | None = None) -> None:
        """Have the member tried again, or note its failure: at one batch size, or on the whole at None."""
        crowded = len(self.members) > 1 or (batch_size and not self.sequential)
        short_of_memory = problem.status == "out_of_memory" and crowded
        if short_of_memory or (member.steps.is_gone() and not self.sequential):
            self.again.append(member)
        elif not member.record.further:  # a further round that fails takes nothing away
            member.fail(batch_size, problem)


class BatchSchedule:
    """The members that are timed in turn at one batch size, block by block."""

    def __init__(self, round_: InterleavedRound, batch_size: int, members: list[Member]):
        self.round, self.batch_size, ready = round_, batch_size, {}
        for member in members:
            if member not in round_.again:
                run_ms = round_.step(member, batch_size, member.begin, round_.sequential)
                ready |= {} if run_ms is None else {member: run_ms}
        self.blocks, runs = plan_blocks(list(ready.values()), round_.job.settings, round_.job.device)
        self.runs = dict(zip(ready, runs, strict=True))
        self.means = {member: [] for member in ready}  # milliseconds, block by block

    def time_blocks(self) -> None:
        """One block of each member, in random order."""
        for member in self.round.rng.sample(list(self.means), len(self.means)):
            mean = self.round.step(member, self.batch_size, member.run, self.runs[member])
            if mean is None:
                del self.means[member]
            else:
                self.means[member].append(mean)

    def end(self, held_back_s: float) -> None:
        baseline = next(
            (means for member, means in self.means.items() if member.job.backend == BASELINE), None
        )
        for member in self.means:
            if member.recorded:
                baseline_ms = None if member.job.backend == BASELINE else baseline
                beside = {"baseline_ms": baseline_ms, "held_back_s": held_back_s}
                self.round.step(member, self.batch_size, functools.partial(member.end, **beside))


def plan_blocks(run_ms: list[float], settings: Settings, device: str) -> tuple[int, list[int]]:
    """How many blocks a round has at one batch size, and how many runs each member then times in a block.

    `run_ms` is what a run takes each of them.  Every member gets its share of the runs and seconds asked for,
    within the seconds allowed; the slowest decides how often they can change.
    """
    least, most = 1000 * settings.min_seconds / settings.rounds, 1000 * settings.max_seconds / settings.rounds
    wanted = [max(math.ceil(settings.runs / settings.rounds), math.ceil(least / ms)) for ms in run_ms]
    runs = [max(1, min(n, int(most / ms))) for n, ms in zip(wanted, run_ms, strict=True)]
    spans = [n * ms / BLOCK_MS[device] for n, ms in zip(runs, run_ms, strict=True)]
    blocks = max(1, min([MOST_BLOCKS, *runs, *map(int, spans)])) if runs else 0
    return blocks, [math.ceil(n / blocks) for n in runs]


def has_saturated(record: Record) -> bool:
    """Whether the last doubling gave too little for another, or failed for want of memory or otherwise."""
    if record.batches and record.batches[-1]["status"] != "ok":
        return True
    sizes = [batch["batch_size"] for batch in record.batches]
    fps = [batch["batch_size"] / timing.trimmed_mean(batch["host_ms"]) for batch in record.batches]
    return timing.saturated(sizes, fps)


def new_server(scripts: list[str]) -> None:
    """Have later processes forked from a server of their own that has imported `scripts`: what another memory
    layout changes belongs into the spread between rounds."""
    if sys.platform == "linux":
        from multiprocessing import forkserver

        # Private, and here alone: multiprocessing offers no way to end its server.
        forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
    fresh_processes("datasets", "model", "backends", "utils.measure.worker", *scripts)
