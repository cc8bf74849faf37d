"""The additive margin, as a method and in the published recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.cli.main import main
from convatlas.errors import Unsupported
from convatlas.experiments.small_training import recipe_settings
from convatlas.nn.margin_softmax import AMSoftmax
from convatlas.recognition.task import Recognition
from convatlas.training.additive_margin import AdditiveMargin
from convatlas.training.optim import learning_rate
from convatlas.training.task import split_settings


def loss_fn(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(model(batch["image"]), batch["label"])}


@pytest.mark.parametrize("margin", [None, 0.1])
def test_losses_have_the_margin_and_predictions_have_not(margin: float | None):
    model = nn.Sequential(nn.Linear(4, 6), AMSoftmax(6, 3))
    batch = {"image": torch.randn(5, 4), "label": torch.tensor([0, 1, 2, 1, 0])}
    before = model(batch["image"])
    method = AdditiveMargin(margin=margin)
    found = method.losses(method.prepare(model), batch, loss_fn)["loss"]
    shifted = before - 32 * (margin or 0.35) * F.one_hot(batch["label"], 3)
    torch.testing.assert_close(found, F.cross_entropy(shifted, batch["label"]))
    torch.testing.assert_close(model(batch["image"]), before)


def test_what_cannot_be_trained_is_named():
    with pytest.raises(Unsupported, match="Linear must have one classifier of angles, got 0"):
        AdditiveMargin().prepare(nn.Linear(2, 2))
    batch = {"image": torch.randn(2, 6), "label": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"labels must be numbers of classes \(B\) for a margin, got \(2, 3\)"):
        AdditiveMargin().losses(AMSoftmax(6, 3), batch, loss_fn)


def test_the_recipe_has_the_published_numbers():
    _, training = split_settings(Recognition, recipe_settings("tvconv_face"))
    rates = {0: 0.1, 21: 0.1, 22: 0.01, 30: 1e-3, 35: 1e-4, 37: 1e-4}
    for epoch, rate in rates.items():
        assert learning_rate(training, epoch * 10, 10) == pytest.approx(rate)
    assert (training.batch_size, training.epochs, training.weight_decay) == (512, 38, 5e-4)
    assert training.optimizer == "sgd"
    assert training.decay_all


def test_the_recipe_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = {"width_mult": 0.1, "stages": [[1, 8, 1, 2]], "embedding": 8, "hidden_channels": 2, "hidden_layers": 0}
    settings = {"run": tmp_path / "run", "data": "digits", "options": json.dumps(options), "image_size": 16}
    settings |= {"epochs": 1, "batch_size": 256, "accelerator": "cpu"}
    words = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["train", "recognition", "--recipe=tvconv_face", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "convatlas report 1"
