"""Do recursive gated convolutions learn products of neighbours that a depthwise convolution and an MLP cannot?

Rao, Zhao, Tang, Zhou, Lim, Lu: "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
NeurIPS 2022, arXiv 2207.14284. It claims that high-order interactions of positions make HorNet better than ConvNeXt and
Swin at equal size: 83.0 % top-1 on ImageNet-1K for HorNet-T (GF) against 82.1 % of ConvNeXt-T.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    accuracy_differences,
    accuracy_parts,
    compare,
    finished,
    full_parts,
    progress,
    train_by_recipe,
)
from convatlas.networks.hornet import HorNetBlock, HorNetConfig
from convatlas.nn.depthwise import DepthwiseConv2d
from convatlas.nn.mixers.gnconv import RecursiveGatedConv
from convatlas.report import Cell, Claim, Images, Lines, Note, Report, Section, Table
from convatlas.training.measure import count_parameters
from convatlas.training.settings import Training
from convatlas.training.task import seed_everything

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Error of the gated block over that of the depthwise block on products of three neighbours, at most.
ERROR_RATIO = 0.5
#: Points of accuracy on digits that count as no difference.
TOLERANCE = 1.0
#: Accuracy in % below which the networks have not learned enough to be compared.
LEARNED = 90.0

SEEDS = (0, 1, 2)
#: Of the regression: channels of the blocks, images of a batch, their side, steps, learning rate.
CHANNELS, BATCH, SIDE, STEPS, LR = 16, 16, 16, 500, 3e-3

TRAINING = Training(epochs=12, batch_size=32, lr=3e-3, warmup_epochs=2)
TRAIN_FRACTION = 0.3
NETWORK = HorNetConfig(
    depths=(1, 1),
    base_dim=24,
    orders=(2, 3),
    filter_grids=(None, None),
    num_classes=10,
    in_channels=1,
    drop_path=0.0,
    layer_scale_init=0.1,
)

RECIPE = "hornet"
TOP1 = {"hornet_tiny_7x7": 82.8, "convnext_tiny": 82.1}
RUN_NOISE = 0.3


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" fits products of neighbours and digits with small networks; "full" trains HorNet-T and
            ConvNeXt-T by the recipe.
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
    """Products of three neighbours by one block of either kind; accuracy on digits with either token mixer."""
    mixers: dict[str, Callable[[int], nn.Module]] = {
        "7x7 depthwise": lambda channels: DepthwiseConv2d(channels, channels, 7, padding=3),
        "gnConv": lambda channels: RecursiveGatedConv(channels, order=2),
    }
    total = len(SEEDS) * (len(mixers) + len(mixers) * TRAINING.epochs)
    with progress(total) as advance:
        regression = _regression_section(mixers, advance)
        networks = {"7x7 depthwise": lambda: _with_depthwise(), "gnConv": NETWORK.build}
        trained = compare(networks, TRAINING, seeds=SEEDS, train_fraction=TRAIN_FRACTION, advance=advance)
    plain, gated = trained["7x7 depthwise"], trained["gnConv"]
    claim = Claim.judge(
        "HorNet is as accurate as the same network with depthwise convolutions",
        published="82.8 % (HorNet-T 7x7) against 82.1 % (ConvNeXt-T) top-1 on ImageNet-1K",
        statistic="accuracy with gnConv less accuracy with 7x7 depthwise convolutions, on the same digits",
        value=accuracy_differences(gated, plain),
        at_least=-TOLERANCE,
        seeds=len(SEEDS),
        scale_ok=statistics.mean(result.accuracy for result in plain) >= LEARNED,
        unit="points",
    )
    parts = accuracy_parts(
        trained,
        SEEDS,
        caption=f"HorNets that differ in the token mixer only, after {TRAINING.epochs} epochs on {TRAIN_FRACTION:.0%} "
        "of scikit-learn's digits.",
    )
    return finished("HorNet: quick test of its claims", [regression, Section("Digits", [claim, *parts])])


def _with_depthwise() -> nn.Module:
    model = NETWORK.build()
    for block in model.modules():
        if isinstance(block, HorNetBlock):
            channels = block.norm1.normalized_shape[0]
            block.gnconv = DepthwiseConv2d(channels, channels, 7, padding=3)
    return model


class _Regression(nn.Module):
    """A 1x1 convolution to the channels of a block, the block, a 1x1 convolution to one channel."""

    def __init__(self, mixer: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 1)
        self.block = HorNetBlock(channels, mixer, layer_scale_init=0.1)
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


def _products(x: Tensor) -> Tensor:
    """x(i, j) x(i, j + 2) x(i + 2, j), zero beyond the border."""
    right, below = F.pad(x, (0, 2))[..., 2:], F.pad(x, (0, 0, 0, 2))[..., 2:, :]
    return x * right * below


def _regression_section(mixers: dict[str, Callable[[int], nn.Module]], advance: Callable[[str], None]) -> Section:
    errors: dict[str, list[float]] = {name: [] for name in mixers}
    curves: dict[str, tuple[list[int], list[float]]] = {}
    pictures = []
    parameters = {}
    for seed in SEEDS:
        for name, make in mixers.items():
            # The gated block has more projections: the other gets wider until it has at least its parameters.
            channels = CHANNELS
            wanted = count_parameters(_Regression(mixers["gnConv"](CHANNELS), CHANNELS))
            while name != "gnConv" and count_parameters(_Regression(make(channels), channels)) < wanted:
                channels += 1
            seed_everything(seed)
            model = _Regression(make(channels), channels)
            parameters[name] = count_parameters(model)
            losses = _fit(model, seed)
            x = torch.randn(64, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1000 + seed))
            with torch.inference_mode():
                y = model.eval()(x)
            errors[name].append(float(F.mse_loss(y, _products(x)) / _products(x).var()))
            if seed == SEEDS[0]:
                curves[name] = (list(range(1, 1 + len(losses))), losses)
                pictures.append((_shown(y[0, 0]), name))
                target = _shown(_products(x)[0, 0])
            advance(f"products of neighbours, {name}")
    ratios = [a / b for a, b in zip(errors["gnConv"], errors["7x7 depthwise"], strict=True)]
    claim = Claim.judge(
        "gnConv learns products of three neighbours that a depthwise convolution and an MLP of its size do not",
        published="high-order spatial interactions, up to order n + 1 (section 3.1)",
        statistic="relative squared error of the gnConv block over that of the depthwise block, on new images",
        value=ratios,
        at_most=ERROR_RATIO,
        seeds=len(SEEDS),
    )
    rows: list[list[Cell]] = [[name, parameters[name], *values] for name, values in errors.items()]
    table = Table(
        "Error on products of three neighbours, 1 for a constant answer",
        ["token mixer", "parameters", *(f"seed {seed}" for seed in SEEDS)],
        rows,
        f"One block with each token mixer, {STEPS} steps of {BATCH} random {SIDE} x {SIDE} images.",
    )
    lines = Lines("Training error", "step / 10", "relative squared error", curves, log_y=True)
    shown = Images("Products in one new image", [(target, "target"), *pictures])
    note = Note("The order-2 layer is a polynomial of degree 3, so the target is within its reach.")
    return Section("High-order interactions", [claim, table, lines, shown, note])


def _fit(model: nn.Module, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses: list[float] = []
    recent = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, 1, SIDE, SIDE, generator=generator)
        target = _products(x)
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent.append(loss.item() / target.var().item())
        if len(recent) == 10:
            losses.append(statistics.mean(recent))
            recent = []
    return losses


def _shown(values: Tensor) -> Any:
    scaled = (values / 4).clamp(-1, 1) / 2 + 0.5
    pixels = (255 * scaled).round().to(torch.uint8).numpy()
    return np.kron(pixels, np.ones((8, 8), np.uint8))


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train HorNet-T and ConvNeXt-T by the recipe.

    Args:
        data: ImageNet-1K, a folder with ``train`` and ``val``.
        folder: where the runs lie, each below the name of its model.
        changes: settings that differ from the recipe; with any, or with other data than ImageNet-1K, the accuracies
            cannot be held against the published ones, and the verdicts say so.
    """
    runs = {
        model: train_by_recipe(RECIPE, Path(folder) / model, **{"data": str(data), "model": model, **changes})
        for model in TOP1
    }
    hornet, convnext = runs.values()
    same_setting = not changes and len(hornet.task.splits["test"].classes) == IMAGENET_CLASSES
    claims = [
        Claim.judge(
            "HorNet-T is more accurate than ConvNeXt-T",
            published="82.8 % against 82.1 % top-1",
            statistic="difference of the top-1 accuracies of the best epochs on the validation images",
            value=hornet.top1 - convnext.top1,
            at_least=0.0,
            seeds=1,
            scale_ok=same_setting,
            unit="points",
        ),
        Claim.judge(
            "HorNet-T trained by the recipe reaches its published accuracy",
            published=f"{TOP1['hornet_tiny_7x7']} % top-1",
            statistic="top-1 accuracy of the best epoch on the validation images",
            value=hornet.top1,
            at_least=TOP1["hornet_tiny_7x7"] - RUN_NOISE,
            seeds=1,
            scale_ok=same_setting,
            unit="%",
        ),
    ]
    sections = [Section("Accuracy", [*claims, *full_parts(runs, TOP1, {})])]
    return finished("HorNet: full test of its claims", sections, data=str(data))
