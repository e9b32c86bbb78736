"""What is measured in one environment on one machine: who lives together, who is tried again, the records."""

import dataclasses
import datetime
import time
from pathlib import Path

import psutil
from tqdm import tqdm

import backends
from utils import environment
from utils.measure import records, timing
from utils.measure.interleave import InterleavedRound, Member, Remote, new_server
from utils.measure.schema import BASELINE, Job, Record
from utils.measure.worker import references
from utils.utils import in_fresh_process, write_json

# What a process takes: on a GPU its context and libraries, and so many times the first layer's output in
# FP32 (seen on an H100 and an H200 at 224 to 512 px and batches 1 to 256, within a third).
GPU_MB, GPU_LAYERS, CPU_MB = 1000, 4, 2048


def new_record(job: Job) -> Record:
    """An empty record of a job."""
    backend = backends.make(job.backend, job.script)
    shared = {name: value for name, value in vars(job).items() if name in records.FIELDS}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()
    made = {"batch_sizes": list(job.batch_sizes), "runs": job.settings.runs, "time": now}
    made |= {"further": job.round >= job.settings.rounds, "adds": backend.adds}
    return Record(**shared | made, precision=backend.precision)  # which load() may still correct


def resume(job: Job, earlier: Record | None) -> Record:
    """The record that a job goes on with: an earlier one of its key, without what failed, or an empty one."""
    fresh = new_record(job)
    if earlier is None or earlier.key != job.key:
        return fresh
    kept = [batch for batch in earlier.batches if batch["status"] != "failed"]
    known = {"time": fresh.time, "batch_sizes": fresh.batch_sizes, "batches": kept}
    return dataclasses.replace(earlier, status="ok", reason="", **known)


def is_up_to_date(record: Record | None, job: Job) -> bool:
    """Whether a record says all that measuring again would say; what failed is tried again."""
    if record is None or record.key != job.key or record.status == "failed":
        return False
    settled = {batch["batch_size"] for batch in record.batches if batch["status"] != "failed"}
    return record.status != "ok" or settled.issuperset(job.batch_sizes)


def room_for(job: Job) -> int:
    """How many processes may be alive together by the memory that is free now; 1: one after the other."""
    if job.device == "cpu":
        return max(2, int(psutil.virtual_memory().available / environment.MB // CPU_MB))
    memory = environment.read_driver("nvmlDeviceGetMemoryInfo")
    if memory is None:
        return 2
    layer_mb = max(job.to_measure) * 64 * (job.image_size / 2) ** 2 * 4 / environment.MB
    return max(1, int(memory.free / environment.MB // (GPU_MB + GPU_LAYERS * layer_mb)))


class Sweep:
    """Brings the records of one sweep up to date: in memory, and beside that in their files."""

    def __init__(self, asked: list[Job], timeout: float):
        self.asked, self.timeout = asked, timeout
        self.folder = asked[0].folder
        self.log = asked[0].results / "benchmark.log"
        self.unavailable, self.spent_s = {}, 0.0  # backend -> why
        self.records: dict[Path, Record] = {}
        if asked[0].device == "cpu":  # want of a GPU is known without a process, which alone may load CUDA
            for name, script in {job.backend: job.script for job in asked}.items():
                if reason := backends.make(name, script).why_unavailable("cpu"):
                    self.unavailable[name] = reason

    def read(self) -> list[Job]:
        """Read all records; the jobs that they leave to do."""
        paths = sorted(self.folder.glob("*_round*.json"))
        self.records = {path: record for path in paths if (record := records.read_record(path))}
        return [job for job in self.asked if not is_up_to_date(self.records.get(job.record), job)]

    def prepare(self, ci_width: float) -> list[Job]:
        """Refuse what can't be measured, then put stale records away; what is left to do."""
        records.unpack(self.folder)
        if first := {job.image_size: job for job in self.read()}:
            in_fresh_process(references, list(first.values()))
        records.archive_stale_records(self.asked)
        self.spent_s = records.note_sweep(self.asked, precision_pct=ci_width).get("spent_s", 0.0)
        return self.read()  # some may have come back

    def measure_round(self, groups: list[list[Job]], progress, limit_s: float | None = None) -> None:
        """Measure the groups, each a backend or more at one image size; no more once `limit_s` is spent."""
        new_server([job.script for job in groups[0]])
        for group in groups:
            if limit_s is not None and self.spent_s >= limit_s:
                break
            start = time.perf_counter()
            self.measure_group(group)
            self.spent_s = round(self.spent_s + time.perf_counter() - start, 1)
            records.note_sweep(self.asked, spent_s=self.spent_s)
            progress.update(len(group))

    def measure_group(self, group: list[Job]) -> None:
        """Measure one image size in one round, as many at once as there is room for; say what came out."""
        with self.log.open("a", encoding="utf-8") as log:
            print(f"\n=== {datetime.datetime.now():%Y-%m-%d %H:%M:%S} round {group[0].round + 1}", file=log)
        if able := [job for job in group if not self.is_settled(job)]:
            self.measure_together(able, room_for(able[0]))
        for record in filter(None, (self.records.get(job.record) for job in group)):
            if record.status == "unavailable":
                self.unavailable[record.backend] = record.reason
            tqdm.write(describe(record))
            with self.log.open("a", encoding="utf-8") as log:
                print(describe(record), file=log)

    def measure_together(self, able: list[Job], room: int) -> None:
        """Measure these beside the baseline, `room` processes at once, or one by one."""
        if room < 2:
            for job in able:
                self.play([job], with_baseline=False, sequential=True)
            return
        first = [job for job in able if job.backend == BASELINE]
        others = [job for job in able if job.backend != BASELINE]
        for k in range(0, max(len(others), 1), room - 1):
            again = self.play([*first, *others[k : k + room - 1]])
            if room > 2:
                again = [job for one in again for job in self.play([one], sequential=True)]
            for job in again:
                self.play([job], with_baseline=False, sequential=True)
            first = []

    def is_settled(self, job: Job) -> bool:
        """Whether what happened before says what this job would give, which is noted: the backend is
        unavailable, or in round 0 memory did not suffice or the figures were wrong."""
        record = resume(job, self.records.get(job.record))
        first = self.records.get(dataclasses.replace(job, round=0).record)
        before = len(record.batches)
        if job.backend in self.unavailable:
            record.status, record.reason = "unavailable", self.unavailable[job.backend]
        elif first and first.key == job.key and job.round and not record.further:
            if first.status == "out_of_memory":
                record.status, record.reason = first.status, first.reason
            same = [batch for batch in first.batches if batch["status"] in ("out_of_memory", "mismatch")]
            record.batches += [batch for batch in same if not record.batch(batch["batch_size"])]
            record.batches.sort(key=lambda batch: batch["batch_size"])
        settled = record.status != "ok" or all(map(record.batch, job.to_measure))
        if settled or len(record.batches) > before:
            self.keep(job, record)
        return settled

    def keep(self, job: Job, record: Record) -> None:
        self.records[job.record] = record
        write_json(job.record, dataclasses.asdict(record))

    def play(self, part: list[Job], with_baseline: bool = True, sequential: bool = False) -> list[Job]:
        """Measure these in one round, beside the baseline; those that are to be tried again, less crowded."""
        wanted = [(job, resume(job, self.records.get(job.record)), True) for job in part]
        if with_baseline and all(job.backend != BASELINE for job in part):
            sizes = tuple(sorted({size for job in part for size in job.to_measure}))
            changed = {"backend": BASELINE, "script": backends.SCRIPTS[BASELINE], "only": sizes}
            beside = dataclasses.replace(part[0], **changed)
            wanted.insert(0, (beside, new_record(beside), False))
        members = []
        try:
            for job, record, recorded in wanted:  # one by one: those started end, whatever happens
                members.append(Member(job, Remote(job, self.log, self.timeout), record, recorded))
            round_ = InterleavedRound(members, lambda one: self.keep(one.job, one.record), sequential)
            round_.play()
        finally:
            for member in members:
                member.steps.stop()
        return [member.job for member in dict.fromkeys(round_.again) if member.recorded]


def describe(record: Record) -> str:
    """One line on a record: milliseconds of a run at each batch size, or why there are none."""
    head = f"round {record.round + 1}  {record.backend:<22} {record.image_size:>4} px"
    if record.status != "ok":
        return f"{head}  {record.status}: {record.reason}"
    cells = []
    for batch in record.batches:
        said = f"{batch['status']} ({batch['reason'][-100:]})"
        if batch["status"] == "ok":
            mean = timing.trimmed_mean(batch["host_ms"])
            said = f"{mean:.3f} ms, {batch['batch_size'] / mean * 1000:,.0f} images/s"
        cells.append(f"batch {batch['batch_size']}: {said}")
    return f"{head}  {'; '.join(cells)}"
