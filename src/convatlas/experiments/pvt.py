"""Does a transformer with a feature pyramid segment better than one with a single coarse map, and stay affordable?

Wang et al.: "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions", ICCV 2021,
arXiv 2102.12122. Its title claims dense prediction; attention on fine maps is paid for by spatial reduction.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from convatlas.cost import cost
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    Samples,
    device,
    finished,
    full_parts,
    one_thread,
    progress,
    published_accuracy,
    published_top1,
    train_by_recipe,
)
from convatlas.networks.pvt import PVT, PVTConfig, SpatialReductionAttention
from convatlas.nn.attention import SelfAttention
from convatlas.nn.embedding import PatchEmbed
from convatlas.nn.mlp import Mlp
from convatlas.ops.tokens import map_to_tokens, tokens_to_map
from convatlas.report import Bars, Cell, Claim, Images, Lines, Note, Report, Section, Table
from convatlas.training.measure import count_parameters
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.settings import Training
from convatlas.training.task import seed_everything

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Points that are a clear gap: what PVT-Small gains over ResNet-50 in RetinaNet (40.4 against 36.3 AP).
GAP = 4.1
#: Mean IoU of the pyramid in %, below which nothing has been learned that could be compared (all background gives 18).
LEARNED = 25.0
#: Products of the attention with R = 8 take R^2 times fewer multiply-adds than without reduction.
PRODUCTS_RATIO = 64.0
#: By how much the whole layer must be faster: an eighth of the ratio of its products, for the linear layers stay.
TIME_RATIO = 8.0
#: Largest distance between the quartiles of a time ratio, over its median, in a steady measurement.
STEADY = 0.25

SEEDS = (0, 1, 2)
SIDE = 64
CLASSES = ("background", "disc", "triangle", "square", "cross")
TRAIN_IMAGES, TEST_IMAGES = 1500, 300
STEPS, BATCH = 240, 16
TRAINING = Training(epochs=STEPS, batch_size=BATCH, lr=6e-3, warmup_epochs=20)  # an epoch stands for a step
NETWORK = PVTConfig(
    dims=(16, 32, 64, 96),
    depths=(1, 1, 2, 1),
    num_heads=(1, 2, 2, 3),
    mlp_ratios=(4, 4, 4, 4),
    drop_path=0.0,
    class_token=False,
    num_classes=0,
    in_channels=1,
).override(preprocess={"size": SIDE})
HEAD_WIDTH = 32
#: Blocks and width of the columnar network, for about as many parameters as the pyramid.
COLUMN_DEPTH, COLUMN_WIDTH, COLUMN_HEADS = 5, 80, 4
#: Attention of the first stage at 224 x 224: channels, side of the map, R.
ATTENTION = (64, 56, 8)
PAIRS = 15

# Full: one training each, as the paper did.

RECIPES = {"pvt_tiny": "pvt", "pvt_small": "pvt", "pvt_v2_b0": "pvt", "pvt_v2_b2_li": "pvt"}
WEIGHTS = (
    *("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large"),
    *("pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "pvt_v2_b2_li", "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5"),
)
#: Points of top-1 by which two ImageNet trainings of one recipe differ.
RUN_NOISE = 0.3


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains a small pyramid and a columnar transformer to segment drawn shapes, and times the
            attention; "full" trains PVT and PVTv2 by the recipe.
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


# -- the two segmenters ------------------------------------------------------------------------------------------------


class _PyramidSegmenter(nn.Module):
    """PVT with the head of Semantic FPN: all levels at 1/4 of the image's size, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = PVT(NETWORK)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, HEAD_WIDTH, 1) for channels in NETWORK.dims)
        self.output = nn.ModuleList(nn.Conv2d(HEAD_WIDTH, HEAD_WIDTH, 3, padding=1) for _ in NETWORK.dims)
        self.levels = nn.ModuleList(
            nn.ModuleList(_conv_norm_act(HEAD_WIDTH) for _ in range(max(1, level)))
            for level in range(len(NETWORK.dims))
        )
        self.classifier = nn.Conv2d(HEAD_WIDTH, len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [conv(feature) for conv, feature in zip(self.lateral, self.backbone.forward_features(x), strict=True)]
        for fine, coarse in reversed(list(zip(range(len(maps) - 1), range(1, len(maps)), strict=True))):
            maps[fine] = maps[fine] + F.interpolate(maps[coarse], size=maps[fine].shape[2:], mode="nearest")
        total = torch.zeros_like(maps[0])
        for level, (conv, steps) in enumerate(zip(self.output, self.levels, strict=True)):
            y = conv(maps[level])
            for step in steps:  # type: ignore[attr-defined]
                y = step(y)
                if level > 0:
                    y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
            total = total + y
        return _enlarged(self.classifier(total), x)


class _ColumnBlock(nn.Module):
    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = SelfAttention(channels, num_heads)
        self.mlp = Mlp(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _ColumnSegmenter(nn.Module):
    """A plain vision transformer on patches of 16 x 16, whose one map is enlarged."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(1, COLUMN_WIDTH, 16, norm=None)
        self.position = nn.Parameter(torch.empty(1, (SIDE // 16) ** 2, COLUMN_WIDTH))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(_ColumnBlock(COLUMN_WIDTH, COLUMN_HEADS) for _ in range(COLUMN_DEPTH)))
        self.norm = nn.LayerNorm(COLUMN_WIDTH)
        self.head = _conv_norm_act(COLUMN_WIDTH, HEAD_WIDTH)
        self.classifier = nn.Conv2d(HEAD_WIDTH, len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = map_to_tokens(self.patch_embed(x)) + self.position
        y = tokens_to_map(self.norm(self.blocks(tokens)), (SIDE // 16, SIDE // 16))
        return _enlarged(self.classifier(self.head(y)), x)


def _conv_norm_act(channels: int, out_channels: int | None = None) -> nn.Module:
    out_channels = out_channels or channels
    conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _enlarged(scores: Tensor, x: Tensor) -> Tensor:
    return F.interpolate(scores, size=x.shape[2:], mode="bilinear", align_corners=False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"pyramid": _PyramidSegmenter, "column": _ColumnSegmenter}
#: Pixels of the image that one position of the finest map spans.
_STRIDES = {"pyramid": 4, "column": 16}


# -- quick -------------------------------------------------------------------------------------------------------------


def _shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 64, 64) of one to four shapes on textured noise, and the class of each pixel."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    coarse = torch.randn(count, 1, 8, 8, generator=generator)
    texture = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=False)[:, 0]
    images = 0.3 * texture + 0.2 * torch.randn(count, SIDE, SIDE, generator=generator)
    labels = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for number in range(4):
        radius, down, across = uniform(4, 14), uniform(6, SIDE - 6), uniform(6, SIDE - 6)
        y, x = (rows - down) / radius, (columns - across) / radius
        kinds = (
            x**2 + y**2 <= 1,
            (y <= 0.5) & (x.abs() <= (y + 1) / 3**0.5),
            (x.abs() <= 0.8) & (y.abs() <= 0.8),
            ((x.abs() <= 0.3) & (y.abs() <= 1)) | ((y.abs() <= 0.3) & (x.abs() <= 1)),
        )
        chosen = torch.randint(len(kinds), (count, 1, 1), generator=generator)
        # Whatever the class, a shape is brighter or darker than the ground by the same range.
        level = uniform(0.8, 1.6) * torch.sign(uniform(-1, 1))
        drawn = torch.rand(count, 1, 1, generator=generator) < (1.0 if number == 0 else 0.5)
        for index, inside in enumerate(kinds):
            place = inside & (chosen == index) & drawn
            images = torch.where(place, level + images - 0.3 * texture, images)
            labels[place] = index + 1
    return images[:, None], labels


class _Segmented(NamedTuple):
    """A short training: mean IoU and share of right pixels at the edges of shapes, both in %, losses, some results."""

    iou: float
    edges: float
    losses: list[float]
    predictions: npt.NDArray[np.int64]


def _samples(seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return Samples(*_shapes(TRAIN_IMAGES, generator), *_shapes(TEST_IMAGES, generator))


def _train(network: nn.Module, samples: Samples, seed: int, advance: Callable[[str], None]) -> _Segmented:
    images, labels, test_images, test_labels = (tensor.to(device()) for tensor in samples)
    order = torch.Generator().manual_seed(seed)
    network = network.to(device())
    optimizer = make_optimizer(network, TRAINING)
    schedule = LambdaLR(optimizer, lambda step: learning_rate(TRAINING, step, 1) / TRAINING.lr)
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=order)
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        advance("training")
    network.eval()
    with torch.inference_mode():
        predicted = torch.cat([network(part).argmax(1) for part in test_images.split(50)])
    iou = _mean_iou(predicted, test_labels)
    edges = _edges(test_labels)
    right = (predicted == test_labels)[edges].double().mean().item()
    return _Segmented(100 * iou, 100 * right, losses, predicted[:4].cpu().numpy())


def _mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Intersection over union of each class over all pixels of all images, averaged over the classes."""
    count = len(CLASSES)
    table = torch.bincount((count * labels + predicted).flatten(), minlength=count**2).reshape(count, count).double()
    hits = table.diagonal()
    return float((hits / (table.sum(0) + table.sum(1) - hits).clamp(min=1)).mean())


def _edges(labels: Tensor) -> Tensor:
    """Pixels with another class among their eight neighbours."""
    maps = labels[:, None].double()
    highest, lowest = F.max_pool2d(maps, 3, 1, 1), -F.max_pool2d(-maps, 3, 1, 1)
    return (highest != lowest)[:, 0]


def quick() -> Report:
    """A small pyramid against a columnar transformer on drawn shapes; cost and time of reduced attention."""
    trained: dict[str, list[_Segmented]] = {name: [] for name in NETWORKS}
    with progress(len(SEEDS) * len(NETWORKS) * STEPS + PAIRS) as advance, one_thread():
        for seed in SEEDS:
            samples = _samples(seed)
            for name, build in NETWORKS.items():
                seed_everything(seed)
                trained[name].append(_train(build(), samples, seed, advance))
        times = _time_attention(advance)
    sections = [_segmentation_section(trained, samples), _attention_section(times)]
    return finished("PVT: quick test of its claims", sections)


def _segmentation_section(trained: dict[str, list[_Segmented]], samples: Samples) -> Section:
    pyramid, column = trained["pyramid"], trained["column"]
    learned = statistics.mean(result.iou for result in pyramid) >= LEARNED
    totals = _totals()
    each = {name: macs / (SIDE / _STRIDES[name]) ** 2 for name, (_, macs) in totals.items()}
    claims = [
        Claim.judge(
            "A pyramid of maps segments clearly better than one coarse map",
            published="RetinaNet on COCO: 40.4 AP with PVT-Small, 36.3 with ResNet-50",
            statistic="mean IoU of the pyramid less that of a columnar transformer with about as many parameters, on "
            "the same test images",
            value=[a.iou - b.iou for a, b in zip(pyramid, column, strict=True)],
            at_least=GAP,
            seeds=len(SEEDS),
            scale_ok=learned,
            unit="points",
        ),
        Claim.judge(
            "The pyramid is better at the edges of the shapes",
            published="high-resolution maps for dense prediction",
            statistic="difference of the shares of right pixels among those with another class beside them",
            value=[a.edges - b.edges for a, b in zip(pyramid, column, strict=True)],
            at_least=GAP,
            seeds=len(SEEDS),
            scale_ok=learned,
            unit="points",
        ),
        Claim.judge(
            "A position of the pyramid's finest map costs less than one of the coarse map",
            published="a progressively shrinking pyramid reduces the cost of large feature maps",
            statistic="multiply-adds of the columnar network for each position of its map over those of the pyramid",
            value=each["column"] / each["pyramid"],
            at_least=1.0,
            seeds=0,
            unit="times",
        ),
    ]
    rows: list[list[Cell]] = []
    for name, results in trained.items():
        ious = [result.iou for result in results]
        edges = statistics.mean(result.edges for result in results)
        rows.append([name, *totals[name], each[name], *ious, statistics.mean(ious), edges])
    columns = ["network", "parameters", "MACs", "MACs a position", *(f"seed {seed} [%]" for seed in SEEDS)]
    caption = f"Mean IoU on {TEST_IMAGES} test images after {STEPS} steps of {BATCH} images, and right pixels at edges."
    table = Table("Segmentation", [*columns, "mean IoU [%]", "at edges [%]"], rows, caption, {"mean IoU [%]": "max"})
    curves = {}
    for name, results in trained.items():
        losses = [statistics.mean(values) for values in zip(*(result.losses for result in results), strict=True)]
        curves[name] = (range(1, 1 + len(losses)), losses)
    lines = Lines("Training loss, mean of the seeds", "step", "cross-entropy [nats]", curves, log_y=True)
    note = Note(
        f"Drawn images of {SIDE} x {SIDE} pixels with one to four shapes of radius 4 to 14, each a {CLASSES[1]}, "
        f"{CLASSES[2]}, {CLASSES[3]} or {CLASSES[4]}. The pyramid is PVT with widths {NETWORK.dims} and the head of "
        f"Semantic FPN; the column is a transformer of {COLUMN_DEPTH} blocks on patches of 16 x 16, whose map is "
        f"enlarged. AdamW, learning rate {TRAINING.lr:g}, cosine decay. Small networks on drawn images: they test "
        "the mechanism, not COCO."
    )
    return Section("Segmentation", [*claims, table, _pictures(trained, samples), lines, note])


def _totals() -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds of both networks."""
    totals = {}
    for name, build in NETWORKS.items():
        model = build()
        totals[name] = (count_parameters(model), cost(model, torch.randn(1, 1, SIDE, SIDE)).total.macs)
    return totals


def _pictures(trained: dict[str, list[_Segmented]], samples: Samples) -> Images:
    """The first test images of the last seed."""
    shown = []
    for index in range(len(trained["pyramid"][-1].predictions)):
        pixels = (255 * (samples.test_images[index, 0] / 4 + 0.5).clamp(0, 1)).to(torch.uint8).numpy()
        shown += [(pixels, "image"), (_coloured(samples.test_labels[index].numpy()), "truth")]
        shown += [(_coloured(results[-1].predictions[index]), name) for name, results in trained.items()]
    names = "grey background, " + ", ".join(f"{colour} {name}" for name, (colour, _) in _COLOURS.items())
    return Images("Test images and what the networks see in them", shown, f"Colours: {names}.")


_COLOURS = {
    "disc": ("blue", (0, 114, 178)),
    "triangle": ("orange", (213, 94, 0)),
    "square": ("green", (0, 158, 115)),
    "cross": ("pink", (204, 121, 167)),
}


def _coloured(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    palette = np.array([(230, 230, 230), *(colour for _, colour in _COLOURS.values())], np.uint8)
    return palette[labels]


class _AttentionTimes(NamedTuple):
    plain: list[float]
    reduced: list[float]


def _time_attention(advance: Callable[[str], None]) -> _AttentionTimes:
    """Seconds of attention without and with reduction, in turn, in inference; of the processor, if that computes."""
    channels, side, ratio = ATTENTION
    x = torch.randn(1, side * side, channels, device=device())
    layers = [SpatialReductionAttention(channels, 1, each).to(device()).eval() for each in (1, ratio)]

    def seconds(layer: nn.Module) -> float:
        # The one thread's own time does not count what a busy machine does meanwhile.
        clock = time.perf_counter if x.is_cuda else time.process_time
        start = clock()
        layer(x, (side, side))
        if x.is_cuda:
            torch.cuda.synchronize()
        return clock() - start

    times = _AttentionTimes([], [])
    with torch.inference_mode():
        for layer in layers:
            seconds(layer)
        for _ in range(PAIRS):
            times.plain.append(seconds(layers[0]))
            times.reduced.append(seconds(layers[1]))
            advance("timing attention")
    return times


def _attention_section(times: _AttentionTimes) -> Section:
    channels, side, ratio = ATTENTION
    counted = {}
    with torch.device("meta"):
        for each in (1, ratio):
            layer, x = SpatialReductionAttention(channels, 1, each), torch.randn(1, side * side, channels)
            counted[each] = cost(layer, x, (side, side))
    products = {
        each: sum(macs for name, macs in found.operations.items() if "attention" in name)
        for each, found in counted.items()
    }
    ratios = [plain / reduced for plain, reduced in zip(times.plain, times.reduced, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    medians = [1000 * statistics.median(values) for values in times]
    claims = [
        Claim.judge(
            f"Reduction by R = {ratio} makes the products of the attention R^2 times cheaper",
            published="R^2 times lower cost than multi-head attention",
            statistic=f"multiply-adds of the two products at {side} x {side} positions without over with reduction",
            value=products[1] / products[ratio],
            at_least=PRODUCTS_RATIO,
            seeds=0,
            unit="times",
        ),
        Claim.judge(
            "The whole layer is faster, too",
            published="affordable attention on high-resolution maps",
            statistic="time without over time with reduction, median of alternating pairs, both with fused attention",
            value=median,
            at_least=TIME_RATIO,
            seeds=0,
            scale_ok=(high - low) / median <= STEADY,
            unit="times",
        ),
    ]
    rows: list[list[Cell]] = [
        [f"R = {each}", found.total.macs, products[each], milliseconds]
        for (each, found), milliseconds in zip(counted.items(), medians, strict=True)
    ]
    where = "a GPU" if device().type == "cuda" else "one thread of the CPU"
    caption = (
        f"{channels} channels, one head, {side} x {side} positions, one image, float32 inference on {where}: medians "
        f"of {PAIRS} alternating pairs. The ratio is {median:.3g}, its quartiles are {low:.3g} and {high:.3g}."
    )
    table = Table("Attention of the first stage", ["reduction", "MACs", "of the products", "time [ms]"], rows, caption)
    return Section("Attention", [*claims, table, Bars("Time", "ms", {str(row[0]): float(row[3] or 0) for row in rows})])


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, *, models: Sequence[str] = tuple(RECIPES), **changes: Any) -> Report:
    """Train PVT and PVTv2 by the recipe, and measure the published weights.

    Args:
        data: ImageNet-1K, a folder with ``train`` and ``val``.
        folder: where the runs lie, each below the name of its model.
        models: which ones to train.
        changes: settings that differ from the recipe, e.g. ``epochs=30``. With any, or with other data than
            ImageNet-1K, the accuracies cannot be held against the published ones, and the verdicts say so.
    """
    runs = {
        model: train_by_recipe(RECIPES[model], Path(folder) / model, **{"data": str(data), "model": model, **changes})
        for model in models
    }
    top1 = {model: published_top1(model) for model in runs}
    images = next(iter(runs.values())).task.splits["test"]
    same_setting = not changes and len(images.classes) == IMAGENET_CLASSES
    claims = [
        Claim.judge(
            f"{model} trained by the recipe reaches its published accuracy",
            published=f"{top1[model]} % top-1 on ImageNet-1K",
            statistic="top-1 accuracy of the best epoch on the validation images",
            value=trained.top1,
            at_least=top1[model] - RUN_NOISE,
            seeds=1,
            scale_ok=same_setting,
            unit="%",
        )
        for model, trained in runs.items()
    ]
    weights = {model: published_accuracy(model, images) for model in WEIGHTS}
    return finished(
        "PVT: full test of its claims",
        [Section("Accuracy", [*claims, *full_parts(runs, top1, weights)])],
        data=str(data),
    )
