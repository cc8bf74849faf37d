"""Operations and energy of spiking networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convatlas.analysis.spiking_energy import energy_report, layer_energies
from convatlas.nn.conv.sparse import SparseSequential, SubMConv2d
from convatlas.nn.spiking import IntegerLIF
from convatlas.ops.sparse import SparseTensor


def test_layers_count_pairs_and_spikes():
    places = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 3, 3]])
    features = torch.tensor([[0.4], [1.6], [9.0]])
    x = SparseTensor(features, places, (4, 4), 1)
    model = SparseSequential(SubMConv2d(1, 2, 3), IntegerLIF(), nn.Linear(2, 5))
    model[0].weight.data.fill_(1.0)
    model[0].bias.data.zero_()
    first, second = layer_energies(model, x)
    assert (first.name, first.macs, first.spikes) == ("0", 5 * 2, None)  # three places with themselves, two neighbours
    assert first.picojoules == pytest.approx(4.6 * 10)
    # Potentials 2, 2 and 9 become spikes 2, 2 and 4.
    assert (second.macs, second.spikes) == (3 * 2 * 5, pytest.approx(8 / 3))
    assert second.picojoules == pytest.approx(0.9 * 30 * 8 / 3)
    assert second.dense_picojoules == pytest.approx(4.6 * 30)
    assert model.training
    report = energy_report(model, x, name="two layers")
    assert "two layers takes" in report.summary
    assert len(report.to_html()) > 5000


def test_dense_layers_count_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 2))
    layers = layer_energies(model, torch.randn(2, 3, 5, 5))
    assert [each.macs for each in layers] == [2 * 4 * 25 * 27, 2 * 2 * 100]
    assert all(each.spikes is None for each in layers)
