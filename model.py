"""ResNet-18: build it, save and load a checkpoint, fold batch normalisation for deployment.

PyTorch and torchvision are imported inside the functions: what a checkpoint says of itself is read without.
"""

import copy
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

from utils.utils import UserError, write_atomic


def build(num_classes: int, pretrained: bool = False):
    """torchvision's ResNet-18 with `num_classes` outputs; random weights, or ImageNet's but for the last.

    Raises UserError when the ImageNet weights can't be downloaded.
    """
    import torch
    import torchvision

    if not pretrained:
        return torchvision.models.resnet18(weights=None, num_classes=num_classes)
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    try:
        model = torchvision.models.resnet18(weights=weights)
    except OSError as error:  # URLError, time-outs and refused connections are all OSError
        mend = "connect this machine to the internet, or train from random weights: python train.py"
        raise UserError(
            f"ImageNet's weights can't be downloaded from {weights.url} ({error}); {mend}"
        ) from error
    model.fc = torch.nn.Linear(model.fc.in_features, num_classes)
    return model


def save(path: Path, model, **facts) -> None:
    """Write weights and `facts` (plain values: classes, image_size, settings, ...), whole or not at all."""
    import torch

    buffer = io.BytesIO()
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    torch.save({"model": weights, **facts}, buffer)
    write_atomic(path, buffer.getvalue())


def read(path: Path) -> dict:
    """The checkpoint as a dict: `model` (the weights, on the CPU) and the facts that save() was given.

    No code in it is run.  Raises UserError where the file is missing, is no checkpoint, or was trained at
    another image size than its name says.
    """
    import torch

    return checked(path, lambda: torch.load(str(path), map_location="cpu", weights_only=True))


def load_facts(path: Path) -> dict:
    """The facts alone; neither PyTorch nor the weights are loaded.  Raises UserError like read()."""

    def load() -> dict:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            return FactsReader(io.BytesIO(archive.read(name))).load()

    facts = checked(path, load)
    del facts["model"]
    return facts


class FactsReader(pickle.Unpickler):
    """Reads plain values that torch.save() wrote, and of tensors the shapes; runs no code."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, *others: Tensor(shape)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")

    def persistent_load(self, saved) -> None:
        """A tensor's numbers, which are left where they are."""


class Tensor:
    def __init__(self, shape: tuple):
        self.shape = shape


def checked(path: Path, load: Callable[[], dict]) -> dict:
    """What `load` makes of a checkpoint; UserError as read() says."""
    size = path.stem.rpartition("_")[2]
    if not path.is_file():
        raise UserError(f"{path} is missing; train it first: python train.py --image-sizes {size}")
    again = f"train again: python train.py --force --image-sizes {size}"
    try:
        checkpoint = load()
        trained_at, classes = checkpoint["image_size"], checkpoint["classes"]
        shapes = {name: tuple(value.shape) for name, value in checkpoint["model"].items()}
        whole = {*map(type, classes)} == {str} and shapes == shapes_of(len(classes))
    except Exception as error:  # anything from EOFError to UnpicklingError comes of a damaged file
        raise UserError(f"{path} is not a checkpoint of train.py; {again}") from error
    if not whole:
        raise UserError(f"{path} is no checkpoint of train.py: classes and weights do not fit; {again}")
    if size.isdigit() and trained_at != int(size):
        raise UserError(f"{path} was trained at {trained_at} px; give it its old name back, or {again}")
    return checkpoint


def shapes_of(num_classes: int) -> dict[str, tuple]:
    """The shape of every tensor in a checkpoint's `model`: the plan of torchvision's ResNet-18."""
    shapes, channels = {}, 64

    def add(convolution: str, norm: str, wide: int, deep: int, kernel: int) -> None:
        shapes[f"{convolution}.weight"] = (wide, deep, kernel, kernel)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{name}"] = (wide,)
        shapes[f"{norm}.num_batches_tracked"] = ()

    add("conv1", "bn1", 64, 3, 7)
    for layer, width in enumerate([64, 128, 256, 512], 1):
        for block in (f"layer{layer}.0", f"layer{layer}.1"):
            add(f"{block}.conv1", f"{block}.bn1", width, channels, 3)
            add(f"{block}.conv2", f"{block}.bn2", width, width, 3)
            if width != channels:
                add(f"{block}.downsample.0", f"{block}.downsample.1", width, channels, 1)
            channels = width
    return shapes | {"fc.weight": (num_classes, 512), "fc.bias": (num_classes,)}


def why_to_keep(path: Path, fingerprint: str) -> str | None:
    """Why training on the images with this fingerprint could not make the file at `path` again, if so."""
    if not path.exists():
        return None
    try:
        data = load_facts(path).get("data")
    except UserError:
        return "is not a checkpoint of train.py for this image size"
    known = data.get("fingerprint") if isinstance(data, dict) else None
    return None if known == fingerprint else "was trained on other images"


def load(path: Path, device: str) -> tuple:
    """The checkpoint's network in FP32 and evaluation mode on `device`, and its facts.  Raises UserError."""
    facts = read(path)
    model = build(len(facts["classes"]))
    model.load_state_dict(facts.pop("model"))
    return model.eval().to(device), facts


def fold_batch_norm(model):
    """A copy with every batch normalisation folded into its convolution, in FP32.

    Do this before `.half()`: folding in half arithmetic is the least accurate order.
    """
    import torch.fx.experimental.optimization as optimization

    return optimization.fuse(copy.deepcopy(model).eval())


def count_work(image_size: int, num_classes: int = 1000) -> dict[str, int]:
    """What ResNet-18 does for one square image, found by walking through it on the meta device.

    flops: of convolutions and matrix products, 2 per multiply-add; activations: numbers that layers read
    and write, batch norm, ReLU and residual sums being part of their convolution; weights: numbers.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.models.resnet import BasicBlock

    activations = []

    def note(module, inputs, output):
        read = 0 if isinstance(module, BasicBlock) else inputs[0].numel()
        activations.append(read + output.numel())  # of a block the residual, which its last convolution reads

    nn, counter = torch.nn, FlopCounterMode(display=False)
    counted = nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AdaptiveAvgPool2d, BasicBlock
    with torch.inference_mode(False), torch.no_grad(), torch.device("meta"), counter:
        network = build(num_classes).eval()
        for module in network.modules():
            if isinstance(module, counted):
                module.register_forward_hook(note)
        network(torch.empty(1, 3, image_size, image_size))
    weights = sum(parameter.numel() for parameter in network.parameters())
    return {"flops": counter.get_total_flops(), "activations": sum(activations), "weights": weights}
