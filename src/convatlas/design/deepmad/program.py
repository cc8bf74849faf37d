"""The mathematical program (paper, section 3.3): which structures may be chosen, and which of two is better.

maximise  sum of a_i H_i - beta Q
subject to  FLOPs <= F, parameters <= P, rho <= rho_0, layers <= D, channels that do not fall from block to block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from convatlas.design.deepmad.scores import WEIGHTS, count, depth_penalty, entropy, stages, thinnest
from convatlas.networks.deepmad import Block, make_structure

__all__ = ["PUBLISHED_PROGRAMS", "SPACES", "Program", "PublishedProgram", "Space", "falls", "repair", "round_channels"]

Structure = tuple[Block, ...]


@dataclass(frozen=True)
class Space:
    """The choices of a search for one kind of super block.

    Attributes:
        kind: the super block.
        scales: factors by which channels change.
        kernels: kernel sizes.
        ratios: bottleneck over output channels, where that is what is chosen; empty where the bottleneck is scaled.
        largest: most channels of a super block.
        stem: fewest and most channels of the stem.
        rho: effectiveness that the authors allow.
        init: where the authors begin.
    """

    kind: str
    scales: tuple[float, ...]
    kernels: tuple[int, ...]
    ratios: tuple[float, ...]
    largest: int
    stem: tuple[int, int]
    rho: float
    init: Structure

    @property
    def expands(self) -> bool:
        """Whether a block is narrow at its ends, as with depthwise convolutions, and not in the middle."""
        return bool(self.ratios)


_INIT_FULL = ((256, 3, 2, 1, 64), (512, 3, 2, 1, 128), (768, 3, 2, 1, 256), (1024, 3, 1, 1, 256), (2048, 3, 2, 1, 512))
_INIT_DEPTHWISE = (
    *((72, 3, 2, 1, 432), (128, 3, 2, 1, 768), (192, 3, 2, 1, 1152)),
    *((288, 3, 2, 1, 1728), (448, 3, 1, 1, 2688)),
)

SPACES: dict[str, Space] = {
    "k1kxk1": Space(
        kind="SuperResK1KXK1",
        scales=(1.5, 1.25, 0.8, 0.6, 0.5),
        kernels=(3, 5),
        ratios=(),
        largest=2048,
        stem=(8, 32),
        rho=0.3,
        init=make_structure("SuperResK1KXK1", 32, _INIT_FULL),
    ),
    "k1dwk1": Space(
        kind="SuperResK1DWK1",
        scales=(2.0, 1.5, 1.25, 0.8, 0.6, 0.5),
        kernels=(3, 5),
        ratios=tuple(step / 2 for step in range(3, 13)),
        largest=1280,
        stem=(8, 32),
        rho=0.5,
        init=make_structure("SuperResK1DWK1", 32, _INIT_DEPTHWISE, 1792),
    ),
    "k1dwsek1": Space(
        kind="SuperResK1DWSEK1",
        scales=tuple(step / 10 for step in range(5, 21)),
        kernels=(3, 5, 7),
        ratios=tuple(step / 10 for step in range(15, 61)),
        largest=1280,
        stem=(16, 32),
        rho=0.5,
        init=make_structure("SuperResK1DWSEK1", 32, _INIT_DEPTHWISE, 1792),
    ),
}


@dataclass(frozen=True)
class PublishedProgram:
    """The program by which a published network was found.

    Attributes:
        space: name of the space.
        flops, params, rho: F, P and rho_0.
        image_size: side of the image.
        last: channels of the convolution at the end, where there is one.
    """

    space: str
    flops: float
    params: float
    rho: float
    image_size: int = 224
    last: int | None = None


#: By the last part of the network's name.
PUBLISHED_PROGRAMS: dict[str, PublishedProgram] = {
    "r18": PublishedProgram("k1kxk1", 1.82e9, 11.69e6, 0.3),
    "r34": PublishedProgram("k1kxk1", 3.68e9, 21.80e6, 0.3),
    "r50": PublishedProgram("k1kxk1", 4.13e9, 25.55e6, 0.3),
    "29m": PublishedProgram("k1dwsek1", 4.5e9, 29e6, 0.5, last=1792),
    "29m_288": PublishedProgram("k1dwsek1", 4.5e9, 29e6, 0.5, image_size=288, last=1792),
    "50m": PublishedProgram("k1dwsek1", 8.7e9, 50e6, 0.5, last=2048),
    "89m": PublishedProgram("k1dwsek1", 15.4e9, 89e6, 0.5, last=2560),
}


@dataclass(frozen=True, kw_only=True)
class Program:
    """An objective and its constraints.

    Attributes:
        image_size: side of the image.
        flops, params, rho, layers: budgets F, P, rho_0 and D; infinite where there is none.
        weights: a_i of each stage.
        penalty: beta.
        alpha1, alpha2, reference_resolution: of the entropy, see `stages`.
    """

    image_size: int = 224
    flops: float = math.inf
    params: float = math.inf
    rho: float = math.inf
    layers: float = math.inf
    weights: tuple[float, ...] = WEIGHTS
    penalty: float = 10.0
    alpha1: float = 1.0
    alpha2: float = 1.0
    reference_resolution: bool = True

    def objective(self, structure: Sequence[Block]) -> float:
        """Weighted entropy less the penalty, whether or not the constraints are met."""
        found = stages(
            structure,
            self.image_size,
            alpha1=self.alpha1,
            alpha2=self.alpha2,
            reference_resolution=self.reference_resolution,
        )
        return entropy(found, self.weights).total - self.penalty * depth_penalty(structure)

    def evaluate(self, structure: Sequence[Block]) -> float | None:
        """The objective, or None where a constraint is violated."""
        flops, size, layers = count(structure, self.image_size)
        if flops > self.flops or size > self.params or layers > self.layers:
            return None
        if thinnest(stages(structure)) > self.rho or falls(structure) is not None:
            return None
        return self.objective(structure)

    def used(self, structure: Sequence[Block]) -> dict[str, tuple[float, float]]:
        """What a structure takes of each budget and what the budget is, by name."""
        flops, size, layers = count(structure, self.image_size)
        return {
            "flops": (flops, self.flops),
            "params": (size, self.params),
            "rho": (thinnest(stages(structure)), self.rho),
            "layers": (layers, self.layers),
        }

    def excess(self, structure: Sequence[Block]) -> float:
        """By how much a structure is over its budgets: the sum of the logarithms of value over budget; 0 for none."""
        return sum(math.log(value / limit) for value, limit in self.used(structure).values() if value > limit)

    def violation(self, structure: Sequence[Block]) -> str | None:
        """Which constraint a structure violates and by how much, in words; None where it violates none."""
        for name, (value, limit) in self.used(structure).items():
            if value > limit:
                return f"{name} is {value:.6g}, the budget is {limit:.6g}"
        index = falls(structure)
        if index is not None:
            before, after = structure[index - 1].out_channels, structure[index].out_channels
            return f"channels fall from {before} to {after} at block {index}"
        return None


def falls(structure: Sequence[Block]) -> int | None:
    """Index of the first block that puts out fewer channels than the one before it; None where there is none."""
    for index in range(1, len(structure)):
        if structure[index].out_channels < structure[index - 1].out_channels:
            return index
    return None


def round_channels(channels: float, *, adaptive: bool = False) -> int:
    """The nearest multiple of 8, at least 8; halves go to the even multiple.

    Args:
        channels: what to round.
        adaptive: multiples of 32 above 256, of 16 above 128.
    """
    base = (32 if channels > 256 else 16 if channels > 128 else 8) if adaptive else 8
    return max(base, round(channels / base) * base)


def repair(structure: Sequence[Block], image_size: int) -> Structure:
    """A changed structure made whole: input channels follow the block before, kernels shrink to 2/3 of their maps."""
    blocks: list[Block] = []
    side = float(image_size)
    for block in structure:
        if blocks and block.in_channels != blocks[-1].out_channels:
            block = block._replace(in_channels=blocks[-1].out_channels)
        kernel = block.kernel_size
        while kernel > 1 and 1.5 * kernel > side:
            kernel -= 2
        blocks.append(block if kernel == block.kernel_size else block._replace(kernel_size=kernel))
        side /= block.stride
    return tuple(blocks)
