"""The contracts between the stages, stated here and nowhere else: Job, Record."""

import dataclasses
from pathlib import Path

STATUSES = ["ok", "unavailable", "out_of_memory", "failed", "mismatch"]
BASELINE = "pytorch"  # the backend that every speedup is formed against, at the same size and batch


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure: the same for every Job of a sweep."""

    runs: int  # timed calls per configuration, over the first `rounds` rounds
    rounds: int  # at least; further ones take as many runs each
    warmup: int  # untimed calls at least
    min_seconds: float  # of timed calls per configuration, over the first `rounds` rounds
    max_seconds: float
    sustain_seconds: float  # of the loop that the driver watches, on a GPU
    seed: int


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked of one process: one backend at one image size in one round (utils/measure/jobs.py)."""

    sweep: str  # everything measured in one environment on one machine, by name
    backend: str
    script: str  # the module whose BACKENDS makes the backend
    image_size: int  # pixels, square
    batch_sizes: tuple[int, ...]
    round: int  # from 0
    device: str  # "cuda" or "cpu"
    settings: Settings
    environment: dict  # machine, packages, commit, data: see jobs.environment_of()
    data: Path
    checkpoint: Path
    results: Path
    settings_key: str  # hash of settings, machine, packages, data and code: rows of one table share it
    key: str  # hash of that and the checkpoint: where it is equal, measuring again would say the same
    only: tuple[int, ...] = ()  # of the batch sizes, those to be measured; all where it is empty

    @property
    def folder(self) -> Path:
        return self.results / "raw" / self.sweep

    @property
    def record(self) -> Path:
        """The file to leave."""
        return self.folder / f"{self.backend}_{self.image_size}_round{self.round}.json"

    @property
    def to_measure(self) -> tuple[int, ...]:
        return self.only or self.batch_sizes


class Problem(Exception):  # noqa: N818 (it is a finding, handed on like one)
    """Why a step gave nothing: one of STATUSES, the reason, and the difference of logits if known."""

    def __init__(self, status: str, reason: str, max_abs_diff: float | None = None):
        super().__init__(status, reason, max_abs_diff)
        self.status, self.reason, self.max_abs_diff = status, reason, max_abs_diff


@dataclasses.dataclass
class Record:
    """What one process measured, as stored in results/raw/<sweep>/<backend>_<size>_round<k>.json.

    `batches` has a dict for each batch size: batch_size, status, reason and, where it was timed, the samples
    in ms, how many a block took (block_runs), the baseline's means beside them (baseline_ms) and the rest.
    """

    sweep: str
    backend: str
    precision: str
    device: str
    image_size: int
    round: int
    batch_sizes: list[int]  # asked for
    runs: int  # asked for, over the first rounds
    key: str
    settings_key: str
    time: str  # ISO 8601, UTC
    status: str = "ok"
    reason: str = ""
    adds: str = ""
    further: bool = False  # a round beyond those asked for: what it lacks is no failure
    build: dict | None = None  # seconds, from_cache, artefact_mb, load_s
    process: dict | None = None  # threads, cuda, cudnn, context_mb
    work: dict | None = None  # model.count_work()
    check: dict | None = None  # worker.whole_test_set(), in round 0
    wall: dict | None = None  # seconds that its process took to start and for each step
    batches: list[dict] = dataclasses.field(default_factory=list)

    def batch(self, batch_size: int) -> dict | None:
        """What was measured at this batch size, or None."""
        return next((batch for batch in self.batches if batch["batch_size"] == batch_size), None)
