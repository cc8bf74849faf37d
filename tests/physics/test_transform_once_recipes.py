"""The published settings of Transform Once: numbers, and one step of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from convatlas.networks.registry import model_config
from convatlas.physics.field_forecasting import FieldForecasting
from convatlas.physics.operator_learning import OperatorLearning
from convatlas.training.optim import learning_rate
from convatlas.training.task import split_settings

FLOWS, AIRFOILS = (500, 100, 0.5), (400, 100, 0.6)
#: Epochs, epochs of a step of the learning rate, its factor; fields of the network's config.
RECIPES: dict[str, tuple[tuple[int, int, float], dict[str, Any], dict[str, Any]]] = {
    "t1_navier_stokes": (
        FLOWS,
        {"modes": 24, "width": 48, "depth": 8, "init": "vp"},
        {"width": 3, "depth": 1, "modes": 4},
    ),
    "t1u_navier_stokes": (FLOWS, {"modes": 24, "channel_exponent": 5}, {"channel_exponent": 0}),
    "t1_fno_navier_stokes": (
        FLOWS,
        {"modes": 24, "width": 48, "depth": 6, "init": "naive", "residual": True, "conv_residual": True},
        {"width": 3, "depth": 1, "modes": 4},
    ),
    "t1_ffno_navier_stokes": (FLOWS, {"modes": 24, "width": 64, "depth": 8}, {"width": 3, "depth": 1, "modes": 4}),
    "t1_airfoil": (
        AIRFOILS,
        {"modes": 64, "width": 48, "depth": 6, "resolution": 128},
        {"width": 3, "depth": 1, "modes": 4},
    ),
    "t1_fno_airfoil": (AIRFOILS, {"modes": 24, "resolution": 128}, {"width": 3, "depth": 1, "modes": 4}),
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


def settings(task: Any, name: str) -> dict[str, Any]:
    return dict(yaml.safe_load(task.recipe(name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", RECIPES)
def test_operator_learning(name: str, tmp_path: Path):
    (epochs, every, factor), network, tiny = RECIPES[name]
    given = settings(OperatorLearning, name)
    task, training = split_settings(OperatorLearning, given)
    assert (training.epochs, training.batch_size, training.optimizer) == (epochs, 64, "adamw")
    assert (training.weight_decay, training.decay_all, task.normalise, task.loss) == (1e-4, True, "none", "relative_l2")
    rates = [learning_rate(training, epoch * 10, 10) for epoch in (0, every - 1, every, 2 * every)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3 * factor, 1e-3 * factor**2])
    config = model_config(task.model)
    assert {key: getattr(config, key) for key in network} == network
    random = np.random.default_rng(0)
    channels = getattr(config, "in_channels", 1)
    fields = random.standard_normal((2, 12, channels, 24, 24)).astype(np.float32)
    np.savez(tmp_path / "fields.npz", x=fields[0], y=fields[1])
    small = {**given, "data": str(tmp_path / "fields.npz"), "options": tiny, "epochs": 1, "batch_size": 6}
    task, training = split_settings(OperatorLearning, small)
    task.prepare()
    batch = task.collate([task.train_set[index] for index in range(4)])
    loss = task.losses(batch)["loss"]
    loss.backward()
    assert 0.5 < float(loss) < 3
    assert all(each.grad is not None for each in task.network.parameters())


def test_every_recipe_is_tested():
    assert {name for name in OperatorLearning.recipes() if name.startswith("t1")} == set(RECIPES)
    assert set(FieldForecasting.recipes()) == {"t1u_scalarflow"}


def test_smoke(tmp_path: Path):
    given = settings(FieldForecasting, "t1u_scalarflow")
    task, training = split_settings(FieldForecasting, given)
    assert (task.context, task.train_steps, task.test_steps, task.order) == (2, 3, 10, 2)
    assert (training.epochs, training.batch_size, training.lr) == (20, 1, 1e-2)
    assert training.methods == {"cosine_restarts": {"first": 32}}
    config: Any = model_config(task.model)
    assert (config.kept, config.grid, config.in_channels) == ((224, 224), (1062, 600), 2)
    np.savez(tmp_path / "smoke.npz", x=np.random.default_rng(0).random((40, 28, 24)))
    small = {"data": str(tmp_path / "smoke.npz"), "options": {"modes": 24, "channel_exponent": 0}}
    more = {"val_fraction": 0.4, "test_fraction": 0.4, "test_steps": 3}
    task, _ = split_settings(FieldForecasting, {**given, **small, **more})
    task.prepare()
    task.losses({"frames": task.train_set[0]["frames"][None].repeat(2, 1, 1, 1, 1)})["loss"].backward()
    assert all(each.grad is not None for each in task.network.parameters())


def test_a_network_of_one_size_is_not_asked_for_other_grids():
    options = {"channel_exponent": 0}
    task = OperatorLearning(data="poisson", samples=4, resolution=24, model="t1_dfpnet_airfoil", options=options)
    task.prepare()
    assert task.other_resolutions() == []
    options = {"modes": 16, "width": 2, "depth": 1}
    t1 = OperatorLearning(data="poisson", samples=4, resolution=24, model="t1_navier_stokes", options=options)
    t1.prepare()
    others = t1.other_resolutions()
    assert [pairs.grid for pairs in others] == [(12, 12), (48, 48)]
    assert all(each.outputs.shape == each.pairs.x.shape for each in t1.measure(others))
