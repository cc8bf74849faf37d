"""Settings of a training are checked when they are made."""

from __future__ import annotations

import pytest

from convatlas.errors import UnknownName
from convatlas.training.settings import Training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulate": -1}, "accumulate must be at least 1, got -1"),
        ({"repeated_augmentation": 0}, "repeated_augmentation must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"lr": float("inf")}, "lr must be positive, got inf"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"cosine_epochs": 0}, "cosine_epochs must be positive"),
        ({"decay_epochs": 0}, "decay_epochs must be positive"),
        ({"decay_rate": 0}, "decay_rate must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"min_lr": float("nan")}, "min_lr must not be negative, got nan"),
        ({"warmup_lr": -1}, "warmup_lr must not be negative"),
        ({"warmup_epochs": -1}, "warmup_epochs must not be negative"),
        ({"checkpoint_minutes": -1}, "checkpoint_minutes must not be negative"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
        ({"layer_decay": 1.1}, r"layer_decay must be in \(0, 1\], got 1.1"),
        ({"plateau_epochs": 0}, "plateau_epochs must be at least 1, got 0"),
        ({"decay_at": (3, 2)}, r"decay_at must be positive epochs in rising order, got \(3, 2\)"),
        ({"decay_at": (0, 2)}, "decay_at must be positive epochs in rising order"),
        ({"lr_factors": {"head": -1}}, "lr_factors must not be negative, got -1 for head"),
        ({"seed": -1}, "seed must be from 0"),
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"strategy": "fsdp", "precision": "16"}, "precision must be 32 or bf16 with the strategy fsdp, got 16"),
        ({"devices": 0}, "devices must be 'auto' or at least 1, got 0"),
        ({"epochs": 3, "warmup_epochs": 2, "cooldown_epochs": 2}, r"must not be more than epochs, got 2 \+ 2 and 3"),
        ({"schedule": "step", "cooldown_epochs": 1}, "cooldown_epochs must be 0 with the step schedule, got 1"),
    ],
)
def test_values_out_of_range_are_named(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Training(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adam"}, "unknown optimizer 'adam': did you mean adamw?"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin': did you mean cosine?"),
        ({"strategy": "fdsp"}, "unknown strategy 'fdsp': did you mean fsdp"),
        ({"methods": {"trakt": {}}}, "unknown method 'trakt': did you mean tract"),
        ({"precision": "64"}, "unknown precision '64'"),
        ({"accelerator": "cuda"}, "unknown accelerator 'cuda'"),
    ],
)
def test_unknown_names_offer_the_nearest(settings: dict, message: str):
    with pytest.raises(UnknownName, match=message):
        Training(**settings)


def test_the_limits_themselves_are_accepted():
    Training(epochs=1, warmup_epochs=1, momentum=0, ema=0.0, layer_decay=1, weight_decay=0, min_lr=0, workers=0)
    Training(epochs=3, warmup_epochs=1, cooldown_epochs=2, devices=1, checkpoint_minutes=0, seed=2**63 - 1)
