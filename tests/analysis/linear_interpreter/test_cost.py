from __future__ import annotations

import torch
from torch import nn

from convatlas.analysis.linear_interpreter.cost import matrix_cost, peak_bytes


def test_matrix_cost():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1)).eval()
    cost = matrix_cost(model, torch.randn(1, 1, 8, 8), pairs=3)
    assert cost.difference < 1e-5
    assert cost.time > 0
    assert cost.spread >= 0
    assert cost.memory > 0


def test_peak_of_memory():
    def call() -> None:
        for _ in range(3):
            a = torch.zeros(1000)
            b = a + 1
            b.add_(1)
            a.view(10, 100)
            del a, b

    assert peak_bytes(call) == 2 * 4000
