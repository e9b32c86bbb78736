"""One round at one image size: processes that are alive together take turns, so that drift falls on all
alike.

Everyone is opened, checked and warmed up at every batch size; then they time small blocks of runs in random
order, one at work while the others wait for word, the turns of each batch size spread over the whole time.
A row is later held against the baseline's block of the same turn.
"""

import contextlib
import functools
import importlib
import os
import random
import sys
import time
from pathlib import Path

from utils.measure import records, timing
from utils.measure.schema import BASELINE, Job
from utils.measure.worker import Measuring, Problem, inference, problem_of, turns_of
from utils.report import analysis
from utils.utils import UserError, end_with_parent, fresh_processes

STEPS = ["open", "begin", "run", "end", "fail", "save", "close"]  # of a Measuring


class Remote:
    """A Measuring in a fresh process: its steps are asked for here and happen there.

    `recorded` says whether its figures are kept; those of a baseline that is only company are not.
    """

    def __init__(self, job: Job, log: Path, timeout: float, recorded: bool = True):
        self.job, self.log, self.timeout, self.recorded = job, log, timeout, recorded
        for step in STEPS:
            setattr(self, step, functools.partial(self.ask, step))
        self.said_before = log.stat().st_size
        processes = fresh_processes()
        self.pipe, theirs = processes.Pipe()
        self.process = processes.Process(target=serve, args=(job, theirs, log, time.time()))
        self.process.start()
        theirs.close()

    def ask(self, step: str, *arguments):
        """What the step returns.  Raises its Problem or UserError, also where the process dies or hangs."""
        try:
            self.pipe.send((step, arguments))
            answered = self.pipe.poll(self.timeout)
            result = self.pipe.recv() if answered else None
        except (EOFError, OSError) as error:
            raise Problem("failed", self.epitaph()) from error
        if not answered:
            self.process.kill()
            self.stop()
            raise Problem("failed", f"its process was stopped after {self.timeout:g} s (--timeout)")
        if isinstance(result, Exception):
            raise result
        return result

    def epitaph(self) -> str:
        self.stop()
        code = self.process.exitcode
        reason = f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
        said = self.log.read_bytes()[self.said_before :].decode("utf-8", errors="replace").strip()
        return f"{reason}: {said.splitlines()[-1][:300]}" if said else reason

    def is_gone(self) -> bool:
        return self.process.exitcode is not None

    def stop(self) -> None:
        """Let the process end: it does so when its pipe is closed, or is made to."""
        self.pipe.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()


class Local(Measuring):
    """A Measuring in this process."""

    recorded = True

    def is_gone(self) -> bool:
        return False


def serve(job: Job, pipe, log: Path, asked: float) -> None:
    """What a member's process, `asked` for then, does: its steps.  Whatever anyone says goes to the log."""
    end_with_parent()
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # the pipe is closed, or Ctrl-C
        measuring = Measuring(job, importlib.import_module(job.script).BACKENDS[job.backend]())
        wall = measuring.record.wall = {"start": round(time.time() - asked, 2)}
        with inference(job.device):
            while True:
                step, arguments = pipe.recv()
                began = time.perf_counter()
                try:
                    result = getattr(measuring, step)(*arguments)
                except UserError as error:
                    result = error
                except Exception as error:
                    result = problem_of(error)
                wall[step] = round(wall.get(step, 0.0) + time.perf_counter() - began, 2)
                pipe.send(result)


def new_server() -> None:
    """Have later processes forked from a server of their own: what another memory layout changes belongs
    into the spread between rounds."""
    if sys.platform == "linux":
        from multiprocessing import forkserver

        forkserver._forkserver._stop()  # the next process starts another; no public way


def attempt(step, *arguments):
    """What the step returns, or the Problem that it raised."""
    try:
        return step(*arguments)
    except UserError:
        raise
    except Exception as error:
        return problem_of(error)


class Round:
    """Members, which have Measuring's steps, at one image size.

    `apart`: one batch size after another, each written when it is measured.  `short` collects the members to
    be played again: those that ran out of memory though they were not alone, and those whose process ended
    though they were not played apart.  Neither is held against them yet.
    """

    def __init__(self, members: list, apart: bool = False):
        self.members, self.short = members, []
        self.apart = apart or (members[0].job.auto and members[0].job.round == 0)
        job = members[0].job
        self.job, self.rng = job, random.Random(f"{job.settings.seed} {job.image_size} {job.round}")

    def play(self) -> None:
        """Measure every member at every batch size that its record lacks."""
        missing = {}
        for one in self.members:
            problem = attempt(one.open)
            if isinstance(problem, Problem):
                self.lose(one, problem, None)
            else:
                missing[one] = lacking(one)
        recorded = [one for one in missing if one.recorded]
        sizes = self.job.batch_sizes
        for together in [[size] for size in sizes] if self.apart else [sizes]:
            if self.job.auto and self.apart and all(has_saturated(one.job) for one in recorded):
                break
            asked = {size: [one for one in missing if size in missing[one]] for size in together}
            self.play_sizes({size: them for size, them in asked.items() if any(one.recorded for one in them)})
        for one in recorded:
            if not one.is_gone() and one not in self.short:
                attempt(one.close)

    def play_sizes(self, asked: dict[int, list]) -> None:
        """Batch size -> members: warm all up, have them take turns, each spread over the whole time."""
        tables = [Table(self, size, members) for size, members in asked.items()]
        for turn in range(max((table.turns for table in tables), default=0)):
            for table in self.rng.sample(tables, len(tables)):
                if turn < table.turns:
                    table.turn()
        for table in tables:
            table.end()
        for one in self.members if self.apart else []:
            if one.recorded and not one.is_gone():
                attempt(one.save)

    def step(self, one, batch_size: int, step, *arguments):
        """What the step returns, or None where it failed, which is noted."""
        result = attempt(step, *arguments)
        if isinstance(result, Problem):
            self.lose(one, result, batch_size)
            return None
        return result

    def lose(self, one, problem: Problem, batch_size: int | None) -> None:
        """Note that a member failed: at one batch size, or on the whole where there is none."""
        crowded = problem.status == "out_of_memory" and len(self.members) > 1
        if crowded or (one.is_gone() and not self.apart):
            self.short.append(one)
        elif one.job.round >= one.job.settings.rounds:
            return  # it has its rounds: a further one that fails takes nothing away
        elif one.recorded and one.is_gone():
            records.note_failure(one.job, problem.reason)
        elif one.recorded and batch_size is None:
            attempt(one.close, problem.status, problem.reason)
        elif one.recorded:
            attempt(one.fail, batch_size, problem.status, problem.reason)


class Table:
    """The members that take turns at one batch size."""

    def __init__(self, round_: Round, batch_size: int, members: list):
        self.round, self.batch_size, ready = round_, batch_size, {}
        for one in members:
            if one not in round_.short:
                run_ms = round_.step(one, batch_size, one.begin, batch_size)
                ready |= {} if run_ms is None else {one: run_ms}
        self.turns, runs = turns_of(list(ready.values()), round_.job.settings, round_.job.device)
        self.runs = dict(zip(ready, runs, strict=True))
        self.means = {one: [] for one in ready}  # milliseconds, turn by turn

    def turn(self) -> None:
        for one in self.round.rng.sample(list(self.means), len(self.means)):
            mean = self.round.step(one, self.batch_size, one.run, self.batch_size, self.runs[one])
            if mean is None:
                del self.means[one]
            else:
                self.means[one].append(mean)

    def end(self) -> None:
        beside = next((taken for one, taken in self.means.items() if one.job.backend == BASELINE), None)
        for one in self.means:
            if one.recorded:
                own = None if one.job.backend == BASELINE else beside
                self.round.step(one, self.batch_size, one.end, self.batch_size, own)


def lacking(one) -> list[int]:
    """The batch sizes that a member still has to measure: all, but for what its record holds."""
    record = records.read_record(one.job.record) if one.recorded else None
    kept = records.kept_batches(record, one.job)
    return [size for size in one.job.batch_sizes if size not in {batch["batch_size"] for batch in kept}]


def has_saturated(job: Job) -> bool:
    """Whether the last doubling gave too little for another, or failed for want of memory or otherwise."""
    record = records.read_record(job.record)
    batches = record.batches if records.is_current(record, job) else []
    if batches and batches[-1]["status"] != "ok":
        return True
    sizes = [batch["batch_size"] for batch in batches]
    fps = [batch["batch_size"] / timing.trimmed_mean(batch["host_ms"]) for batch in batches]
    return analysis.saturated(sizes, fps)
