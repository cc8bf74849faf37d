"""The experiment of UniFormer: it runs, and its verdicts follow from its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convatlas.experiments import uniformer
from convatlas.experiments.small_training import Trained, recipe_settings, train_by_recipe
from convatlas.networks.registry import model_config
from convatlas.networks.uniformer.blocks import GlobalBlock, LocalBlock
from convatlas.networks.uniformer.video import UniFormer3dConfig
from convatlas.recognition.task import Recognition
from convatlas.report import Images
from convatlas.training.optim import learning_rate
from convatlas.training.settings import Training
from convatlas.training.task import split_settings

UNKNOWN = "cannot be told at this scale"


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    for name, value in {"SEEDS": (0, 1), "TRAIN": 16, "TEST": 8, "PAIRS": 2, "FIRST": (16, 8, 16)}.items():
        monkeypatch.setattr(uniformer, name, value)
    one = Training(epochs=1, batch_size=16, lr=1e-3, warmup_epochs=0)
    small: dict[str, Any] = {"dims": (4, 4, 8, 8), "head_dim": 4}
    monkeypatch.setattr(uniformer, "TRAINING", one)
    monkeypatch.setattr(uniformer, "TRAINING_DIGITS", Training(epochs=1, batch_size=256, warmup_epochs=0))
    monkeypatch.setattr(uniformer, "CLIPS", uniformer.CLIPS.override(**small))
    monkeypatch.setattr(uniformer, "DIGITS", uniformer.DIGITS.override(**small))
    monkeypatch.setattr(uniformer, "VARIANTS", {"uniformer3d_small": UniFormer3dConfig(depths=(1, 1, 1, 1))})
    report = uniformer.run("quick")
    assert [claim.verdict for claim in report.claims[:4]] == [UNKNOWN] * 4
    assert [claim.verdict for claim in report.claims[4:6]] == ["holds"] * 2
    assert report.claims[5].values == pytest.approx([(100 / 197) ** 2], rel=1e-6)
    pictures = next(part for section in report.sections for part in section.parts if isinstance(part, Images))
    assert all(pixels.std() > 10 for pixels, _ in pictures.images)
    assert "disc" in report.to_html()


@pytest.mark.parametrize(
    ("mixed", "local", "verdict"),
    [(80.0, 81.0, "holds"), (80.0, 83.0, "does not hold"), (40.0, 80.0, UNKNOWN)],
)
def test_verdicts_follow_from_the_accuracies(mixed: float, local: float, verdict: str) -> None:
    accuracies = {"LLGG": mixed, "LLLL": local, "GGGG": 50.0}
    trained = {kind: [Trained(10, value, [1.0])] * 3 for kind, value in accuracies.items()}
    assert uniformer._accuracy_claims(trained, "clips")[0].verdict == verdict


def test_letters_name_the_blocks() -> None:
    for kind in uniformer.KINDS:
        network: Any = uniformer._network(uniformer.DIGITS, kind)
        kinds = [type(stage.blocks[0]) for stage in network.stages]
        assert kinds == [{"L": LocalBlock, "G": GlobalBlock}[letter] for letter in kind]


def test_shapes_move_as_their_labels_say() -> None:
    clips, labels = uniformer.moving_shapes(64, torch.Generator().manual_seed(0))
    assert clips.shape == (64, 1, uniformer.FRAMES, uniformer.SIDE, uniformer.SIDE)
    assert set(labels.tolist()) == set(range(8))
    bright = (clips[:, 0] > 0.8).float()
    for clip, label in zip(bright, labels.tolist(), strict=True):
        down, right = list(uniformer.DIRECTIONS.values())[label // 2]
        matches = {
            step: float((clip[1:] * clip[:-1].roll((step * down, step * right), (1, 2))).sum()) for step in (-3, 0, 3)
        }
        assert max(matches, key=lambda step: matches[step]) == 3


def test_full_trains_by_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(uniformer, "WEIGHTS", ("uniformer_small",))
    changes: dict[str, Any] = {
        "epochs": 1,
        "warmup_epochs": 0,
        "batch_size": 8,
        "accumulate": 1,
        "image_size": 32,
        "options": {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "head_dim": 4},
        "accelerator": "cpu",
        "precision": "32",
    }
    report = uniformer.full(pictures, tmp_path, **changes)
    assert [claim.verdict for claim in report.claims] == [UNKNOWN]
    assert "82.9 % top-1 on ImageNet-1K" in report.claims[0].published
    assert (tmp_path / "uniformer_small" / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("recipe", "rates", "batch", "drop_path", "hflip"),
    [
        ("uniformer3d", {0: 1e-6, 10: 1e-4, 110: 1e-6}, 32, 0.1, 0.5),
        ("uniformer3d_base", {0: 1e-6, 10: 1.25e-4, 110: 1e-6}, 40, 0.3, 0.5),
        ("uniformer3d_ss", {0: 1e-6, 5: 2e-4, 60: 1e-6}, 32, 0.3, 0.0),
    ],
)
def test_recipes_for_video(recipe: str, rates: dict[int, float], batch: int, drop_path: float, hflip: float) -> None:
    task, training = split_settings(Recognition, recipe_settings(recipe))
    assert training.batch_size * training.accumulate == batch
    for epoch, rate in rates.items():
        assert learning_rate(training, 100 * epoch, 100) == pytest.approx(rate)
    config: Any = model_config(task.model)
    assert (config.drop_path, task.volume_size) == (drop_path, config.preprocess.size)
    assert (training.weight_decay, training.repeated_augmentation) == (0.05, 2)
    augment = task.volume_augment
    assert (augment.hflip, augment.rand_augment, augment.random_erasing) == (hflip, "rand-m7-n4-mstd0.5-inc1", 0.25)
    assert augment.scale == pytest.approx(((224 / 320) ** 2, (224 / 256) ** 2), abs=1e-4)
    assert (task.mixup, task.cutmix, task.label_smoothing) == (0.8, 1.0, 0.1)


@pytest.mark.parametrize("model", ["uniformer3d_small", "uniformer3d_xxs"])
def test_clips_train_by_the_recipe(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("down", "up"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for number in range(3):
                clip = random.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
                np.save(tmp_path / "data" / split / label / f"{number}.npy", clip)
    light: dict[str, Any] = {"prune_ratios": [[1], [0.5]], "trade_offs": [[1], [0.5]]}
    options = {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "head_dim": 4, **(light if "xxs" in model else {})}
    run = train_by_recipe(
        "uniformer3d",
        tmp_path / "run",
        data=str(tmp_path / "data"),
        model=model,
        options=options,
        weights=None,
        volume_size=[4, 32, 32],
        epochs=1,
        warmup_epochs=0,
        batch_size=3,
        accumulate=1,
        accelerator="cpu",
    )
    (row,) = run.run.read_metrics()
    assert 0 < row["train_loss"] < 3


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        uniformer.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        uniformer.run("full", data=tmp_path)
