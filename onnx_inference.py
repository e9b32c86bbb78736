"""Backend: ONNX Runtime, from an export of the checkpoint; FP16 on CUDA, FP32 and INT8 on a CPU.

Reads weights/best_resnet18_<size>.pth, writes weights/resnet18_<size>_<precision>.onnx, leaves raw records
in results/raw/ and prints their table.

    python onnx_inference.py --image-sizes 224 --batch-sizes 1 8 16
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)
from pathlib import Path

import numpy as np
import torch

import model
from utils import onnx_export
from utils.backend import Backend, why_not_importable
from utils.utils import run_main


class OnnxRuntime(Backend):
    """ONNX Runtime, its input and output bound to PyTorch's tensors on the device: nothing is copied.

    `nhwc`: the CUDA provider keeps channels last.  `graph`: it replays a CUDA graph.  `int8`: for CPUs.
    """

    def __init__(self, nhwc: bool = False, graph: bool = False, int8: bool = False):
        self.nhwc, self.graph, self.int8 = nhwc, graph, int8
        self.precision = "INT8" if int8 else "FP16"  # load() makes it FP32 on a CPU: there FP16 is casts
        meaning = [(int8, "INT8 calibrated on training images"), (nhwc, "channels last inside")]
        meaning += [(graph, "replayed as one CUDA graph")]
        self.adds = ", ".join(text for used, text in meaning if used)

    def why_unavailable(self, device: str) -> str | None:
        if reason := why_not_importable("onnxruntime", "pip install -r requirements.txt"):
            return reason
        if device == "cpu":
            why = "NHWC and CUDA graphs are options of ONNX Runtime's CUDA provider; this run is on the CPU"
            return why if self.nhwc else None
        if self.int8:
            why = "ONNX Runtime has INT8 convolutions for CPUs, none for CUDA"
            return f"{why}; measure tensorrt-int8 here, or this one with --device cpu"
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            how = "measure it as a sweep of its own in an environment made from requirements.txt"
            return f"onnxruntime {onnxruntime.__version__} has no CUDA provider; {how}"
        return None

    def load(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> None:
        import onnxruntime

        self.device = device
        if device == "cpu" and not self.int8:
            self.precision = "FP32"
        self.classes = len(model.load_facts(checkpoint)["classes"])
        exported = onnx_export.export(checkpoint, image_size, self.precision, self.data)
        self.artefact, self.build_s, self.from_cache = exported
        if device == "cuda":
            onnxruntime.preload_dlls()  # finds the CUDA libraries that PyTorch brought along
        self.run_options = onnxruntime.RunOptions()  # the clock synchronises:
        self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.bound = {}  # batch size -> input, logits, binding, session
        self.sessions = [self.new_session()]

    def new_session(self):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Threads that wait spinning take the cores from whatever else runs here, another process's turn too.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider, settings = "CPUExecutionProvider", {}
        options.intra_op_num_threads = torch.get_num_threads()
        if self.device == "cuda":
            options.intra_op_num_threads = 1  # more would only wait
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            provider = "CUDAExecutionProvider"
            settings = {"device_id": torch.cuda.current_device(), "arena_extend_strategy": "kSameAsRequested"}
            settings["user_compute_stream"] = str(torch.cuda.current_stream().cuda_stream)
            settings |= {"prefer_nhwc": str(int(self.nhwc)), "enable_cuda_graph": str(int(self.graph))}
        session = onnxruntime.InferenceSession(str(self.artefact), options, providers=[(provider, settings)])
        if session.get_providers()[0] != provider:
            raise RuntimeError(f"ONNX Runtime fell back from {provider} to {session.get_providers()}")
        return session

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Images in its precision, input and logits bound to tensors that are kept, so that they stay."""
        x = images.to(torch.float32 if self.device == "cpu" else torch.float16).contiguous()
        bound = self.bound.get(len(x))
        if self.graph and bound:  # a CUDA graph reads from where it was captured
            return bound[0].copy_(x)
        if bound is None or bound[0].data_ptr() != x.data_ptr():
            self.bind(x)
        return x

    def bind(self, x: torch.Tensor) -> None:
        if len(x) in self.bound:
            session = self.bound[len(x)][3]
        elif self.device == "cpu":
            session = self.sessions[0]
        else:  # one for each batch size: when that changes, a session plans convolutions anew (0.1 s)
            session = self.sessions.pop() if self.sessions else self.new_session()
        binding = session.io_binding()
        logits = torch.empty(len(x), self.classes, dtype=x.dtype, device=x.device)
        kind = np.float32 if x.dtype == torch.float32 else np.float16
        where = self.device, x.device.index or 0, kind
        binding.bind_input("input", *where, tuple(x.shape), x.data_ptr())
        binding.bind_output("logits", *where, tuple(logits.shape), logits.data_ptr())
        self.bound[len(x)] = x, logits, binding, session
        if self.graph:
            session.run_with_iobinding(binding, self.run_options)  # captures

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        bound, logits, binding, session = self.bound[len(x)]
        if bound.data_ptr() != x.data_ptr():
            raise ValueError("predict() takes the tensor that prepare() returned last for this batch size")
        session.run_with_iobinding(binding, self.run_options)
        return logits

    def release(self) -> None:
        if self.device == "cuda":  # there each batch size has a session of its own, with an arena of its own
            self.bound.clear()
            self.sessions.clear()


BACKENDS = {
    "onnx": OnnxRuntime,
    "onnx-int8": lambda: OnnxRuntime(int8=True),
    "onnx-nhwc": lambda: OnnxRuntime(nhwc=True),
    "onnx-nhwc-graph": lambda: OnnxRuntime(nhwc=True, graph=True),
}

if __name__ == "__main__":
    from benchmark import measure_script

    run_main(lambda: measure_script(__doc__, "onnx_inference", BACKENDS))
