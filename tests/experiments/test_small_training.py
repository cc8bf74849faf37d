"""What the experiments share: the noise rule, recipes, published weights, the comparison of seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from convatlas.data.images import read_images
from convatlas.errors import CheckpointError, UnknownName
from convatlas.experiments import small_training
from convatlas.experiments.small_training import compare, published_accuracy, recipe_settings, resolved
from convatlas.networks.registry import create_model
from convatlas.training.settings import Training


def test_resolved_is_twice_the_standard_error() -> None:
    assert resolved([1.0, 1.0, 1.0])
    assert resolved([-2.0, -1.0, -1.5])
    assert not resolved([1.0, -1.0, 0.5])
    # mean 1, standard deviation 1, standard error 0.5: just at the bound with four values
    spread = (3 / 4) ** 0.5
    assert resolved([1 - spread, 1 + spread] * 2)
    assert not resolved([0.99 - spread, 0.99 + spread] * 2)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="unknown recipe of recognition 'inceptionnet': did you mean inceptionnext"):
        recipe_settings("inceptionnet")


def _compare(seeds: tuple[int, ...]) -> dict[str, Any]:
    networks = {
        "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)),
        "constant": lambda: nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), nn.Dropout(1.0)),
    }
    training = Training(epochs=2, batch_size=32, lr=1e-3, warmup_epochs=0)
    return compare(networks, training, seeds=seeds, train_fraction=0.5, advance=lambda _: None)


def test_images_can_be_changed_before_they_are_normalised() -> None:
    seen = []

    def change(images: torch.Tensor, seed: int) -> torch.Tensor:
        seen.append((tuple(images.shape[1:]), seed, images.min().item(), images.max().item()))
        return images[:, :, :1, :1]

    networks = {"corner": lambda: nn.Sequential(nn.Flatten(), nn.Linear(1, 10))}
    training = Training(epochs=1, batch_size=200, warmup_epochs=0)
    compare(networks, training, seeds=(3,), train_fraction=0.2, advance=lambda _: None, change=change)
    assert seen == [((1, 32, 32), 6, 0, 1), ((1, 32, 32), 7, 0, 1)]


def test_compare_pairs_the_seeds() -> None:
    first, again = _compare((0, 1)), _compare((1, 2))
    assert first["linear"][1] == again["linear"][0]  # a seed decides everything
    assert first["linear"][0].losses != first["linear"][1].losses
    for result in first["linear"]:
        assert result.parameters == 10_250
        assert result.accuracy > 80
        assert result.losses[1] < result.losses[0]
    # Trained on zeros the scores stay random: chance is 10 %.
    assert all(result.accuracy < 30 for result in first["constant"])


def test_published_accuracy_measures_or_tells_why(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = read_images(pictures)["val"]
    assert published_accuracy("resnet18", images) == "the images have 2 classes, the weights 1000"
    asked = []

    def tiny(name: str, *, weights: str, in_channels: int) -> nn.Module:
        asked.append((name, weights, in_channels))
        torch.manual_seed(0)
        return create_model(name, num_classes=2, widths=(4, 4, 4, 4), stem_width=4)

    monkeypatch.setattr(small_training, "IMAGENET_CLASSES", 2)
    monkeypatch.setattr(small_training, "create_model", tiny)
    measured = published_accuracy("resnet18", images)
    assert isinstance(measured, float)
    assert measured % 12.5 == 0  # of eight pictures
    assert asked == [("resnet18", "published", 3)]

    def offline(*_: object, **__: object) -> nn.Module:
        raise CheckpointError("download.pytorch.org cannot be reached")

    monkeypatch.setattr(small_training, "create_model", offline)
    assert published_accuracy("resnet18", images) == "download.pytorch.org cannot be reached"
