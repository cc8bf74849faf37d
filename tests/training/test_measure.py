"""What a model costs, and what was measured where."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import nn

import convatlas
from convatlas.training.measure import count_parameters, kept_bytes, latency, peak_bytes, provenance


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
    assert told["allocator"] in ("large blocks are kept", "as the system sets it")


def test_latency_leaves_the_mode_of_every_part():
    model = nn.Sequential(nn.Dropout().eval(), nn.BatchNorm1d(1)).train(False)
    model[1].train()
    latency(model, torch.zeros(2, 1), repeats=1, warm_up=0)
    assert [part.training for part in model.modules()] == [False, False, True]


def test_peak_counts_what_lies_in_memory_at_the_same_time():
    x = torch.zeros(1000)
    assert peak_bytes(x.relu) == 4000
    assert peak_bytes(lambda: x.relu().exp().sin()) == 8000  # one is let go of before the next but one is made
    assert peak_bytes(lambda: x.view(10, 100)) == 0
    held: list[torch.Tensor] = []
    assert peak_bytes(lambda: held.extend(x.relu() for _ in range(5))) == 20000


def test_the_profiler_is_silent(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    peak_bytes(lambda: torch.zeros(1000))
    assert capfd.readouterr() == ("", "")
    assert "KINETO_LOG_LEVEL" not in os.environ


def test_kept_bytes_count_each_storage_once():
    weight = torch.randn(10, 10, requires_grad=True)
    x = torch.randn(5, 10)

    def call() -> torch.Tensor:
        y = x @ weight
        return y.exp() + y.view(-1).square().sum()

    # x for the product; y for the square; the exponential for itself
    assert kept_bytes(call) == 4 * (50 + 50 + 50)
    assert kept_bytes(call, without=[x]) == 4 * (50 + 50)
    with torch.no_grad():
        assert kept_bytes(call) == 0
