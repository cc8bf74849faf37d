"""Entropy, effectiveness and budgets of a structure, by arithmetic alone (paper, section 3).

The paper's letters: w_l = c k^2 / g is the width of convolution l with c input channels, kernel size k and g groups; a
stage i has n_i convolutions from the image to its end, C_i channels and r_i x r_i positions there.

- entropy of a stage: H_i = (ln C_i + ln r_i^2) * sum over its n_i convolutions of ln(w_l) / 2
- multi-scale entropy: sum of a_i H_i
- effectiveness: rho = max over i of n_i / (geometric mean of the n_i widths)
- penalty of unequal depths: Q = exp(spread of the depths L of the super blocks)

Projections of shortcuts and squeeze-excitation count neither as width nor as depth. The paper's entropy lacks the
factor 1/2, which only rescales it, and its Q has the variance where the authors' code has the standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from convatlas.networks.deepmad import CONV, Block, squeezed_channels

__all__ = [
    "WEIGHTS",
    "Count",
    "Score",
    "Stage",
    "count",
    "deepmad_score",
    "depth_penalty",
    "effectiveness",
    "entropy",
    "madnas_score",
    "stages",
    "thinnest",
]

#: Weights a of the stages.
WEIGHTS = (1.0, 1.0, 1.0, 1.0, 8.0)


class Stage(NamedTuple):
    """The network from the image to the end of one stage.

    Attributes:
        blocks: number of blocks, each inner layer of a super block counted.
        layers: n_i, number of convolutions.
        log_width: sum of ln(w_l) over them.
        entropy: half the same sum with the exponents alpha in the widths.
        channels: C_i.
        resolution: r_i; 0 where no image size is given.
    """

    blocks: float
    layers: float
    log_width: float
    entropy: float
    channels: int
    resolution: int


class Score(NamedTuple):
    """The entropy of a structure: a_i H_i of each stage, and their sum."""

    stages: tuple[float, ...]
    total: float


class Count(NamedTuple):
    """What a structure costs, as the authors' search counts it.

    Attributes:
        flops: multiply-adds of the convolutions, and one operation for each value that an activation or a pooled
            shortcut puts out, two for each of a norm. Neither the classifier nor squeeze-excitation is counted.
        size: parameters, all but those of the classifier.
        layers: convolutions, all but those of shortcuts and squeeze-excitation.
    """

    flops: float
    size: float
    layers: int


# -- one block; a search sees the same blocks again and again ----------------------------------------------------------


@lru_cache(1 << 16)
def _log_width(block: Block, alpha1: float, alpha2: float) -> float:
    """Sum of ln(c^alpha1 k^(2 alpha2) / g) over the convolutions of a block."""
    kernel = 2 * alpha2 * math.log(block.kernel_size)
    if block.kind == CONV:
        return alpha1 * math.log(block.in_channels) + kernel
    # A depthwise convolution has as many groups as channels: its width is the kernel alone.
    full = 2 if block.kind == "SuperResK1KXK1" else 1
    channels = math.log(block.in_channels) + (block.depth - 1) * math.log(block.out_channels)
    return alpha1 * channels + block.depth * (alpha1 * full * math.log(block.bottleneck) + kernel)


def _inner(block: Block) -> Iterator[tuple[int, int, float]]:
    """The inner layers of a super block, equal ones together: input channels, stride and how many there are."""
    yield block.in_channels, block.stride, 1
    if block.depth > 1:
        yield block.out_channels, 1, block.depth - 1


@lru_cache(1 << 16)
def _cost(block: Block) -> tuple[float, float]:
    """FLOPs of a block for each position of its input, and its parameters."""
    out, kernel = block.out_channels, block.kernel_size
    if block.kind == CONV:
        products = block.in_channels * out * kernel**2
        return (products + 3 * out) / block.stride**2, products + 2 * out
    middle, depthwise = block.bottleneck, block.kind != "SuperResK1KXK1"
    spatial = middle * kernel**2 * (1 if depthwise else middle)
    flops = size = 0.0
    before = 1.0
    for index, (channels, stride, number) in enumerate(_inner(block)):
        after = before / stride**2
        # Three convolutions, each with its norm (2 operations a value) and activation (1).
        layer = before * (channels * middle + 3 * middle) + after * (spatial + 3 * middle + middle * out + 3 * out)
        parameters = channels * middle + spatial + middle * out + 2 * (2 * middle + out)
        if stride == 2 and (not depthwise or channels == out):
            layer += before * channels  # pooling
        if not depthwise and (index == 0 or channels != out):
            layer += after * (channels * out + 3 * out)
            parameters += channels * out + 2 * out
        if block.kind == "SuperResK1DWSEK1":
            hidden = squeezed_channels(middle)
            parameters += 2 * middle * hidden + 2 * (middle + hidden)
        flops += number * layer
        size += number * parameters
        before = after
    return flops, size


# -- a structure -------------------------------------------------------------------------------------------------------


def stages(
    structure: Sequence[Block],
    image_size: int | None = None,
    *,
    alpha1: float = 1.0,
    alpha2: float = 1.0,
    reference_resolution: bool = True,
) -> list[Stage]:
    """What the scores are made of, stage by stage. A stage ends before a block with stride 2 and at the last block.

    Args:
        structure: the blocks.
        image_size: side of the image.
        alpha1, alpha2: exponents of channels and kernel areas in the widths of the entropy.
        reference_resolution: resolutions as in the authors' code, on which the published scores rest: a block with
            squeeze-excitation counts as if its map had one position, and sides are rounded down. Otherwise the side
            that the map has.
    """
    found = []
    blocks: float = 0
    layers: float = 0
    log_width = half_sum = 0.0
    side, last = image_size or 0, len(structure) - 1
    plain = alpha1 == alpha2 == 1
    for index, block in enumerate(structure):
        width = _log_width(block, 1.0, 1.0)
        log_width += width
        half_sum += (width if plain else _log_width(block, alpha1, alpha2)) / 2
        blocks += block.depth
        layers += 1 if block.kind == CONV else 3 * block.depth
        if reference_resolution and block.kind == "SuperResK1DWSEK1":
            side = min(side, 1)
        elif block.stride == 2:
            side = max(side // 2, min(side, 1)) if reference_resolution else -(-side // 2)
        if index == last or structure[index + 1].stride == 2:
            found.append(Stage(blocks, layers, log_width, half_sum, block.out_channels, side))
    return found


def deepmad_score(
    structure: Sequence[Block],
    image_size: int,
    *,
    weights: Sequence[float] = WEIGHTS,
    alpha1: float = 1.0,
    alpha2: float = 1.0,
    reference_resolution: bool = True,
) -> Score:
    """The weighted multi-scale entropy of a structure.

    Args:
        structure: the blocks.
        image_size: side of the image.
        weights: a_i of each stage.
        alpha1, alpha2, reference_resolution: see `stages`.

    Raises:
        ValueError: weights has not one value for each stage, or the image is smaller than the total stride.
    """
    stride = math.prod(block.stride for block in structure)
    if image_size < stride:
        raise ValueError(f"image_size must be at least the total stride, {stride}, got {image_size}")
    found = stages(structure, image_size, alpha1=alpha1, alpha2=alpha2, reference_resolution=reference_resolution)
    return entropy(found, weights)


def entropy(found: Sequence[Stage], weights: Sequence[float] = WEIGHTS) -> Score:
    """The weighted multi-scale entropy of stages that are at hand.

    Raises:
        ValueError: weights has not one value for each stage.
    """
    _check_weights(found, weights)
    parts = tuple(
        weight * stage.entropy * (math.log(stage.channels) + 2 * math.log(stage.resolution))
        for weight, stage in zip(weights, found, strict=True)
    )
    return Score(parts, sum(parts))


def madnas_score(structure: Sequence[Block], *, weights: Sequence[float] | None = None) -> float:
    """The score of the earlier MadNAS (MAE-DET): sum over stages of a_i (sum of ln(w_l) / 2 + ln C_i).

    Args:
        structure: the blocks.
        weights: a_i of each stage; by default only the last one counts.

    Raises:
        ValueError: weights has not one value for each stage.
    """
    found = stages(structure)
    chosen = [0.0] * (len(found) - 1) + [1.0] if weights is None else weights
    _check_weights(found, chosen)
    return sum(weight * (stage.entropy + math.log(stage.channels)) for weight, stage in zip(chosen, found, strict=True))


def _check_weights(found: Sequence[Stage], weights: Sequence[float]) -> None:
    if len(weights) != len(found):
        raise ValueError(f"weights must have one value for each stage: {len(found)} stages but {len(weights)} weights")


def effectiveness(structure: Sequence[Block]) -> float:
    """rho of a structure: too large, and the network is too deep for its width to be trained."""
    return thinnest(stages(structure))


def thinnest(found: Sequence[Stage]) -> float:
    """rho of stages that are at hand: depth over mean width, of the one where it is largest."""
    return max(stage.layers / math.exp(stage.log_width / stage.layers) for stage in found)


def depth_penalty(structure: Sequence[Block], *, reference: bool = True) -> float:
    """Q: exp of the spread of the depths of the super blocks; 1 where they are equal.

    Args:
        structure: the blocks.
        reference: as in the authors' code: the standard deviation, without the first two super blocks of networks
            with full convolutions. Otherwise the variance of all, as the paper writes.
    """
    blocks = [block for block in structure if block.kind != CONV]
    if reference and blocks and blocks[0].kind == "SuperResK1KXK1":
        blocks = blocks[2:]
    if len(blocks) < 2:
        return 1.0
    mean = sum(block.depth for block in blocks) / len(blocks)
    variance = sum((block.depth - mean) ** 2 for block in blocks) / len(blocks)
    return math.exp(math.sqrt(variance) if reference else variance)


def count(structure: Sequence[Block], image_size: float) -> Count:
    """FLOPs, parameters and layers, which the budgets of a search limit.

    Args:
        structure: the blocks.
        image_size: side of the image; divided by the stride, not rounded, after each block.
    """
    flops = size = layers = 0.0
    area = float(image_size) ** 2
    for block in structure:
        for_each_position, parameters = _cost(block)
        flops += area * for_each_position
        size += parameters
        layers += 1 if block.kind == CONV else 3 * block.depth
        area /= block.stride**2
    return Count(flops, size, int(layers))
