"""Does the benchmark's clock add anything?  Each backend under it against a bare hand-written loop, in
interleaved blocks in one process.

Run by hand, on a machine that does nothing else; exit code 1 if they differ by more than 5 %.  Reads the
checkpoint in weights/.

    python tests/bench_overhead.py --image-size 224 --batch-size 16
"""

import argparse
import functools
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import model
from onnx_inference import OnnxRuntime
from openvino_inference import OpenVino
from pytorch_inference import PyTorch
from utils import onnx_export
from utils.devices import choose_device
from utils.measure import timing
from utils.utils import add_path_arguments, checkpoint_path, run_main


def bare_pytorch(checkpoint: Path, images: torch.Tensor, device: str):
    """What anyone would write: a call that blocks until the logits are there."""
    network, _ = model.load(checkpoint, device)
    x = images.to(device)

    def call():
        network(x)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def bare_onnx(checkpoint: Path, images: torch.Tensor, device: str):
    """ONNX Runtime on NumPy arrays on a CPU, on one bound CUDA tensor on a GPU."""
    import onnxruntime

    if device == "cpu":
        path, _, _ = onnx_export.export(checkpoint, images.shape[-1], "FP32")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # As ours: its threads would spin on, on a core that the others need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        x = images.numpy()
        return lambda: session.run(None, {"input": x})
    path, _, _ = onnx_export.export(checkpoint, images.shape[-1], "FP16")
    onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(path, providers=["CUDAExecutionProvider"])
    x = images.to(device).half()
    binding = session.io_binding()
    binding.bind_input("input", "cuda", 0, np.float16, tuple(x.shape), x.data_ptr())
    binding.bind_output("logits", "cuda")
    return lambda: (x, session.run_with_iobinding(binding))


def bare_openvino(checkpoint: Path, images: torch.Tensor, device: str):
    """OpenVINO as its documentation has it for latency, on a NumPy array that is not copied."""
    import openvino

    path, _, _ = onnx_export.export(checkpoint, images.shape[-1], "FP32")
    core = openvino.Core()
    network = core.read_model(path)
    network.reshape({"input": list(images.shape)})
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(
        network, "CPU", {"PERFORMANCE_HINT": "LATENCY", **threads}
    ).create_infer_request()
    x = images.numpy()
    return lambda: request.infer(x, share_inputs=True, share_outputs=True)


def bare_loop(call, runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--runs", type=int, default=8, help="per block")
    add_path_arguments(parser)
    args = parser.parse_args()
    device = choose_device(args.device)
    checkpoint = checkpoint_path(args.weights, args.image_size)
    images = torch.randn(
        args.batch_size, 3, args.image_size, args.image_size, generator=torch.Generator().manual_seed(0)
    )
    worst = 0.0
    for name, backend, make_bare in (
        ("PyTorch", PyTorch(), bare_pytorch),
        ("ONNX Runtime", OnnxRuntime(), bare_onnx),
        ("OpenVINO", OpenVino(), bare_openvino),
    ):
        if reason := backend.why_unavailable(device):
            print(f"{name}: {reason}")
            continue
        with torch.inference_mode():
            backend.load(checkpoint, args.image_size, [args.batch_size], device)
            x = backend.prepare(images.to(device))
            bare = make_bare(checkpoint, images, device)
            synchronize = torch.cuda.current_stream().synchronize if device == "cuda" else lambda: None
            new_event = (lambda: torch.cuda.Event(enable_timing=True)) if device == "cuda" else None
            ours, theirs = [], []
            for block in range(args.blocks + 1):
                call = functools.partial(backend.predict, x)
                samples = timing.sample(call, synchronize, args.runs, new_event)
                loop = bare_loop(bare, args.runs)
                if block:  # the first one warms up
                    ours, theirs = ours + samples["host_ms"], theirs + loop
        own, bare_ms = timing.trimmed_mean(ours), timing.trimmed_mean(theirs)
        ratio = own / bare_ms
        worst = max(worst, abs(ratio - 1))
        print(f"{name}: benchmark {own:.3f} ms, bare loop {bare_ms:.3f} ms, ratio {ratio:.3f}")
    sys.exit(worst > 0.05)


if __name__ == "__main__":
    run_main(main)
