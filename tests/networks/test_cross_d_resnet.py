"""ResNet-18 of Cross-D convolutions: its size, and volumes after images."""

from __future__ import annotations

import torch

from convatlas.networks.registry import create_model
from convatlas.nn.conv.cross_d_conv import CrossDConv2d
from convatlas.training.measure import count_parameters
from convatlas.weights import load_weights

TINY = {"depths": (1, 1), "widths": (4, 6), "stem_width": 4, "num_classes": 3}


def test_parameters_are_those_of_the_authors():
    with torch.device("meta"):
        assert count_parameters(create_model("cross_d_resnet18")) == 33_352_357
        assert count_parameters(create_model("resnet18", num_classes=165)) == 11_261_157
        assert count_parameters(CrossDConv2d(64, 128, 3, bias=False)) == 222_324


def test_a_network_for_volumes_loads_one_for_images():
    images, volumes = (create_model(f"cross_d_resnet18{form}", **TINY) for form in ("", "_3d"))
    state = images.state_dict()
    # As torchvision's training script writes it.
    report = load_weights(volumes, {"model": state, "epoch": 3})
    assert not report.missing
    assert not report.unexpected
    assert torch.equal(volumes.layer2[0].downsample[0].weight, state["layer2.0.downsample.0.weights_3d"])
    assert torch.equal(volumes.fc.weight, state["fc.weight"])
