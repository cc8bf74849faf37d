"""The experiment and the recipes of the scaling MLPs: they run, and verdicts follow from numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convatlas.cli.main import main
from convatlas.experiments import scaling_mlps
from convatlas.experiments.small_training import recipe_settings
from convatlas.networks.registry import create_model, model_config
from convatlas.networks.scaling_mlps import BottleneckMLP
from convatlas.recognition.task import Recognition
from convatlas.report import Images, Report, Table
from convatlas.training.measure import count_parameters
from convatlas.training.optim import Lion, learning_rate, make_optimizer
from convatlas.training.task import split_settings
from convatlas.weights import save_weights

UNKNOWN = "cannot be told at this scale"
RECIPES = ("scaling_mlps_pretrain", "scaling_mlps_finetune", "scaling_mlps_linear")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The verdicts of given accuracies after the least, the middle and the most data; ``noise`` differs by seed."""

    def verdicts(
        mlp: float = 90.0,
        standard: float = 85.0,
        gaps: tuple[float, float] = (20.0, 5.0),
        noise: float = 0.0,
        **lost: float,
    ) -> list[str]:
        def curves(middle: float, least: float = 60.0, most: float = 95.0) -> list[Any]:
            steps = {scaling_mlps.BUDGETS[0]: least, scaling_mlps.BUDGETS[1]: middle, scaling_mlps.BUDGETS[2]: most}
            return [
                scaling_mlps._Curve(1, [steps.get(n, 0.0) + noise * (-1) ** seed for n in scaling_mlps.STEPS])
                for seed in scaling_mlps.SEEDS
            ]

        noise, mine = 0.0, noise
        other, conv = curves(standard), curves(90.0, 60.0, 95.0)
        permuted = curves(mlp - lost.get("of_mlp", 0.0)), curves(90.0 - lost.get("of_cnn", 20.0))
        noise = mine
        ours = curves(mlp, 60.0 - gaps[0], 95.0 - gaps[1])
        claims = scaling_mlps._claims(ours, other, conv)
        claims += scaling_mlps._permutation_claims(ours, permuted[0], conv, permuted[1])
        return [claim.verdict for claim in claims]

    return verdicts


def test_verdicts_follow_from_the_accuracies(measured: Callable[..., list[str]]) -> None:
    assert measured() == ["holds"] * 4
    assert measured(standard=91.0)[0] == "does not hold"
    assert measured(standard=89.0, noise=3.0)[0] == UNKNOWN
    assert measured(gaps=(5.0, 8.0))[1] == "does not hold"
    assert measured(of_cnn=4.0)[2] == "does not hold"
    assert measured(of_mlp=3.5)[3] == "does not hold"


def test_networks_are_of_equal_size_and_shapes_of_every_class_differ() -> None:
    mlp = scaling_mlps._bottleneck(scaling_mlps.WIDTHS[-1])
    assert count_parameters(scaling_mlps.STANDARD.build()) == pytest.approx(count_parameters(mlp), rel=0.02)
    images, labels = scaling_mlps.draw_shapes(4000, torch.Generator().manual_seed(0))
    assert images.shape == (4000, 1, scaling_mlps.SIDE, scaling_mlps.SIDE)
    counts = labels.bincount(minlength=len(scaling_mlps.SHAPES))
    assert counts.min() > 400
    means = torch.stack([images[labels == label].abs().mean(0).flatten() for label in range(len(counts))])
    assert torch.pdist(means).min() > 0.1
    again = scaling_mlps.draw_shapes(4000, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], images)


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    for name, value in {
        "SEEDS": (0, 1),
        "STEPS": (1, 2, 3, 4, 8, 16),
        "BUDGETS": (2, 8, 16),
        "TEST_IMAGES": 100,
        "BATCH": 16,
        "WIDTHS": (4, 8),
    }.items():
        monkeypatch.setattr(scaling_mlps, name, value)
    report = scaling_mlps.run("quick")
    assert report.claims[1].verdict == UNKNOWN
    parts = [part for section in report.sections for part in section.parts]
    table = next(part for part in parts if isinstance(part, Table))
    assert [row[0] for row in table.rows] == [
        *("bottleneck MLP 4", "bottleneck MLP 8", "standard MLP", "convolutional"),
        *("bottleneck MLP 8, permuted", "convolutional, permuted"),
    ]
    assert [row[-1] is None for row in table.rows] == [True, False, True, False, True, True]
    shapes, first = (part for part in parts if isinstance(part, Images))
    assert [caption for _, caption in shapes.images] == list(scaling_mlps.SHAPES)
    assert all(pixels.shape == (16, 16) and pixels.std() > 10 for pixels, _ in (*shapes.images, *first.images))
    assert "Error and compute" in report.to_html()


def test_full_trains_from_scratch(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    options = {"block_dims": [[8, 4]]}
    report: Report = scaling_mlps.full(pictures, tmp_path, epochs=1, batch_size=8, options=options, accelerator="cpu")
    assert report.claims[0].verdict == UNKNOWN
    assert (tmp_path / "B_6-Wi_1024_cifar10" / "config.yaml").is_file()


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        scaling_mlps.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        scaling_mlps.run("full", data=tmp_path)


# Recipes


def test_recipes_have_the_published_numbers() -> None:
    tasks, trainings = zip(*(split_settings(Recognition, recipe_settings(name)) for name in RECIPES), strict=True)
    pretrain, finetune, linear = trainings
    assert (pretrain.optimizer, pretrain.lr, pretrain.batch_size, pretrain.epochs) == ("lion", 5e-5, 16384, 800)
    assert (tasks[0].mixup, tasks[0].augment.scale, tasks[0].label_smoothing) == (0.8, (0.08, 1.0), 0.3)
    for task, training in zip(tasks[1:], (finetune, linear), strict=True):
        assert (training.optimizer, training.lr, training.momentum, training.clip) == ("sgd", 0.01, 0.9, 1.0)
        assert (training.batch_size, training.epochs, task.mixup, task.label_smoothing) == (2048, 100, 0.0, 0.3)
        assert (task.augment.scale, task.augment.ratio, task.augment.hflip) == ((0.4, 1.0), (1.0, 1.0), 0.5)
    for task, training in zip(tasks, trainings, strict=True):
        assert [learning_rate(training, step, 10) for step in (0, 500)] == [training.lr] * 2
        assert training.weight_decay == 0.0
        assert training.accumulate == training.devices == 1
        config: Any = model_config(task.model)
        assert task.image_size == config.preprocess.size == 64


def test_recipes_move_what_they_should() -> None:
    network = create_model("B_6-Wi_512", num_classes=3, block_dims=((8, 4), (8, 4)), preprocess={"size": 4})
    assert isinstance(network, BottleneckMLP)
    _, pretrain = split_settings(Recognition, recipe_settings(RECIPES[0]))
    optimizer = make_optimizer(network, pretrain)
    assert isinstance(optimizer, Lion)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    head, body = set(network.linear_out.parameters()), set(network.parameters()) - set(network.linear_out.parameters())
    for name, rate in ((RECIPES[1], 0.01 * 0.1), (RECIPES[2], None)):
        _, training = split_settings(Recognition, recipe_settings(name))
        rates = {p: group["lr"] for group in make_optimizer(network, training).param_groups for p in group["params"]}
        assert {rates[parameter] for parameter in head} == {0.01}
        assert {rates.get(parameter) for parameter in body} == {rate}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train(recipe: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"block_dims": [[8, 4]]}
    start = create_model("B_6-Wi_512", num_classes=7, preprocess={"size": 8}, **options)
    save_weights(start, tmp_path / "start.safetensors")
    settings = {
        "run": str(tmp_path / "run"),
        "data": str(pictures),
        "options": json.dumps(options),
        "weights": str(tmp_path / "start.safetensors"),
        "image_size": 8,
        "epochs": 1,
        "batch_size": 8,
        "test_augmentations": 2,
        "accelerator": "cpu",
    }
    words = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["train", "recognition", f"--recipe={recipe}", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "convatlas report 1"
    trained = Recognition.load(tmp_path / "run").network
    assert torch.equal(trained.linear_in.weight, start.linear_in.weight) == (recipe == "scaling_mlps_linear")
