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
ELSEWHERE = {
    "long_conv",
    *("scaling_mlps_pretrain", "scaling_mlps_finetune", "scaling_mlps_linear"),
    *("sgconv_image", "sgconv_pathfinder", "sgconv_pathx"),
    *("spark_resnet_finetune", "spark_convnext_finetune", "spark_convnext_384_finetune"),
    *("spatiospatial", "unireplknet_video", "uniformer3d", "uniformer3d_base", "uniformer3d_ss"),
    *("tract_cifar10", "tract_cifar10_adam", "tract_resnet", "tvconv_face"),
}
RECIPES = set(Recognition.recipes()) - ELSEWHERE
HORNET = {"depths": [1, 1], "base_dim": 8, "orders": [1, 2], "filter_grids": [None, None]}
UNIFORMER = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "head_dim": 4}
LIGHT = {**UNIFORMER, "prune_ratios": [[1], [0.5]], "trade_offs": [[1], [0.5]]}
UNIREPLKNET = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "kernel_sizes": [[3], [7], [3], [0]]}
#: Two phases for small images, two for large ones.
WAVEMIX = ("wavemix_cifar", "wavemix_cifar_sgd", "wavemix_imagenet", "wavemix_imagenet_sgd")
DHVT = ("dhvt_cifar", "dhvt_domain", "dhvt_imagenet", "dhvt_finetune")
REPEATED = ("pvt", "pvt_large", "cvt_21", "crossvit", "crossvit_384", *DHVT[:3], "uniformer", "uniformer_base")
#: The network of each recipe, small enough for a test.
TINY: dict[str, dict[str, Any]] = {
    "inceptionnext": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
    "inceptionnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
    "inceptionnext_base_384": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
    "convnext_study": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]},
    "eca_resnet": {"depths": [1, 1, 1, 1], "widths": [4, 4, 4, 4], "stem_width": 4},
    "eca_mobilenet_v2": {"width_mult": 0.1},
    "ela": {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8], "stem_width": 4, "ela": "B", "block": "bottleneck"},
    "ulsam": {"width_mult": 0.1},
    "ulsam_fine_grained": {"width_mult": 0.1},
    "deepmad_r": {"structure": [["ConvKXBNRELU", 3, 8, 3, 2], ["SuperResK1KXK1", 8, 8, 3, 2, 1, 8]]},
    "deepmad": {"structure": [["ConvKXBNRELU", 3, 8, 3, 2], ["SuperResK1DWSEK1", 8, 8, 3, 2, 1, 8]]},
    **{key: {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "num_heads": [1, 1, 2, 2]} for key in ("pvt", "pvt_large")},
    **{
        key: {"depths": [1, 1, 1], "dims": [8, 8, 8], "num_heads": [1, 2, 2]}
        for key in ("cvt_13", "cvt_21", "cvt_384", "cvt_finetune")
    },
    **dict.fromkeys(("hornet", "hornet_384"), HORNET),
    "as_vit": {"genotype": "4,1,2,1|2,1,2,1|2,1,2,1|2,1,2,1|8,4"},
    **{key: {"depths": [[1, 1, 0]], "dims": [8, 8], "num_heads": [1, 2]} for key in ("crossvit", "crossvit_384")},
    **{key: {"depth": 1, "dim": 16, "num_heads": 2} for key in DHVT},
    **{f"unireplknet{kind}": UNIREPLKNET for kind in ("", "_22k", "_384", "_384_large")},
    "phresnet_cifar": {"depths": [1, 1], "widths": [8, 8]},
    "phvgg_cifar": {"widths": [[8], [8]], "head_widths": [8, 8]},
    "phnn_svhn": {"depths": [1, 1], "widths": [8, 8], "algebra": "quaternion"},
    **{key: {"depth": 1, "dim": 8} for key in WAVEMIX},
    "ninformer_cifar": {"depth": 1, "dim": 8, "ffn_dim": 8},
    "convfirst": {"depths": [1, 1], "dims": [8, 8], "block_types": ["convfirst", "mbconv"], "stem_width": 8},
    **dict.fromkeys(("uniformer", "uniformer_base", "uniformer_tl", "uniformer_tl_384"), UNIFORMER),
    **dict.fromkeys(("uniformer_xs", "uniformer_xxs"), LIGHT),
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
    "ela": {0: 0.1, 29: 0.1, 30: 0.01, 60: 1e-3, 90: 1e-4, 99: 1e-4},
    "ulsam": {0: 0.1, 29: 0.1, 30: 0.01, 60: 1e-3, 89: 1e-3},
    "ulsam_fine_grained": {0: 0.1, 49: 0.1, 50: 0.01, 100: 1e-3, 149: 1e-3},
    "deepmad_r": {0: 1e-6, 5: 0.1, 480: 0.0},
    "deepmad": {0: 1e-6, 5: 0.8, 480: 0.0},
    **{recipe: {0: 1e-6, 5: 1e-3, 300: 1e-5, 309: 1e-5} for recipe in ("pvt", "pvt_large", "cvt_384")},
    **{key: {0: 1e-06, 5: 0.002, 300: 1e-05, 309: 1e-05} for key in ("cvt_13", "cvt_21")},
    "cvt_finetune": {0: 0.01, 4: 0.005, 8: 0},
    "hornet": {0: 1e-6, 20: 4e-3, 300: 1e-6},
    "as_vit": {0: 1e-6, 5: 1e-3, 300: 1e-5},
    "hornet_384": {0: 5e-5, 30: 1e-6},
    "crossvit": {0: 1e-6, 30: 4e-3, 165: (4e-3 + 1e-5) / 2, 300: 1e-5},
    "crossvit_384": {0: 5e-6, 29: 5e-6},
    "dhvt_cifar": {0: 1e-6, 5: 1e-3, 300: 1e-5},
    "dhvt_domain": {0: 1e-6, 20: 5e-4, 300: 1e-5},
    "dhvt_imagenet": {0: 1e-6, 10: 5e-4, 300: 1e-5},
    "dhvt_finetune": {0: 1e-6, 2: 2.5e-4, 100: 1e-6},
    "unireplknet": {0: 1e-6, 20: 4e-3, 300: 1e-6},
    "unireplknet_22k": {0: 1e-6, 5: 4e-3, 90: 1e-6},
    "unireplknet_384": {0: 5e-5, 30: 1e-6},
    "unireplknet_384_large": {0: 5e-5, 20: 1e-6},
    "phresnet_cifar": {0: 0.1, 100: 0.05},
    "phvgg_cifar": {0: 0.01, 100: 0.005},
    "phnn_svhn": {0: 0.01, 50: 0.005 * (1 + 0.5**0.5)},
    **{key: {0: 0.001, 999: 0.001} for key in WAVEMIX},
    "ninformer_cifar": {0: 0.001, 99: 0.001},
    "convfirst": {0: 1e-6, 5: 2e-3, 300: 1e-5},
    "uniformer": {0: 1e-6, 5: 1e-3, 300: 1e-5},
    "uniformer_base": {0: 1e-6, 5: 8e-4, 300: 1e-5},
    "uniformer_tl": {0: 1e-6, 5: 1.6e-3, 300: 1e-5},
    "uniformer_tl_384": {0: 5e-6, 49: 5e-6},
    "uniformer_xs": {0: 1e-6, 30: 4e-3, 600: 1e-5},
    "uniformer_xxs": {0: 1e-6, 30: 3.2e-3, 600: 1e-5},
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
    "ela": 256,
    "ulsam": 128,
    "ulsam_fine_grained": 128,
    "deepmad_r": 256,
    "deepmad": 2048,
    "pvt": 1024,
    "pvt_large": 1024,
    "cvt_13": 2048,
    "cvt_21": 2048,
    "cvt_384": 1024,
    "cvt_finetune": 512,
    "hornet": 4096,
    "as_vit": 1024,
    "hornet_384": 512,
    "crossvit": 4096,
    "crossvit_384": 512,
    "dhvt_cifar": 512,
    "dhvt_domain": 256,
    "dhvt_imagenet": 512,
    "dhvt_finetune": 256,
    "unireplknet": 4096,
    "unireplknet_22k": 4096,
    "unireplknet_384": 512,
    "unireplknet_384_large": 512,
    "phresnet_cifar": 128,
    "phvgg_cifar": 128,
    "phnn_svhn": 128,
    "wavemix_cifar": 512,
    "wavemix_cifar_sgd": 512,
    "wavemix_imagenet": 128,
    "wavemix_imagenet_sgd": 128,
    "ninformer_cifar": 128,
    "convfirst": 1024,
    "uniformer": 1024,
    "uniformer_base": 1024,
    "uniformer_tl": 1024,
    "uniformer_tl_384": 512,
    "uniformer_xs": 4096,
    "uniformer_xxs": 4096,
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
    "ela": {"ela": "B", "depths": (3, 4, 6, 3)},
    "ulsam": {"ulsam_positions": (14, 17), "ulsam_groups": 4, "ulsam_mode": "replace"},
    "ulsam_fine_grained": {"ulsam_positions": (13, 14, 16, 17)},
    "deepmad_r": {"drop_path": 0.0, "dropout": 0.0},
    "deepmad": {"in_channels": 3},  # the rates of drop path and dropout are the recipe's
    "pvt": {"drop_path": 0.1},
    "pvt_large": {"drop_path": 0.3},
    "cvt_13": {"drop_path": (0.0, 0.0, 0.1)},
    "cvt_21": {"drop_path": (0.0, 0.0, 0.1)},
    "cvt_384": {"preprocess": Preprocess(size=384, crop=1.0, stretch=True)},
    "cvt_finetune": {"preprocess": Preprocess(size=384, crop=1.0, stretch=True)},
    "hornet": {"drop_path": 0.2, "base_dim": 64},
    "as_vit": {"num_mlps": 1, "absolute_position": False},
    "hornet_384": {"drop_path": 0.4, "base_dim": 192},
    "crossvit": {"drop_path": 0.1, "image_sizes": None},
    "crossvit_384": {"preprocess": Preprocess(size=408, crop=1.0)},
    **{key: {"drop_path": 0.1} for key in DHVT},
    "unireplknet": {"drop_path": 0.2, "head_init_scale": 1.0},
    "unireplknet_22k": {"drop_path": 0.1, "num_classes": 21841},
    "unireplknet_384": {"drop_path": 0.2, "head_init_scale": 0.001},
    "unireplknet_384_large": {"drop_path": 0.3, "head_init_scale": 0.001},
    "phresnet_cifar": {"n": 4, "algebra": "learned"},
    "phvgg_cifar": {"n": 4, "dropout": 0.5},
    "phnn_svhn": {"n": 4, "algebra": "learned"},
    **{key: {"dim": 320, "dropout": 0.5} for key in WAVEMIX[:2]},
    **{key: {"dim": 192, "level": 3} for key in WAVEMIX[2:]},
    "ninformer_cifar": {"drop": 0.5, "dim": 256, "num_tokens": 64},
    "convfirst": {"dropout": 0.2, "group_width": 8},
    "uniformer": {"drop_path": 0.1, "head_dim": 64},
    "uniformer_base": {"drop_path": 0.3, "head_dim": 64},
    "uniformer_tl": {"token_head": True, "head_dim": 32},
    "uniformer_tl_384": {"token_head": True, "head_dim": 32},
    "uniformer_xs": {"drop_path": 0.1, "head_dim": 32},
    "uniformer_xxs": {"drop_path": 0.0, "head_dim": 28},
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
    whole = hypercomplex or recipe in (*WAVEMIX[:2], "dhvt_cifar", "ninformer_cifar")
    assert augment.random_resized_crop is not whole
    assert augment.pad_crop == (4 if recipe in ("dhvt_cifar", "ninformer_cifar") else 0)
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
        "as_vit": (0.8, 1.0, *strong),
        "hornet_384": (0.0, 0.0, *strong),
        "unireplknet": (0.8, 1.0, *strong),
        "unireplknet_22k": (0.8, 1.0, *strong),
        "unireplknet_384": (0.0, 0.0, *strong),
        "unireplknet_384_large": (0.0, 0.0, 0.3, *strong[1:]),
        "deepmad_r": (0.2, 0.0, 0.1, 0.2, "rand-m9-mstd0.5-inc1"),
        "convfirst": (0.2, 1.0, *strong),
        "deepmad": (0.8, 0.0, *strong),
        **dict.fromkeys(("pvt", "pvt_large", "cvt_13", "cvt_21", "cvt_384"), (0.8, 1.0, *strong)),
        **dict.fromkeys(("crossvit", "crossvit_384", *DHVT), (0.8, 1.0, *strong)),
        **dict.fromkeys(("uniformer", "uniformer_base", "uniformer_xs"), (0.8, 1.0, *strong)),
        **dict.fromkeys(("uniformer_tl", "uniformer_tl_384"), (0.0, 0.0, 0.0, *strong[1:])),
        "uniformer_xxs": (0.8, 1.0, 0.1, 0.25, None),
    }.get(recipe, (0.0, 0.0, 0.0, 0.0, None))
    averaged = recipe in (
        *("inceptionnext_base_384", "convnext_study", "hornet", "hornet_384", "unireplknet_384_large"),
        *("uniformer_xs", "uniformer_xxs"),
    )
    labelled = recipe.startswith("uniformer_tl")
    assert training.ema == (0.9999 if averaged else 0.99996 if labelled else None)
    assert augment.auto_augment == (recipe == "uniformer_xxs")
    assert bool(training.methods) == (labelled or recipe == "orthogonal_resnet")
    decay = {
        "eca_resnet": 1e-4,
        "eca_mobilenet_v2": 4e-5,
        "ela": 1e-4,
        "ulsam": 4e-5,
        "ulsam_fine_grained": 4e-5,
        "hornet_384": 1e-8,
        "crossvit_384": 1e-8,
        "dhvt_finetune": 1e-8,
        "unireplknet_384": 1e-8,
        "unireplknet_384_large": 1e-8,
        "cvt_21": 0.1,
        "cvt_finetune": 0.0,
        "deepmad_r": 5e-5,
        "deepmad": 5e-5,
        "ninformer_cifar": 0.0,
        "uniformer_tl_384": 1e-8,
        "uniformer_xxs": 0.1,
        "cross_d_resnet18": 0.01,
        "orthogonal_resnet": 1e-4,
    }
    decay |= dict.fromkeys(("phresnet_cifar", "phvgg_cifar", "phnn_svhn"), 5e-4)
    decay |= dict(zip(WAVEMIX, (0.01, 0.0, 0.01, 0.0), strict=True))
    assert training.weight_decay == decay.get(recipe, 0.05)
    descended = (
        *("eca_resnet", "eca_mobilenet_v2", "ela", "ulsam", "ulsam_fine_grained", "cvt_finetune"),
        *("deepmad_r", "deepmad", "orthogonal_resnet", *WAVEMIX[1::2]),
    )
    assert (training.optimizer == "sgd") == (recipe in descended or hypercomplex)
    assert training.repeated_augmentation == (3 if recipe in REPEATED else 1)
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
