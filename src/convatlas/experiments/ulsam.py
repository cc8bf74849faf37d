"""Can subspace attention stand in the place of whole blocks of a MobileNet?

Saini, Jha, Das, Mittal, Mohan: "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural
Networks", WACV 2020, arXiv 2006.15102. Its abstract claims about 13 % fewer parameters and FLOPs with 0.27 points more
top-1 on ImageNet-1K for MobileNetV2, and about 25 % fewer with more than one point more on fine-grained images.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from convatlas.cost import cost
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    Trained,
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
from convatlas.networks.mobilenet import MobileNetV2Config
from convatlas.networks.registry import model_config
from convatlas.nn.mixers.ulsam import ULSAM
from convatlas.report import Cell, Claim, Images, Note, Part, Report, Section, Table
from convatlas.training.measure import count_parameters
from convatlas.training.settings import Training

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Points that count as no difference between two small networks.
TOLERANCE = 1.0
#: Accuracy of the plain network in %, below which the networks have not learned enough to be compared (chance is 10).
LEARNED = 90.0
#: Parameters of the small network with attention in the place of two blocks, as a share of the plain one's, in %.
CLEARLY_FEWER = 75.0
#: Parameters and multiply-adds that MobileNetV2 must save, in %: published are about 13 and about 25.
SAVED = {"mobilenet_v2_ulsam": 12.0, "mobilenet_v2_ulsam_13_14_16_17": 24.0}
#: Networks whose parameters and multiply-adds are counted besides.
ALSO_COUNTED = ("mobilenet_v1", "mobilenet_v1_ulsam_11", "mobilenet_v1_ulsam_11_12")

SEEDS = (0, 1, 2)
TRAIN_FRACTION = 0.2
TRAINING = Training(epochs=20, batch_size=32, lr=5e-3, warmup_epochs=2)
NETWORK = MobileNetV2Config(
    stages=((1, 8, 1, 1), (6, 16, 2, 2), (6, 32, 3, 2)),
    stem_width=8,
    head_width=64,
    dropout=0.0,
    num_classes=10,
    in_channels=1,
)
#: The last two blocks that keep the shape, and the same network without them.
POSITIONS = (6, 7)
WITHOUT = {"stages": ((1, 8, 1, 1), (6, 16, 2, 2), (6, 32, 1, 2))}
#: Digits whose attention maps the report shows.
SHOWN = 4
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ULSAM, g = 1": {"ulsam_positions": POSITIONS, "ulsam_groups": 1},
    "ULSAM, g = 4": {"ulsam_positions": POSITIONS, "ulsam_groups": 4},
    "two blocks left out": WITHOUT,
}

# Full: one training each, as the paper did.

RECIPE = "ulsam"
#: Top-1 on ImageNet-1K in %: published is the gain alone.
TOP1: dict[str, float | None] = {"mobilenet_v2_ulsam": None, "mobilenet_v2": None}
PUBLISHED_GAIN = 0.27
WEIGHTS = ("mobilenet_v2",)
PUBLISHED = "0.27 points more top-1 on ImageNet-1K with 13 % fewer parameters and FLOPs (MobileNetV2)"


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small MobileNets with subspace attention in the place of two blocks on digits and counts
            parameters; "full" trains MobileNetV2 with and without it by the recipe.
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


def quick() -> Report:
    """A small MobileNetV2, plain, with subspace attention in the place of two blocks, and without these blocks."""
    built: list[nn.Module] = []
    shown: list[Tensor] = []

    def build(name: str) -> nn.Module:
        network = NETWORK.override(**NETWORKS[name]).build()
        if name == "ULSAM, g = 4":
            built.append(network)
        return network

    def seen(pictures: Tensor, seed: int) -> Tensor:
        shown.append(pictures[:SHOWN])
        return pictures

    networks = {name: (lambda name=name: build(name)) for name in NETWORKS}
    with progress(len(SEEDS) * len(networks) * TRAINING.epochs) as advance:
        trained = compare(networks, TRAINING, seeds=SEEDS, train_fraction=TRAIN_FRACTION, advance=advance, change=seen)
    # A seed shows the training digits and then those of the test.
    sections = [_accuracy_section(trained, _maps(built[0], shown[1])), _cost_section()]
    return finished("ULSAM: quick test of its claims", sections)


# Accuracy


def _maps(network: nn.Module, pictures: Tensor) -> Images:
    """Digits and the attention maps of the first module of a network."""
    module = next(module for module in network.modules() if isinstance(module, ULSAM))
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, inputs, output: kept.append(module.attention_maps(inputs[0])))
    place = next(network.parameters()).device
    with torch.inference_mode():
        network.eval()(((pictures - 0.5) / 0.25).to(place))
    handle.remove()
    images = []
    for picture, maps in zip(pictures, kept[0].cpu(), strict=True):
        images.append((_grey(picture[0]), "digit"))
        images += [(_grey(each), f"group {group + 1}") for group, each in enumerate(maps)]
    return Images("Attention maps of the groups", images, "Test digits, first seed; white is the largest value.")


def _grey(values: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    low, high = values.min(), values.max()
    return (255 * (values - low) / (high - low).clamp(min=1e-9)).round().to(torch.uint8).numpy()


def _accuracy_section(trained: dict[str, list[Trained]], images: Images) -> Section:
    plain, one, four, without = trained.values()
    learned = statistics.mean(result.accuracy for result in plain) >= LEARNED
    claims: list[Part] = [
        Claim.judge(
            f"A network with attention in the place of two blocks is as accurate ({name})",
            published=PUBLISHED,
            statistic="accuracy with ULSAM less accuracy of the plain network, on the same digits",
            value=accuracy_differences(replaced, plain),
            at_least=-TOLERANCE,
            seeds=len(SEEDS),
            scale_ok=learned,
            unit="points",
        )
        for name, replaced in (("g = 1", one), ("g = 4", four))
    ]
    gains = accuracy_differences(four, without)
    claims += [
        Claim.judge(
            "The attention does more than leaving the blocks out",
            published="the attention makes up for the blocks that it replaces",
            statistic="accuracy with ULSAM (g = 4) less accuracy without the two blocks, on the same digits; judged if "
            "it is at least twice its standard error",
            value=gains,
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=learned and resolved(gains),
            unit="points",
        ),
        Claim.judge(
            "It has clearly fewer parameters",
            published="13 % to 25 % fewer",
            statistic="parameters of the small network with ULSAM (g = 4) as a share of the plain one's",
            value=100 * four[0].parameters / plain[0].parameters,
            at_most=CLEARLY_FEWER,
            seeds=0,
            unit="%",
        ),
    ]
    parts = accuracy_parts(
        trained,
        SEEDS,
        caption=f"Small MobileNetV2 after the last of {TRAINING.epochs} epochs on {TRAIN_FRACTION:.0%} of "
        "scikit-learn's 1797 digits at 32 x 32 pixels.",
    )
    note = Note(
        f"Stages {NETWORK.stages}, attention in the place of layers {POSITIONS}; AdamW, learning rate {TRAINING.lr:g}, "
        f"{TRAINING.warmup_epochs:g} epochs of warm-up, cosine decay, batches of {TRAINING.batch_size}, no "
        "augmentation. Small networks on small images: they test the mechanism, not the accuracy on ImageNet."
    )
    return Section("Accuracy", [*claims, *parts, images, note])


# Cost


def _cost_section() -> Section:
    counts: dict[str, tuple[int, int]] = {}
    for name in ("mobilenet_v2", *SAVED, *ALSO_COUNTED):
        with torch.device("meta"):
            network = model_config(name).build()
            total = cost(network, torch.empty(1, 3, 224, 224)).total
        # As published, multiply-adds include those of the norms.
        counts[name] = count_parameters(network), total.macs + total.norm_macs
    claims, rows = [], []
    for name, values in counts.items():
        plain = counts[name[: len("mobilenet_v2")]]
        saved = [100 * (1 - value / reference) for value, reference in zip(values, plain, strict=True)]
        row: list[Cell] = [name, values[0], saved[0], values[1], saved[1]]
        rows.append(row)
        if name in SAVED:
            claims.append(
                Claim.judge(
                    f"MobileNetV2 becomes about {SAVED[name] + 1:g} % smaller ({name})",
                    published="about 13 % (25 % on fine-grained images) fewer parameters and FLOPs",
                    statistic="the smaller of the shares of parameters and of multiply-adds that are saved",
                    value=min(saved),
                    at_least=SAVED[name],
                    seeds=0,
                    unit="%",
                )
            )
    columns = ["network", "parameters", "fewer [%]", "MACs", "MACs fewer [%]"]
    caption = "At 224 x 224 pixels with 1000 classes, against the plain network; multiply-adds include those of norms."
    return Section("Parameters and multiply-adds", [*claims, Table("Networks", columns, rows, caption)])


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train MobileNetV2 with subspace attention and without by the recipe, and measure the latter's published weights.

    Args:
        data: ImageNet-1K, a folder with ``train`` and ``val``.
        folder: where the runs lie, each below the name of its model.
        changes: settings that differ from the recipe, e.g. ``epochs=30``. With any, or with other data than
            ImageNet-1K, the accuracies cannot be held against the published ones, and the verdicts say so.
    """
    runs = {
        model: train_by_recipe(RECIPE, Path(folder) / model, **{"data": str(data), "model": model, **changes})
        for model in TOP1
    }
    replaced, plain = runs.values()
    images = replaced.task.splits["test"]
    claim = Claim.judge(
        "MobileNetV2 with attention in the place of two blocks is more accurate",
        published=PUBLISHED,
        statistic="difference of the top-1 accuracies of the best epochs on the validation images",
        value=replaced.top1 - plain.top1,
        at_least=PUBLISHED_GAIN,
        seeds=1,
        scale_ok=not changes and len(images.classes) == IMAGENET_CLASSES,
        unit="points",
    )
    weights = {model: published_accuracy(model, images) for model in WEIGHTS}
    note = Note("The published weights are torchvision's, from another recipe; of ULSAM there are none.")
    return finished(
        "ULSAM: full test of its claims",
        [Section("Accuracy", [claim, *full_parts(runs, TOP1, weights), note])],
        data=str(data),
    )
