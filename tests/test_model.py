"""model.py: the written-out ResNet-18 against torchvision's."""

import pytest
import torch

import model


def test_the_network_is_torchvisions_number_for_number():
    models = pytest.importorskip("torchvision.models", reason="torchvision is what it is compared with")
    torch.manual_seed(0)
    theirs = models.resnet18(num_classes=4)
    torch.manual_seed(0)
    ours = model.build(4)
    weights = theirs.state_dict()
    assert list(ours.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())  # by seed
    images = torch.randn(3, 3, 96, 64)
    theirs(images)  # in training: the statistics of batch norm are no longer 0 and 1
    ours.load_state_dict(theirs.state_dict())
    with torch.inference_mode():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))
