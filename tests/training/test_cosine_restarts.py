from __future__ import annotations

import pytest
import torch
from torch import nn

from convatlas.errors import Unsupported
from convatlas.training.cosine_restarts import CosineRestarts
from convatlas.training.settings import Training


@pytest.mark.parametrize(("first", "growth"), [(4, 1), (2, 2)])
def test_rates_are_those_of_torch_also_after_resuming(first: int, growth: int):
    method = CosineRestarts(first=first, growth=growth, min_lr=1e-3)
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    training = Training(lr=0.1)
    (optimizer,), reference = method.optimizers(model, training), torch.optim.AdamW(other.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(reference, first, growth, eta_min=1e-3)
    for step in range(11):
        if step == 5:
            (resumed,) = method.optimizers(model, training)
            resumed.load_state_dict(optimizer.state_dict())
            optimizer = resumed
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([schedule.get_last_lr()[0]] * 2)
        reference.step()
        schedule.step()


def test_bad_settings():
    with pytest.raises(ValueError, match="first and growth must be at least 1"):
        CosineRestarts(first=0)
    with pytest.raises(ValueError, match="min_lr must not be negative, got -1"):
        CosineRestarts(min_lr=-1)
    with pytest.raises(Unsupported, match="cosine_restarts needs the optimizer adamw, which counts its steps, got sgd"):
        CosineRestarts().optimizers(nn.Linear(2, 2), Training(optimizer="sgd"))
