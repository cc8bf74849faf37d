"""Subspace attention beyond what the battery tests."""

from __future__ import annotations

import pytest
import torch

from convatlas.nn.mixers.ulsam import ULSAM
from convatlas.training.measure import count_parameters


@pytest.mark.parametrize(("channels", "groups", "count"), [(512, 4, 2572), (96, 4, 492), (160, 1, 803), (320, 8, 1624)])
def test_parameters(channels: int, groups: int, count: int):
    assert count_parameters(ULSAM(channels, num_splits=groups)) == count


def test_maps_are_distributions_and_the_result_follows_from_them():
    layer = ULSAM(12, num_splits=3).double().eval()
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    maps = layer.attention_maps(x)
    assert maps.shape == (2, 3, 5, 7)
    assert maps.min() >= 0
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(layer(x) / x - 1, maps.repeat_interleave(4, 1))


def test_a_constant_map_spreads_evenly():
    layer = ULSAM(8).eval()
    torch.nn.init.zeros_(layer.point)
    x = torch.randn(2, 8, 4, 5)
    torch.testing.assert_close(layer(x), x * (1 + 1 / 20))


def test_whole_groups_can_be_exchanged():
    layer = ULSAM(6, num_splits=2).double().eval()
    with torch.no_grad():
        layer.bn_dws.running_mean.normal_()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    other = ULSAM(6, num_splits=2).double().eval()
    state = {
        key: value if value.dim() == 0 else torch.cat(value.chunk(2)[::-1]) for key, value in layer.state_dict().items()
    }
    other.load_state_dict(state)
    torch.testing.assert_close(other(torch.cat(x.chunk(2, 1)[::-1], 1)), torch.cat(layer(x).chunk(2, 1)[::-1], 1))


def test_the_groups_follow_the_definition_one_by_one():
    layer = ULSAM(8, num_splits=2).double().eval()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    found = []
    for index, part in enumerate(x.chunk(2, 1)):
        rows = slice(4 * index, 4 * index + 4)
        d = (part * layer.scale[rows, None, None] + layer.shift[rows, None, None]) / (1 + 1e-5) ** 0.5
        p = torch.nn.functional.max_pool2d(d.relu(), 3, 1, 1)
        q = (p * layer.point[index, :, None, None]).sum(1, keepdim=True) + layer.offset[index]
        a = (q / (1 + 1e-5) ** 0.5).relu().flatten(1).softmax(1).reshape(2, 1, 5, 6)
        found.append(part * a + part)
    torch.testing.assert_close(layer(x), torch.cat(found, 1))


def test_channels_must_be_divisible():
    with pytest.raises(ValueError, match="channels must be divisible by num_splits, got 10 and 4"):
        ULSAM(10)
