"""Backend: ONNX Runtime.  Exports the checkpoint to ONNX if there is no fresh export, then runs it: FP16 on CUDA, FP32 on a CPU.

Reads weights/best_resnet18_<size>.pth, writes weights/resnet18_<size>_<precision>.onnx, leaves raw records in results/raw/.

    python onnx_inference.py --image-sizes 224 --batch-sizes 1 8 16
"""

import importlib.util
import time
from pathlib import Path

import numpy as np
import torch

import model
from utils import measure
from utils.utils import package_version, read_json, run_main, sha256, write_atomic, write_json

MAX_BATCH = 1024  # of the exported graph's free batch axis
OLD_EXPORTER_OPSET = 17  # torch before 2.5 has no dependable dynamo exporter


def export(checkpoint: Path, image_size: int, precision: str) -> tuple[Path, float, bool]:
    """The checkpoint as an ONNX file with a free batch axis, input "input" (N, 3, S, S), output "logits" (N, classes).

    Batch normalisation is folded in FP32; "FP16" then halves weights, input and output.  Returns the path, the seconds it took
    and whether it was there already: a file that still has the bytes written from this checkpoint by this torch and onnx.
    """
    start = time.perf_counter()
    path = checkpoint.with_name(f"resnet18_{image_size}_{precision.lower()}.onnx")
    note = path.with_suffix(".onnx.json")
    key = sha256(
        checkpoint,
        str(package_version("torch")),
        str(package_version("onnx")),
        str(package_version("onnxscript")),
        precision,
    )
    if path.is_file() and read_json(note) == {"key": key, "sha256": sha256(path)}:
        return path, time.perf_counter() - start, True
    temporary = path.with_name(path.name + ".tmp")
    try:
        with torch.inference_mode(False), torch.no_grad():  # exporters can't trace inference tensors
            _export(checkpoint, image_size, precision, temporary)
        content = temporary.read_bytes()
    finally:
        temporary.unlink(missing_ok=True)
    write_atomic(path, content)
    write_json(note, {"key": key, "sha256": sha256(content)})
    return path, time.perf_counter() - start, False


def _export(checkpoint: Path, image_size: int, precision: str, path: Path) -> None:
    """Write the ONNX file to `path`: by the dynamo exporter, or with torch before 2.5 by the older one."""
    network = model.fold_batch_norm(model.load(checkpoint, "cpu")[0])
    example = torch.zeros(2, 3, image_size, image_size)  # a batch of 1 would be taken for a constant
    if precision == "FP16":
        network, example = network.half(), example.half()
    names = {"input_names": ["input"], "output_names": ["logits"]}
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5):
        free = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
        torch.onnx.export(
            network,
            (example,),
            path,
            dynamo=True,
            dynamic_shapes=free,
            external_data=False,
            verbose=False,
            **names,
        )
        return
    if (
        precision == "FP16" and torch.cuda.is_available()
    ):  # the older one runs the network, and CPUs had no half convolution
        network, example = network.cuda(), example.cuda()
    free = {"input": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        network, (example,), str(path), opset_version=OLD_EXPORTER_OPSET, dynamic_axes=free, **names
    )


class OnnxRuntime:
    """ONNX Runtime with its input and output bound to PyTorch's tensors on the device, so that nothing is copied.

    `nhwc` has the CUDA provider keep channels last; `graph` replays a CUDA graph, with a session for each batch size.
    """

    def __init__(self, nhwc: bool = False, graph: bool = False):
        self.nhwc, self.graph = nhwc, graph
        self.precision = "FP16"  # on a CPU, load() makes it FP32: there its FP16 is FP32 with casts

    def why_unavailable(self, device: str) -> str | None:
        if importlib.util.find_spec("onnxruntime") is None:
            return "onnxruntime is not installed; run: pip install -r requirements.txt"
        import onnxruntime

        if device == "cpu":
            return (
                "NHWC and CUDA graphs are options of ONNX Runtime's CUDA provider; this run is on the CPU"
                if self.nhwc
                else None
            )
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return (
                f"onnxruntime {onnxruntime.__version__} has no CUDA provider; measure it in an environment made from requirements.txt, "
                "as a run of its own: python benchmark.py --run NAME"
            )
        return None

    def load(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> None:
        import onnxruntime

        self.device = device
        self.precision = "FP32" if device == "cpu" else "FP16"
        facts = model.load_facts(checkpoint)
        self.classes = len(facts["classes"])
        self.artefact, self.build_s, self.from_cache = export(checkpoint, image_size, self.precision)
        if device == "cuda":
            onnxruntime.preload_dlls()  # finds the CUDA libraries that PyTorch brought along
        self.run_options = onnxruntime.RunOptions()
        self.run_options.add_run_config_entry(
            "disable_synchronize_execution_providers", "1"
        )  # the clock synchronises
        self.sessions, self.bound = {}, {}

    def session(self, batch_size: int):
        """The session for a batch size: one for all, but for CUDA graphs one each."""
        import onnxruntime

        key = batch_size if self.graph else None
        if key not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.add_session_config_entry(
                "session.disable_cpu_ep_fallback", "0" if self.device == "cpu" else "1"
            )
            if self.device == "cpu":
                providers = ["CPUExecutionProvider"]
            else:
                cuda = {
                    "device_id": torch.cuda.current_device(),
                    "user_compute_stream": str(torch.cuda.current_stream().cuda_stream),
                    "arena_extend_strategy": "kSameAsRequested",
                    "prefer_nhwc": str(int(self.nhwc)),
                    "enable_cuda_graph": str(int(self.graph)),
                }
                providers = [("CUDAExecutionProvider", cuda)]
            session = onnxruntime.InferenceSession(self.artefact, options, providers=providers)
            wanted = providers[0] if self.device == "cpu" else providers[0][0]
            if session.get_providers()[0] != wanted:
                raise RuntimeError(f"ONNX Runtime fell back from {wanted} to {session.get_providers()}")
            self.sessions[key] = session
        return self.sessions[key]

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        x = images.to(torch.float32 if self.precision == "FP32" else torch.float16).contiguous()
        if self.graph and len(x) in self.bound:  # a CUDA graph reads from where it was captured
            x = self.bound[len(x)][0].copy_(x)
        self.bind(x)
        return x

    def bind(self, x: torch.Tensor) -> None:
        """Bind input and output of one batch size to tensors on the device; both are kept, so that their memory stays theirs."""
        if len(x) in self.bound and self.bound[len(x)][0].data_ptr() == x.data_ptr():
            return
        session = self.session(len(x))
        binding = session.io_binding()
        logits = torch.empty(len(x), self.classes, dtype=x.dtype, device=x.device)
        kind, index = np.float32 if x.dtype == torch.float32 else np.float16, x.device.index or 0
        binding.bind_input("input", self.device, index, kind, tuple(x.shape), x.data_ptr())
        binding.bind_output("logits", self.device, index, kind, tuple(logits.shape), logits.data_ptr())
        self.bound[len(x)] = x, logits, binding, session
        if self.graph:
            session.run_with_iobinding(binding, self.run_options)  # captures

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        bound, logits, binding, session = self.bound[len(x)]
        if bound.data_ptr() != x.data_ptr():
            raise ValueError("predict() takes the tensor that prepare() returned last for this batch size")
        session.run_with_iobinding(binding, self.run_options)
        return logits


BACKENDS = {
    "onnx": OnnxRuntime,
    "onnx-nhwc": lambda: OnnxRuntime(nhwc=True),
    "onnx-nhwc-graph": lambda: OnnxRuntime(nhwc=True, graph=True),
}

if __name__ == "__main__":
    run_main(lambda: measure.main(__doc__, BACKENDS))
