"""DnCNN, NAFNet and VGG for small images: sizes, what they compute, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convatlas.networks.nafnet import NAFNet, NAFNetConfig
from convatlas.networks.registry import create_model
from convatlas.restoration.upscaling import in_tiles
from convatlas.training.measure import count_parameters
from convatlas.weights import load_weights

#: Those of NAFNet are published; three density values a layer come on top of DnCNN's where they are trained.
PARAMETERS = {
    "nafnet_width32": 29_159_715,
    "nafnet_width64": 115_982_915,
    "nafnet_gopro_width32": 17_111_907,
    "nafnet_gopro_width64": 67_888_835,
    "dncnn": 556_097,
    "dncnn_weighted": 556_097,
    "dncnn_weighted_k7": 3_018_817,
    "dncnn_trained_density_k7": 3_018_817 + 3 * 17,
    "vgg16_bn_small": 14_774_436,
    "vgg16_bn_small_weighted": 14_774_436,
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameters(model: str):
    with torch.device("meta"):
        assert count_parameters(create_model(model)) == PARAMETERS[model]


def test_dncnn_takes_the_noise_off_and_works_in_tiles():
    model = create_model("dncnn", depth=4, dim=6, kernel_size=5).eval()
    assert model.reach == 8
    x = torch.rand(1, 1, 30, 41)
    torch.testing.assert_close(x - model(x), model.dncnn(x))
    torch.testing.assert_close(in_tiles(model, x, tile=8), model(x), rtol=1e-4, atol=1e-5)


def test_nafnet_keeps_any_size_and_begins_without_branches():
    model = create_model("nafnet_width32", width=4, encoder_depths=(1, 1), middle_depth=1, decoder_depths=(1, 1)).eval()
    x = torch.rand(1, 3, 9, 14)
    assert model(x).shape == x.shape
    block = model.encoders[0][0]
    y = torch.rand(1, 4, 5, 6)
    assert torch.equal(block(y), y)


def test_nafnet_loads_the_layout_of_its_authors():
    model = NAFNet(NAFNetConfig(width=4, encoder_depths=(1,), middle_depth=1, decoder_depths=(1,)))
    state = {key.replace("sca.conv.", "sca.1."): torch.randn_like(value) for key, value in model.state_dict().items()}
    report = load_weights(model, {"params": state})
    assert not report.missing
    assert torch.equal(model.middle_blks[0].sca.conv.weight, state["middle_blks.0.sca.1.weight"])


def test_bad_configs():
    for model, options, message in (
        ("dncnn", {"depth": 1}, "depth must be at least 2"),
        ("dncnn", {"kernel_size": 4}, "kernel_size must be odd"),
        ("dncnn", {"scale": 2}, "scale must be 1"),
        ("nafnet_width32", {"width": 3}, "width must be even"),
        ("nafnet_width32", {"decoder_depths": (1,)}, "same length"),
        ("vgg16_bn_small", {"widths": ((8,), ())}, "widths must hold"),
        ("vgg16_bn_small", {"kernel_size": 2}, "kernel_size must be odd"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model(model, **options)
    assert isinstance(create_model("vgg16_bn_small", widths=((4,),)).stages[0][3], nn.MaxPool2d)
