"""Training density values beside the weights."""

from __future__ import annotations

import pytest
import torch

from convatlas.errors import Unsupported
from convatlas.nn.conv.weighted_conv import WeightedConv2d
from convatlas.training.density import DensityTraining
from convatlas.training.method import Together, make_methods
from convatlas.training.optim import restarted_cosine
from convatlas.training.settings import Training


def test_schedule_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10, 2)
    for epoch in range(75):
        assert restarted_cosine(epoch) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()
    with pytest.raises(ValueError, match="first and growth"):
        DensityTraining(first=0)


def test_values_have_a_rate_of_their_own():
    method = make_methods({"density": {"lr": 0.5}})["density"]
    layer = WeightedConv2d(1, 1, 3, density=(0.5,), trainable_density=True)
    (optimizer,) = Together({"density": method}).optimizers(layer, Training(lr=1e-3, weight_decay=0.0))
    method.start_epoch(layer, 5)
    layer(torch.randn(1, 1, 5, 5)).sum().backward()
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, pytest.approx(0.25)]
    assert float(layer.parametrizations.weight[0].density) != 0.5
    with pytest.raises(Unsupported, match="no trained density"):
        method.optimizers(torch.nn.Linear(1, 1), Training())
