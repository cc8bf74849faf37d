"""Separation by chunks: nothing is lost, sources keep their order, blocks of any size, and errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from convatlas.ops.chunked_separation import ChunkedSeparation, separate_in_chunks


def _sources(x: Tensor) -> Tensor:
    """What a separator that works sample by sample gives."""
    return torch.stack([x, 0.5 * x.abs(), x.square()], 1)


class _Shuffled:
    """The same, in another order for every call."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, x: Tensor) -> Tensor:
        return _sources(x)[:, torch.randperm(3, generator=self.generator)]


def _mixture(length: int = 2003) -> Tensor:
    return torch.randn(2, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("size", "hop", "window"), [(200, None, "hann"), (200, 50, "hann"), (201, 70, "hamming"), (200, 90, None)]
)
def test_chunks_add_up_and_keep_the_order_of_their_sources(size: int, hop: int | None, window: str | None):
    x = _mixture()
    y = separate_in_chunks(_Shuffled(), x, window_size=size, hop=hop, window=window)
    orders = [_sources(x)[:, list(order)] for order in itertools.permutations(range(3))]
    assert min((y - order).abs().max() for order in orders) < 1e-12
    plain = separate_in_chunks(_Shuffled(), x, window_size=size, hop=hop, window=window, reorder=False)
    assert min((plain - order).abs().max() for order in orders) > 0.1


def test_blocks_of_any_size_give_the_same_in_bounded_memory():
    x, longest = _mixture(), 0
    expected = separate_in_chunks(_sources, x, window_size=100)
    for sizes in ([1] * 2003, [37] * 54 + [5], [0, 1500, 503]):
        separation, pieces = ChunkedSeparation(_sources, window_size=100), []
        for block in x.split(sizes, 1):
            pieces.append(separation.push(block))
            longest = max(longest, separation._waiting.shape[1])
        pieces.append(separation.finish())
        together = torch.cat([piece for piece in pieces if piece.shape[1]], 2)
        torch.testing.assert_close(together, expected, rtol=0, atol=1e-13)
    assert longest < 100


def test_short_mixtures_go_through_whole_and_progress_is_told():
    told: list[tuple[int, int]] = []
    x = _mixture(90)
    y = separate_in_chunks(lambda mixture: mixture[:, None] - mixture.mean(), x, window_size=100)
    torch.testing.assert_close(y[:, 0], x - x.mean())
    separate_in_chunks(
        _sources, _mixture(250), window_size=100, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(100, 250), (200, 250), (250, 250)]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="window_size must be at least 2 and hop from 1 to it, got 100 and 101"):
        ChunkedSeparation(_sources, window_size=100, hop=101)
    with pytest.raises(ValueError, match="windows of 100 samples every 100 leave gaps"):
        ChunkedSeparation(_sources, window_size=100, hop=100)
    with pytest.raises(ValueError, match=r"mixture must be \(B, T\), got \(200,\)"):
        separate_in_chunks(_sources, torch.zeros(200), window_size=100)
    with pytest.raises(ValueError, match=r"the network must give \(2, C, 100\), got \(2, 100\)"):
        separate_in_chunks(lambda x: x, _mixture(), window_size=100)
    with pytest.raises(ValueError, match="at least one sample"):
        ChunkedSeparation(_sources, window_size=100).finish()
    separation = ChunkedSeparation(_sources, window_size=100)
    separation.push(torch.zeros(2, 10))
    with pytest.raises(ValueError, match=r"x must be \(2, n\), got \(3, 10\)"):
        separation.push(torch.zeros(3, 10))
