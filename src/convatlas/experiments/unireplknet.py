"""Are large kernels worth training with dilated ones beside them, exact to merge, and do they see wider than small?

Ding, Zhang, Ge, Zhao, Song, Yue, Shan: "UniRepLKNet", CVPR 2024, arXiv 2311.15599; Zhang, Ding, Yue: "Scaling Up Your
Kernels", TPAMI 2025, arXiv 2410.08049. They report 83.2 % top-1 on ImageNet-1K for UniRepLKNet-T, larger effective
receptive fields than networks of small kernels, and that the same network forecasts the weather at many stations.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.analysis.effective_receptive_field import THRESHOLDS, contribution_map, erf_area, erf_parts
from convatlas.data.images import read_images
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    accuracy_differences,
    accuracy_parts,
    compare,
    finished,
    full_parts,
    one_thread,
    progress,
    published_accuracy,
    train_by_recipe,
)
from convatlas.networks.registry import list_models, published_files
from convatlas.networks.unireplknet.backbone import UniRepLKNetBlock, UniRepLKNetConfig
from convatlas.networks.unireplknet.series import UniRepLKNetSeriesConfig
from convatlas.nn.depthwise import DepthwiseConv2d
from convatlas.nn.mixers.dilated_reparam import DilatedReparamBlock
from convatlas.report import Cell, Claim, Lines, Note, Report, Section, Table
from convatlas.surgery import merge
from convatlas.training.settings import Training
from convatlas.training.task import seed_everything

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Difference of merged and unmerged network in float64, relative to the largest output, at most.
MERGE_ERROR = 1e-12
#: Points of accuracy on digits that count as no difference.
TOLERANCE = 1.0
#: Accuracy in % below which the networks have not learned enough to be compared.
LEARNED = 85.0
#: Pixels by which the side of the square of the network of large kernels is larger, at least, for each share.
SIDE_GAIN = 2
#: Error of the forecast over that of repeating the last period, at most.
FORECAST_RATIO = 1.0

SEEDS = (0, 1, 2)

TRAINING = Training(epochs=8, batch_size=32, lr=3e-3, warmup_epochs=2)
TRAIN_FRACTION = 0.3
NETWORK = UniRepLKNetConfig(
    depths=(1, 1),
    dims=(16, 32),
    kernel_sizes=((13,), (3,)),
    num_classes=10,
    in_channels=1,
    drop_path=0.0,
    layer_scale_init=0.1,
)

#: Of the receptive fields: the networks, without LayerScale, which hides random blocks; side and number of images.
LARGE = UniRepLKNetConfig(
    depths=(1, 2, 4),
    dims=(12, 24, 48),
    kernel_sizes=((3,), (13, 13), (13, 3, 13, 3)),
    num_classes=0,
    layer_scale_init=None,
)
SMALL = LARGE.override(kernel_sizes=((3,), (3, 3), (3, 3, 3, 3)))
SIDE, IMAGES = 160, 4
#: 99 % of all contributions need more than these images hold.
SHARES = THRESHOLDS[:3]

#: Of the series: their network, length, period, steps, windows of a batch, learning rate.
SERIES = UniRepLKNetSeriesConfig(
    network=UniRepLKNetConfig(
        depths=(1, 1), dims=(12, 24), kernel_sizes=((3,), (7,)), in_channels=1, num_classes=0, layer_scale_init=0.1
    ),
    tree=(2, 2),
    node_series=2,
    length=24,
    label_length=12,
    horizon=12,
    dim=24,
    num_heads=4,
    hidden_channels=48,
    window=13,
    num_layers=1,
    dropout=0.0,
)
TIMES, PERIOD = 1200, 12
STEPS, WINDOWS, LR = 60, 8, 3e-3

RECIPE = "unireplknet"
TOP1 = {"unireplknet_t": 83.2}
RUN_NOISE = 0.3
#: Points by which the top-1 of published weights may differ from the published one.
WEIGHTS_NOISE = 0.1


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the papers.

    Args:
        budget: "quick" merges random networks, trains small ones on digits and series, and measures receptive fields;
            "full" trains UniRepLKNet-T by the recipe and evaluates the published weights.
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
    """Merge, accuracy on digits with three kinds of kernels, receptive fields, and a forecast."""
    networks: dict[str, Callable[[], nn.Module]] = {
        "3x3": NETWORK.override(kernel_sizes=tuple((3,) * depth for depth in NETWORK.depths)).build,
        "13x13": _plain,
        "13x13 with dilated branches": NETWORK.build,
    }
    with progress(len(SEEDS) * (3 + len(networks) * TRAINING.epochs)) as advance, one_thread():
        merging = _merge_section(advance)
        fields = _field_section(advance)
        series = _series_section(advance)
        trained = compare(networks, TRAINING, seeds=SEEDS, train_fraction=TRAIN_FRACTION, advance=advance)
    claim = Claim.judge(
        "A large kernel with dilated branches is as accurate as one without",
        published="large kernels are to be trained with dilated small ones beside them (guideline 2, section 3.1)",
        statistic="accuracy with branches less accuracy of plain 13x13 kernels, on the same digits",
        value=accuracy_differences(trained["13x13 with dilated branches"], trained["13x13"]),
        at_least=-TOLERANCE,
        seeds=len(SEEDS),
        scale_ok=statistics.mean(result.accuracy for result in trained["13x13"]) >= LEARNED,
        unit="points",
    )
    parts = accuracy_parts(
        trained,
        SEEDS,
        caption=f"UniRepLKNets that differ in the depthwise kernels of the first stage only, after {TRAINING.epochs} "
        f"epochs on {TRAIN_FRACTION:.0%} of scikit-learn's digits.",
    )
    sections = [merging, fields, series, Section("Digits", [claim, *parts])]
    return finished("UniRepLKNet: quick test of its claims", sections)


def _plain() -> nn.Module:
    """The network with plain kernels of the same size: one convolution and no branches."""
    model = NETWORK.build()
    for block in model.modules():
        if isinstance(block, UniRepLKNetBlock) and isinstance(block.dwconv, DilatedReparamBlock):
            channels, size = block.dwconv.channels, block.dwconv.kernel_size
            block.dwconv = DepthwiseConv2d(channels, channels, size, padding=size // 2, bias=False)
            nn.init.trunc_normal_(block.dwconv.weight, std=0.02)
    return model


def _merge_section(advance: Callable[[str], None]) -> Section:
    errors, rows = [], []
    for seed in SEEDS:
        seed_everything(seed)
        model = NETWORK.build().double().eval()
        _stir(model, seed)
        x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
        surgery = merge(model, x)
        with torch.inference_mode():
            expected, actual = model(x), surgery.model(x)
        errors.append(float((actual - expected).abs().max() / expected.abs().max()))
        numbers: list[Cell] = [sum(p.numel() for p in net.parameters()) for net in (model, surgery.model)]
        rows.append([f"seed {seed}", *numbers, errors[-1]])
        advance("merging")
    claim = Claim.judge(
        "All branches and norms merge into one large kernel without a change of the output",
        published="equivalent transformation (section 3.1)",
        statistic="largest difference of merged and unmerged network in float64 over the largest output",
        value=errors,
        at_most=MERGE_ERROR,
        seeds=len(SEEDS),
    )
    columns = ["network", "parameters", "parameters merged", "relative difference"]
    return Section("Merging", [claim, Table("Random networks before and after merging", columns, rows)])


def _stir(model: nn.Module, seed: int) -> None:
    """Move weights and running statistics off their initial values, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))


def _field_section(advance: Callable[[str], None]) -> Section:
    gains, shown = [], {}
    for seed in SEEDS:
        images = torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        sides = {}
        for name, config in (("kernels of 3x3", SMALL), ("kernels of 13x13", LARGE)):
            seed_everything(seed)
            contributions = contribution_map(_normalised(config.build(), images), images)
            sides[name] = [area.side or SIDE for area in erf_area(contributions, SHARES)]
            if seed == SEEDS[0]:
                shown[name] = contributions
        small, large = sides.values()
        gains.append(min(a - b for a, b in zip(large, small, strict=True)))
        advance("receptive fields")
    claim = Claim.judge(
        "The network of large kernels sees wider than one of 3x3 kernels of equal depth",
        published="a larger effective receptive field at every threshold",
        statistic="side of the square with a share of the contributions, large less small kernels, the smallest "
        f"difference of the shares {', '.join(f'{share:.0%}' for share in SHARES)}, random weights, normalised",
        value=gains,
        at_least=SIDE_GAIN,
        seeds=len(SEEDS),
        unit="pixels",
    )
    return Section("Effective receptive field", [claim, *erf_parts(shown)])


def _normalised(model: nn.Module, images: Tensor) -> nn.Module:
    """Give the batch norms of a network with random weights the statistics of what they see."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all passes, here of one
    with torch.no_grad():
        model.train()(images)
    return model


# -- forecasting -------------------------------------------------------------------------------------------------------


def _signals(seed: int) -> Tensor:
    """Signals (TIMES, series) of a common period, a slow one that drifts from place to place, and noise."""
    count = math.prod(SERIES.tree) * SERIES.node_series
    generator = torch.Generator().manual_seed(seed)
    phase, strength = (torch.rand(count, generator=generator) for _ in range(2))
    time = torch.arange(TIMES)[:, None]
    daily = (0.5 + strength) * torch.sin(2 * torch.pi * (time / PERIOD + phase))
    slow = torch.sin(2 * torch.pi * (time / (7.3 * PERIOD) + torch.linspace(0, 0.3, count)))
    return daily + slow + 0.2 * torch.randn(TIMES, count, generator=generator)


def _windows(signals: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Known values, features of their times, features of the times ahead, and the values ahead."""
    time = starts[:, None] + torch.arange(SERIES.length + SERIES.horizon)
    turns = 2 * torch.pi * torch.stack([time / PERIOD, time / (7.3 * PERIOD)], dim=-1)
    features = torch.cat([turns.sin(), turns.cos()], dim=-1).float() / 2
    values, ahead = signals[time], SERIES.length
    return values[:, :ahead], features[:, :ahead], features[:, ahead:], values[:, ahead:]


def _series_section(advance: Callable[[str], None]) -> Section:
    ratios: list[float] = []
    rows: list[list[Cell]] = []
    curves = {}
    span, last = SERIES.length + SERIES.horizon, int(0.8 * TIMES)
    for seed in SEEDS:
        seed_everything(seed)
        signals = _signals(seed)
        model = SERIES.build()
        optimizer = torch.optim.Adam(model.parameters(), LR)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(STEPS):
            known, time, ahead, target = _windows(signals, torch.randint(last - span, (WINDOWS,), generator=generator))
            loss = F.mse_loss(model(known, time, ahead), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        known, time, ahead, target = _windows(signals, torch.arange(last, TIMES - span, 3))
        with torch.inference_mode():
            forecast = model.eval()(known, time, ahead)
        repeated = known[:, -PERIOD:].repeat(1, -(-SERIES.horizon // PERIOD), 1)[:, : SERIES.horizon]
        errors = [float(F.mse_loss(guess, target)) for guess in (forecast, repeated)]
        ratios.append(errors[0] / errors[1])
        rows.append([f"seed {seed}", *errors, ratios[-1]])
        if seed == SEEDS[0]:
            steps = range(SERIES.length, span)
            curves = {"known": (range(SERIES.length), known[0, :, 0].tolist())}
            curves |= {
                name: (steps, values[0, :, 0].tolist())
                for name, values in (("what came", target), ("forecast", forecast), ("last period", repeated))
            }
        advance("forecasting")
    claim = Claim.judge(
        "Series that are folded into images are forecast by the same network",
        published="Global Temp: mean squared error 7.602, ahead of models made for series (recalled)",
        statistic="mean squared error of the forecast over that of repeating the last period, on later times",
        value=ratios,
        at_most=FORECAST_RATIO,
        seeds=len(SEEDS),
    )
    table = Table("Mean squared error", ["signals", "forecast", "last period repeated", "ratio"], rows)
    note = Note("The signals are simulated: a common period, a slow wave that drifts from place to place, and noise.")
    return Section("Forecasting", [claim, table, Lines("One series", "time", "value", curves), note])


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train UniRepLKNet-T by the recipe, and evaluate the published weights of all sizes on the validation images.

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
    (trained,) = runs.values()
    same_setting = not changes and len(trained.task.splits["test"].classes) == IMAGENET_CLASSES
    images = read_images(str(data), channels=3)["val"]
    measure = partial(published_accuracy, images=images)
    weights = {model: measure(model) for model in list_models("unireplknet_*") if _has_top1(model)}
    measured = {model: value for model, value in weights.items() if isinstance(value, float)}
    gaps = [abs(value - published_files(model)[0].figures[_FIGURE]) for model, value in measured.items()]
    claims = [
        Claim.judge(
            "UniRepLKNet-T trained by the recipe reaches its published accuracy",
            published=f"{TOP1['unireplknet_t']} % top-1",
            statistic="top-1 accuracy of the best epoch on the validation images",
            value=trained.top1,
            at_least=TOP1["unireplknet_t"] - RUN_NOISE,
            seeds=1,
            scale_ok=same_setting,
            unit="%",
        ),
        Claim.judge(
            "The published weights have the accuracies in their names",
            published="top-1 accuracies of the files",
            statistic="largest difference of measured and published top-1 accuracy",
            value=max(gaps, default=math.nan),
            at_most=WEIGHTS_NOISE,
            seeds=0,
            scale_ok=len(images.classes) == IMAGENET_CLASSES,
            unit="points",
        ),
    ]
    sections = [Section("Accuracy", [*claims, *full_parts(runs, TOP1, weights)])]
    return finished("UniRepLKNet: full test of its claims", sections, data=str(data))


_FIGURE = "ImageNet-1K top-1 [%]"


def _has_top1(model: str) -> bool:
    files = published_files(model)
    return bool(files) and _FIGURE in files[0].figures
