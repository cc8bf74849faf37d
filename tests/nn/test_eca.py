"""The ECA layer: what the paper says of it, its relatives, the authors' layout, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convatlas.nn.mixers.eca import ECA, ChannelGate, eca_per_stage
from convatlas.weights import load_weights


def filled(layer: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    return layer


@pytest.mark.parametrize(
    "layer", [ECA(6, kernel_size=5), ECA(6, shared=False), ECA(6, padding="circular"), ChannelGate(6)]
)
def test_zero_weights_halve_the_input(layer: nn.Module) -> None:
    x = torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(filled(layer, 0.0)(x), x / 2)


def test_permuting_positions_permutes_the_output() -> None:
    layer, x = ECA(6).double(), torch.randn(2, 6, 12, dtype=torch.float64)
    order = torch.randperm(12)
    torch.testing.assert_close(layer(x[..., order]), layer(x)[..., order])


def test_scale_lies_between_0_and_1_and_is_one_a_channel() -> None:
    x = torch.rand(2, 16, 5, 5) + 0.5
    scale = ECA(16)(x) / x
    assert 0 < scale.min() < scale.max() < 1
    torch.testing.assert_close(scale, scale[:, :, :1, :1].expand_as(scale))


def test_kernel_of_one_is_the_diagonal_gate_with_one_weight() -> None:
    layer, gate, x = ECA(kernel_size=1), ChannelGate(7, groups=7), torch.randn(2, 7, 3)
    filled(gate, layer.weight.item())
    torch.testing.assert_close(layer(x), gate(x))


def test_equals_the_full_gate_with_a_banded_matrix() -> None:
    layer, gate, x = ECA(5, kernel_size=3), ChannelGate(5), torch.randn(2, 5, 3, 3)
    before, centre, after = layer.weight.detach().flatten()
    with torch.no_grad():
        gate.weight.copy_(
            torch.diag(before.expand(4), -1) + torch.diag(centre.expand(5)) + torch.diag(after.expand(4), 1)
        )
    torch.testing.assert_close(layer(x), gate(x))


def test_unshared_with_equal_rows_is_the_shared_layer() -> None:
    shared, free, x = ECA(6, kernel_size=3), ECA(6, kernel_size=3, shared=False), torch.randn(2, 6, 3, 3)
    assert free.weight.shape == (6, 1, 3)
    with torch.no_grad():
        free.weight.copy_(shared.weight.expand(6, 1, 3))
    torch.testing.assert_close(shared(x), free(x))


@pytest.mark.parametrize(("channels", "size"), [(16, 3), (256, 5), (2048, 7)])
def test_kernel_size_follows_the_channels(channels: int, size: int) -> None:
    assert ECA(channels).weight.shape == (1, 1, size)


def test_fresh_weights_are_those_of_conv1d() -> None:
    for layer, conv in (
        (ECA(kernel_size=5), nn.Conv1d(1, 1, 5, bias=False)),
        (ECA(8, kernel_size=3, shared=False), nn.Conv1d(8, 8, 3, groups=8, bias=False)),
    ):
        for module in (layer, conv):
            torch.manual_seed(0)
            module.reset_parameters()
        torch.testing.assert_close(layer.weight, conv.weight)


@pytest.mark.parametrize(("groups", "count"), [(None, 0), (12, 12), (3, 48), (1, 144)])
def test_gate_sizes_and_range(groups: int | None, count: int) -> None:
    gate, x = ChannelGate(12, groups=groups), torch.rand(2, 12, 4, 4) + 0.5
    assert sum(parameter.numel() for parameter in gate.parameters()) == count
    scale = gate(x) / x
    assert 0 < scale.min() < scale.max() < 1


def test_loads_the_authors_names() -> None:
    for layer in (ECA(9, kernel_size=5), ECA(9, kernel_size=3, shared=False)):
        weight = torch.randn_like(layer.weight)
        load_weights(layer, {"conv.weight": weight})
        torch.testing.assert_close(layer.weight.detach(), weight)


def test_sizes_of_stages() -> None:
    makers = eca_per_stage("3557", 4)
    assert [make(32).weight.shape[2] for make in makers] == [3, 5, 5, 7]
    assert [make(32).channels for make in eca_per_stage((1, 3), 2)] == [32, 32]
    with pytest.raises(ValueError, match="kernel_sizes must be 4 odd numbers, one for each stage, got '355'"):
        eca_per_stage("355", 4)
    with pytest.raises(ValueError, match="got '3,5x'"):
        eca_per_stage("3,5x", 4)
    with pytest.raises(ValueError, match="must be odd, got 4"):
        eca_per_stage("34", 2)[1](8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "channels must be given, or kernel_size with shared weights"),
        ({"kernel_size": 3, "shared": False}, "channels must be given"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"kernel_size": 4}, "ECA kernel size must be odd, got 4"),
        ({"kernel_size": -1}, "ECA kernel size must be odd, got -1"),
        ({"channels": 8, "padding": "same"}, "padding must be 'zeros' or 'circular', got 'same'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ECA(**arguments)  # type: ignore[arg-type]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x must be \(B, 8, ...\), got \(2, 7, 3, 3\)"):
        ECA(8)(torch.zeros(2, 7, 3, 3))
    with pytest.raises(ValueError, match=r"x must be \(B, 8, ...\), got \(2, 8\)"):
        ChannelGate(8)(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="groups must divide the 8 channels, got 3"):
        ChannelGate(8, groups=3)
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        ChannelGate(0)
