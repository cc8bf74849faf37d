"""HorNet beyond what the battery tests: sizes, degrees, global filters, the feature pyramid."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from convatlas.cost import cost
from convatlas.errors import UnknownName
from convatlas.networks.hornet import GatedConvModule, HorFPN
from convatlas.networks.registry import create_model
from convatlas.nn.mixers.gnconv import GlobalLocalFilter, RecursiveGatedConv, gate_widths
from convatlas.ops.global_filter import global_filter, resize_global_filter
from convatlas.training.measure import count_parameters
from convatlas.training.optim import parameter_groups

# Model -> parameters, and 10^9 multiply-adds at 224 x 224 where the sheet of the paper tells them without transforms.
PUBLISHED = {
    "hornet_tiny_7x7": (22_409_512, 3.977),
    "hornet_tiny_gf": (22_991_848, None),
    "hornet_small_7x7": (49_528_264, 8.826),
    "hornet_small_gf": (50_401_768, None),
    "hornet_base_7x7": (87_256_680, 15.6),
    "hornet_base_gf": (88_421_352, None),
    "hornet_base_gf_img384": (92_099_560, None),
    "hornet_large_7x7": (194_542_504, 34.8),
    "hornet_large_gf": (196_289_512, None),
    "hornet_large_gf_img384": (201_806_824, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str):
    parameters, macs = PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(name).eval()
        assert count_parameters(model) == parameters
        assert [feature.channels for feature in model.feature_info] == [model.config.base_dim * 2**i for i in range(4)]
        if macs is not None:
            # The published figures count norms too, in a way of their own.
            assert cost(model, *model.example_inputs()).total.macs / 1e9 == pytest.approx(macs, rel=3e-3)


def test_parameters_of_the_layer():
    channels, order = 16, 3
    widths = gate_widths(channels, order)
    projections = sum(before * after + after for before, after in pairwise(widths))
    expected = 2 * channels**2 + 2 * channels + 50 * sum(widths) + channels**2 + channels + projections
    assert widths == (4, 8, 16)
    assert count_parameters(RecursiveGatedConv(channels, order=order)) == expected


@pytest.mark.parametrize("order", [1, 2, 4])
def test_without_biases_the_layer_is_homogeneous(order: int):
    layer = RecursiveGatedConv(8, order=order).double()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    x = torch.randn(1, 8, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(3 * x), 3 ** (order + 1) * layer(x))


def test_the_scale_multiplies_the_bias_too():
    layer = RecursiveGatedConv(4, order=1, scale=0.5).double()
    nn.init.zeros_(layer.dwconv.weight)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    p = layer.proj_in(x)[:, :4]
    torch.testing.assert_close(layer(x), layer.proj_out(p * 0.5 * layer.dwconv.bias[:, None, None]))


def test_global_filter_is_a_circular_convolution():
    x, weight = torch.randn(2, 3, 6, 7, dtype=torch.float64), torch.randn(3, 6, 4, 2, dtype=torch.float64)
    kernel = torch.fft.irfft2(torch.view_as_complex(weight), s=(6, 7))
    expected = torch.zeros_like(x)
    for row in range(6):
        for column in range(7):
            expected += kernel[:, row, column, None, None] * x.roll((row, column), (2, 3))
    torch.testing.assert_close(global_filter(x, weight), expected)
    one = torch.zeros_like(weight)
    one[..., 0] = 1
    torch.testing.assert_close(global_filter(x, one), x)
    assert torch.autograd.gradcheck(global_filter, (x[:1].requires_grad_(), weight.requires_grad_()), fast_mode=True)


def test_filters_are_resized_between_their_corners():
    weight = torch.randn(2, 8, 5, 2)
    resized = resize_global_filter(weight, (15, 9))
    torch.testing.assert_close(resized[:, ::2, ::2], weight)
    assert resize_global_filter(weight, (8, 5)) is weight
    with pytest.raises(ValueError, match=r"weight must be \(C, h, w, 2\), got \(2, 8, 5\)"):
        resize_global_filter(weight[..., 0], (8, 5))


def test_channels_of_the_two_filters_take_turns():
    layer = GlobalLocalFilter(4, (4, 3)).double()
    layer.post_norm = nn.Identity()  # type: ignore[assignment]
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    local, _ = layer.pre_norm(x).chunk(2, 1)
    torch.testing.assert_close(layer(x)[:, 0::2], layer.dw(local))


def test_blocks_begin_at_the_identity():
    model = create_model("hornet_tiny_7x7", depths=(1, 1), base_dim=8, orders=(2, 2), filter_grids=(None, None))
    block = model.eval().stages[0][0]
    nn.init.zeros_(block.scale1.gamma)
    nn.init.zeros_(block.scale2.gamma)
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(block(x), x)


def test_published_layer_wise_decay():
    with torch.device("meta"):
        model = create_model("hornet_tiny_7x7")
    layers = model.layers()
    assert len(layers) == 14
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.7)
    assert min(group["lr_scale"] for group in groups) == pytest.approx(0.7**13)
    assert sum(parameter.numel() for group in groups for parameter in group["params"]) == count_parameters(model)


def test_dense_form_has_a_norm_for_each_map_and_loads_its_layout():
    options = {"depths": (1, 1), "base_dim": 8, "orders": (2, 2), "filter_grids": (None, (4, 3)), "dense": True}
    model = create_model("hornet_tiny_gf", **options).eval()
    assert {"norm0.weight", "norm1.weight"} <= set(model.state_dict())
    assert not any(key.startswith(("head", "norm.")) for key in model.state_dict())
    maps = model.forward_features(torch.randn(1, 3, 32, 32))
    assert [tuple(feature.shape[1:]) for feature in maps] == [(8, 8, 8), (16, 4, 4)]
    for feature in maps:
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature.mean(1)), atol=1e-5, rtol=0)


def test_pyramid_levels():
    model = HorFPN([8, 16, 32], 8, num_outs=5).eval()
    maps = [torch.randn(2, 8 * 2**level, 17 // 2**level, 13 // 2**level) for level in range(3)]
    levels = model(maps)
    assert [tuple(level.shape[2:]) for level in levels] == [(17, 13), (8, 6), (4, 3), (2, 2), (1, 1)]
    assert all(level.shape[1] == 8 for level in levels)
    with pytest.raises(ValueError, match="there must be 3 maps, got 2"):
        model(maps[:2])
    with pytest.raises(ValueError, match="num_outs must be at least the 3 maps"):
        HorFPN([8, 16, 32], 8, num_outs=2)


def test_the_module_form_has_other_channels_norm_and_activation():
    module = GatedConvModule(6, 8, dim_ratio=2, norm=nn.BatchNorm2d, act=nn.ReLU).eval()
    assert module(torch.randn(1, 6, 5, 4)).shape == (1, 8, 5, 4)
    assert GatedConvModule(6, 8, project_out=False)(torch.randn(1, 6, 5, 4)).shape == (1, 8, 5, 4)
    with pytest.raises(ValueError, match="dim_ratio must be 1 without project_out"):
        GatedConvModule(6, 8, dim_ratio=2, project_out=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecursiveGatedConv(12, order=4), r"channels must be divisible by 2\*\*\(order - 1\) = 8, got 12"),
        (lambda: RecursiveGatedConv(8, order=0), "order must be at least 1, got 0"),
        (lambda: RecursiveGatedConv(8, order=1, kernel_size=4), "kernel_size must be odd, got 4"),
        (lambda: GlobalLocalFilter(5), "channels must be even, got 5"),
        (lambda: create_model("hornet_tiny_7x7", orders=(2, 3)), "depths, orders and filter_grids must name the same"),
    ],
)
def test_impossible_settings_are_named(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(UnknownName, match="unknown init 'trunc'"):
        create_model("hornet_tiny_7x7", init="trunc")
