"""The experiment of TrAct: its verdicts follow from its numbers; its recipes have the published numbers and train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convatlas.cli.main import main
from convatlas.data.images import read_images
from convatlas.experiments import tract
from convatlas.experiments.small_training import recipe_settings
from convatlas.experiments.tract import _StepTime, _Trained
from convatlas.networks.registry import create_model
from convatlas.recognition.task import Recognition
from convatlas.report import Report, Table
from convatlas.training.optim import learning_rate
from convatlas.training.run import Run
from convatlas.training.task import split_settings
from convatlas.training.tract import TrAct, TrActConv2d

UNKNOWN = "cannot be told at this scale"
TINY: dict[str, Any] = {"depths": [1, 1, 1, 1], "widths": [4, 4, 4, 4], "stem_width": 4}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


def _verdicts(report: Report) -> list[str]:
    return [claim.verdict for claim in report.claims]


def _tables(report: Report) -> dict[str, Table]:
    return {part.title: part for section in report.sections for part in section.parts if isinstance(part, Table)}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """The quick report of trainings that reach the target in given epochs, one a seed."""

    def report(
        plain: tuple[int, ...] = (20, 25, 30),
        with_tract: tuple[int, ...] = (5, 6, 7),
        gain: float = 0.0,
        ratio: float = 1.05,
        spread: float = 0.1,
    ) -> Report:
        def train(build: Any, method: TrAct | None, rate: float, seed: int, *, stop: bool = False) -> _Trained:
            epochs = (plain if method is None else with_tract)[seed % 100]
            accuracies = [90.0] * (epochs - 1) + [95.0] * (tract.EPOCHS - epochs + 1)
            return _Trained(
                [*accuracies[:-1], 95.0 + (gain if method else 0.0)] if epochs <= tract.EPOCHS else accuracies
            )

        monkeypatch.setattr(tract, "_train", train)
        monkeypatch.setattr(tract, "_step_time", lambda seed, advance: _StepTime(ratio, 1.0, ratio, spread))
        return tract.run("quick")

    return report


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"EPOCHS": 2, "RATES": (0.01, 0.03), "SEEDS": (0, 1), "STEP_BATCH": 2, "PAIRS": 2}.items():
        monkeypatch.setattr(tract, name, value)
    monkeypatch.setattr(tract, "TARGET", 40.0)
    monkeypatch.setattr(tract, "create_model", lambda name, **options: create_model(name, **options, **TINY))
    report = tract.run("quick")
    assert len(report.claims) == 5
    epochs = _tables(report)["Epochs to 40 %"]
    assert [row[0] for row in epochs.rows] == ["plain gradient", "TrAct"]
    assert all(40 < float(row[-1] or 0) < 100 for row in epochs.rows)  # of 10 classes
    assert all(row[1] in tract.RATES for row in epochs.rows)
    (seeds, *_), steps = zip(*_tables(report)["Step time"].rows, strict=True), _tables(report)["Step time"].rows
    assert seeds == (0, 1)
    assert all(row[1] > 0 and row[2] > 0 for row in steps)
    assert "TrAct" in report.to_html()


def test_digits_vary_in_contrast_and_brightness() -> None:
    data, again = tract._digits(3), tract._digits.__wrapped__(3)
    assert all(torch.equal(one, other) for one, other in zip(data, again, strict=True))
    assert len(data.images) + len(data.test_images) == len(read_images("digits")["all"])
    assert data.images.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.images.std().item() == pytest.approx(1, abs=1e-5)
    ranges = data.images.amax((1, 2, 3)) - data.images.amin((1, 2, 3))
    assert ranges.max() > 7 * ranges.min()
    assert data.images.amin((1, 2, 3)).std() > 0.3


def test_epochs_are_those_to_the_target() -> None:
    assert _Trained([90.0, 95.0, 94.0, 96.0]).epochs == 2
    assert _Trained([90.0] * tract.EPOCHS).epochs == tract.EPOCHS + 1


def test_speed_is_judged_only_where_it_can_be_told(measured: Callable[..., Report]) -> None:
    assert _verdicts(measured())[::2][:2] == ["holds", "holds"]
    assert measured().claims[0].values == pytest.approx([20 / 5, 25 / 6, 30 / 7])
    assert _verdicts(measured(with_tract=(18, 22, 27)))[0] == "does not hold"
    assert _verdicts(measured(with_tract=(30, 28, 30), plain=(20, 20, 20)))[0] == "does not hold"
    assert _verdicts(measured(with_tract=(5, 30, 30), plain=(20, 20, 20)))[0] == UNKNOWN  # within the noise
    late = tract.EPOCHS + 1
    assert _verdicts(measured(plain=(late,) * 3))[0] == "holds"
    assert _verdicts(measured(plain=(late,) * 3, with_tract=(late, late, 5)))[0] == UNKNOWN


def test_accuracy_and_time_are_judged(measured: Callable[..., Report]) -> None:
    assert _verdicts(measured())[1::2] == ["holds", "holds"]
    assert _verdicts(measured(gain=-1.1))[1::2] == ["does not hold", "does not hold"]
    assert _verdicts(measured())[4] == "holds"
    assert _verdicts(measured(ratio=1.2))[4] == "does not hold"
    assert _verdicts(measured(ratio=1.2, spread=0.4))[4] == UNKNOWN


def test_full_trains_every_length_with_and_without(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tract, "LENGTHS", (1, 2))
    monkeypatch.setattr(tract, "EQUAL", ((1, 2),))
    report = tract.full(pictures, tmp_path, batch_size=4, options={**TINY, "small_stem": True}, accelerator="cpu")
    assert _verdicts(report) == [UNKNOWN] * 3
    rows = _tables(report)["Accuracy after the last epoch"].rows
    assert [row[0] for row in rows] == [1, 2]
    methods = {
        name: Run(tmp_path / name).settings()["methods"] for name in ("tract_1", "plain_1", "tract_2", "plain_2")
    }
    assert methods == {"tract_1": {"tract": {"lam": 0.1}}, "plain_1": {}, "tract_2": methods["tract_1"], "plain_2": {}}
    last = [Run(tmp_path / name).read_metrics()[-1]["val_accuracy"] for name in ("tract_2", "plain_2")]
    assert list(rows[1][1:3]) == [100 * value for value in last]


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        tract.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        tract.run("full", data=tmp_path)


# -- recipes -----------------------------------------------------------------------------------------------------------

RECIPES = {
    "tract_cifar10": (128, {0: 0.08, 50: 0.04, 100: 0.0}),
    "tract_cifar10_adam": (128, {0: 0.01, 50: 0.005, 100: 0.0}),
    "tract_resnet": (256, {0: 0.1, 29: 0.1, 30: 0.01, 60: 0.001, 89: 0.001}),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_numbers(recipe: str) -> None:
    batch, rates = RECIPES[recipe]
    task, training = split_settings(Recognition, recipe_settings(recipe))
    assert (training.batch_size, training.accumulate, training.devices, training.momentum) == (batch, 1, 1, 0.9)
    for epoch, rate in rates.items():
        assert learning_rate(training, epoch * 390, 390) == pytest.approx(rate, abs=1e-12)
    assert training.methods == {"tract": {"lam": 0.1}}
    small = recipe != "tract_resnet"
    assert (training.epochs, training.drop_last, training.weight_decay) == (
        (100, True, 0) if small else (90, False, 1e-4)
    )
    assert training.optimizer == ("adamw" if recipe.endswith("adam") else "sgd")
    assert (task.image_size, task.mean) == ((32, (0.4914, 0.4822, 0.4465)) if small else (224, None))
    assert (task.augment.pad_crop, task.augment.random_resized_crop, task.augment.hflip) == (4 * small, not small, 0.5)
    assert (task.mixup, task.cutmix, task.label_smoothing, task.augment.random_erasing) == (0, 0, 0, 0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_trains(recipe: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = json.dumps({**recipe_settings(recipe).get("options", {}), **TINY})
    settings = {"run": tmp_path / "run", "data": pictures, "options": options, "image_size": 32, "epochs": 1}
    words = [f"--{name}={value}" for name, value in {**settings, "batch_size": 4, "accelerator": "cpu"}.items()]
    assert main(["train", "recognition", f"--recipe={recipe}", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "convatlas report 1"
    assert Run(tmp_path / "run").read_metrics()[-1]["step"] == 2
    task = Recognition.load(tmp_path / "run")
    assert not isinstance(task.network.conv1, TrActConv2d)  # what is kept is the plain network
    if recipe != "tract_resnet":
        assert task.preprocess.std == (0.2023, 0.1994, 0.2010)
        assert task.network.conv1.weight.shape == (4, 3, 3, 3)
