"""Progressive tokenisation: train a vision transformer on few coarse tokens first, on many fine ones at last.

Chen, Huang, Du, Song, Wang, Zhou: "Auto-scaling Vision Transformers without Training", ICLR 2022, arXiv 2202.11921,
section 4.3. Only stride and dilation of the first projection change, so that all weights go on to be trained. The code
of the authors' training is not public.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from convatlas.cost import cost
from convatlas.errors import Unsupported
from convatlas.training.method import Method

__all__ = ["TokenSchedule", "Tokenized"]


@runtime_checkable
class Tokenized(Protocol):
    """A network whose tokens can be made coarser: `AsViT`."""

    def set_tokenization(self, stride: int, dilation: int) -> None:
        """Read one token from every ``stride`` pixels with a kernel spread by ``dilation``."""


@dataclass(frozen=True, kw_only=True)
class TokenSchedule(Method):
    """Which tokens a network reads in which epochs.

    Attributes:
        phases: (until_epoch, stride, dilation) in the order of the epochs, which count from 0: a phase ends before its
            epoch. The default ends after 40 and 70 epochs, of the authors' 300.
        stride: of the projection in the epochs after the last phase.

    Raises:
        ValueError: the epochs do not rise, or a number is smaller than 1.
    """

    phases: tuple[tuple[int, int, int], ...] = ((40, 16, 4), (70, 8, 2))
    stride: int = 4

    def __post_init__(self) -> None:
        for phase in self.phases:
            if len(phase) != 3 or min(phase) < 1:
                raise ValueError(f"a phase must be (until_epoch, stride, dilation), each at least 1, got {phase}")
        epochs = [0, *(until for until, _, _ in self.phases)]
        if any(after <= before for before, after in itertools.pairwise(epochs)):
            raise ValueError(f"the epochs of phases must rise, got {epochs[1:]}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")

    def tokenization(self, epoch: int) -> tuple[int, int]:
        """Stride and dilation in an epoch."""
        for until, stride, dilation in self.phases:
            if epoch < until:
                return stride, dilation
        return self.stride, 1

    def prepare(self, model: nn.Module) -> nn.Module:
        """Check that the tokens of ``model`` can be made coarser.

        Raises:
            Unsupported: they cannot.
        """
        if not isinstance(model, Tokenized):
            raise Unsupported(f"{type(model).__name__} has no tokens that can be made coarser, so no token schedule")
        return model

    def start_epoch(self, model: nn.Module, epoch: int) -> None:
        """Set the tokens of an epoch."""
        self.prepare(model).set_tokenization(*self.tokenization(epoch))  # type: ignore[operator]

    def share_of_macs(self, model: nn.Module, inputs: Sequence[Tensor], epochs: int) -> float:
        """Multiply-adds of a training of so many epochs over those of one without a schedule; counted, not measured.

        Args:
            model: the network; it is left as it is.
            inputs: of an example call; may be on the meta device, as the model may.
            epochs: of the training.

        Raises:
            ValueError: epochs is smaller than 1.
            Unsupported: the tokens of the model cannot be made coarser.
        """
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        tried = copy.deepcopy(self.prepare(model))
        macs = {}
        for tokenization in {(self.stride, 1), *(self.tokenization(epoch) for epoch in range(epochs))}:
            tried.set_tokenization(*tokenization)  # type: ignore[operator]
            macs[tokenization] = cost(tried, *inputs).total.macs
        spent = sum(macs[self.tokenization(epoch)] for epoch in range(epochs))
        return spent / (epochs * macs[(self.stride, 1)])
