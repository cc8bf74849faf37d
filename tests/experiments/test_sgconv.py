"""The experiment on SGConv and its recipes, at a scale that only shows that they run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from convatlas.experiments import sgconv
from convatlas.experiments.small_training import recipe_settings, train_by_recipe
from convatlas.networks.registry import create_model
from convatlas.recognition.task import Recognition
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.settings import Training
from convatlas.training.task import split_settings


@pytest.mark.slow
def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    settings = {"SEEDS": (5,), "LENGTH": 64, "STEPS": 20, "KERNEL_DIM": 4, "TESTED": 32, "DECAYS": (1.0, 2.0, 4.0)}
    for name, value in settings.items():
        monkeypatch.setattr(sgconv, name, value)
    monkeypatch.setattr(sgconv, "_MIXERS", {"SGConv": None, "a": 20, "local": 9, "b": 64})
    monkeypatch.setattr(sgconv, "TRAIN_FRACTION", 0.1)
    monkeypatch.setattr(sgconv, "TRAINING", Training(epochs=1, batch_size=32, warmup_epochs=0))
    monkeypatch.setattr(sgconv, "NETWORK", sgconv.NETWORK.override(trunk={"dim": 4, "depth": 1}))
    report = sgconv.run("quick")
    assert len(report.claims) == 5
    assert "free taps" in report.to_html()


def test_markers_are_far_from_the_end():
    x, sign = sgconv._markers(50, torch.Generator().manual_seed(0))
    marked = x[..., 1]
    assert (marked != 0).sum() == 50
    assert not marked[:, sgconv.LENGTH // 8 :].any()
    assert torch.equal(marked.sum(1) > 0, sign == 1)


def test_kernels_differ_in_their_taps_only():
    structured, same = (sgconv._network(sgconv._MIXERS[name]) for name in ("SGConv", "as many free taps"))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (structured, same)]
    assert sizes[0] == sizes[1]


#: Learning rate, weight decay, batch, steps of an epoch, epochs, warm-up steps and training images.
IMAGES = {
    "sgconv_image": (0.01, 0.05, 50, 200_000, 200, 1000, 50_000),
    "sgconv_pathfinder": (0.004, 0.03, 64, 500_000, 200, 2500, 160_000),
    "sgconv_pathx": (0.004, 0.03, 64, 125_000, 50, 10_000, 160_000),
}


@pytest.mark.parametrize("recipe", IMAGES)
def test_recipes_for_images_have_the_published_numbers(recipe: str, pictures: Path, tmp_path: Path):
    lr, decay, batch, steps, epochs, warmup, images = IMAGES[recipe]
    task, training = split_settings(Recognition, recipe_settings(recipe))
    assert (task.model, training.lr, training.weight_decay, training.epochs) == (recipe, lr, decay, epochs)
    assert training.batch_size * training.accumulate == batch
    assert images // batch * epochs == steps
    assert training.warmup_epochs * (images // batch) == warmup
    assert learning_rate(training, warmup, images // batch) == pytest.approx(lr)
    model = create_model(recipe, trunk={"dim": 4})
    rates = {
        name: group["lr"]
        for group in make_optimizer(model, training).param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is other for other in group["params"])
    }
    assert any(".kernel." in name for name in rates)
    for name, rate in rates.items():
        assert rate == pytest.approx(0.001 if ".kernel." in name else lr), name
    small: dict[str, Any] = {
        "epochs": 1,
        "warmup_epochs": 0,
        "options": {"trunk": {"dim": 4}},
        "batch_size": 4,
        "accumulate": 1,
    }
    small["image_size"] = 12
    run = train_by_recipe(recipe, tmp_path / "run", data=str(pictures), **small)
    assert 0 <= run.top1 <= 100


@pytest.mark.parametrize("model", sgconv.RECIPES)
def test_recipes_for_tokens_train(model: str):
    recipe = sgconv.RECIPES[model]
    tiny = sgconv.SequenceRecipe(recipe.lr, recipe.weight_decay, 4, 3, 1, recipe.accuracy)
    network = create_model(model, trunk={"dim": 4, "depth": 1, "l_max": 32})
    batch = (*network.example_inputs(4), None, torch.tensor([0, 1, 1, 0]))
    before = [parameter.clone() for parameter in network.parameters()]
    losses = sgconv.train_sequences(network, iter([batch] * 3), tiny)
    assert len(losses) == 3
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_full_test_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sgconv, "train_by_recipe", lambda *_, **settings: SimpleNamespace(top1=87.0))
    report = sgconv.full(
        "cifar10",
        tmp_path,
        lists=sgconv.SequenceRecipe(0.01, 0.05, 4, 2, 1, 61.45),
        lists_counts=(8, 4),
        lists_options={"trunk": {"dim": 4, "depth": 1, "l_max": 64, "kernel_dim": 2}},
    )
    assert [claim.verdict for claim in report.claims] == ["cannot be told at this scale", "does not hold"]


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        sgconv.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        sgconv.run("slow")  # type: ignore[arg-type]
