"""EDSR and VDSR: sizes, what they compute, how far they see, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convatlas import create_model
from convatlas.ops.resize import resize
from convatlas.restoration.upscaling import in_tiles
from convatlas.training.measure import count_parameters

#: By scale 2, 3 and 4, RGB.
PARAMETERS = {
    "edsr_baseline": (1_369_859, 1_554_499, 1_517_571),
    "edsr": (40_729_603, 43_680_003, 43_089_923),
    "vdsr": (667_008, 667_008, 667_008),
    "srcnn_915": (20_099, 20_099, 20_099),
}


@pytest.mark.parametrize("family", PARAMETERS)
def test_parameter_counts_are_the_published_ones(family: str):
    with torch.device("meta"):
        counts = [count_parameters(create_model(f"{family}_x{scale}", in_channels=3)) for scale in (2, 3, 4)]
        assert tuple(counts) == PARAMETERS[family]
        assert family != "vdsr" or count_parameters(create_model("vdsr_x2")) == 664_704


def test_vdsr_adds_a_residual_to_the_interpolated_image():
    model = create_model("vdsr_x2", depth=3, dim=4, convention="pillow").eval()
    x = torch.rand(1, 1, 7, 6)
    enlarged = resize(x, (14, 12), convention="pillow")
    torch.testing.assert_close(model(x) - enlarged, model.layers(enlarged), rtol=1e-4, atol=1e-6)
    nn.init.zeros_(model.layers[-1].weight)
    assert torch.equal(model(x), enlarged)
    std = create_model("vdsr_x2", depth=3, dim=64).layers[2].weight.std().item()
    assert std == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)


def test_edsr_scales_its_residuals_and_skips_all_blocks():
    model = create_model("edsr_x3", dim=4, depth=2, residual_scale=0.5).eval()
    block, x = model.body[0], torch.rand(1, 4, 5, 5)
    torch.testing.assert_close(block(x) - x, 0.5 * block.body(x), rtol=1e-4, atol=1e-6)
    nn.init.zeros_(model.body[-1].weight)
    nn.init.zeros_(model.body[-1].bias)
    image = torch.rand(1, 3, 5, 4)
    torch.testing.assert_close(model(image), model.tail(model.head(image)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vdsr_x2", {"depth": 4, "dim": 3}),
        ("vdsr_x3", {"depth": 4, "dim": 3}),
        ("edsr_baseline_x2", {"depth": 1, "dim": 3}),
        ("edsr_baseline_x4", {"depth": 1, "dim": 3}),
        ("edsr_baseline_x2", {"depth": 1, "dim": 3, "scale": 8}),
        ("edsr_baseline_x2", {"depth": 1, "dim": 3, "scale": 1}),
    ],
)
def test_nothing_beyond_their_reach_matters(name: str, options: dict):
    model = create_model(name, **options).double().eval()
    x = torch.rand(1, model.in_channels, 40, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = model(x)
        assert whole.shape[2:] == (40 * model.scale, 12 * model.scale)
        torch.testing.assert_close(in_tiles(model, x, tile=7), whole)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vdsr_x2", {"depth": 1}, "depth must be at least 2 and dim at least 1, got 1 and 64"),
        ("vdsr_x2", {"convention": "opencv"}, "unknown convention 'opencv'"),
        ("edsr_baseline_x2", {"scale": 5}, "scale must be one of 1, 2, 3, 4, 8, got 5"),
        ("edsr_baseline_x2", {"dim": 0}, "dim must be at least 1, got 0"),
        ("edsr_baseline_x2", {"residual_scale": 0.0}, r"residual_scale must be in \(0, 1\], got 0.0"),
    ],
)
def test_impossible_networks_are_refused(name: str, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        create_model(name, **changes)
