"""ResNet-18: build it, save and load a checkpoint, fold batch normalisation for deployment."""

import copy
import io
from pathlib import Path

import torch
import torchvision
from torchvision.models.resnet import BasicBlock

from utils.utils import UserError, write_atomic


def build(num_classes: int, pretrained: bool = False) -> torch.nn.Module:
    """torchvision's ResNet-18 with `num_classes` outputs; random weights, or ImageNet's but for the last.

    Raises UserError when the ImageNet weights can't be downloaded.
    """
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


def save(path: Path, model: torch.nn.Module, **facts) -> None:
    """Write weights and `facts` (plain values: classes, image_size, settings, ...), whole or not at all."""
    buffer = io.BytesIO()
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    torch.save({"model": weights, **facts}, buffer)
    write_atomic(path, buffer.getvalue())


def read(path: Path, **options) -> dict:
    """The checkpoint as a dict: `model` (the weights, on the CPU) and the facts that save() was given.

    No code in it is run.  Raises UserError where the file is missing, is no checkpoint, or was trained at
    another image size than its name says.
    """
    size = path.stem.rpartition("_")[2]
    if not path.is_file():
        raise UserError(f"{path} is missing; train it first: python train.py --image-sizes {size}")
    again = f"train again: python train.py --force --image-sizes {size}"
    try:
        checkpoint = torch.load(str(path), map_location="cpu", weights_only=True, **options)
        trained_at, classes = checkpoint["image_size"], checkpoint["classes"]
        shapes = {name: value.shape for name, value in checkpoint["model"].items()}
        whole = {*map(type, classes)} == {str} and shapes == shapes_of(len(classes))
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError on a damaged file
        raise UserError(f"{path} is not a checkpoint of train.py; {again}") from error
    if not whole:
        raise UserError(f"{path} is no checkpoint of train.py: classes and weights do not fit; {again}")
    if size.isdigit() and trained_at != int(size):
        raise UserError(f"{path} was trained at {trained_at} px; give it its old name back, or {again}")
    return checkpoint


def shapes_of(num_classes: int) -> dict[str, torch.Size]:
    """The shape of every tensor in a checkpoint's `model`; nothing is computed."""
    with torch.device("meta"):
        return {name: value.shape for name, value in build(num_classes).state_dict().items()}


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


def load_facts(path: Path) -> dict:
    """The facts alone; the weights are not read.  Raises UserError like read()."""
    facts = read(path, mmap=True)
    del facts["model"]
    return facts


def load(path: Path, device: torch.device | str) -> tuple[torch.nn.Module, dict]:
    """The checkpoint's network in FP32 and evaluation mode on `device`, and its facts.  Raises UserError."""
    facts = read(path)
    model = build(len(facts["classes"]))
    model.load_state_dict(facts.pop("model"))
    return model.eval().to(device), facts


def fold_batch_norm(model: torch.nn.Module) -> torch.nn.Module:
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
    from torch.utils.flop_counter import FlopCounterMode

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
