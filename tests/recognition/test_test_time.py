"""Test-time augmentation on tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from convatlas.recognition.test_time import tta_predict


def test_probabilities_are_averaged() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 4))
    images = torch.randn(5, 3, 2, 2)
    shifts = iter((0.0, 1.0, -2.0))

    def augment(x: Tensor) -> Tensor:
        return x + next(shifts)

    found = tta_predict(model, images, augment, n=3)
    assert model.training
    assert model[1].training
    model.eval()
    expected = torch.stack([model(images + shift).softmax(1) for shift in (0.0, 1.0, -2.0)]).mean(0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(5))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        tta_predict(model, images, augment, n=0)
