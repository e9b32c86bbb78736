"""Backend: OpenVINO on a CPU, from the exports that ONNX Runtime runs: FP32 and INT8; FP16 on Intel's GPUs.

Reads weights/best_resnet18_<size>.pth, writes weights/resnet18_<size>_<precision>.onnx, leaves raw records
in results/raw/ and prints their table.

    python openvino_inference.py --image-sizes 224 --batch-sizes 1 8 16
"""

import utils  # isort: skip  # noqa: F401  (from here on Ctrl-C is quiet)
from pathlib import Path

import torch

import model
from utils import onnx_export
from utils.backend import Backend, why_not_importable
from utils.utils import run_main


class OpenVino(Backend):
    """OpenVINO, a network of a fixed shape for each batch size, on PyTorch's tensors: nothing is copied.

    `where` is OpenVINO's name of the device: "CPU", or "GPU" for Intel's own, where it computes in FP16.
    """

    def __init__(self, precision: str = "FP32", where: str = "CPU", adds: str = ""):
        self.precision, self.where, self.adds = precision, where, adds

    def why_unavailable(self, device: str) -> str | None:
        if device != "cpu":
            return "OpenVINO runs on CPUs and Intel's GPUs; this run is on an NVIDIA GPU (use --device cpu)"
        if reason := why_not_importable("openvino", "pip install -r requirements.txt"):
            return reason
        import openvino

        found = sorted({name.partition(".")[0] for name in openvino.Core().available_devices})
        if self.where not in found:
            return f"OpenVINO finds no Intel GPU here, only {', '.join(found)}; install its driver"
        return None

    def load(self, checkpoint: Path, image_size: int, batch_sizes: list[int], device: str) -> None:
        import openvino

        source = "INT8" if self.precision == "INT8" else "FP32"
        exported = onnx_export.export(checkpoint, image_size, source, self.data)
        self.artefact, self.build_s, self.from_cache = exported
        self.core, self.bound = openvino.Core(), {}  # batch size -> input, logits, request
        self.network = self.core.read_model(self.artefact)
        self.classes = len(model.load_facts(checkpoint)["classes"])
        for batch_size in batch_sizes:
            self.prepare(torch.zeros(batch_size, 3, image_size, image_size))

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Images as they are, bound as input beside a tensor for the logits, both kept so that they stay."""
        import openvino

        x = images.contiguous()
        bound = self.bound.get(len(x))
        if bound is None or bound[0].data_ptr() != x.data_ptr():
            request = bound[2] if bound else self.new_request(x.shape)
            logits = torch.empty(len(x), self.classes)
            request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
            request.set_output_tensor(openvino.Tensor(logits.numpy(), shared_memory=True))
            self.bound[len(x)] = x, logits, request
        return x

    def new_request(self, shape: torch.Size):
        """What runs one batch of this shape.  It takes half a second, so its result is not kept in a file."""
        settings: dict = {"PERFORMANCE_HINT": "LATENCY"}
        if self.where == "CPU":  # which by itself would compute in BF16 if it can
            settings |= {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        self.network.reshape({"input": list(shape)})
        compiled = self.core.compile_model(self.network, self.where, settings)
        used = compiled.get_property("EXECUTION_DEVICES")
        if not all(name.startswith(self.where) for name in used):
            raise RuntimeError(f"OpenVINO fell back from {self.where} to {', '.join(used)}")
        return compiled.create_infer_request()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        bound, logits, request = self.bound[len(x)]
        if bound.data_ptr() != x.data_ptr():
            raise ValueError("predict() takes the tensor that prepare() returned last for this batch size")
        request.infer(share_outputs=True)
        return logits


BACKENDS = {
    "openvino": OpenVino,
    "openvino-int8": lambda: OpenVino("INT8", adds="INT8 calibrated on training images"),
    "openvino-fp16": lambda: OpenVino("FP16", "GPU", adds="FP16 on Intel's GPU"),
}

if __name__ == "__main__":
    from benchmark import measure_script

    run_main(lambda: measure_script(__doc__, "openvino_inference", BACKENDS))
