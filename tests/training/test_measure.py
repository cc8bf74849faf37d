"""What a model costs, and what was measured where."""

from __future__ import annotations

import time

import torch
from torch import nn

import convatlas
from convatlas.training.measure import count_parameters, latency, provenance


def test_parameters_are_counted_once_and_buffers_not():
    layer = nn.Linear(3, 4)
    assert count_parameters(nn.Sequential(layer, nn.BatchNorm1d(4))) == 3 * 4 + 4 + 2 * 4
    assert count_parameters(nn.Sequential(layer, layer)) == 3 * 4 + 4


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        time.sleep(0.2 if len(self.calls) == 1 else 0.01)  # the first pass is a warm-up
        return x


def test_latency_is_the_median_in_milliseconds_of_evaluation_passes():
    model = Slow().train()
    measured = latency(model, torch.zeros(1), repeats=5)
    assert 10 <= measured < 100
    assert model.calls == [(False, False)] * 8
    assert model.training


def test_provenance_says_what_a_reader_needs():
    told = provenance(data="photos")
    assert told["convatlas"] == convatlas.__version__
    assert told["torch"] == torch.__version__
    assert told["data"] == "photos"
    assert {"python", "command", "date", "device"} < set(told)
