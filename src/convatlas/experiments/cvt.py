"""Do convolutions in the token embedding and the projections make position embeddings superfluous?

Wu, Xiao, Codella, Liu, Dai, Yuan, Zhang: "CvT: Introducing Convolutions to Vision Transformers", ICCV 2021,
arXiv 2103.15808. Keys and values of stride 2 also save a third of the work.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.cost import cost
from convatlas.data.images import read_images, stratified_split
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    Samples,
    accuracy_differences,
    accuracy_parts,
    compare,
    finished,
    full_parts,
    progress,
    published_accuracy,
    resolved,
    train_by_recipe,
)
from convatlas.networks.cvt import CvT, CvTConfig
from convatlas.networks.registry import model_config
from convatlas.report import Bars, Cell, Claim, Images, Note, Report, Section, Table
from convatlas.training.settings import Training

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Points that count as no loss: about two standard errors of the mean paired difference of three short runs, whose
#: differences spread by about three points (seen in trial runs with other seeds).
TOLERANCE = 3.0
#: Accuracy in %, below which a network has not learned enough to be compared (chance is 10).
LEARNED = 50.0
#: Share of the multiply-adds that keys and values of stride 2 leave: 4.5 of 6.6 GMACs (CvT-13 at 224 x 224).
MACS_SHARE = 0.69

SEEDS = (0, 1, 2)
#: Digits are enlarged to twice their size and shifted by up to so many pixels, in training and in the test.
SHIFT = 4
SIDE = 24
TRAIN_FRACTION = 1 / 3
#: So many shifted copies of each training digit.
COPIES = 2
TRAINING = Training(epochs=6, batch_size=32, lr=4e-3, warmup_epochs=1)
NETWORK = CvTConfig(
    depths=(1, 1, 2),
    dims=(16, 32, 64),
    num_heads=(1, 2, 4),
    mlp_ratios=(2, 2, 2),
    patch_sizes=(3, 3, 3),
    patch_strides=(2, 2, 2),
    patch_paddings=(1, 1, 1),
    drop_path=(0.0, 0.0, 0.0),
    num_classes=10,
    in_channels=1,
)
#: Ordinary attention on patches that do not overlap.
PLAIN = NETWORK.override(patch_sizes=(2, 2, 2), patch_paddings=(0, 0, 0), projections=("linear", "linear", "linear"))

# Full: one training each, as the paper did.

RECIPES = {"cvt_13": "cvt_13", "cvt_21": "cvt_21"}
TOP1 = {"cvt_13": 81.6, "cvt_21": 82.5}
WEIGHTS = ("cvt_13", "cvt_13_384", "cvt_13_384_22k", "cvt_21", "cvt_21_384", "cvt_21_384_22k", "cvt_w24")
#: Points of top-1 by which two ImageNet trainings of one recipe differ.
RUN_NOISE = 0.3


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small networks with and without convolutions and position embeddings on shifted digits;
            "full" trains CvT-13 and CvT-21 by the recipes.
        data: for "full": ImageNet-1K, a folder with ``train`` and ``val`` and a folder for each class in them.
        folder: for "full": where the runs lie. The same folder goes on with runs that were stopped.

    Raises:
        ValueError: the budget is unknown, or "full" lacks data or folder.
    """
    if budget == "quick":
        return quick()
    if budget != "full":
        raise ValueError(f"budget must be 'quick' or 'full', got {budget!r}")
    if data is None or folder is None:
        raise ValueError(f"budget 'full' needs data and folder, got {data} and {folder}")
    return full(data, folder)


class _Positioned(nn.Module):
    """A token embedding with a learnt position embedding added behind."""

    def __init__(self, embed: nn.Module, channels: int, side: int) -> None:
        super().__init__()
        self.embed = embed
        self.table = nn.Parameter(torch.empty(1, channels, side, side))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) + self.table


def _positioned(config: CvTConfig) -> nn.Module:
    model = CvT(config)
    stage: Any = model.stages[0]
    stage.patch_embed = _Positioned(stage.patch_embed, config.dims[0], SIDE // config.patch_strides[0])
    return model


def quick() -> Report:
    """Small networks on shifted digits, with and without convolutions and position embeddings; multiply-adds."""
    networks: dict[str, Callable[[], nn.Module]] = {
        "convolutions": lambda: CvT(NETWORK),
        "convolutions, positions": lambda: _positioned(NETWORK),
        "no convolutions": lambda: CvT(PLAIN),
        "no convolutions, positions": lambda: _positioned(PLAIN),
    }
    with progress(len(SEEDS) * len(networks) * TRAINING.epochs) as advance:
        trained = compare(networks, TRAINING, seeds=SEEDS, samples=_shifted_digits, advance=advance)
    with_conv, with_both, bare, with_positions = trained.values()
    learned, learned_with_positions = (
        statistics.mean(result.accuracy for result in results) >= LEARNED for results in (with_conv, with_positions)
    )
    against_positions = accuracy_differences(with_conv, with_positions)
    positions_alone = accuracy_differences(with_positions, bare)
    without_loss = accuracy_differences(with_conv, with_both)
    claims = [
        Claim.judge(
            "Convolutions without position embeddings beat position embeddings without convolutions",
            published="more accurate than ViT and DeiT with fewer parameters and operations, without position encoding",
            statistic="accuracy with convolutions alone less accuracy with position embeddings alone, on the same "
            "shifted digits; judged if it is at least twice its standard error",
            value=against_positions,
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=learned and resolved(against_positions),
            unit="points",
        ),
        Claim.judge(
            "With convolutions, the position embedding can be left out without loss",
            published="the position encoding can be removed without loss",
            statistic="accuracy with convolutions alone less accuracy with both",
            value=without_loss,
            at_least=-TOLERANCE,
            seeds=len(SEEDS),
            scale_ok=learned,
            unit="points",
        ),
        Claim.judge(
            "Without convolutions, the position embedding is needed",
            published="the convolutions make superfluous what other vision transformers need",
            statistic="accuracy without convolutions, with less without position embedding; judged if it is at least "
            "twice its standard error and the network with positions has learned",
            value=positions_alone,
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=learned_with_positions and resolved(positions_alone),
            unit="points",
        ),
    ]
    parts = accuracy_parts(
        trained,
        SEEDS,
        caption=f"Networks of equal depth and width after the last of {TRAINING.epochs} epochs on {COPIES} shifted "
        f"copies of {TRAIN_FRACTION:.0%} of scikit-learn's 1797 digits; the others are the test images, shifted too.",
    )
    shown = _shifted_digits(SEEDS[0])
    pictures = [(255 * (0.25 * image[0] + 0.5)).round().to(torch.uint8).numpy() for image in shown.test_images[:8]]
    example = Images("Test images", list(zip(pictures, map(str, shown.test_labels.tolist()), strict=False)))
    note = Note(
        f"Three stages of depths {NETWORK.depths} and widths {NETWORK.dims}, each halving the map; overlapping 3 x 3 "
        "embeddings and 3 x 3 depthwise projections, against 2 x 2 patches and linear projections. Digits of 16 x 16 "
        f"pixels shifted by up to {SHIFT} pixels on {SIDE} x {SIDE}; AdamW, learning rate {TRAINING.lr:g}, cosine "
        f"decay, batches of {TRAINING.batch_size}. Small networks on small images: they test the mechanism, not the "
        "accuracy on ImageNet."
    )
    sections = [Section("Accuracy", [*claims, *parts, example, note]), _cost_section()]
    return finished("CvT: quick test of its claims", sections)


def _shifted_digits(seed: int) -> Samples:
    parts = {"train": TRAIN_FRACTION, "test": 1 - TRAIN_FRACTION}
    sets = stratified_split(read_images("digits")["all"], parts, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for name, copies in (("train", COPIES), ("test", 1)):
        digits = sets[name]
        pixels = torch.stack([torch.tensor(digits.image(index)[..., 0]) for index in range(len(digits))])
        images = (pixels.float() / 255 - 0.5) / 0.25
        images = F.interpolate(images[:, None].repeat(copies, 1, 1, 1), scale_factor=2, mode="nearest")
        shifts = torch.randint(-SHIFT, SHIFT + 1, (len(images), 2), generator=generator) + (SIDE - 16) // 2
        canvas = torch.full((len(images), 1, SIDE, SIDE), -2.0)
        for image, place, (down, right) in zip(images, canvas, shifts.tolist(), strict=True):
            place[:, down : down + 16, right : right + 16] = image
        tensors += [canvas, torch.from_numpy(digits.labels).repeat(copies)]
    return Samples(*tensors)


def _cost_section() -> Section:
    counted = {}
    with torch.device("meta"):
        for stride in (1, 2):
            config = model_config("cvt_13", kv_strides=(stride,) * 3)
            model = config.build()
            counted[f"stride {stride}"] = cost(model, *model.example_inputs())  # type: ignore[operator]
    gigas = {name: each.total.macs / 1e9 for name, each in counted.items()}
    share = gigas["stride 2"] / gigas["stride 1"]
    claim = Claim.judge(
        "Keys and values of stride 2 leave 69 % of the multiply-adds of CvT-13",
        published="4.5 instead of 6.6 GMACs at 224 x 224, for 0.7 points of top-1",
        statistic="multiply-adds of convolutions, matrix products and attention with stride 2 over those with stride 1",
        value=share,
        at_most=MACS_SHARE,
        seeds=0,
    )
    rows: list[list[Cell]] = [
        [name, each.total.parameters, gigas[name], each.operations.get("convolution", 0) / 1e9]
        for name, each in counted.items()
    ]
    columns = ["keys and values", "parameters", "GMACs", "of convolutions"]
    return Section("Cost", [claim, Table("CvT-13 at 224 x 224", columns, rows), Bars("Multiply-adds", "GMACs", gigas)])


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train CvT-13 and CvT-21 by the recipes, and measure the published weights.

    Args:
        data: ImageNet-1K, a folder with ``train`` and ``val``.
        folder: where the runs lie, each below the name of its model.
        changes: settings that differ from the recipes, e.g. ``epochs=30``. With any, or with other data than
            ImageNet-1K, the accuracies cannot be held against the published ones, and the verdicts say so.
    """
    runs = {
        model: train_by_recipe(recipe, Path(folder) / model, **{"data": str(data), "model": model, **changes})
        for model, recipe in RECIPES.items()
    }
    images = runs["cvt_13"].task.splits["test"]
    same_setting = not changes and len(images.classes) == IMAGENET_CLASSES
    claims = [
        Claim.judge(
            f"{model} trained by the recipe reaches its published accuracy",
            published=f"{TOP1[model]} % top-1 on ImageNet-1K",
            statistic="top-1 accuracy of the best epoch on the validation images",
            value=trained.top1,
            at_least=TOP1[model] - RUN_NOISE,
            seeds=1,
            scale_ok=same_setting,
            unit="%",
        )
        for model, trained in runs.items()
    ]
    weights = {model: published_accuracy(model, images) for model in WEIGHTS}
    return finished(
        "CvT: full test of its claims",
        [Section("Accuracy", [*claims, *full_parts(runs, TOP1, weights)])],
        data=str(data),
    )
