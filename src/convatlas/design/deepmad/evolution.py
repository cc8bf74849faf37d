"""The authors' solver: a population of structures that meet the constraints, changed at random, the best ones kept."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from convatlas.design.deepmad.program import Program, Space, repair, round_channels
from convatlas.networks.deepmad import CONV, Block

__all__ = ["Mutation", "Population"]

Structure = tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """Random changes of a structure.

    Attributes:
        space: what may be chosen.
        image_size: side of the image, which limits kernel sizes.
        layers: budget of layers, which limits the depth of each super block; infinite where there is none.
        adaptive_rounding: coarser multiples for larger numbers of channels, see `round_channels`.
        mutate_last: whether the last block changes too, if it is a super block. In the authors' present code it does
            not; in their published structures it has.
    """

    space: Space
    image_size: int
    layers: float = float("inf")
    adaptive_rounding: bool = False
    mutate_last: bool = True

    def __call__(self, structure: Structure, random: Random, *, minor: bool = False) -> Structure:
        """Change two blocks, one after the other, and repair the rest.

        Args:
            structure: a structure whose channels do not fall.
            random: where the choices come from.
            minor: change channels and bottlenecks only, not kernels and depths.
        """
        blocks = list(structure)
        last = blocks[-1].kind != CONV and self.mutate_last
        for _ in range(2):
            index = random.randrange(len(blocks) if last else len(blocks) - 1)
            blocks[index] = self._changed(blocks, index, random, minor)
            if index + 1 < len(blocks):
                blocks[index + 1] = blocks[index + 1]._replace(in_channels=blocks[index].out_channels)
        return repair(blocks, self.image_size)

    def _changed(self, blocks: Sequence[Block], index: int, random: Random, minor: bool) -> Block:
        block = blocks[index]
        if block.kind == CONV:
            if index > 0:
                return block
            least, most = self.space.stem
            channels = self._round(random.choice(self.space.scales) * block.out_channels)
            return block._replace(out_channels=min(max(channels, least), most, blocks[1].out_channels))
        choice = random.choice(("out", "btn") if minor else ("out", "k", "btn", "L"))
        if choice == "out":
            return self._other_channels(blocks, index, random)
        if choice == "k":
            return block._replace(kernel_size=random.choice(self.space.kernels))
        if choice == "btn":
            return self._other_bottleneck(block, random)
        return block._replace(depth=self._depth(blocks, index, block.depth + random.choice((-2, -1, 1, 2))))

    def _other_channels(self, blocks: Sequence[Block], index: int, random: Random) -> Block:
        block, space = blocks[index], self.space
        following = blocks[index + 1] if index + 1 < len(blocks) else None
        least, most = block.in_channels, space.largest
        if following is not None:
            most = min(most, following.out_channels)
        if not space.expands:
            most = min(most, 4 * block.in_channels)
            if following is not None and following.kind != CONV:
                least = max(least, self._round(following.out_channels / 4))
        channels = min(max(self._round(random.choice(space.scales) * block.out_channels), least), most)
        if space.expands:
            bottleneck = self._round(block.bottleneck * channels / block.out_channels)
        else:
            bottleneck = self._within(block.bottleneck, channels)
        return block._replace(out_channels=channels, bottleneck=bottleneck)

    def _other_bottleneck(self, block: Block, random: Random) -> Block:
        if self.space.expands:
            return block._replace(bottleneck=self._round(block.out_channels * random.choice(self.space.ratios)))
        bottleneck = self._round(random.choice(self.space.scales) * block.bottleneck)
        return block._replace(bottleneck=self._within(bottleneck, block.out_channels))

    def _within(self, bottleneck: int, channels: int) -> int:
        return min(max(bottleneck, self._round(channels / 10)), channels)

    def _depth(self, blocks: Sequence[Block], index: int, depth: int) -> int:
        if blocks[index - 1].kind == CONV:  # the first super block, whose maps are the largest
            depth = min(depth, 3)
        if self.layers < float("inf"):
            depth = min(depth, int(self.layers) // 3 // max(1, len(blocks) - (3 if self.space.expands else 2)))
        return max(depth, 1)

    def _round(self, channels: float) -> int:
        return round_channels(channels, adaptive=self.adaptive_rounding)


class Population:
    """The best structures so far, none twice, and how they came about.

    Attributes:
        members: score and structure, from the worst to the best.
        evaluated: how many candidates were tried.
        feasible: how many of them met the constraints.
    """

    def __init__(self, members: Iterable[tuple[float, Structure]], largest: int, random: Random) -> None:
        self.members: list[tuple[float, Structure]] = []
        self.largest, self.random = largest, random
        self.evaluated = self.feasible = 0
        self._known: set[Structure] = set()
        for score, structure in members:
            self.insert(score, structure)

    def insert(self, score: float, structure: Structure) -> None:
        """Add a structure that is not there yet; beyond the largest size the worst one goes."""
        if structure in self._known:
            return
        self._known.add(structure)
        insort(self.members, (score, structure))
        if len(self.members) > self.largest:
            _, worst = self.members.pop(0)
            self._known.discard(worst)

    def evolve(self, candidates: int, program: Program, mutation: Mutation, *, minor: bool = False) -> None:
        """Try a number of candidates: a random member, changed, is inserted if it meets the constraints."""
        for _ in range(candidates):
            _, parent = self.random.choice(self.members)
            child = mutation(parent, self.random, minor=minor)
            score = program.evaluate(child)
            if score is not None:
                self.feasible += 1
                self.insert(score, child)
        self.evaluated += candidates

    def state(self) -> dict[str, Any]:
        """Everything that `restored` needs, as plain data for JSON."""
        version, numbers, gauss = self.random.getstate()
        return {
            "members": [[score, [list(block) for block in structure]] for score, structure in self.members],
            "largest": self.largest,
            "random": [version, list(numbers), gauss],
            "evaluated": self.evaluated,
            "feasible": self.feasible,
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Population:
        """The population of a `state`."""
        random = Random()
        version, numbers, gauss = state["random"]
        random.setstate((version, tuple(numbers), gauss))
        members = [(score, tuple(Block(*values) for values in blocks)) for score, blocks in state["members"]]
        population = cls(members, state["largest"], random)
        population.evaluated, population.feasible = state["evaluated"], state["feasible"]
        return population
