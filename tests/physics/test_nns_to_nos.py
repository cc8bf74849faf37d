"""The recipes of neural operators train, and the losses are what they are called."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import yaml

from convatlas.data.fields import FieldPairs
from convatlas.networks.registry import create_model
from convatlas.physics.operator_learning import OperatorLearning
from convatlas.training.optim import learning_rate
from convatlas.training.settings import Training
from convatlas.training.task import split_settings

TINY: dict[str, dict[str, Any]] = {
    "fno": {"n_modes": 4, "dim": 4},
    "fno_disco": {"n_modes": 4, "dim": 4, "radius_cutoff": 0.25},
    "fno_difference": {"n_modes": 4, "dim": 4},
    "unet": {"dim": 4, "dim_mults": [1, 2], "depth": 1, "kernel_size": 3},
    "vit": {"patch_size": 4, "dim": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8},
    "oformer": {"dim": 8, "depth": 1, "num_heads": 2, "n_modes": 4},
    "multi_resolution": {"n_modes": 4, "dim": 4},
}
#: Learning rate at the beginning of an epoch, as published.
RATES = {
    **{name: {0: 5e-4, 32: 5e-4, 33: 2.5e-4, 299: 5e-4 / 2**9} for name in ("fno", "fno_disco", "fno_difference")},
    **{name: {0: 5e-4, 50: 2.5e-4, 499: 5e-4 / 2**9} for name in ("unet", "vit")},
    "oformer": {0: 1e-4, 33: 5e-5},
    "multi_resolution": {0: 5e-4, 20: 2.5e-4, 99: 5e-4 / 2**4},
}


def simulated(samples: int, resolution: int, seed: int) -> FieldPairs:
    """Smooth fields and their squares, in place of a simulator that takes long."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, resolution, resolution, generator=generator).numpy()
    return FieldPairs(x, x**2)


@pytest.mark.parametrize("name", TINY)
def test_recipes_have_the_published_numbers_and_train(name: str, monkeypatch: pytest.MonkeyPatch):
    from convatlas.data.simulators import SIMULATORS

    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setitem(SIMULATORS, "navier_stokes_forcing", simulated)
    recipe = yaml.safe_load(OperatorLearning.recipe(f"nns_to_nos_{name}").read_text(encoding="utf-8"))
    task, training = split_settings(OperatorLearning, recipe)
    assert (task.samples, task.loss, task.normalise) == (12000, "l2_sum_squared", "inputs")
    assert (training.batch_size, training.weight_decay) == ((2, 1e-6) if name == "oformer" else (16, 1e-4))
    for epoch, rate in RATES[name].items():
        assert learning_rate(training, epoch * 10, 10) == pytest.approx(rate)
    assert task.resolutions == ((64, 128, 256) if name == "multi_resolution" else (128,))

    sizes = [8, 12] if name == "multi_resolution" else 16
    changes = {"samples": 8, "resolution": sizes, "options": TINY[name]}
    small, _ = split_settings(OperatorLearning, {**recipe, **changes})
    small.prepare()
    batch = small.collate([small.train_set[index] for index in range(len(small.train_set))])
    assert len(batch["x"]) == len(small.resolutions)
    small.losses(batch)["loss"].backward()
    gradients = [parameter.grad for parameter in small.network.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert all(math.isfinite(error) for error in small.quality().values())


@pytest.mark.parametrize("loss", ["h1", "l2_sum_squared"])
def test_losses_of_the_task(loss: Any):
    from convatlas.ops.field_losses import h1_error, l2_sum_squared

    task = OperatorLearning(model="fno", options=TINY["fno"], loss=loss, normalise="none")
    task.network = create_model("fno", **TINY["fno"])  # type: ignore[assignment]
    sets = [torch.randn(2, 3, 1, 9, 9), torch.randn(2, 2, 1, 8, 8)]
    batch = {"x": [pair[0] for pair in sets], "y": [pair[1] for pair in sets]}
    with torch.no_grad():
        found = task.losses(batch)["loss"]
        answers = [task.network(x) for x in batch["x"]]
    if loss == "h1":
        expected = torch.cat([h1_error(a, y, relative=True) for a, y in zip(answers, batch["y"], strict=True)]).mean()
    else:
        roots = [l2_sum_squared(a, y).sqrt() for a, y in zip(answers, batch["y"], strict=True)]
        expected = torch.stack(roots).sum().square()
    torch.testing.assert_close(found, expected)


def test_training_settings_are_complete():
    known = {entry.name for entry in dataclasses.fields(Training)} | {
        entry.name for entry in dataclasses.fields(OperatorLearning)
    }
    for name in TINY:
        recipe = yaml.safe_load(OperatorLearning.recipe(f"nns_to_nos_{name}").read_text(encoding="utf-8"))
        assert set(recipe) <= known
