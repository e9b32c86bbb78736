"""What all backends share: the contract, CUDA graphs around any of them, whether a package is there, and the
files in weights/ with when they are fresh."""

import abc
import argparse
import contextlib
import ctypes
import importlib
import importlib.util
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path

from utils.environment import package_version
from utils.utils import in_fresh_process, read_dict, sha256, write_json, write_whole


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
    """Any backend replayed from CUDA graphs, one for each batch size, captured when prepare() meets it."""

    def __init__(self, backend: Backend):
        self.backend, self.precision = backend, backend.precision
        self.any_batch, self.torch_allocator = backend.any_batch, backend.torch_allocator
        self.adds = ", ".join(filter(None, [backend.adds, "replayed as one CUDA graph"]))

    def why_unavailable(self, device: str) -> str | None:
        if device == "cpu":
            return "CUDA graphs need a CUDA GPU; this run is on the CPU"
        return self.backend.why_unavailable(device)

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
            for _ in range(3):  # before the capture algorithms are chosen and memory is allocated
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


@contextlib.contextmanager
def inference(device: str):
    """Inference mode; on a GPU on a stream of its own, since graphs can't be captured on the default one.

    On Linux malloc keeps freed memory; otherwise page faults can halve a CPU's throughput.
    """
    import torch

    if sys.platform == "linux":
        malloc = ctypes.CDLL(None)
        malloc.mallopt(-4, 0)  # M_MMAP_MAX
        malloc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    with torch.inference_mode(), stream:
        yield


def why_not_importable(package: str, install: str) -> str | None:
    """None if `package` can be imported, else one sentence."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; run: {install}"
    try:
        importlib.import_module(package)
    except Exception as error:  # a library is missing or of another version: loaders raise anything
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return f"{package} is installed but does not load: {words}"
    return None


# ---- files in weights/


def is_fresh(path: Path, facts: dict) -> bool:
    """Whether `path` is whole and made from exactly `facts`; if it is there but not that, stderr says why."""
    if not path.is_file():
        return False
    note = read_dict(path.with_name(f"{path.name}.json"))
    made_from = note.get("made_from")
    if not isinstance(made_from, dict):
        wrong = "does not say what it was made from"
    elif others := sorted(name for name in facts if made_from.get(name) != facts[name]):
        wrong = f"was made for another {', '.join(others)}"
    elif note.get("sha256") != sha256(path):
        wrong = "is damaged"
    else:
        return True
    print(f"{path} {wrong}; building it anew", file=sys.stderr, flush=True)
    return False


def store(path: Path, facts: dict, write: Callable[[Path], object]) -> None:
    """Have `write(path)` write the whole file, with a note beside it that says from what."""
    write_whole(path, write)
    write_json(path.with_name(f"{path.name}.json"), {"made_from": facts, "sha256": sha256(path)})


# ---- TensorRT's engines, whichever route builds them

WORKSPACE_BYTES = 1 << 30  # at most; a quarter of the free memory where less, so that a 4 GB card can build
INSTALL = "pip install -r requirements-tensorrt.txt (Python 3.10: requirements-tensorrt86.txt)"


def why_no_tensorrt(packages: list[str], device: str) -> str | None:
    """None if `packages` load and there is a GPU to run on, else one sentence that says what to do."""
    if device != "cuda":
        return "TensorRT needs an NVIDIA GPU; this run is on the CPU"
    reasons = (why_not_importable(package, INSTALL) for package in packages)
    return next(filter(None, reasons), None)


def workspace_bytes() -> int:
    """What a builder may take for kernels that want scratch memory."""
    import torch

    return min(WORKSPACE_BYTES, torch.cuda.mem_get_info()[0] // 4)


class EngineFile(abc.ABC):
    """An engine's file: what it is made from, for which shapes, how it is built and opened."""

    PACKAGES: list[str]  # modules that it needs
    MADE_WITH: list[str]  # distributions whose version changes the file
    suffix: str
    profiles: list[list[int]]  # TensorRT's: for each the smallest, best and largest batch size
    kind: str  # what the file's name says of the batch sizes

    def __init__(self, checkpoint, image_size, batch_sizes, data: Path | None, static=False, int8=False):
        self.checkpoint, self.image_size, self.data = checkpoint, image_size, data
        self.batch_sizes, self.static, self.int8 = sorted(set(batch_sizes)), static, int8

    @classmethod
    def files(cls, checkpoint: Path, image_size: int, batch_sizes, data, **options: bool) -> list:
        """One for all batch sizes, or `static` one for each alone."""
        groups = [[size] for size in batch_sizes] if options.get("static") else [batch_sizes]
        return [cls(checkpoint, image_size, group, data, **options) for group in groups]

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
        gpu = {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}
        facts = {name: package_version(name) for name in self.MADE_WITH} | gpu
        facts |= {"checkpoint": sha256(self.checkpoint), "tensorrt": tensorrt.__version__}
        return facts | {"profiles": self.profiles, "workspace_bytes": WORKSPACE_BYTES}

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

    def load_or_build(self) -> tuple[typing.Any, float, bool]:
        """What open() gives, the seconds and whether a fresh file was there that loads.

        Building has a process of its own, so that nothing of it stays in this one's GPU memory.
        """
        start = time.perf_counter()
        if is_fresh(self.path, self.facts()):
            try:
                return self.open(), time.perf_counter() - start, True
            except Exception as error:  # whole and made from the same, yet refused, in whatever words
                print(f"{self.path} does not load ({error}); building it anew", file=sys.stderr, flush=True)
        seconds = in_fresh_process(self.build)
        return self.open(), seconds, False


def build_engines(about: str | None, kind: type[EngineFile], *options: str) -> None:
    """What trt.py and torch_trt.py do when they are run: build what is missing, a line for each file."""
    import torch

    import model
    from utils.utils import BATCH_SIZES, IMAGE_SIZES, UserError, add_path_arguments, checkpoint_path

    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("image", IMAGE_SIZES), ("batch", BATCH_SIZES)):
        parser.add_argument(f"--{name}-sizes", nargs="+", type=int, default=default)
    for name in options:
        parser.add_argument(f"--{name}", action="store_true")
    add_path_arguments(parser)
    args = parser.parse_args()
    if reason := why_no_tensorrt(kind.PACKAGES, "cuda" if torch.cuda.is_available() else "cpu"):
        raise UserError(reason)
    asked = {name: getattr(args, name) for name in options}
    for size in args.image_sizes:
        checkpoint = checkpoint_path(args.weights, size)
        model.load_facts(checkpoint)  # which says what is wrong with it
        for made in kind.files(checkpoint, size, args.batch_sizes, args.data, **asked):
            _, seconds, from_cache = made.load_or_build()
            how, megabytes = "from the cache" if from_cache else "built", made.path.stat().st_size / 2**20
            print(f"{made.path}: {how} in {seconds:.1f} s, {megabytes:.1f} MB", flush=True)
