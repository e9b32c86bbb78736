"""What all backends share: the contract, CUDA graphs around any of them, whether a package is there, and the
files in weights/ with when they are fresh."""

import abc
import argparse
import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path

from utils.environment import package_version
from utils.utils import (
    BATCH_SIZES,
    IMAGE_SIZES,
    UserError,
    add_path_arguments,
    checkpoint_path,
    in_fresh_process,
    read_dict,
    sha256,
    write_json,
    write_whole,
)

# ---- the contract


class Unavailable(Exception):  # noqa: N818 (it is a finding like why_unavailable()'s, only made later)
    """load(), prepare() or predict() found that this machine can't do what the backend's name says."""


class Backend(abc.ABC):
    """A way to run ResNet-18.  To add one: a class, a line in backends.py, one in utils/report/names.py.

    Everything vendor-specific is imported inside the methods, so that --help works on every machine.
    """

    precision = "FP32"  # of weights and arithmetic: FP32, TF32, FP16, BF16, INT8; load() may correct it
    build_s = 0.0  # seconds that load() took to export, build or compile, or to find the artefact
    from_cache = False  # whether the artefact was there already
    artefact: Path | None = None  # the file in weights/ that it runs from besides the checkpoint
    adds = ""  # what a variant adds to its plain method, in one clause
    data: Path | None = None  # its train/ calibrates INT8; None: the INT8 file that is there is used
    any_batch = True  # whether it takes every batch size up to the largest that load() is given
    torch_allocator = False  # whether PyTorch's allocator holds its memory, and so can tell how much

    def why_unavailable(self, device: str) -> str | None:
        """None if it can run on `device` ("cuda" or "cpu"), else one sentence that a user can act on."""
        return None

    def artefacts(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> list[Path]:
        """The files that load() would build where they are missing or stale; nothing is loaded for this."""
        return []

    @abc.abstractmethod
    def load(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> None:
        """Make ready for these batch sizes; never timed as inference.  What it raises costs its own rows."""

    def prepare(self, images):
        """float32 (N, 3, S, S) on the device -> predict()'s own dtype and layout.  Outside the clock."""
        return images.contiguous()

    @abc.abstractmethod
    def predict(self, x) -> typing.Any:
        """Enqueue on the current CUDA stream; logits (N, classes) on the device.  The clock synchronises."""

    def release(self) -> None:  # noqa: B027 (most hold nothing)
        """Give back the memory that batch sizes so far hold; prepare() takes it anew where it is needed."""


class CudaGraph(Backend):
    """Any backend replayed from CUDA graphs, one for each batch size, captured when prepare() first meets it.

    Replaying launches the whole network at once: launching kernels one by one no longer bounds small batches.
    """

    WARM_UP = 3  # calls before the capture, so that algorithms are chosen and memory is allocated

    def __init__(self, backend: Backend):
        self.backend, self.precision = backend, backend.precision
        self.any_batch, self.torch_allocator = backend.any_batch, backend.torch_allocator
        self.adds = ", ".join(filter(None, [backend.adds, "replayed as one CUDA graph"]))

    def why_unavailable(self, device: str) -> str | None:
        if device == "cpu":
            return "CUDA graphs need a CUDA GPU; this run is on the CPU"
        return self.backend.why_unavailable(device)

    def artefacts(self, *asked) -> list[Path]:
        return self.backend.artefacts(*asked)

    def load(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> None:
        inner, self.graphs = self.backend, {}
        inner.data = self.data
        inner.load(checkpoint, image_size, batch_sizes, device)
        self.precision, self.build_s = inner.precision, inner.build_s
        self.from_cache, self.artefact = inner.from_cache, inner.artefact

    def prepare(self, images):
        import torch

        prepared = self.backend.prepare(images)
        if len(images) not in self.graphs:
            fixed = prepared.clone()
            for _ in range(self.WARM_UP):
                self.backend.predict(fixed)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                logits = self.backend.predict(fixed)
            self.graphs[len(images)] = graph, fixed, logits
        fixed = self.graphs[len(images)][1]
        fixed.copy_(prepared)
        return fixed

    def predict(self, x):
        graph, _, logits = self.graphs[len(x)]
        graph.replay()
        return logits

    def release(self) -> None:
        self.graphs.clear()
        self.backend.release()


# ---- how a process runs one

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for the next call, as ONNX Runtime's own arena does.

    By glibc's defaults a run of PyTorch on a CPU that takes and frees tensors of over 32 MB is page faults
    for up to half its time, and by 10 to 30 % more of them in one process than in the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def inference(device: str):
    """Inference mode; on a GPU on a stream of its own, since graphs can't be captured on the default one."""
    import torch

    keep_freed_memory()
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    with torch.inference_mode(), stream:
        yield


# ---- whether a package is there


def why_not_importable(package: str, install: str, distributions: list[str] | None = None) -> str | None:
    """None if `package` can be imported, else one sentence; it may be one of several distributions."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; run: {install}"
    try:
        importlib.import_module(package)
    except Exception as error:  # a library is missing or of another version: loaders raise anything
        words = " ".join(f"{type(error).__name__}: {error}".split())
        version = next(filter(None, map(package_version, distributions or [package])), "")
        return f"{package} {version} is installed but does not load: {words}"
    return None


# ---- files in weights/


def is_fresh(path: Path, facts: dict) -> bool:
    """Whether `path` is whole and made from exactly `facts`; if it is there but not that, stderr says why."""
    if not path.is_file():
        return False
    try:
        record = read_dict(note_of(path))
    except OSError:
        record = {}
    if not isinstance(record.get("made_from"), dict):
        wrong = "does not say what it was made from"
    elif others := sorted(name for name in facts if record["made_from"].get(name) != facts[name]):
        wrong = f"was made for another {', '.join(others)}"
    elif record.get("sha256") != sha256(path):
        wrong = "is damaged"
    else:
        return True
    print(f"{path} {wrong}; building it anew", file=sys.stderr, flush=True)
    return False


def note_of(path: Path) -> Path:
    """The file beside an artefact that says what it was made from."""
    return path.with_name(path.name + ".json")


def store(path: Path, facts: dict, write: Callable[[Path], object]) -> None:
    """Have `write(path)` write the whole file, with a note beside it: from what, and in how many seconds."""
    start = time.perf_counter()
    write_whole(path, write)
    seconds = round(time.perf_counter() - start, 3)
    write_json(note_of(path), {"made_from": facts, "sha256": sha256(path), "build_s": seconds})


def builds_ahead(artefacts: list[Path], checkpoint: Path) -> dict[Path, float | None]:
    """Those that are missing, damaged or of other weights, with the seconds of the last time, if known.

    Nothing is loaded: what another version or GPU makes stale shows only when it is needed.
    """
    found, weights = {}, sha256(checkpoint)
    for path in artefacts:
        note = read_dict(note_of(path))
        made_from = note.get("made_from")
        weights_then = made_from.get("checkpoint") if isinstance(made_from, dict) else None
        whole = path.is_file() and note.get("sha256") == sha256(path)
        if not whole or weights_then != weights:
            found[path] = note.get("build_s")
    return found


# ---- TensorRT's engines, whichever route builds them

WORKSPACE_BYTES = 1 << 30  # at most; a quarter of the free memory where less, so that a 4 GB card can build
DISTRIBUTIONS = ["tensorrt", "tensorrt-cu13", "tensorrt-cu12"]  # one module, by version of CUDA
INSTALL = "pip install -r requirements-tensorrt.txt (Python 3.10: requirements-tensorrt86.txt)"


def why_no_tensorrt(packages: list[str], device: str) -> str | None:
    """None if `packages` load and there is a GPU to run on, else one sentence that says what to do."""
    import torch

    if device != "cuda":
        return "TensorRT needs an NVIDIA GPU; this run is on the CPU"
    if not torch.cuda.is_available():
        return "TensorRT needs an NVIDIA GPU, and PyTorch finds none; check that nvidia-smi lists one"
    for package in packages:
        names = DISTRIBUTIONS if package == "tensorrt" else [package]
        if reason := why_not_importable(package, INSTALL, names):
            return reason
    return None


def workspace_bytes() -> int:
    """What a builder may take for kernels that want scratch memory."""
    import torch

    return min(WORKSPACE_BYTES, torch.cuda.mem_get_info()[0] // 4)


class EngineFile(abc.ABC):
    """An engine's file: what it is made from, for which shapes, how it is built and opened.

    `static`: the engine takes this one batch size alone.
    """

    PACKAGES: list[str]  # modules that it needs
    MADE_WITH: list[str]  # distributions whose version changes the file
    OPTIONS: dict[str, str] = {}  # what can be asked for besides batch sizes -> what it means
    suffix: str

    def __init__(self, checkpoint, image_size, batch_sizes, data: Path | None, static=False, int8=False):
        self.checkpoint, self.image_size, self.data = checkpoint, image_size, data
        self.batch_sizes, self.static, self.int8 = sorted(set(batch_sizes)), static, int8

    @property
    @abc.abstractmethod
    def profiles(self) -> list[list[int]]:
        """TensorRT's optimisation profiles: for each the smallest, best and largest batch size."""

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """What the file's name says of the batch sizes."""

    @property
    def path(self) -> Path:
        precision = "int8" if self.int8 else "fp16"
        return self.checkpoint.with_name(f"resnet18_{self.image_size}_{self.kind}_{precision}.{self.suffix}")

    @abc.abstractmethod
    def make(self, path: Path, timings: bytes) -> bytes:
        """Build and write `path`; the timing cache with what building has measured."""

    @abc.abstractmethod
    def open(self):
        """What is called with images on the GPU: float16 (N, 3, S, S) -> logits (N, classes)."""

    def facts(self) -> dict:
        """What the file depends on."""
        import tensorrt
        import torch

        major, minor = torch.cuda.get_device_capability()
        return {
            **{name: package_version(name) for name in self.MADE_WITH},
            "checkpoint": sha256(self.checkpoint),
            "tensorrt": tensorrt.__version__,
            "gpu": torch.cuda.get_device_name(),
            "compute_capability": f"{major}.{minor}",
            "profiles": self.profiles,
            "workspace_bytes": WORKSPACE_BYTES,
        }

    def build(self) -> float:
        """Build and write the file; the seconds that it took.  TensorRT's timings serve every network."""
        start = time.perf_counter()
        print(f"building {self.path}; this can take a minute", file=sys.stderr, flush=True)
        facts = self.facts()
        timings = self.checkpoint.with_name("tensorrt.timings")
        timed_with = {name: facts[name] for name in ("tensorrt", "gpu", "compute_capability")}
        known, timed = timings.read_bytes() if is_fresh(timings, timed_with) else b"", []
        store(self.path, facts, lambda file: timed.append(self.make(file, known)))
        store(timings, timed_with, lambda file: file.write_bytes(timed[0]))
        return time.perf_counter() - start

    def load_or_build(self, force: bool = False) -> tuple[object, float, bool]:
        """What open() gives, the seconds and whether a fresh file was there.

        A file that does not load is built anew.  Building has a process of its own, so that nothing of it
        stays in this one's GPU memory.
        """
        if not self.checkpoint.is_file():
            mend = f"train it first: python train.py --image-sizes {self.image_size}"
            raise UserError(f"{self.checkpoint} is missing; {mend}")
        start = time.perf_counter()
        if not force and is_fresh(self.path, self.facts()):
            try:
                return self.open(), time.perf_counter() - start, True
            except Exception as error:  # whole and made from the same, yet refused, in whatever words
                print(f"{self.path} does not load ({error}); building it anew", file=sys.stderr, flush=True)
        seconds = in_fresh_process(self.build)
        return self.open(), seconds, False


def build_engines(about: str | None, kind: type[EngineFile]) -> None:
    """What trt.py and torch_trt.py do when they are run: build what is missing, a line for each file."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=form)
    parser.add_argument("--image-sizes", nargs="+", type=int, default=IMAGE_SIZES)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--force", action="store_true", help="build even where a fresh file is there")
    for name, text in kind.OPTIONS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    add_path_arguments(parser)
    args = parser.parse_args()
    if reason := why_no_tensorrt(kind.PACKAGES, "cuda"):
        raise UserError(reason)
    options = {name: getattr(args, name) for name in kind.OPTIONS}
    for size in args.image_sizes:
        for batches in [[n] for n in args.batch_sizes] if options.get("static") else [args.batch_sizes]:
            made = kind(checkpoint_path(args.weights, size), size, batches, args.data, **options)
            _, seconds, from_cache = made.load_or_build(args.force)
            how = "from the cache" if from_cache else "built"
            megabytes = made.path.stat().st_size / 2**20
            print(f"{made.path}: {how} in {seconds:.1f} s, {megabytes:.1f} MB", flush=True)
