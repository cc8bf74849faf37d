"""Masked computation equals sparse computation, lets nothing out of hidden cells, and leaves a network as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.networks.registry import create_model
from convatlas.nn.masked import ActiveMap, leaking_layers, masked
from convatlas.nn.norm import ChannelLayerNorm

SMALL = {"num_classes": 3, "depths": (1, 1, 1, 1)}


def cells(batch: int = 2, grid: tuple[int, ...] = (2, 2), visible: int = 2, seed: int = 0) -> Tensor:
    count = torch.Size(grid).numel()
    order = torch.rand(batch, count, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return (order < visible).reshape(batch, 1, *grid)


def network(kind: str) -> nn.Module:
    if kind == "resnet18":
        return create_model(kind, widths=(4, 4, 6, 8), stem_width=4, **SMALL).double()
    return create_model(kind, dims=(4, 4, 6, 8), layer_scale_init=0.5, **SMALL).double()


def sparse_conv(x: Tensor, conv: nn.Conv2d, active: Tensor) -> Tensor:
    """Submanifold convolution, site by site: sums over those neighbours that are active, at active sites."""
    out = x.new_zeros(len(x), conv.out_channels, *x.shape[2:])
    reach = conv.kernel_size[0] // 2
    sites = {tuple(site) for site in active[:, 0].nonzero().tolist()}
    for image, row, column in sites:
        value = conv.bias.clone()
        for down in range(-reach, reach + 1):
            for right in range(-reach, reach + 1):
                if (image, row + down, column + right) in sites:
                    value += conv.weight[:, :, down + reach, right + reach] @ x[image, :, row + down, column + right]
        out[image, :, row, column] = value
    return out


def test_masked_convolution_is_sparse_convolution():
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    x, shown = torch.randn(2, 3, 6, 6).double(), cells(grid=(3, 3), visible=4)
    with masked(shown, conv) as active, torch.no_grad():
        found = conv(active.mask(x))
    torch.testing.assert_close(found, sparse_conv(x, conv, active.at((6, 6))))


@pytest.mark.parametrize("even", [True, False])
def test_batch_norm_sees_the_visible_positions_alone(even: bool):
    norm, plain = nn.BatchNorm2d(5).double(), nn.BatchNorm1d(5).double()
    x = torch.randn(2, 5, 4, 6).double().requires_grad_()
    shown = cells()
    if not even:
        shown[0, 0] = True
    with masked(shown, norm) as active:
        found = norm(x)
    chosen = active.at((4, 6))[:, 0]
    torch.testing.assert_close(found.movedim(1, -1)[chosen], plain(x.movedim(1, -1)[chosen]))
    assert found.movedim(1, -1)[~chosen].abs().max() == 0
    torch.testing.assert_close(norm.running_var, plain.running_var)
    norm.eval(), plain.eval()
    with masked(shown, norm):
        torch.testing.assert_close(norm(x).movedim(1, -1)[chosen], plain(x.movedim(1, -1)[chosen]))


def test_the_statistics_equal_those_of_sums_over_masked_maps():
    """Mean = sum / n and variance = sum of squares / n - mean^2, with n visible positions and zeros elsewhere."""
    norm, x, shown = nn.BatchNorm2d(3, affine=False).double(), torch.randn(4, 3, 8, 8).double(), cells(4)
    with masked(shown, norm) as active:
        found = norm(x)
    mask = active.at((8, 8)).double()
    count, zeroed = mask.sum(), x * mask
    mean = zeroed.sum((0, 2, 3)) / count
    var = zeroed.square().sum((0, 2, 3)) / count - mean**2
    expected = (x - mean.view(-1, 1, 1)) / (var + norm.eps).sqrt().view(-1, 1, 1) * mask
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var * count / (count - 1))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)])
def test_norms_of_one_image_see_its_visible_positions(norm: nn.Module):
    x, shown = torch.randn(2, 4, 4, 4), cells()
    with masked(shown, norm) as active:
        found = norm(x)
    for image in range(2):
        chosen = active.at((4, 4))[image, 0]
        expected = norm(x[image : image + 1, :, chosen][..., None])[0, ..., 0]
        torch.testing.assert_close(found[image][:, chosen], expected)
    uneven = shown.clone()
    uneven[0] = True
    with masked(uneven, norm), pytest.raises(ValueError, match="equally much"):
        norm(x)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), ChannelLayerNorm(4)])
def test_layer_norms_of_both_layouts_are_masked_on_their_positions(norm: nn.Module):
    last = type(norm) is nn.LayerNorm
    x = torch.randn(2, 6, 8, 4) if last else torch.randn(2, 4, 6, 8)
    with masked(cells(), norm) as active:
        found = norm(x)
    expected = norm(x)
    mask = active.at((6, 8)).float()
    torch.testing.assert_close(found, expected * (mask.movedim(1, -1) if last else mask))


@pytest.mark.parametrize("even", [True, False])
def test_linear_layers_are_computed_at_the_visible_positions(even: bool):
    layer, x, shown = nn.Linear(3, 5).double(), torch.randn(2, 4, 6, 3).double().requires_grad_(), cells()
    if not even:
        shown[0, 0] = True
    rows = []
    with masked(shown, layer) as active:
        handle = layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
        found = layer(x)
        handle.remove()
    mask = active.at((4, 6)).movedim(1, -1)
    assert rows == [(int(mask.sum()), 3)]
    torch.testing.assert_close(found, layer(x) * mask)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad((layer(x) * mask).square().sum(), x)[0])


def test_means_over_the_map_are_means_over_the_visible_part():
    x, shown = torch.randn(2, 3, 4, 4), cells(visible=1)
    pool = nn.AdaptiveAvgPool2d(1)
    with masked(shown, pool) as active:
        zeroed = active.mask(x)
        pooled, mean, others = pool(zeroed).flatten(1), zeroed.mean((2, 3)), zeroed.mean(1)
    for image in range(2):
        expected = x[image][:, active.at((4, 4))[image, 0]].mean(1)
        torch.testing.assert_close(pooled[image], expected)
        torch.testing.assert_close(mean[image], expected)
    torch.testing.assert_close(others, zeroed.mean(1))


@pytest.mark.parametrize("kind", ["resnet18", "convnext_tiny"])
def test_hidden_cells_stay_zero_and_what_they_hold_changes_nothing(kind: str):
    model, x = network(kind).train(), torch.randn(2, 3, 64, 64).double()
    shown = cells()
    other = torch.where(ActiveMap(shown).at((64, 64)), x, torch.randn_like(x))
    with masked(shown, model) as active, torch.no_grad():
        maps = model.eval().forward_features(active.mask(x))
        again = model.forward_features(active.mask(other))
        for first, second in zip(maps, again, strict=True):
            assert first.masked_select(~active.at(tuple(first.shape[2:])).expand_as(first)).abs().max() == 0
            assert first.abs().max() > 0
            torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["resnet18", "convnext_tiny", "inceptionnext_atto", "unireplknet_a"])
def test_with_all_cells_visible_nothing_changes(kind: str):
    model = network(kind) if kind in ("resnet18", "convnext_tiny") else create_model(kind, num_classes=3).double()
    model.eval()
    x = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        expected = model(x)
        with masked(torch.ones(2, 1, 2, 2, dtype=torch.bool), model):
            torch.testing.assert_close(model(x), expected)


def test_the_network_is_as_it_was():
    model = network("resnet18")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="multiples of the"), masked(cells(grid=(3, 3)), model):
        model(torch.randn(2, 3, 64, 64).double())
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())
    assert model.state_dict().keys() == before.keys()


def test_three_position_axes():
    layers = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2), nn.MaxPool3d(2))
    with masked(cells(grid=(2, 2, 2), visible=3), layers) as active:
        found = layers(active.mask(torch.randn(2, 1, 4, 8, 4)))
    assert found.masked_select(~active.at((2, 4, 2)).expand_as(found)).abs().max() == 0


class Added(nn.Module):
    """Adds one to every position between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + 1)


def test_layers_that_read_hidden_positions_are_named():
    model, shown = Added(), cells()
    x = ActiveMap(shown).mask(torch.ones(2, 1, 4, 4))
    assert leaking_layers(model, shown, lambda: model(x)) == ("second",)
    line = nn.Conv1d(1, 1, 3)
    with pytest.raises(Unsupported, match="Conv1d"):
        leaking_layers(line, shown, lambda: line(torch.ones(2, 1, 9)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(2, 2, 2), "must be bool"),
        (torch.ones(2, 3, 2, 2, dtype=torch.bool), "must be bool"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.bool), "hidden whole"),
    ],
)
def test_bad_masks_are_refused(given: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        ActiveMap(given)
