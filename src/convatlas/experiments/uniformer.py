"""Are convolutions in the early stages and attention in the late ones as good as either alone, and cheaper?

Li, Wang, Zhang, Gao, Song, Liu, Li, Qiao: "UniFormer: Unifying Convolution and Self-attention for Visual Recognition",
TPAMI 2023, arXiv 2201.09450; for video ICLR 2022, arXiv 2201.04676. Letters name the blocks of the four stages: L is
local, G is global; the paper's networks are LLGG.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.cost import cost
from convatlas.data.volumes import CLIP_SUFFIXES, montage
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    Samples,
    accuracy_differences,
    accuracy_parts,
    compare,
    device,
    finished,
    full_parts,
    one_thread,
    progress,
    published_accuracy,
    published_top1,
    train_by_recipe,
)
from convatlas.networks.uniformer.blocks import BlockOptions, GlobalBlock, LocalBlock
from convatlas.networks.uniformer.image import UniFormer, UniFormerConfig
from convatlas.networks.uniformer.light import EvoBlock
from convatlas.networks.uniformer.video import VARIANTS, UniFormer3d, UniFormer3dConfig
from convatlas.report import Bars, Cell, Claim, Images, Note, Report, Section, Table
from convatlas.training.settings import Training

__all__ = ["full", "moving_shapes", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Points of accuracy that count as no difference.
TOLERANCE = 2.0
#: Accuracy of LLGG in %, below which nothing has been learned that could be compared (chance is 12.5 or 10).
LEARNED = 60.0
#: By how much global blocks in all stages need more multiply-adds at the published size.
MACS_RATIO = 4.0
#: By how much a global block of the first stage takes longer than a local one.
TIME_RATIO = 2.0
#: Share of the attention's products that is left where half of the tokens go through a block.
PRODUCTS_SHARE = 0.26
#: Largest distance between the quartiles of a time ratio, over its median, in a steady measurement.
STEADY = 0.25

KINDS = ("LLGG", "LLLL", "GGGG")
SEEDS = (0, 1, 2)
FRAMES, SIDE = 4, 32
TRAIN, TEST = 1600, 300
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
SHAPES = ("disc", "ring")
SIZES: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "dims": (8, 16, 32, 48),
    "mlp_ratios": (2, 2, 2, 2),
    "head_dim": 8,
    "in_channels": 1,
    "drop_path": 0.0,
}
CLIPS = UniFormer3dConfig().override(num_classes=len(DIRECTIONS) * len(SHAPES), **SIZES)
DIGITS = UniFormerConfig().override(num_classes=10, **SIZES)
TRAINING = Training(epochs=4, batch_size=32, lr=3e-3, warmup_epochs=1)
TRAINING_DIGITS = Training(epochs=3, batch_size=64, lr=3e-3, warmup_epochs=1)
#: A block of the first stage at 224 x 224: channels, side of the map, side of a head.
FIRST = (64, 56, 64)
PAIRS = 9

# Full: one training each, as the paper did.

RECIPES = {"uniformer_small": "uniformer"}
RECIPES_VIDEO = {"uniformer3d_small": "uniformer3d"}
WEIGHTS = ("uniformer_small", "uniformer_base")
VIDEO_TOP1 = 80.8
KINETICS_CLASSES = 400
#: Points of top-1 by which two trainings of one recipe differ.
RUN_NOISE = 0.3


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small networks on clips of moving shapes and on digits; "full" trains UniFormer-S by the
            recipe.
        data: for "full": ImageNet-1K or Kinetics-400, a folder with ``train`` and ``val`` and a folder for each class
            in them.
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


# -- networks of other blocks ------------------------------------------------------------------------------------------


def _network(config: UniFormerConfig | UniFormer3dConfig, kind: str) -> nn.Module:
    """A network whose stages consist of the blocks that ``kind`` names."""
    base: type[UniFormer] | type[UniFormer3d] = UniFormer3d if isinstance(config, UniFormer3dConfig) else UniFormer

    class Other(base):  # type: ignore[misc, valid-type]
        def _block(self, stage: int, index: int, drop_path: float) -> nn.Module:
            return (LocalBlock if kind[stage] == "L" else GlobalBlock)(self._options(stage), drop_path)

    network: nn.Module = Other(config)
    return network


def _networks(config: UniFormerConfig | UniFormer3dConfig) -> dict[str, Callable[[], nn.Module]]:
    return {kind: lambda kind=kind: _network(config, kind) for kind in KINDS}  # type: ignore[misc]


# -- quick -------------------------------------------------------------------------------------------------------------


def moving_shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips (count, 1, 4, 32, 32) of a disc or a ring that moves over textured noise, and their labels.

    A label is 2 times the direction plus the shape. A shape starts anywhere, moves 2 to 3.5 pixels a frame and comes
    back on the other side, so that a single frame does not tell the direction.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    labels = torch.randint(len(DIRECTIONS) * len(SHAPES), (count,), generator=generator)
    steps = torch.tensor(list(DIRECTIONS.values()))[labels // len(SHAPES)].float()
    coarse = torch.randn(count, 1, 8, 8, generator=generator)
    texture = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    clips = 0.2 * texture + 0.1 * torch.randn(count, FRAMES, SIDE, SIDE, generator=generator)
    frames = torch.arange(FRAMES).reshape(1, -1, 1, 1)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    radius, speed = uniform(5, 8), uniform(2.0, 3.5)
    distances = []
    for axis, places in enumerate((rows, columns)):
        centre = uniform(0, SIDE) + speed * frames * steps[:, axis].reshape(-1, 1, 1, 1)
        distances.append(((places - centre + SIDE / 2) % SIDE - SIDE / 2) / radius)
    y, x = distances
    ring = (labels % len(SHAPES) == 1).reshape(-1, 1, 1, 1)
    distance = y**2 + x**2
    clips = torch.where((distance <= 1) & ~(ring & (distance < 0.3)), clips + uniform(1.0, 1.6), clips)
    return clips[:, None], labels


def _clips(seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return Samples(*moving_shapes(TRAIN, generator), *moving_shapes(TEST, generator))


def quick() -> Report:
    """Local, global and mixed stages on clips and on digits; multiply-adds and time of the blocks."""
    total = len(SEEDS) * len(KINDS) * (TRAINING.epochs + TRAINING_DIGITS.epochs) + PAIRS
    with progress(total) as advance:
        clips = compare(_networks(CLIPS), TRAINING, seeds=SEEDS, samples=_clips, advance=advance)
        digits = compare(_networks(DIGITS), TRAINING_DIGITS, seeds=SEEDS, advance=advance)
        times = _time_blocks(advance)
    on_clips = f"{TRAIN} clips of {FRAMES} frames of {SIDE} x {SIDE} pixels; {TEST} test clips."
    sections = [
        Section("Clips of moving shapes", [*_accuracy_claims(clips, "clips"), *_parts(clips, on_clips), _pictures()]),
        Section(
            "Digits", [*_accuracy_claims(digits, "digits"), *_parts(digits, "half of scikit-learn's 1797 digits.")]
        ),
        _cost_section(),
        _time_section(times),
    ]
    return finished("UniFormer: quick test of its claims", sections)


def _accuracy_claims(trained: Any, what: str) -> list[Claim]:
    learned = statistics.mean(result.accuracy for result in trained["LLGG"]) >= LEARNED
    return [
        Claim.judge(
            f"Local then global blocks are at least as accurate as {words} alone, on {what}",
            published="LLGG is the most accurate of all combinations of local and global stages",
            statistic=f"accuracy of LLGG less accuracy of {other}, on the same test {what}",
            value=accuracy_differences(trained["LLGG"], trained[other]),
            at_least=-TOLERANCE,
            seeds=len(SEEDS),
            scale_ok=learned,
            unit="points",
        )
        for other, words in (("LLLL", "local ones"), ("GGGG", "global ones"))
    ]


def _parts(trained: Any, caption: str) -> list[Any]:
    network = f"Networks of widths {SIZES['dims']} with one block a stage after the last epoch on {caption}"
    return accuracy_parts(trained, SEEDS, caption=network)


def _pictures() -> Images:
    clips, labels = moving_shapes(4, torch.Generator().manual_seed(SEEDS[0]))
    names = [f"{shape}, {direction}" for direction in DIRECTIONS for shape in SHAPES]
    pictures: list[tuple[npt.NDArray[np.uint8], str]] = []
    for clip, label in zip(clips, labels.tolist(), strict=True):
        pixels = (255 * (0.25 + 0.4 * clip[0]).clamp(0, 1)).round().to(torch.uint8).numpy()
        pictures.append((montage(pixels[..., None])[..., 0], names[label]))
    return Images("Clips, frame by frame", pictures)


def _cost_section() -> Section:
    config = VARIANTS["uniformer3d_small"]
    with torch.device("meta"):
        counted = {}
        for kind in KINDS:
            network = _network(config, kind).eval()
            counted[kind] = cost(network, *network.example_inputs())  # type: ignore[operator]
        options = BlockOptions(channels=320, num_heads=5)
        inputs = torch.empty(1, 320, 14, 14), torch.empty(1, 1, 320), torch.empty(1, 196)
        products = {}
        for ratio in (1.0, 0.5):
            operations = cost(EvoBlock(options, prune_ratio=ratio), *inputs).operations
            products[ratio] = sum(macs for name, macs in operations.items() if "attention" in name)
    gigas = {kind: each.total.macs / 1e9 for kind, each in counted.items()}
    claims = [
        Claim.judge(
            "Global blocks in all stages cost far more than in the last two",
            published="convolution in shallow layers reduces the computation of early attention by a large factor",
            statistic="multiply-adds of GGGG over those of LLGG, sizes of UniFormer-S, 16 frames of 224 x 224",
            value=gigas["GGGG"] / gigas["LLGG"],
            at_least=MACS_RATIO,
            seeds=0,
            unit="times",
        ),
        Claim.judge(
            "With half of the tokens a light block makes about a quarter of the attention's products",
            published="hourglass blocks for light networks",
            statistic="multiply-adds of the attention's products with r = 0.5 over those with r = 1, 14 x 14 tokens",
            value=products[0.5] / products[1.0],
            at_most=PRODUCTS_SHARE,
            seeds=0,
        ),
    ]
    rows: list[list[Cell]] = [
        [kind, each.total.parameters, gigas[kind], each.total.activations / 1e6] for kind, each in counted.items()
    ]
    table = Table(
        "UniFormer-S with other blocks, 16 frames of 224 x 224",
        ["blocks", "parameters", "multiply-adds [10^9]", "activations [10^6]"],
        rows,
    )
    return Section("Cost", [*claims, table, Bars("Multiply-adds", "10^9", gigas)])


def _time_blocks(advance: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds of a local and a global block in turn, in inference; of the processor, if that computes."""
    channels, side, head_dim = FIRST
    options = BlockOptions(channels=channels, num_heads=channels // head_dim)
    x = torch.randn(1, channels, side, side, device=device()).contiguous(memory_format=torch.channels_last)
    blocks = {"local": LocalBlock(options).to(device()).eval(), "global": GlobalBlock(options).to(device()).eval()}

    def seconds(block: nn.Module) -> float:
        # The one thread's own time does not count what a busy machine does meanwhile.
        clock = time.perf_counter if x.is_cuda else time.process_time
        start = clock()
        block(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        return clock() - start

    times: dict[str, list[float]] = {name: [] for name in blocks}
    with torch.inference_mode(), one_thread():
        for block in blocks.values():
            seconds(block)
        for _ in range(PAIRS):
            for name, block in blocks.items():
                times[name].append(seconds(block))
            advance("timing blocks")
    return times


def _time_section(times: dict[str, list[float]]) -> Section:
    channels, side, _ = FIRST
    ratios = [slow / fast for slow, fast in zip(times["global"], times["local"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    claim = Claim.judge(
        "A local block of the first stage is faster than a global one",
        published="local relation aggregators save computation in shallow layers",
        statistic="time of a global block over time of a local one, median of alternating pairs, fused attention",
        value=median,
        at_least=TIME_RATIO,
        seeds=0,
        scale_ok=(high - low) / median <= STEADY,
        unit="times",
    )
    medians: list[list[Cell]] = [[name, 1000 * statistics.median(values)] for name, values in times.items()]
    where = "a GPU" if device().type == "cuda" else "one thread of the CPU"
    caption = (
        f"{channels} channels, {side} x {side} positions, one image, float32 inference on {where}: medians of {PAIRS} "
        f"alternating pairs. The ratio is {median:.3g}, its quartiles are {low:.3g} and {high:.3g}."
    )
    note = Note(
        "Small networks on small clips test the mechanism, not the accuracy on ImageNet or Kinetics. At this size "
        "attention is cheap everywhere; what it costs at the published size is counted above."
    )
    return Section("Time", [claim, Table("Blocks of the first stage", ["block", "time [ms]"], medians, caption), note])


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train UniFormer-S by its recipe for images or for video, whichever the data are; measure the published weights.

    Args:
        data: ImageNet-1K or Kinetics-400, a folder with ``train`` and ``val``.
        folder: where the runs lie, each below the name of its model.
        changes: settings that differ from the recipe, e.g. ``epochs=30``. With any, or with other data, the accuracies
            cannot be held against the published ones, and the verdicts say so.
    """
    first = next((path for path in Path(data).rglob("*") if path.is_file()), Path())
    video = first.suffix.lower() in CLIP_SUFFIXES
    recipes, classes = (RECIPES_VIDEO, KINETICS_CLASSES) if video else (RECIPES, IMAGENET_CLASSES)
    runs = {
        model: train_by_recipe(recipe, Path(folder) / model, **{"data": str(data), "model": model, **changes})
        for model, recipe in recipes.items()
    }
    ((model, trained),) = runs.items()
    images = trained.task.splits["test"]
    expected = VIDEO_TOP1 if video else published_top1(model)
    claim = Claim.judge(
        f"{model} trained by the recipe reaches its published accuracy",
        published=f"{expected} % top-1" + (" with four clips of each video" if video else " on ImageNet-1K"),
        statistic="top-1 accuracy of the best epoch on the validation samples, one view each",
        value=trained.top1,
        at_least=expected - RUN_NOISE,
        seeds=1,
        scale_ok=not changes and len(images.classes) == classes,
        unit="%",
    )
    weights = {} if video else {name: published_accuracy(name, images) for name in WEIGHTS}
    return finished(
        "UniFormer: full test of its claims",
        [Section("Accuracy", [claim, *full_parts(runs, {model: expected}, weights)])],
        data=str(data),
    )
