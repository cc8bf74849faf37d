"""Receptive fields of networks where they are known, and the squares that hold a share of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from convatlas.analysis.effective_receptive_field import (
    contribution_map,
    erf_area,
    erf_picture,
    erf_section,
    log_contributions,
)
from convatlas.errors import UnknownName, Unsupported
from convatlas.networks.registry import create_model


def positive(*layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    return model


def test_support_is_the_receptive_field():
    model = positive(nn.Conv2d(2, 3, 5, padding=2), nn.Conv2d(3, 1, 3, padding=1)).train()
    field = contribution_map(model, torch.rand(3, 2, 15, 13))
    rows, columns = field.nonzero().unbind(1)
    assert (int(rows.min()), int(rows.max())) == (7 - 3, 7 + 3)
    assert (int(columns.min()), int(columns.max())) == (6 - 3, 6 + 3)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_linear_network_has_the_sum_of_its_kernel():
    conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    nn.init.uniform_(conv.weight)
    field = contribution_map(conv, torch.rand(2, 9, 9))
    torch.testing.assert_close(field[3:6, 3:6], conv.weight.detach().sum((0, 1)))


def test_a_layer_can_be_chosen():
    model = positive(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 7, padding=3), nn.AdaptiveAvgPool2d(1))
    x = torch.rand(1, 1, 17, 17)
    assert int((contribution_map(model, x, layer="0") > 0).sum()) == 9
    assert int((contribution_map(model, x) > 0).sum()) == 81
    with pytest.raises(UnknownName, match="unknown layer '3'"):
        contribution_map(model, x, layer="3")
    with pytest.raises(Unsupported, match=r"puts out no map \(B, C, h, w\)"):
        contribution_map(nn.Sequential(nn.Flatten(), nn.Linear(289, 2)), x)


def test_images_without_a_finite_gradient_are_left_out():
    model = positive(nn.Conv2d(1, 1, 3, padding=1))
    broken = nn.Sequential(_Root(), model)
    images = torch.stack([torch.ones(1, 9, 9), torch.zeros(1, 9, 9)])
    torch.testing.assert_close(contribution_map(broken, images), contribution_map(broken, images[:1]))
    with pytest.raises(ValueError, match="images must have finite gradients, got none in 1"):
        contribution_map(broken, images[1:])


class _Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def test_squares_grow_with_the_share():
    contributions = torch.zeros(21, 21)
    contributions[8:13, 8:13] = 1.0
    contributions[2, 2] = 5.0
    areas = erf_area(contributions, (0.2, 0.5, 0.89, 0.95))
    # 25 values of log10(2) within 5 x 5, of them 9 in the middle; one of log10(6), 9.4 % of all, 8 away from it.
    assert [area.side for area in areas] == [3, 5, 5, 17]
    assert areas[0].ratio == pytest.approx(9 / 441)
    edge = torch.zeros(9, 9)
    edge[0, 0] = 1.0
    assert erf_area(edge, (0.5,))[0][1:] == (None, None)
    assert float(log_contributions(contributions).max()) == 1.0
    picture = erf_picture(contributions, areas)
    assert picture.shape == (21, 21, 3)
    assert picture.std() > 0


def test_section_of_a_report():
    model = create_model("unireplknet_t", depths=(1,), dims=(8,), kernel_sizes=((3,),), num_classes=3)
    section = erf_section(model, (torch.randn(1, 3, 32, 32),))
    assert section is not None
    assert [type(part).__name__ for part in section.parts] == ["Table", "Images"]
    assert erf_section(nn.Linear(3, 2), (torch.randn(1, 3),)) is None
    assert erf_section(nn.Flatten(), (torch.randn(1, 3, 32, 32),)) is None


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 1, 9, 9), "images must hold at least one image"),
        (torch.zeros(9, 9), r"images must be \(C, H, W\) or \(N, C, H, W\), got \(9, 9\)"),
        ([torch.ones(1, 9, 9), torch.ones(1, 9, 8)], "images must have one size"),
    ],
)
def test_wrong_images_are_named(images, message: str):
    with pytest.raises(ValueError, match=message):
        contribution_map(positive(nn.Conv2d(1, 1, 3, padding=1)), images)


def test_wrong_maps_and_shares_are_named():
    with pytest.raises(ValueError, match=r"contributions must be \(H, W\) and not negative"):
        erf_area(-torch.ones(5, 5))
    with pytest.raises(ValueError, match="thresholds must lie between 0 and 1"):
        erf_area(torch.ones(5, 5), (1.0,))
