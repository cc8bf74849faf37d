"""Every published recipe is made of real settings, has the published numbers, and trains."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from convatlas.cli.main import main
from convatlas.data.transforms import Augment, Preprocess
from convatlas.experiments.small_training import recipe_settings
from convatlas.networks.registry import model_config
from convatlas.recognition.task import Recognition
from convatlas.training.optim import learning_rate
from convatlas.training.settings import Training
from convatlas.training.task import split_settings

#: Recipes that stand in no row of the tables below, because the test of their system tests them.
ELSEWHERE = {"spatiospatial", "tract_cifar10", "tract_cifar10_adam", "tract_resnet"}
RECIPES = set(Recognition.recipes()) - ELSEWHERE
HORNET = {"depths": [1, 1], "base_dim": 8, "orders": [1, 2], "filter_grids": [None, None]}
#: Two phases for small images, two for large ones.
WAVEMIX = ("wavemix_cifar", "wavemix_cifar_sgd", "wavemix_imagenet", "wavemix_imagenet_sgd")
#: The network of each recipe, small enough for a test.
TINY: dict[str, dict[str, Any]] = {
    "inceptionnext": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
    "inceptionnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
    "inceptionnext_base_384": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
    "convnext_study": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
    "eca_resnet": {"depths": [1, 1, 1, 1], "widths": [4, 4, 4, 4], "stem_width": 4},
    "eca_mobilenet_v2": {"width_mult": 0.1},
    "deepmad_r": {"structure": [["ConvKXBNRELU", 3, 8, 3, 2], ["SuperResK1KXK1", 8, 8, 3, 2, 1, 8]]},
    "deepmad": {"structure": [["ConvKXBNRELU", 3, 8, 3, 2], ["SuperResK1DWSEK1", 8, 8, 3, 2, 1, 8]]},
    **{key: {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "num_heads": [1, 1, 2, 2]} for key in ("pvt", "pvt_large")},
    **{
        key: {"depths": [1, 1, 1], "dims": [8, 8, 8], "num_heads": [1, 2, 2]}
        for key in ("cvt_13", "cvt_21", "cvt_384", "cvt_finetune")
    },
    **dict.fromkeys(("hornet", "hornet_384"), HORNET),
    "phresnet_cifar": {"depths": [1, 1], "widths": [8, 8]},
    "phvgg_cifar": {"widths": [[8], [8]], "head_widths": [8, 8]},
    "phnn_svhn": {"depths": [1, 1], "widths": [8, 8], "algebra": "quaternion"},
    **{key: {"depth": 1, "dim": 8} for key in WAVEMIX},
    "cross_d_resnet18": {"depths": [1, 1], "widths": [4, 4], "stem_width": 4},
    "orthogonal_resnet": {"depths": [1, 1], "widths": [4, 4], "stem_width": 4},
}
#: Learning rate at the beginning of an epoch, as published.
RATES = {
    "inceptionnext": {0: 1e-6, 20: 4e-3, 160: (4e-3 + 1e-5) / 2, 300: 1e-5, 309: 1e-5},
    "inceptionnext_atto": {0: 5e-7, 5: 1e-3, 600: 5e-7, 609: 5e-7},
    "inceptionnext_base_384": {0: 5e-5, 15: 5e-5, 29: 5e-5},
    "convnext_study": {0: 1e-6, 20: 4e-3, 160: (4e-3 + 1e-5) / 2, 300: 1e-5, 309: 1e-5},
    "eca_resnet": {0: 0.1, 29: 0.1, 30: 0.01, 60: 1e-3, 90: 1e-4, 99: 1e-4},
    "eca_mobilenet_v2": {0: 0.045, 1: 0.045 * 0.98, 100: 0.045 * 0.98**100, 399: 0.045 * 0.98**399},
    "deepmad_r": {0: 1e-6, 5: 0.1, 480: 0.0},
    "deepmad": {0: 1e-6, 5: 0.8, 480: 0.0},
    **{recipe: {0: 1e-6, 5: 1e-3, 300: 1e-5, 309: 1e-5} for recipe in ("pvt", "pvt_large", "cvt_384")},
    **{key: {0: 1e-06, 5: 0.002, 300: 1e-05, 309: 1e-05} for key in ("cvt_13", "cvt_21")},
    "cvt_finetune": {0: 0.01, 4: 0.005, 8: 0},
    "hornet": {0: 1e-6, 20: 4e-3, 300: 1e-6},
    "hornet_384": {0: 5e-5, 30: 1e-6},
    "phresnet_cifar": {0: 0.1, 100: 0.05},
    "phvgg_cifar": {0: 0.01, 100: 0.005},
    "phnn_svhn": {0: 0.01, 50: 0.005 * (1 + 0.5**0.5)},
    **{key: {0: 0.001, 999: 0.001} for key in WAVEMIX},
    "orthogonal_resnet": {0: 0.1, 29: 0.1, 30: 0.01, 60: 1e-3},
    "cross_d_resnet18": {0: 1e-3, 29: 1e-3, 30: 1e-4, 60: 1e-5, 89: 1e-5},
}
BATCHES = {
    "inceptionnext": 4096,
    "inceptionnext_atto": 1280,
    "inceptionnext_base_384": 1024,
    "convnext_study": 4096,
    "eca_resnet": 256,
    "eca_mobilenet_v2": 96,
    "deepmad_r": 256,
    "deepmad": 2048,
    "pvt": 1024,
    "pvt_large": 1024,
    "cvt_13": 2048,
    "cvt_21": 2048,
    "cvt_384": 1024,
    "cvt_finetune": 512,
    "hornet": 4096,
    "hornet_384": 512,
    "phresnet_cifar": 128,
    "phvgg_cifar": 128,
    "phnn_svhn": 128,
    "wavemix_cifar": 512,
    "wavemix_cifar_sgd": 512,
    "wavemix_imagenet": 128,
    "wavemix_imagenet_sgd": 128,
    "cross_d_resnet18": 512,
    "orthogonal_resnet": 256,
}
#: What the network of a recipe has to bring along.
NETWORKS: dict[str, dict[str, Any]] = {
    "inceptionnext": {"drop_path": 0.1},
    "inceptionnext_atto": {"drop_path": 0.1, "band_kernel_size": 9},
    "inceptionnext_base_384": {"drop_path": 0.7, "dropout": 0.5},
    "convnext_study": {"drop_path": 0.1, "kernel_size": 7},
    "eca_resnet": {"eca_kernel_sizes": (3, 5, 5, 7)},
    "eca_mobilenet_v2": {"eca_kernel_sizes": (1, 1, 1, 1, 3, 3, 3), "dropout": 0.25},
    "deepmad_r": {"drop_path": 0.0, "dropout": 0.0},
    "deepmad": {"in_channels": 3},  # the rates of drop path and dropout are the recipe's
    "pvt": {"drop_path": 0.1},
    "pvt_large": {"drop_path": 0.3},
    "cvt_13": {"drop_path": (0.0, 0.0, 0.1)},
    "cvt_21": {"drop_path": (0.0, 0.0, 0.1)},
    "cvt_384": {"preprocess": Preprocess(size=384, crop=1.0, stretch=True)},
    "cvt_finetune": {"preprocess": Preprocess(size=384, crop=1.0, stretch=True)},
    "hornet": {"drop_path": 0.2, "base_dim": 64},
    "hornet_384": {"drop_path": 0.4, "base_dim": 192},
    "phresnet_cifar": {"n": 4, "algebra": "learned"},
    "phvgg_cifar": {"n": 4, "dropout": 0.5},
    "phnn_svhn": {"n": 4, "algebra": "learned"},
    **{key: {"dim": 320, "dropout": 0.5} for key in WAVEMIX[:2]},
    **{key: {"dim": 192, "level": 3} for key in WAVEMIX[2:]},
    "cross_d_resnet18": {"depths": (2, 2, 2, 2), "centered": False},
    "orthogonal_resnet": {"depths": (3, 4, 6, 3)},
}
each_recipe = pytest.mark.parametrize("recipe", sorted(TINY))


def test_every_recipe_is_tested() -> None:
    assert set(TINY) == set(RATES) == set(BATCHES) == set(NETWORKS) == RECIPES


@each_recipe
def test_keys_are_settings(recipe: str) -> None:
    settings = recipe_settings(recipe)
    fields = {entry.name for cls in (Recognition, Training) for entry in dataclasses.fields(cls) if entry.init}
    assert set(settings) <= fields
    assert set(settings["augment"]) <= {entry.name for entry in dataclasses.fields(Augment)}
    task, training = split_settings(Recognition, settings)
    for name, value in settings.items():
        holder: Any = training if hasattr(training, name) else task
        assert name == "augment" or getattr(holder, name) == value
    for name, value in settings["augment"].items():
        assert getattr(task.augment, name) == (tuple(value) if isinstance(value, list) else value)


@each_recipe
def test_published_numbers(recipe: str) -> None:
    task, training = split_settings(Recognition, recipe_settings(recipe))
    assert training.batch_size * training.accumulate == BATCHES[recipe]
    assert training.devices == 1
    steps = 1_281_167 // BATCHES[recipe]
    for epoch, rate in RATES[recipe].items():
        assert learning_rate(training, epoch * steps, steps) == pytest.approx(rate, rel=1e-9)
    config: Any = model_config(task.model)
    assert {name: getattr(config, name) for name in NETWORKS[recipe]} == NETWORKS[recipe]
    assert task.image_size == config.preprocess.size


@each_recipe
def test_published_augmentation(recipe: str) -> None:
    task, training = split_settings(Recognition, recipe_settings(recipe))
    augment = task.augment
    hypercomplex = recipe.startswith("ph")
    assert augment.random_resized_crop is not hypercomplex
    assert (augment.scale, augment.hflip) == ((0.08, 1.0), 0.0 if hypercomplex else 0.5)
    assert augment.ratio == pytest.approx((3 / 4, 4 / 3))
    mixed = (task.mixup, task.cutmix, task.label_smoothing, augment.random_erasing, augment.rand_augment)
    strong = (0.1, 0.25, "rand-m9-mstd0.5-inc1")
    assert mixed == {
        "inceptionnext": (0.8, 1.0, *strong),
        "inceptionnext_atto": (0.2, 1.0, 0.1, 0.1, "rand-m5-mstd0.5-inc1"),
        "inceptionnext_base_384": (0.0, 0.0, *strong),
        "convnext_study": (0.8, 1.0, *strong),
        "hornet": (0.8, 1.0, *strong),
        "hornet_384": (0.0, 0.0, *strong),
        "deepmad_r": (0.2, 0.0, 0.1, 0.2, "rand-m9-mstd0.5-inc1"),
        "deepmad": (0.8, 0.0, *strong),
        **dict.fromkeys(("pvt", "pvt_large", "cvt_13", "cvt_21", "cvt_384"), (0.8, 1.0, *strong)),
    }.get(recipe, (0.0, 0.0, 0.0, 0.0, None))
    averaged = recipe in ("inceptionnext_base_384", "convnext_study", "hornet", "hornet_384")
    assert training.ema == (0.9999 if averaged else None)
    decay = {
        "eca_resnet": 1e-4,
        "eca_mobilenet_v2": 4e-5,
        "hornet_384": 1e-8,
        "cvt_21": 0.1,
        "cvt_finetune": 0.0,
        "deepmad_r": 5e-5,
        "deepmad": 5e-5,
        "cross_d_resnet18": 0.01,
        "orthogonal_resnet": 1e-4,
    }
    decay |= dict.fromkeys(("phresnet_cifar", "phvgg_cifar", "phnn_svhn"), 5e-4)
    decay |= dict(zip(WAVEMIX, (0.01, 0.0, 0.01, 0.0), strict=True))
    assert training.weight_decay == decay.get(recipe, 0.05)
    assert (training.optimizer == "sgd") == (
        recipe
        in (
            *("eca_resnet", "eca_mobilenet_v2", "cvt_finetune", "deepmad_r", "deepmad", "orthogonal_resnet"),
            *WAVEMIX[1::2],
        )
        or hypercomplex
    )
    assert training.repeated_augmentation == (3 if recipe in ("pvt", "pvt_large", "cvt_21") else 1)
    clips = {"pvt_large": 1.0, "cvt_finetune": 1.0, "hornet": 100.0, "hornet_384": 1.0}
    assert training.clip == clips.get(recipe)
    assert training.momentum == 0.9


def test_warm_up_is_linear() -> None:
    _, training = split_settings(Recognition, recipe_settings("inceptionnext"))
    assert learning_rate(training, 10 * 312, 312) == pytest.approx((1e-6 + 4e-3) / 2)
    assert learning_rate(training, 10 * 312 + 156, 312) == pytest.approx(1e-6 + (4e-3 - 1e-6) * 10.5 / 20)


@each_recipe
def test_trains(recipe: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "run": str(tmp_path / "run"),
        "data": str(pictures),
        "options": json.dumps(TINY[recipe]),
        "image_size": 32,
        "weights": "null",
        "epochs": 1,
        "batch_size": 8,
        "accumulate": 1,
        "warmup_epochs": 0,
        "cooldown_epochs": 0,
        "accelerator": "cpu",
    }
    words = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["train", "recognition", f"--recipe={recipe}", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "convatlas report 1"
    assert (tmp_path / "run" / "checkpoints" / "best.safetensors").stat().st_size > 1000
    rows = (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2
    values = dict(zip(rows[0].split(","), map(float, rows[1].split(",")), strict=True))
    assert values["step"] == 1
    assert 0 < values["train_loss"] < 5
