"""ResNet-18: build it, save and load a checkpoint, fold batch normalisation for deployment."""

import copy
import io
from pathlib import Path

import torch
from torch import nn

from utils.utils import UserError, write_atomic

IMAGENET = "https://download.pytorch.org/models/resnet18-f37072fd.pth"  # torchvision's IMAGENET1K_V1


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and the sum with the input, which a 1 x 1 convolution fits to another shape."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        fit = None
        if stride != 1:  # made first, as in torchvision, so that a seed gives the same weights
            fit = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = fit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x += residual
        return self.relu(x)


class ResNet18(nn.Module):
    """torchvision's resnet18, number for number: images float32 (N, 3, S, S) -> logits (N, num_classes).

    Written out, since importing torchvision brings torch._dynamo, which takes as long as PyTorch itself.
    He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, 2015.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def build(num_classes: int, pretrained: bool = False) -> nn.Module:
    """ResNet-18 with random weights, or ImageNet's but for the last layer; UserError if they can't be had."""
    model = ResNet18(1000 if pretrained else num_classes)
    if not pretrained:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return model
    try:
        model.load_state_dict(torch.hub.load_state_dict_from_url(IMAGENET, check_hash=True))
    except OSError as error:  # URLError, time-outs and refused connections are all OSError
        mend = "connect this machine to the internet, or train from random weights: python train.py"
        raise UserError(f"{IMAGENET} can't be downloaded ({error}); {mend}") from error
    model.fc = nn.Linear(512, num_classes)
    return model


def save(path: Path, model: nn.Module, **facts) -> None:
    """Write weights and `facts` (plain values: classes, image_size, settings, ...), whole or not at all."""
    buffer = io.BytesIO()
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    torch.save({"model": weights, **facts}, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: Path, device: torch.device | str = "cpu", **options) -> tuple[nn.Module, dict]:
    """The checkpoint's network in FP32 and evaluation mode on `device`, and the facts that save() was given.

    Raises UserError where it is missing, no checkpoint, or trained at another image size than its name says.
    """
    size = path.stem.rpartition("_")[2]
    if not path.is_file():
        raise UserError(f"{path} is missing; train it first: python train.py --image-sizes {size}")
    again = f"train again: python train.py --force --image-sizes {size}"
    try:
        facts = torch.load(str(path), map_location="cpu", weights_only=True, **options)
        trained_at, classes = facts["image_size"], facts["classes"]
        with torch.device("meta"):
            network = ResNet18(len(classes))  # no time is spent on random weights
        network.load_state_dict(facts.pop("model"), assign=True)  # to_empty() would import sympy: 0.3 s
        if {*map(type, classes)} != {str}:
            raise ValueError("classes are names")
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError on a damaged file
        raise UserError(f"{path} is not a checkpoint of train.py; {again}") from error
    if size.isdigit() and trained_at != int(size):
        raise UserError(f"{path} was trained at {trained_at} px; give it its old name back, or {again}")
    return network.eval().to(device), facts


def load_facts(path: Path) -> dict:
    """The facts alone; the weights are not read.  Raises UserError like load()."""
    return load(path, mmap=True)[1]


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy with every batch normalisation folded into its convolution; less accurate after `.half()`."""
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

    counted = nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AdaptiveAvgPool2d, BasicBlock
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(False), torch.no_grad(), torch.device("meta"), counter:
        network = ResNet18(num_classes).eval()
        for module in network.modules():
            if isinstance(module, counted):
                module.register_forward_hook(note)
        network(torch.empty(1, 3, image_size, image_size))
    weights = sum(parameter.numel() for parameter in network.parameters())
    return {"flops": counter.get_total_flops(), "activations": sum(activations), "weights": weights}
