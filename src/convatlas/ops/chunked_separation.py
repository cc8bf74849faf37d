"""Separating long recordings piece by piece: overlapping chunks whose sources are matched and faded into each other.

The memory does not grow with the length. A separator may give its outputs in another order for every chunk; they are
brought into the order of the chunk before by their correlation where both overlap.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.framing import Window
from convatlas.ops.framing import window as make_window
from convatlas.ops.permutation_invariant import best_permutation, reorder_sources

__all__ = ["ChunkedSeparation", "separate_in_chunks"]

#: Mixtures (B, T) to sources (B, C, T).
Network = Callable[[Tensor], Tensor]


class ChunkedSeparation:
    """Separation of a mixture of any length that comes in blocks.

    Chunks of ``window_size`` samples begin every ``hop`` samples, the first ones before the beginning. The separated
    chunks are put into the order of the one before, faded by the window and added; where the shifted windows do not add
    up to 1 they are divided by their sum.

    Args:
        network: maps mixtures (B, window_size) to sources (B, C, window_size).
        window_size: samples of a chunk; seconds, not the few samples of an encoder's frame.
        hop: samples between chunks; half of window_size when left out.
        window: what `convatlas.ops.framing.window` takes, or None for a flat one.
        reorder: whether the sources are matched from chunk to chunk.

    Raises:
        ValueError: sizes are out of range, or the windows leave gaps.
    """

    def __init__(
        self,
        network: Network,
        *,
        window_size: int,
        hop: int | None = None,
        window: Window | None = "hann",
        reorder: bool = True,
    ) -> None:
        hop = window_size // 2 if hop is None else hop
        if window_size < 2 or not 1 <= hop <= window_size:
            raise ValueError(f"window_size must be at least 2 and hop from 1 to it, got {window_size} and {hop}")
        taper = torch.ones(window_size, dtype=torch.float64) if window is None else make_window(window, window_size)
        total = F.pad(taper, (0, -window_size % hop)).view(-1, hop).sum(0)
        if float(total.min()) < 1e-3 * float(total.max()):
            raise ValueError(f"windows of {window_size} samples every {hop} leave gaps: choose a smaller hop")
        self.network, self.window_size, self.hop, self.reorder = network, window_size, hop, reorder
        self._taper = taper / total.repeat(-(-window_size // hop))[:window_size]
        self._waiting: Tensor | None = None
        self._overlap: Tensor | None = None
        self._last: Tensor | None = None
        self._received, self._given, self._skip = 0, 0, window_size - hop

    @torch.no_grad()
    def push(self, x: Tensor) -> Tensor:
        """Take the next samples (B, n) and give those of the sources that are done, (B, C, m).

        Before the first chunk is full, C is not known and 0.

        Raises:
            ValueError: x is not (B, n) of the same batch, or the network gives another shape than (B, C, window_size).
        """
        if x.dim() != 2 or (self._waiting is not None and len(x) != len(self._waiting)):
            batch = "B" if self._waiting is None else len(self._waiting)
            raise ValueError(f"x must be ({batch}, n), got {tuple(x.shape)}")
        self._received += x.shape[1]
        return self._advance(x)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The samples (B, C, m) that are left when the mixture has ended.

        Raises:
            ValueError: there were no samples.
        """
        if self._waiting is None or not self._received:
            raise ValueError("there must be at least one sample")
        missing = self._received - self._given
        pieces = []
        while missing > 0:
            piece = self._advance(self._waiting.new_zeros(len(self._waiting), self.hop))
            pieces.append(piece[..., :missing])
            missing -= piece.shape[-1]
        return torch.cat([piece for piece in pieces if piece.shape[1]], -1)

    def _advance(self, x: Tensor) -> Tensor:
        if self._waiting is None:
            self._waiting = x.new_zeros(len(x), self.window_size - self.hop)
        waiting = torch.cat([self._waiting, x], 1)
        done = []
        while waiting.shape[1] >= self.window_size:
            done.append(self._chunk(waiting[:, : self.window_size]))
            waiting = waiting[:, self.hop :]
        self._waiting = waiting.clone() if done else waiting
        if not done:
            return x.new_zeros(len(x), 0 if self._overlap is None else self._overlap.shape[1], 0)
        y = torch.cat(done, -1)
        skipped = min(self._skip, y.shape[-1])
        self._skip -= skipped
        self._given += y.shape[-1] - skipped
        return y[..., skipped:]

    def _chunk(self, mixture: Tensor) -> Tensor:
        sources = self.network(mixture)
        if sources.dim() != 3 or sources.shape[::2] != mixture.shape:
            raise ValueError(
                f"the network must give ({mixture.shape[0]}, C, {mixture.shape[1]}), got {tuple(sources.shape)}"
            )
        shared = self.window_size - self.hop
        if self._overlap is None:
            self._overlap = sources.new_zeros(*sources.shape[:2], shared)
        if self.reorder and self._last is not None and shared:
            sources = reorder_sources(sources, _matching(sources[..., :shared], self._last))
        self._last = sources[..., self.hop :].clone()
        y = sources * self._taper.to(sources)
        y[..., :shared] += self._overlap
        self._overlap = y[..., self.hop :]
        return y[..., : self.hop]


def _matching(now: Tensor, before: Tensor) -> Tensor:
    """The source of ``now`` that goes on with each source of ``before``, both (B, C, n): highest mean correlation."""
    now, before = (x.float() - x.float().mean(-1, keepdim=True) for x in (now, before))
    return best_permutation(-(now @ before.mT))[1]


def separate_in_chunks(
    network: Network,
    mixture: Tensor,
    *,
    window_size: int,
    hop: int | None = None,
    window: Window | None = "hann",
    reorder: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sources (B, C, T) of a long mixture (B, T), of which the network never sees more than a chunk.

    A mixture that is not longer than a chunk goes through as it is.

    Args:
        network, window_size, hop, window, reorder: as in `ChunkedSeparation`.
        mixture: (B, T).
        progress: called with the samples done and the number of all samples.

    Raises:
        ValueError: as in `ChunkedSeparation`.
    """
    separation = ChunkedSeparation(network, window_size=window_size, hop=hop, window=window, reorder=reorder)
    if mixture.dim() != 2:
        raise ValueError(f"mixture must be (B, T), got {tuple(mixture.shape)}")
    total = mixture.shape[1]
    if total <= window_size:
        with torch.no_grad():
            return network(mixture)
    pieces = []
    for start in range(0, total, window_size):
        pieces.append(separation.push(mixture[:, start : start + window_size]))
        if progress is not None:
            progress(min(start + window_size, total), total)
    pieces.append(separation.finish())
    return torch.cat([piece for piece in pieces if piece.shape[1]], -1)
