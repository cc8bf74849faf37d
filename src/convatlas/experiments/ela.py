"""Does attention along rows and columns find the object, and is it as good as attention that sees no positions?

Xu, Wan: "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", 2024, arXiv 2403.01123.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.cost import cost
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    Samples,
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
from convatlas.networks.registry import model_config
from convatlas.networks.resnet import ResNet, ResNetConfig
from convatlas.nn.mixers.ela import ELA, CoordinateAttention
from convatlas.report import Cell, Claim, Images, Note, Report, Section, Table
from convatlas.training.measure import count_parameters
from convatlas.training.settings import Training

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Points that count as no difference between two small networks.
TOLERANCE = 1.0
#: Times the accuracy of guessing, below which the networks have not learned enough to be compared.
LEARNED = 2.0
#: How many times as strongly the gates must mark the place of the object as they mark that of another image's object.
MARKED = 1.5
#: Multiply-adds that the attention may add to ResNet-50, in %.
ADDED = 1.0

SEEDS = (0, 1, 2)
TRAINING = Training(epochs=12, batch_size=32, lr=3e-3, warmup_epochs=2)
NETWORK = ResNetConfig(depths=(1, 1), widths=(16, 48), stem_width=16, stem_pool=False, num_classes=10, in_channels=1)
#: Pictures of shapes, for training and for the test, and their sides.
SHAPE_IMAGES = (400, 600)
SIDE = 32
OBJECT = 9
TRAIN_FRACTION = 0.2
#: Networks whose cost is counted, the plain one and that of the claim among them.
COUNTED = ("resnet50", "eca_resnet50", "ela_t_resnet50", "ela_b_resnet50", "ela_s_resnet50", "ela_l_resnet50")
NONE, CHANNELS, COORDINATES, LOCAL = "no attention", "ECA", "coordinate attention", "ELA-B"

# Full: one training each, as the paper did.

RECIPE = "ela"
#: Top-1 on ImageNet-1K in %; that of ELA is not known here.
TOP1: dict[str, float | None] = {"ela_b_resnet50": None, "eca_resnet50": 77.42, "resnet50": 75.20}
WEIGHTS = ("resnet50",)
BETTER = "better than coordinate attention, ECA, SE and others on ImageNet, COCO and VOC"


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small ResNets with four attentions on shapes and digits at random places; "full" trains
            ResNet-50 with ELA, with ECA and without by the recipe.
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
    """Small ResNets with four attentions on shapes among distractors and on shifted digits; what ELA costs."""
    attentions: dict[str, Callable[[int], nn.Module] | None] = {
        NONE: None,
        CHANNELS: None,  # the network's own
        COORDINATES: partial(CoordinateAttention, reduction=4),
        LOCAL: ELA,
    }
    built: list[ResNet] = []

    def build(name: str) -> nn.Module:
        config = NETWORK.override(num_classes=10 if shifted else len(_SHAPES))
        if name == CHANNELS:
            config = config.override(eca_kernel_sizes=(3,) * len(config.depths))
        network = ResNet(config, attention=attentions[name])
        if name == LOCAL:
            built.append(network)
        return network

    networks = {name: partial(build, name) for name in attentions}
    shifted = False
    with progress(2 * len(SEEDS) * len(networks) * TRAINING.epochs) as advance:
        shapes = compare(networks, TRAINING, seeds=SEEDS, samples=_shape_samples, advance=advance)
        found = list(built)
        shifted = True
        digits = compare(
            networks, TRAINING, seeds=SEEDS, train_fraction=TRAIN_FRACTION, advance=advance, change=_shifted
        )
    sections = [
        _accuracy_section(
            "Shapes",
            shapes,
            100 / len(_SHAPES),
            f"on {SHAPE_IMAGES[0]} pictures of a shape at a random place among distractors",
        ),
        _place_section(found),
        _accuracy_section(
            "Shifted digits",
            digits,
            10,
            f"on {TRAIN_FRACTION:.0%} of scikit-learn's 1797 digits, each at a random place of a larger picture",
        ),
        _cost_section(),
    ]
    return finished("ELA: quick test of its claims", sections)


# Shapes


def _shape_masks() -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
    """The classes: figures of about the same area, (OBJECT, OBJECT)."""
    y, x = np.mgrid[:OBJECT, :OBJECT] - OBJECT // 2
    radius = np.hypot(y, x)
    return {
        "disc": radius < 3.7,
        "ring": (radius < 4.6) & (radius > 2.3),
        "cross": np.minimum(abs(y), abs(x)) < 2,
        "square": np.maximum(abs(y), abs(x)) < 3.5,
        "diagonals": np.minimum(abs(y - x), abs(y + x)) < 2,
        "bars": abs(y) % 3 == 1,
    }


_SHAPES = _shape_masks()


def _shapes(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (N, 1, SIDE, SIDE), their labels (N), and where the object is (N, SIDE, SIDE)."""
    rng = np.random.default_rng(seed)
    masks = list(_SHAPES.values())
    labels = rng.integers(len(masks), size=count)
    pictures = rng.normal(0.0, 0.3, (count, SIDE, SIDE))
    places = np.zeros((count, SIDE, SIDE), bool)
    for picture, place, label in zip(pictures, places, labels, strict=True):
        for _ in range(4):  # distractors: short bright lines
            y, x = rng.integers(SIDE - 5, size=2)
            part: Any = (y, slice(x, x + 5)) if rng.random() < 0.5 else (slice(y, y + 5), x)
            picture[part] += 1.0
        y, x = rng.integers(SIDE - OBJECT, size=2)
        picture[y : y + OBJECT, x : x + OBJECT] += masks[label]
        place[y : y + OBJECT, x : x + OBJECT] = True
    return torch.from_numpy(pictures).float()[:, None], torch.from_numpy(labels), torch.from_numpy(places)


def _shape_samples(seed: int) -> Samples:
    (images, labels, _), (test, test_labels, _) = (
        _shapes(count, 2 * seed + part) for part, count in enumerate(SHAPE_IMAGES)
    )
    return Samples(images, labels, test, test_labels)


def _shifted(pictures: Tensor, seed: int) -> Tensor:
    """Pictures (N, 1, SIDE, SIDE) at half the size, each at a random place of an empty one."""
    generator = torch.Generator().manual_seed(seed)
    small = F.avg_pool2d(pictures, 2)
    side = small.shape[-1]
    places = torch.randint(pictures.shape[-1] - side + 1, (len(pictures), 2), generator=generator).tolist()
    moved = torch.zeros_like(pictures)
    for picture, part, (y, x) in zip(moved, small, places, strict=True):
        picture[:, y : y + side, x : x + side] = part
    return moved


def _accuracy_section(title: str, trained: dict[str, list[Trained]], chance: float, on: str) -> Section:
    plain, channels, coordinates, local = trained.values()
    learned = statistics.mean(result.accuracy for result in plain) >= LEARNED * chance
    gains = accuracy_differences(local, plain)

    def against(what: str, other: list[Trained]) -> Claim:
        return Claim.judge(
            f"ELA is as accurate as {what} ({title.lower()})",
            published=BETTER,
            statistic=f"accuracy with ELA-B less accuracy with {what}, on the same pictures",
            value=accuracy_differences(local, other),
            at_least=-TOLERANCE,
            seeds=len(SEEDS),
            scale_ok=learned,
            unit="points",
        )

    claims = [
        Claim.judge(
            f"ELA raises the accuracy of a ResNet ({title.lower()})",
            published=BETTER,
            statistic="accuracy with ELA-B less accuracy without attention, on the same pictures; judged if it is at "
            "least twice its standard error",
            value=gains,
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=learned and resolved(gains),
            unit="points",
        ),
        against("channel attention (ECA)", channels),
        against("coordinate attention", coordinates),
    ]
    caption = f"ResNets that differ in the attention only, after the last of {TRAINING.epochs} epochs {on}."
    note = Note(
        f"Basic blocks {NETWORK.depths}, widths {NETWORK.widths}, {SIDE} x {SIDE} pixels; AdamW, learning rate "
        f"{TRAINING.lr:g}, {TRAINING.warmup_epochs:g} epochs of warm-up, cosine decay, batches of "
        f"{TRAINING.batch_size}, no augmentation. Small networks on small pictures: they test the mechanism."
    )
    return Section(title, [*claims, *accuracy_parts(trained, SEEDS, caption=caption), note])


# Where the attention looks


def _gates(network: ResNet, pictures: Tensor) -> Tensor:
    """Gates (N, C, h, w) of the first attention of a network: what comes out over what goes in."""
    kept: list[Tensor] = []
    handle = network.get_submodule("layer1.0.attention").register_forward_hook(
        lambda module, inputs, output: kept.append(torch.where(inputs[0] == 0, 0.25, output / inputs[0]))
    )
    place = next(network.parameters()).device
    with torch.inference_mode():
        network.eval()(pictures.to(place))
    handle.remove()
    return kept[0].cpu()


def _contrast(gates: Tensor, places: Tensor) -> float:
    """Mean of |gate inside - gate outside| over pictures and channels, in units of the mean gate."""
    inside = places[:, None].float()
    means = [(gates * part).sum((2, 3)) / part.sum((2, 3)) for part in (inside, 1 - inside)]
    return float((means[0] - means[1]).abs().mean() / gates.mean())


def _place_section(networks: list[ResNet]) -> Section:
    ratios, rows = [], []
    pictures_shown: list[tuple[Any, str]] = []
    for seed, network in zip(SEEDS, networks, strict=True):
        pictures, _, places = _shapes(SHAPE_IMAGES[1], 2 * seed + 1)
        gates = _gates(network, pictures)
        small = F.max_pool2d(places[:, None].float(), SIDE // gates.shape[-1])[:, 0] > 0
        own, other = _contrast(gates, small), _contrast(gates, small.roll(1, 0))
        ratios.append(own / other)
        row: list[Cell] = [f"seed {seed}", own, other, own / other]
        rows.append(row)
        if not pictures_shown:
            for index in range(4):
                mean = gates[index].mean(0)
                pictures_shown += [
                    (_grey(pictures[index, 0]), f"picture {index + 1}"),
                    (_grey(mean), "mean gate of its channels"),
                ]
    claim = Claim.judge(
        "The attention follows the object",
        published="localises regions of interest accurately",
        statistic="difference of the gates of the first block between the object's square and the rest, mean of the "
        "absolute values over pictures and channels, over the same for the square of another picture's object; test "
        "pictures",
        value=ratios,
        at_least=MARKED,
        seeds=len(SEEDS),
        unit="times",
    )
    columns = ["network", "own object", "another picture's", "ratio"]
    caption = "Differences in units of the mean gate. Gates of channel attention do not differ: 0."
    images = Images("Pictures of shapes and gates a_h a_w", pictures_shown, "White is the largest value of a picture.")
    return Section("Where the attention looks", [claim, Table("Gates at the object", columns, rows, caption), images])


def _grey(values: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    low, high = values.min(), values.max()
    return (255 * (values - low) / (high - low).clamp(min=1e-9)).round().to(torch.uint8).numpy()


# Cost


def _cost_section() -> Section:
    counts: dict[str, tuple[int, int]] = {}
    for name in COUNTED:
        with torch.device("meta"):
            network = model_config(name).build()
            counts[name] = count_parameters(network), cost(network, torch.empty(1, 3, 224, 224)).total.macs
    plain = counts["resnet50"]
    rows: list[list[Cell]] = [
        [name, parameters, parameters - plain[0], macs, 100 * (macs / plain[1] - 1)]
        for name, (parameters, macs) in counts.items()
    ]
    claim = Claim.judge(
        "ELA costs next to nothing",
        published="better at a similar cost",
        statistic="multiply-adds of ResNet-50 with ELA-B more than without, at 224 x 224 pixels",
        value=100 * (counts["ela_b_resnet50"][1] / plain[1] - 1),
        at_most=ADDED,
        seeds=0,
        unit="%",
    )
    columns = ["network", "parameters", "added", "MACs", "MACs added [%]"]
    return Section("Cost", [claim, Table("Parameters and multiply-adds at 224 x 224 pixels", columns, rows)])


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train ResNet-50 with ELA, with ECA and without by the recipe, and measure the published weights of the last.

    Args:
        data: ImageNet-1K, a folder with ``train`` and ``val``.
        folder: where the runs lie, each below the name of its model.
        changes: settings that differ from the recipe, e.g. ``epochs=30``. With any, or with other data than
            ImageNet-1K, the verdicts say that the accuracies cannot be held against the published claim.
    """
    runs = {
        model: train_by_recipe(RECIPE, Path(folder) / model, **{"data": str(data), "model": model, **changes})
        for model in TOP1
    }
    local, channels, plain = runs.values()
    images = local.task.splits["test"]
    same_setting = not changes and len(images.classes) == IMAGENET_CLASSES
    claims = [
        Claim.judge(
            f"ELA raises the accuracy of ResNet-50 above that {what}",
            published=BETTER,
            statistic="difference of the top-1 accuracies of the best epochs on the validation images",
            value=local.top1 - other.top1,
            at_least=0.0,
            seeds=1,
            scale_ok=same_setting,
            unit="points",
        )
        for what, other in (("without attention", plain), ("with ECA", channels))
    ]
    weights = {model: published_accuracy(model, images) for model in WEIGHTS}
    note = Note(
        "The published figures are those of ECA-Net's paper, whose recipe is nearly the same. The published weights of "
        "resnet50 are torchvision's; of ELA there are none."
    )
    return finished(
        "ELA: full test of its claims",
        [Section("Accuracy", [*claims, *full_parts(runs, TOP1, weights), note])],
        data=str(data),
    )
