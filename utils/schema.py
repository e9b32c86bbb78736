"""The contracts between the stages: Backend, Job, Record and Row.  What each of them is stands here and nowhere else."""

import abc
import dataclasses
from pathlib import Path

STATUSES = ["ok", "unavailable", "out_of_memory", "failed", "mismatch"]
BASELINE = "pytorch"  # the backend that every speedup is formed against, at the same size and batch


class Backend(abc.ABC):
    """A way to run ResNet-18.  To add one: a class like this, a line in its script's BACKENDS, a colour in plot_utils.

    Everything vendor-specific is imported inside the methods, so that --help works on every machine.
    """

    precision = "FP32"  # of weights and arithmetic: FP32, TF32, FP16, INT8; load() may correct it
    build_s = 0.0  # seconds that load() took to export, build or compile, or to find the artefact
    from_cache = False  # whether the artefact was there already
    artefact: Path | None = None  # the file in weights/ that it runs from besides the checkpoint
    torch_allocator = False  # whether PyTorch's allocator holds its memory, and so can tell how much

    def why_unavailable(self, device: str) -> str | None:
        """None if it can run on `device` ("cuda" or "cpu"), else one sentence that a user can act on."""
        return None

    @abc.abstractmethod
    def load(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> None:
        """Make ready for these batch sizes; never timed as inference.  May raise anything: it costs its rows."""

    def prepare(self, images):
        """float32 (N, 3, S, S) on the device -> what predict() takes: its own dtype and layout.  Outside the clock."""
        return images.contiguous()

    @abc.abstractmethod
    def predict(self, x):
        """Enqueue on the current CUDA stream; logits (N, classes) on the device.  The clock synchronises, not this."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure: the same for all Jobs of a sweep, and part of the key that says when a record is stale."""

    device: str = "auto"  # as asked: auto, cuda, cpu
    runs: int = 100  # timed calls per configuration, over all rounds
    rounds: int = 3
    warmup: int = 10  # untimed calls at least
    min_seconds: float = 1.0  # of timed calls per configuration, over all rounds
    max_seconds: float | None = None  # None: by device, see measure.MAX_SECONDS
    sustain_seconds: float = 3.0  # of the loop that the driver watches, on a GPU
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked of one process: one backend at one image size in one round.  Made once, by utils/jobs.py."""

    sweep: str  # everything measured in one environment on one machine, by name
    backend: str
    image_size: int  # pixels, square
    batch_sizes: tuple[int, ...]
    auto: bool  # whether to stop at the batch size where throughput saturates
    round: int  # from 0
    device: str  # "cuda" or "cpu"
    settings: Settings
    data: Path
    checkpoint: Path
    record: Path  # the file to leave
    round0: Path  # the file of round 0, which finds out how many batch sizes --batch-sizes auto takes
    trace: Path  # where --profile leaves its traces
    environment: dict  # see jobs.environment_of()
    settings_key: str  # hash of settings, machine, packages, data and code: rows of one table share it
    key: (
        str  # hash of settings_key and the checkpoint: an equal key means that measuring again gives the same
    )


@dataclasses.dataclass
class Record:
    """What one process measured, as stored in results/raw/<sweep>/<backend>_<size>_round<k>.json.

    `batches` holds a dict for each batch size: batch_size, status, reason and, if it was timed, the samples in ms and
    what was read beside them (see measure.time_batch).
    """

    sweep: str
    backend: str
    precision: str
    device: str
    image_size: int
    round: int
    batch_sizes: list[int]  # asked for
    runs: int  # asked for, over all rounds
    key: str
    settings_key: str
    time: str  # ISO 8601, UTC
    status: str = "ok"
    reason: str = ""
    build: dict | None = None  # seconds, from_cache, artefact_mb
    process: dict | None = None  # threads, cuda, cudnn, context_mb
    work: dict | None = None  # see model.count_work(); round 0 only
    check: dict | None = None  # see check.compare_on_test_set(); round 0 only
    wall: dict | None = None  # seconds of loading, checking, timing and of the whole process
    batches: list[dict] = dataclasses.field(default_factory=list)

    def batch(self, batch_size: int) -> dict | None:
        """What was measured at this batch size, or None."""
        return next((batch for batch in self.batches if batch["batch_size"] == batch_size), None)


@dataclasses.dataclass
class Row:
    """One configuration of one sweep; its fields are the columns of benchmark_results.csv.  Empty means not known."""

    sweep: str
    backend: str
    precision: str
    device: str
    image_size: int
    batch_size: int
    status: str
    reason: str = ""
    runs: int | None = None
    rounds: int | None = None
    mean_ms: float | None = None
    std_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    min_ms: float | None = None
    gpu_ms: float | None = None
    busy_ms: float | None = None
    fps: float | None = None
    fps_low: float | None = None
    fps_high: float | None = None
    sustained_fps: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    build_s: float | None = None
    gpu_memory_mb: float | None = None
    torch_memory_mb: float | None = None
    host_memory_mb: float | None = None
    gpu_util_pct: float | None = None
    power_w: float | None = None
    mj_per_image: float | None = None
    sm_clock_mhz: float | None = None
    temperature_c: float | None = None
    throttled: str | None = None
    tflops: float | None = None
    pct_peak: float | None = None
    pct_measured_peak: float | None = None
    flops_per_byte: float | None = None
    limit: str | None = None
    max_abs_diff: float | None = None
    agreement: float | None = None
    accuracy: float | None = None
    notes: str = ""


COLUMNS = [field.name for field in dataclasses.fields(Row)]
