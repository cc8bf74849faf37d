"""The order of the training data, a pure function of seed and epoch, so that a run can go on where it stopped."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = [
    "EpochSampler",
    "ShareSampler",
    "mixed_seed",
    "random_states",
    "restore_random_states",
    "seed_everything",
]


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed) pairs: a permutation drawn from seed and epoch, and a seed for each sample.

    Nothing depends on the number of workers or on what was drawn before, so `start_at` can skip what an interrupted run
    has already seen. A single sample left over for a last batch of its own is left out of that epoch (another one each
    time), because batch normalisation cannot learn from one.

    Args:
        length: number of samples.
        batch_size: samples of a batch on one device.
        seed: of the run.
        rank, world_size: which share of every epoch this process takes. The epoch is padded to equal shares.
        drop_last: leave out the last batch of an epoch when it is smaller than the others.
        repeats: how often each sample of an epoch comes in it, with a seed of its own each time and with several
            devices on different ones; an epoch then has as many samples, of which so many times fewer are different.
        order: of an epoch and a generator, the indices of that epoch, ``length`` of them; a permutation when left out.

    Raises:
        ValueError: there would be no batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        repeats: int = 1,
        order: Callable[[int, torch.Generator], Tensor] | None = None,
    ) -> None:
        self.length, self.batch_size, self.seed, self.order = length, batch_size, seed, order
        self.rank, self.world_size, self.drop_last, self.repeats = rank, world_size, drop_last, repeats
        self._epoch = 0
        self._skip = (0, 0)
        if len(self) < 1:
            raise ValueError(
                f"{length} samples are too few for a batch of {batch_size} on each of {world_size} devices"
            )

    def __len__(self) -> int:
        whole, rest = divmod(-(-self.length // self.world_size), self.batch_size)
        return whole if self.drop_last or rest == 0 or (rest == 1 and whole > 0) else whole + 1

    @property
    def sampler(self) -> EpochSampler:
        """Itself: where Lightning looks for `set_epoch` in a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self._epoch = epoch

    def start_at(self, epoch: int, batch: int) -> None:
        """Begin with ``epoch`` and leave out its first ``batch`` batches."""
        self._epoch, self._skip = epoch, (epoch, batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self._epoch))
        if self.order is None:
            order = torch.randperm(self.length, generator=generator)
        else:
            order = self.order(self._epoch, generator)
        order = order.repeat_interleave(self.repeats)
        seeds = torch.randint(2**62, (self.length,), generator=generator)
        share = -(-self.length // self.world_size)
        positions = torch.arange(share * self.world_size)[self.rank :: self.world_size] % self.length
        pairs = [(int(order[position]), int(seeds[position])) for position in positions]
        skipped = self._skip[1] if self._epoch == self._skip[0] else 0
        for batch in range(skipped, len(self)):
            yield pairs[batch * self.batch_size : (batch + 1) * self.batch_size]


class ShareSampler(Sampler[list[int]]):
    """Batches of the indices that one process takes of a validation set: every index belongs to one process.

    All processes get as many batches, because those that compute together wait for each other. Where one has fewer of
    its own, it gets a batch more, which must not be counted.

    Args:
        length: number of samples.
        batch_size: samples of a batch.
        rank, world_size: which share.
    """

    def __init__(self, length: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.indices, self.batch_size = range(length)[rank::world_size], batch_size
        self.length = -(-length // (world_size * batch_size))

    @property
    def own(self) -> int:
        """Number of the batches that count; they come first."""
        return -(-len(self.indices) // self.batch_size)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.length):
            start = batch * self.batch_size
            yield list(self.indices[start : start + self.batch_size]) or [0]


def mixed_seed(*numbers: int) -> int:
    """A seed below 2**63 that depends on each of the numbers and on their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(seed: int) -> None:
    """Seed every global random number generator."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_states() -> dict[str, Any]:
    """The state of every global random number generator of this process, as plain data and tensors."""
    version, internal, gauss = random.getstate()
    state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
