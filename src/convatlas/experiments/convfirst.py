"""Do layers with few operations a byte lose the time that they promise, and does block fusion win it back?

Lavin: "On the Efficiency of Convolutional Neural Networks", 2024, arXiv 2404.03617. The paper claims that ConvFirst
networks with block-fusion kernels run about four times as fast as ConvNeXt at like accuracy, in half precision on a GPU
of NVIDIA's Ampere generation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from convatlas.analysis.waterline import (
    EfficiencyGap,
    GapRow,
    Machine,
    Waterline,
    efficiency_gap,
    find_machine,
    halo_overlap,
    layer_costs,
    measure_machine,
    waterline,
)
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    FullRun,
    device,
    finished,
    full_parts,
    one_thread,
    progress,
    published_top1,
    train_by_recipe,
)
from convatlas.networks.convfirst import ConvFirstBlock, FusedMBConvBlock, MBConvBlock, MLPBlock, fold_block
from convatlas.networks.convnext import ConvNeXtBlock
from convatlas.networks.registry import create_model
from convatlas.report import Cell, Claim, Note, Part, Report, Section, Table
from convatlas.surgery import merge
from convatlas.training.measure import peak_bytes

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Largest difference of a fused block from its layers, over the largest value, in float64.
EXACT = 1e-10
#: The paper's machine: Ampere, half precision; and a batch that fills it.
MACHINE, SAMPLES, SIDE = "a5000_fp16", 128, 224
#: Times by which block fusion must raise the attainable efficiency of a ConvFirst network: half of what the worst
#: blocks of it gain at this machine's balance.
FUSION_GAIN = 1.5
#: Attainable time of ConvNeXt-T over that of the fused network: half the paper's figure, which is of trained networks.
FASTER = 2.0
#: Measured over attainable efficiency of a CPU's kernels: no kernel beats the roofline by more than the noise of it.
BELOW_ROOFLINE = 1.05
#: Time of the layers in turn over that of the fused block, on large maps.
FUSED_RATIO = 1.0
#: Peak memory of the fused block over that of its layers: they hold expanded features twice, it holds a piece of them.
PEAK_SHARE = 0.5
#: Largest distance between the quartiles of a ratio, over its median, with which it counts.
STEADY = 0.3

SEEDS = (0, 1, 2)
#: Channels, expansion, kernel, stride, height and width of the blocks that must not change by fusion.
EQUAL = ((16, 4, 3, 1, 13, 9), (16, 3, 5, 1, 7, 12), (24, 2, 3, 2, 13, 9))
TILES = ((1, 1), (3, 4), (8, 8))
#: Models whose depthwise layers are looked for, and all models of the efficiency gap.
DEPTHWISE = ("convnext_tiny", "mobilenet_v2")
MODELS = ("convnext_tiny", "mobilenet_v2", "resnet18", "convfirst_tiny", "convfirst_mbconv_tiny")
FUSED_MODEL = "convfirst_tiny"
#: Channels and side of the large maps on which blocks are timed, samples, blocks of the stage that is measured.
CPU_SIZES = ((64, 112), (64, 160))
CPU_SAMPLES, CPU_DEPTH = 2, 2
PAIRS = 15

# Full: one training each, and the author's kernel benchmark.

RECIPES = {"convfirst_small": "convfirst", "convnext_tiny": "convnext_study"}
#: Ratio of the latencies at like accuracy: nine tenths of the paper's 4, for other GPUs.
FULL_RATIO = 3.6
#: Points of top-1 within which accuracies are alike.
ALIKE = 0.5
#: The author's stack: extra MLP blocks around the tested ones.
CHANNELS, EXPANSION, RESOLUTION, DEPTH, EXTRA = 64, 6, 64, 4, 2
STACK_SAMPLES = (32, 96, 160, 224, 288)


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" compares fused blocks with their layers, holds networks against the ceilings of a GPU and times
            blocks on the CPU; "full" trains ConvFirst and ConvNeXt-T and times them and the author's stacks of blocks.
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
    """Equality of fused blocks, waterlines of networks, times of blocks on this CPU."""
    with progress(len(SEEDS) + len(MODELS) + 1 + len(SEEDS) * len(CPU_SIZES)) as advance, one_thread():
        sections = [_equality(advance), _networks(advance), _on_this_machine(advance)]
    return finished("ConvFirst: quick test of its claims", sections)


# -- equality ----------------------------------------------------------------------------------------------------------


def _equality(advance: Callable[[str], None]) -> Section:
    worst = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        worst.append(max(_difference(kind, *sizes) for kind in (ConvFirstBlock, MBConvBlock) for sizes in EQUAL))
        advance("comparing blocks")
    claim = Claim.judge(
        "A block fused tile by tile computes what its layers compute",
        published="block fusion changes where features lie, not what is computed",
        statistic="largest difference over the largest value in float64; ConvFirst and MBConv, odd sizes, three tiles",
        value=worst,
        at_most=EXACT,
        seeds=len(SEEDS),
    )
    rows: list[list[Cell]] = [
        [f"{tile[0]} x {tile[1]}", 1.0, halo_overlap(tile, 3), halo_overlap(tile, 3, depth=2)]
        for tile in ((4, 4), (8, 8), (16, 16))
    ]
    columns = ["tile", "ConvFirst", "MBConv", "two ConvFirst in one kernel"]
    table = Table(
        "How often an expanded feature is computed, kernel of 3", columns, rows, "Why the convolution is first."
    )
    return Section("Fused blocks", [claim, table])


@torch.inference_mode()
def _difference(
    kind: type[ConvFirstBlock | MBConvBlock], channels: int, expansion: int, kernel: int, stride: int, *size: int
) -> float:
    block = kind(channels, channels, kernel_size=kernel, stride=stride, expansion=expansion).double()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                tensor.copy_(0.5 + torch.rand(tensor.shape))  # type: ignore[union-attr]
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    expected = block.eval()(x)
    results = [fold_block(block, tile=tile)(x) for tile in (None, *TILES)]
    return max(float((result - expected).abs().max() / expected.abs().max()) for result in results)


# -- networks against a GPU's ceilings ---------------------------------------------------------------------------------


def _networks(advance: Callable[[str], None]) -> Section:
    machine = find_machine(MACHINE)
    with torch.device("meta"):
        models = {name: create_model(name) for name in MODELS}
        image = torch.empty(SAMPLES, 3, SIDE, SIDE)
    lines: dict[str, Waterline] = {}
    for name, model in models.items():
        costs = layer_costs(model, image, bytes_per_element=machine.bytes_per_element)
        lines[name] = waterline(costs, machine)
        if name == FUSED_MODEL:
            fused = waterline(costs, machine, fused=[ConvFirstBlock])
        advance(f"waterline of {name}")
    shares: list[float] = []
    rows: list[list[Cell]] = []
    for name in DEPTHWISE:
        under, number, lost = _depthwise(models[name], lines[name])
        shares.append(under / number)
        rows.append([name, number, under, 100 * lost])
    claims = [
        Claim.judge(
            "The depthwise layers of efficient networks are bound by memory",
            published="depthwise convolutions have low operational intensity and so low attainable efficiency",
            statistic=f"share of the depthwise layers that are under water on {machine.name}, the least of "
            f"{' and '.join(DEPTHWISE)}",
            value=min(shares),
            at_least=1.0,
            seeds=0,
        ),
        Claim.judge(
            "Block fusion raises the attainable efficiency of a ConvFirst network",
            published="ConvFirst with block fusion has higher efficiency than layer by layer",
            statistic=f"attainable efficiency of {FUSED_MODEL}, blocks fused over layer by layer, {machine.name}",
            value=fused.efficiency / lines[FUSED_MODEL].efficiency,
            at_least=FUSION_GAIN,
            seeds=0,
            unit="times",
        ),
        Claim.judge(
            "A fused ConvFirst network can run faster than ConvNeXt",
            published="about 4 times as fast at like accuracy; the accuracies of these networks are not known here",
            statistic=f"attainable time of convnext_tiny layer by layer over that of {FUSED_MODEL} fused",
            value=lines["convnext_tiny"].attainable / fused.attainable,
            at_least=FASTER,
            seeds=0,
            unit="times",
        ),
    ]
    columns = ["model", "depthwise layers", "under water", "their share of the time lost [%]"]
    gap = EfficiencyGap(
        tuple(GapRow(name, line.ops, line.ideal, line.attainable, None, None) for name, line in lines.items()), machine
    )
    parts: list[Part] = [
        *claims,
        Table("Depthwise layers", columns, rows),
        gap.table(),
        gap.figure(),
        *lines[FUSED_MODEL].parts(fused),
        _blocks(),
    ]
    return Section(f"Networks on {machine.name}", parts)


def _depthwise(model: nn.Module, line: Waterline) -> tuple[int, int, float]:
    """How many of the depthwise layers are under water, how many there are, and their share of the time lost."""
    convs = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
    }
    drowning = {bar.layer.name: share for bar, share in line.drowning()}
    number = sum(bar.layer.name in convs for bar in line.bars)
    return len(convs & set(drowning)), number, sum(drowning.get(name, 0.0) for name in convs)


def _blocks() -> Table:
    """Single blocks on a machine of balance 100."""
    machine = Machine(1e14, 1e12, bytes_per_element=2)
    with torch.device("meta"):
        blocks: dict[str, tuple[nn.Module, int]] = {
            "ConvFirst, 8 channels a group": (ConvFirstBlock(64, 64), 64),
            "MBConv, 8 channels a group": (MBConvBlock(64, 64), 64),
            "MBConv, depthwise": (MBConvBlock(64, 64, group_width=1), 64),
            "fused MBConv": (FusedMBConvBlock(64, 64), 64),
            "ConvNeXt, 7 x 7": (ConvNeXtBlock(96), 96),
        }
        rows: list[list[Cell]] = []
        for name, (block, channels) in blocks.items():
            x = torch.empty(128, channels, 56, 56)
            costs = layer_costs(block, x, bytes_per_element=machine.bytes_per_element)
            line, fused = waterline(costs, machine), waterline(costs, machine, fused=[type(block)])
            intensities = ", ".join(f"{bar.layer.intensity:.1f}" for bar in line.bars)
            whole = fused.bars[0].layer.intensity
            rows.append([name, line.ops / 1e9, intensities, line.efficiency, whole, fused.efficiency])
    columns = ["block", "operations [G]", "ops a byte, by layer", "E", "ops a byte, fused", "E fused"]
    caption = "Batch of 128, maps of 56 x 56, half precision, a machine that does 100 operations in the time of a byte."
    return Table("Single blocks", columns, rows, caption)


# -- blocks on this CPU ------------------------------------------------------------------------------------------------


class _Timing(NamedTuple):
    """Medians of alternating pairs: milliseconds of both sides, their ratio and its relative spread."""

    layers: float
    fused: float
    ratio: float
    spread: float


def _on_this_machine(advance: Callable[[str], None]) -> Section:
    machine = measure_machine()
    channels, side = CPU_SIZES[0]
    torch.manual_seed(SEEDS[0])
    stage = nn.Sequential(*(ConvFirstBlock(channels, channels) for _ in range(CPU_DEPTH))).eval()
    image = _image(channels, side)
    merged = nn.Sequential(*(_Residual(merge(block.layers, image).model) for block in stage)).to(  # type: ignore[arg-type]
        memory_format=torch.channels_last  # type: ignore[call-overload]
    )
    line = waterline(layer_costs(merged, image, measure=True), machine)
    advance("measuring a stage")
    timings: dict[tuple[int, int], list[_Timing]] = {}
    peaks: dict[tuple[int, int], tuple[int, int]] = {}
    for size in CPU_SIZES:
        sides = _sides(*size)
        peaks[size] = peak_bytes(sides[0]), peak_bytes(sides[1])
        timings[size] = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            timings[size].append(_alternate(*_sides(*size)))
            advance("timing blocks")
    claims = [
        Claim.judge(
            "Kernels stay below the efficiency that the roofline allows",
            published="latency is operations over peak and efficiency; the roofline bounds the efficiency",
            statistic="measured over attainable efficiency of a ConvFirst stage, layer by layer",
            value=line.quality or float("nan"),
            at_most=BELOW_ROOFLINE,
            seeds=0,
        )
    ]
    rows: list[list[Cell]] = []
    for size, repeated in timings.items():
        label = f"{CPU_SAMPLES} x {size[0]} x {size[1]} x {size[1]}"
        layers, fused = peaks[size]
        claims += [
            Claim.judge(
                f"The fused block is not slower than its layers in turn ({label})",
                published="about 2 times at most where memory bounds; on a CPU operations do",
                statistic="processor time of the layers, norms folded, over that of the fused block, median of pairs",
                value=[timing.ratio for timing in repeated],
                at_least=FUSED_RATIO,
                seeds=len(repeated),
                scale_ok=statistics.median(timing.spread for timing in repeated) <= STEADY,
                unit="times",
            ),
            Claim.judge(
                f"The fused block needs much less memory ({label})",
                published="expanded features never go to memory",
                statistic="peak bytes of the fused block over those of its layers",
                value=fused / layers,
                at_most=PEAK_SHARE,
                seeds=0,
            ),
        ]
        for seed, timing in zip(SEEDS, repeated, strict=True):
            rows.append([label, seed, *timing, layers / 2**20, fused / 2**20])
    columns = [
        "input",
        "seed",
        "layers [ms]",
        "fused [ms]",
        "ratio",
        "spread",
        "layers, peak [MiB]",
        "fused, peak [MiB]",
    ]
    caption = "Norms folded on both sides, channels last, float32, one thread; sides in turn, processor time."
    parts: list[Part] = [*claims, Table("Fused block against its layers", columns, rows, caption), *line.parts()]
    return Section("Blocks on this machine", parts)


class _Residual(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """x plus what the layers make of it."""
        y: Tensor = self.layers(x)
        return x + y


def _image(channels: int, side: int) -> Tensor:
    return torch.randn(CPU_SAMPLES, channels, side, side).contiguous(memory_format=torch.channels_last)


def _sides(channels: int, side: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A block layer by layer, and fused."""
    block, image = ConvFirstBlock(channels, channels).eval(), _image(channels, side)
    layers = _Residual(merge(block.layers, image).model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _call(layers, image), _call(fold_block(block), image)


def _call(module: nn.Module, image: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return module(image)

    return call


def _alternate(layers: Callable[[], object], fused: Callable[[], object]) -> _Timing:
    times = []
    for _ in range(2 + PAIRS):
        pair = []
        for call in (layers, fused):
            start = time.process_time()
            call()
            pair.append(1000 * (time.process_time() - start))
        times.append(pair)
    times = times[2:]
    ratios = [first / second for first, second in times]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return _Timing(medians[0], medians[1], ratio, (high - low) / ratio)


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train by recipe, compare latencies at like accuracy, and time the author's stacks of blocks.

    Args:
        data: labelled images, ImageNet-1K.
        folder: where the runs lie, each below the name of its model.
        changes: settings that differ from the recipes, e.g. ``epochs=30``. With any, or with other data than
            ImageNet-1K, the verdicts say that they cannot be held against the paper.
    """
    runs = {
        model: train_by_recipe(recipe, Path(folder) / model, **{"data": str(data), "model": model, **changes})
        for model, recipe in RECIPES.items()
    }
    same_setting = not changes and len(runs[next(iter(RECIPES))].task.splits["test"].classes) == IMAGENET_CLASSES
    sections = [_trained(runs, same_setting), _stacks()]
    return finished("ConvFirst: full test of its claims", sections, data=str(data))


def _trained(runs: Mapping[str, FullRun], same_setting: bool) -> Section:
    half = device().type == "cuda"
    dtype = torch.half if half else torch.float32
    models = {}
    for name, each in runs.items():
        network = each.task.network.to(device()).eval()
        example = tuple(x.to(device()) for x in network.example_inputs(2))
        # Folded blocks; ConvNeXt has no norm that folds.
        merged = merge(network, example).model
        models[name] = merged.to(device(), dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    samples = SAMPLES if half else 2
    image = example[0][:1].repeat(samples, 1, 1, 1).to(dtype).contiguous(memory_format=torch.channels_last)
    accuracies = {name: each.top1 for name, each in runs.items()}
    gap = efficiency_gap(models, measure_machine(dtype, device()), inputs=image, accuracies=accuracies)
    first, second = (row.measured or float("nan") for row in gap.rows)
    alike = abs(accuracies["convfirst_small"] - accuracies["convnext_tiny"]) <= ALIKE
    claim = Claim.judge(
        "ConvFirst with fused blocks runs about four times as fast as ConvNeXt at like accuracy",
        published="about 4 times, half precision, Ampere; the paper's own networks, which were not published",
        statistic=f"latency of convnext_tiny over that of convfirst_small, batch of {SAMPLES}, half precision",
        value=second / first,
        at_least=FULL_RATIO,
        seeds=0,
        scale_ok=same_setting and half and alike,
        unit="times",
    )
    published = {"convfirst_small": float("nan"), "convnext_tiny": published_top1("convnext_tiny")}
    return Section("Trained networks", [claim, gap.table(), gap.figure(), *full_parts(runs, published, {})])


def _stack(block: Callable[[], nn.Module]) -> nn.Module:
    """The author's benchmark: MLP blocks, the tested blocks, MLP blocks, mean pool."""

    def extra() -> list[nn.Module]:
        return [MLPBlock(CHANNELS, CHANNELS, expansion=EXPANSION) for _ in range(EXTRA)]

    tested = [block() for _ in range(DEPTH)]
    return nn.Sequential(*extra(), *tested, *extra(), nn.AdaptiveAvgPool2d(1)).eval()


def _stacks() -> Section:
    half = device().type == "cuda"
    dtype = torch.half if half else torch.float32
    machine = measure_machine(dtype, device())
    kinds: dict[str, Callable[[], nn.Module]] = {
        "ConvFirst": lambda: ConvFirstBlock(CHANNELS, CHANNELS, expansion=EXPANSION),
        "MBConv": lambda: MBConvBlock(CHANNELS, CHANNELS, expansion=EXPANSION),
        "ConvNeXt": lambda: ConvNeXtBlock(CHANNELS),
    }
    rows: list[list[Cell]] = []
    for samples in STACK_SAMPLES if half else (1,):
        x = torch.randn(samples, CHANNELS, RESOLUTION, RESOLUTION, device=device(), dtype=dtype)
        for name, block in kinds.items():
            stack = _stack(block)
            names = [str(index) for index in range(EXTRA, EXTRA + DEPTH)]
            model = stack.to(device(), dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            costs = layer_costs(model, x.contiguous(memory_format=torch.channels_last), measure=True)
            units = [bar.layer for bar in waterline(costs, machine, fused=names).bars if bar.layer.name in names]
            seconds = sum(unit.seconds or 0.0 for unit in units)
            moved = sum(unit.bytes for unit in units)
            layers = waterline(costs, machine)
            rows.append(
                [name, samples, 1000 * seconds, moved / seconds / 1e9, layers.efficiency, layers.measured_efficiency]
            )
    columns = ["block", "batch", "blocks [ms]", "effective bandwidth [GB/s]", "E attainable", "E measured"]
    caption = (
        f"{DEPTH} blocks of {CHANNELS} channels on maps of {RESOLUTION} x {RESOLUTION}, layer by layer, on "
        f"{machine.name}. Effective bandwidth: bytes of the fused block over the time measured; memory peaks at "
        f"{machine.bandwidth / 1e9:.4g} GB/s."
    )
    note = Note("The setting of the author's kernel benchmark. The fused kernel itself is timed by convatlas bench.")
    return Section("Stacks of blocks", [Table("Stacks", columns, rows, caption), note])
