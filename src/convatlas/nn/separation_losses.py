"""Losses for networks that separate sources: signal ratios, and training for which their order does not matter."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.ops.permutation_invariant import best_permutation, reorder_sources
from convatlas.ops.signal_ratios import Ratio, pairwise_signal_ratio, signal_ratio

__all__ = ["PITLoss", "PITResult", "SignalRatioLoss"]

#: Takes estimates and references, gives losses; see `PITLoss` for the shapes.
LossFunction = Callable[..., Tensor]
Form = Literal["matrix", "pair", "sources"]


class SignalRatioLoss(nn.Module):
    """Minus a signal ratio in decibels of every estimate and reference; the usual loss of `PITLoss`.

    Args:
        kind: ``si_snr``, ``sd_sdr`` or ``snr``, see `convatlas.ops.signal_ratios.signal_ratio`.
        zero_mean: take the mean over time off both signals first.

    Raises:
        UnknownName: there is no such ratio.
    """

    def __init__(self, kind: Ratio = "si_snr", *, zero_mean: bool = True) -> None:
        super().__init__()
        if kind not in get_args(Ratio):
            raise unknown("ratio", str(kind), get_args(Ratio))
        self.kind: Ratio = kind
        self.zero_mean = zero_mean

    def forward(self, estimates: Tensor, references: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Losses (B, C, C) of estimate i and reference j, from (B, C, T) both.

        Args:
            estimates, references: (B, C, T).
            lengths: (B,) numbers of valid samples.
        """
        return -pairwise_signal_ratio(estimates, references, self.kind, zero_mean=self.zero_mean, lengths=lengths)

    def in_order(self, estimates: Tensor, references: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean loss (B,) of estimates that are in the order of the references."""
        if lengths is not None:
            lengths = lengths.unsqueeze(-1)
        ratio = signal_ratio(estimates, references, self.kind, zero_mean=self.zero_mean, lengths=lengths)
        return -ratio.mean(1)

    def extra_repr(self) -> str:
        """Show the ratio."""
        return f"{self.kind}, zero_mean={self.zero_mean}"


class PITResult(NamedTuple):
    """What `PITLoss` found.

    Attributes:
        loss: mean over the batch, a scalar.
        estimates: (B, C, T) in the order of the references.
        order: (B, C), the number of the estimate that belongs to each reference.
        losses: (B,) of each sample.
    """

    loss: Tensor
    estimates: Tensor
    order: Tensor
    losses: Tensor


class PITLoss(nn.Module):
    """Utterance-level permutation-invariant training: the loss of the assignment that is best for each sample.

    Args:
        loss: by default the negative SI-SNR. What it takes and gives is said by ``form``.
        form: ``matrix``: (B, C, T) and (B, C, T) to (B, C, C) of estimate i and reference j. ``pair``: (B, T) and
            (B, T) to (B,), called for all pairs. ``sources``: (B, C, T) and (B, C, T) to (B,), called for every
            permutation; for losses that are no mean over the sources.

    Raises:
        UnknownName: there is no such form.
    """

    def __init__(self, loss: LossFunction | None = None, *, form: Form = "matrix") -> None:
        super().__init__()
        if form not in get_args(Form):
            raise unknown("form", str(form), get_args(Form))
        self.loss = SignalRatioLoss() if loss is None else loss
        self.form = form

    def forward(self, estimates: Tensor, references: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            estimates: (B, C, T).
            references: (B, C, T).
            lengths: (B,) numbers of valid samples, handed on to a loss that takes them as its third argument.

        Raises:
            ValueError: shapes are not (B, C, T) alike, or the loss function gives another shape than it should.
        """
        return self.match(estimates, references, lengths).loss

    def match(self, estimates: Tensor, references: Tensor, lengths: Tensor | None = None) -> PITResult:
        """The loss and the assignment that it belongs to."""
        if estimates.dim() != 3 or estimates.shape != references.shape:
            raise ValueError(
                f"estimates and references must be of shape (B, C, T) = [batch, n_src, time], got "
                f"{tuple(estimates.shape)} and {tuple(references.shape)}"
            )
        more = () if lengths is None else (lengths,)
        if self.form == "sources":
            losses, order = self._over_permutations(estimates, references, more)
        else:
            losses, order = best_permutation(self._pairwise(estimates, references, more))
        return PITResult(losses.mean(), reorder_sources(estimates, order), order, losses)

    def _pairwise(self, estimates: Tensor, references: Tensor, more: tuple[Tensor, ...]) -> Tensor:
        batch, count = estimates.shape[:2]
        if self.form == "matrix":
            losses = self.loss(estimates, references, *more)
            return _checked(losses, (batch, count, count))
        rows = [
            torch.stack(
                [_checked(self.loss(estimates[:, i], references[:, j], *more), (batch,)) for j in range(count)], 1
            )
            for i in range(count)
        ]
        return torch.stack(rows, 1)

    def _over_permutations(
        self, estimates: Tensor, references: Tensor, more: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        batch, count = estimates.shape[:2]
        table = torch.tensor(list(itertools.permutations(range(count))), device=estimates.device)
        columns = [_checked(self.loss(estimates[:, order], references, *more), (batch,)) for order in table]
        stacked = torch.stack(columns, 1)
        return stacked.min(1).values, table[stacked.argmin(1)]


def _checked(losses: Tensor, shape: tuple[int, ...]) -> Tensor:
    if losses.shape != shape:
        raise ValueError(f"the loss must give {shape}, got {tuple(losses.shape)}")
    return losses
