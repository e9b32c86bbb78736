"""One round at one image size: processes that are alive together are timed in turn, so that a machine whose
speed drifts drifts for all alike.

All are loaded, checked and warmed up at every batch size; then small blocks of runs are timed in random
order, one process at work while the others wait.  A block is compared with the baseline's of the same pass.
"""

import contextlib
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from utils.environment import throttled_s
from utils.measure.schema import BASELINE, Job, Problem, Record, Settings
from utils.measure.worker import LONGEST_REASON, serve
from utils.utils import fresh_processes

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
        written = self.log.read_bytes()[self.log_size_before :].decode("utf-8", errors="replace").strip()
        code, last = self.process.exitcode or 0, written.rpartition("\n")[2][-LONGEST_REASON:]
        reason = f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
        return f"{reason}: {last}; {self.log} says more; run the same command to try again"

    def is_gone(self) -> bool:
        return self.process.exitcode is not None

    def stop(self) -> None:
        """Let the process end: it does so when its pipe is closed, or is made to."""
        self.pipe.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()


class Member:
    """A backend in a round: where its steps happen, and the record that grows by what they return; it is not
    `recorded` of a baseline that only runs beside others."""

    def __init__(self, job: Job, steps: Remote, record: Record, recorded: bool = True):
        self.job, self.steps, self.record, self.recorded = job, steps, record, recorded
        self.record.wall = steps.seconds
        self.begun = {}  # batch size -> what the step "begin" returned

    def missing(self) -> list[int]:
        return [size for size in self.job.to_measure if not self.record.batch(size)]

    def note(self, batch_size: int, status: str, reason: str, **found) -> None:
        batch = {"batch_size": batch_size, "status": status, "reason": reason, **found}
        self.record.batches = sorted([*self.record.batches, batch], key=lambda one: one["batch_size"])

    def fail(self, batch_size: int | None, problem: Problem) -> None:
        """Note that a batch size gave no figures, or, at None or where its process is dead, all."""
        if batch_size is None and not self.record.batches:  # a measurement is not replaced by a failure
            self.record.status, self.record.reason = problem.status, problem.reason
            return
        lost = [batch_size] if batch_size and not self.steps.is_gone() else self.missing()
        for size in lost:
            difference = self.begun.get(size, {}).get("max_abs_diff", problem.max_abs_diff)
            known = {} if difference is None else {"max_abs_diff": difference}
            self.note(size, problem.status, problem.reason, **known)

    def profile(self, only: bool) -> None:
        """Ask for the time that the GPU works in a call, where that is watched."""
        if self.job.device == "cuda" and self.job.round == 0 and self.job.settings.sustain_seconds:
            for size in self.begun:
                batch = self.record.batch(size)
                if batch and batch["status"] == "ok" and not self.steps.is_gone():
                    batch["busy_ms"] = None
                    with contextlib.suppress(Problem):
                        batch["busy_ms"] = self.steps.ask("busy_ms", size, only)


class InterleavedRound:
    """Members at one image size.  play() fills their records with what was measured and what failed.

    `keep` is called with every member whose record has grown.  `sequential`: one batch size after another,
    each alone in memory.  `again` collects the members to be tried again less crowded: they ran out of memory
    beside others or other batch sizes, or their process ended.
    """

    def __init__(self, members: list[Member], keep: Callable[[Member], object], sequential: bool = False):
        self.members, self.keep, self.sequential, self.again = members, keep, sequential, []
        self.job = job = members[0].job
        self.rng = random.Random(f"{job.settings.seed} {job.image_size} {job.round}")

    def play(self) -> None:
        """Measure every member at every batch size that its record lacks."""
        missing, recorded = {}, [member for member in self.members if member.recorded]
        for member in self.members:
            if found := self.step(member, None, "open"):
                vars(member.record).update(found)
                missing[member] = member.missing()
        asked = {size: [one for one in missing if size in missing[one]] for size in self.job.batch_sizes}
        asked = {size: them for size, them in asked.items() if any(member.recorded for member in them)}
        for together in [{size: asked[size]} for size in asked] if self.sequential else [asked]:
            self.play_sizes(together)
            for member in recorded if self.sequential else []:
                self.keep(member)
        for member in recorded:
            member.profile(self.sequential)
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

    def step(self, member: Member, batch_size: int | None, step: str, *arguments):
        """What the step returns, or None where it failed: then the member is tried again, or its failure is
        noted, at one batch size or, at None, on the whole."""
        try:
            return member.steps.ask(step, *([batch_size] if batch_size else []), *arguments)
        except Problem as problem:
            crowded = len(self.members) > 1 or (batch_size and not self.sequential)
            short_of_memory = problem.status == "out_of_memory" and crowded
            if short_of_memory or (member.steps.is_gone() and not self.sequential):
                self.again.append(member)
            elif not member.record.further:  # a further round that fails takes nothing away
                member.fail(batch_size, problem)
        return None


class BatchSchedule:
    """The members that are timed in turn at one batch size, block by block."""

    def __init__(self, round_: InterleavedRound, batch_size: int, members: list[Member]):
        self.round, self.batch_size = round_, batch_size
        self.means = {}  # member -> milliseconds, block by block
        for member in [one for one in members if one not in round_.again]:
            if found := round_.step(member, batch_size, "begin", round_.sequential):
                member.begun[batch_size], self.means[member] = found, []
        self.run_ms = {member: member.begun[batch_size]["run_ms"] for member in self.means}
        self.blocks, runs = plan_blocks(list(self.run_ms.values()), round_.job.settings, round_.job.device)
        self.runs = dict(zip(self.means, runs, strict=True))

    def time_blocks(self) -> None:
        """One block of each member, in random order."""
        for member in self.round.rng.sample(list(self.means), len(self.means)):
            asked = self.runs[member], self.run_ms[member]
            if mean := self.round.step(member, self.batch_size, "run", *asked):
                self.means[member].append(mean)
            else:
                del self.means[member]

    def end(self, held_back_s: float) -> None:
        """Note what the batch size gave each member, and the baseline in the blocks beside it."""
        beside = [means for member, means in self.means.items() if member.job.backend == BASELINE]
        for member in self.means:
            if member.recorded and (found := self.round.step(member, self.batch_size, "end")):
                baseline_ms = None if member.job.backend == BASELINE or not beside else beside[0]
                found |= {"baseline_ms": baseline_ms, "held_back_s": held_back_s}
                member.note(self.batch_size, "ok", "", **member.begun[self.batch_size], **found)


def plan_blocks(run_ms: list[float], settings: Settings, device: str) -> tuple[int, list[int]]:
    """How many blocks a round has at one batch size, and how many runs, of `run_ms` each, a member times in a
    block: its share of the runs and seconds asked for, within the seconds allowed."""
    least, most = 1000 * settings.min_seconds / settings.rounds, 1000 * settings.max_seconds / settings.rounds
    wanted = [max(math.ceil(settings.runs / settings.rounds), math.ceil(least / ms)) for ms in run_ms]
    runs = [max(1, min(n, int(most / ms))) for n, ms in zip(wanted, run_ms, strict=True)]
    spans = [n * ms / BLOCK_MS[device] for n, ms in zip(runs, run_ms, strict=True)]
    blocks = max(1, min([MOST_BLOCKS, *runs, *map(int, spans)])) if runs else 0
    return blocks, [math.ceil(n / blocks) for n in runs]


def new_server(scripts: list[str]) -> None:
    """Have later processes forked from a server of their own that has imported `scripts`: what another memory
    layout changes belongs into the spread between rounds."""
    if sys.platform == "linux":
        from multiprocessing import forkserver

        # Private, and here alone: multiprocessing offers no way to end its server.
        forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
    fresh_processes("datasets", "model", "backends", "utils.measure.worker", *scripts)
