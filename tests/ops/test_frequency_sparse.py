"""Convolutions of which taps or frequencies are left out, and signals that come piece by piece."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convatlas.ops.fft_conv import fft_conv
from convatlas.ops.frequency_sparse import frequency_mask, frequency_sparse_conv, frequency_sparse_kernel, sparsity
from convatlas.ops.partial_conv import partial_conv, stream_conv


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("n_partial", [1, 5, 12, 13, 40])
def test_partial_convolution_has_the_first_taps_only(n_partial: int):
    u, k = random(2, 3, 12), random(3, 13)
    short = k.clone()
    short[:, n_partial:] = 0
    torch.testing.assert_close(partial_conv(u, k, n_partial), fft_conv(u, short, 40))
    with pytest.raises(ValueError, match="n_partial must be at least 1, got 0"):
        partial_conv(u, k, 0)


@settings(max_examples=20, deadline=None)
@given(pieces=st.lists(st.integers(1, 6), min_size=1, max_size=5), taps=st.integers(1, 9), gated=st.booleans())
def test_pieces_join_to_the_whole(pieces: list[int], taps: int, gated: bool):
    u, k, skip = random(2, 2, sum(pieces)), random(2, taps), random(2)
    gates = (u.cos(), u.sin()) if gated else (None, None)
    state, found = None, []
    for piece in zip(
        *(x.split(pieces, -1) if x is not None else [None] * len(pieces) for x in (u, *gates)), strict=True
    ):
        y, state = stream_conv(piece[0], k, state, *piece[1:], skip=skip)
        found.append(y)
    assert state is not None
    assert state.shape == (2, 2, taps - 1)
    torch.testing.assert_close(torch.cat(found, -1), fft_conv(u, k, None, *gates, skip=skip))


def test_a_low_pass_is_that_of_the_authors():
    u, k, n = random(2, 3, 10), random(3, 10), 20
    for n_partial in (2, 7, 12, 22):
        k_f = torch.fft.rfft(k, n)
        k_f[:, n_partial // 2 :] = 0
        expected = torch.fft.irfft(torch.fft.rfft(u, n) * k_f, n)[..., :10]
        torch.testing.assert_close(frequency_sparse_conv(u, k, n, n_partial // 2), expected)
    torch.testing.assert_close(frequency_sparse_conv(u, k[None], n, 11), fft_conv(u, k, n))


@settings(max_examples=25, deadline=None)
@given(factors=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data(), gated=st.booleans())
def test_blocks_of_any_factors(factors: list[int], data: st.DataObject, gated: bool):
    n = math.prod(factors)
    keep = [data.draw(st.integers(1, factor)) for factor in factors]
    length = data.draw(st.integers(1, n))
    u, k = random(2, 2, length), random(2, data.draw(st.integers(1, n)))
    gates = (u.cos(), u.sin()) if gated else ()
    exact = frequency_sparse_conv(u, k, n, keep, factors, *gates, backend="naive")
    for backend in ("monarch", "filtered"):
        torch.testing.assert_close(frequency_sparse_conv(u, k, n, keep, factors, *gates, backend=backend), exact)
    mask = frequency_mask(n, keep, factors)
    assert mask.sum() == math.prod(keep)
    assert sparsity(factors, keep) == pytest.approx(1 - mask.mean().item())
    symmetric = frequency_mask(n, keep, factors, symmetrize=True)
    assert torch.equal(symmetric, symmetric.flip(0).roll(1))
    assert symmetric.sum() == pytest.approx(mask.sum().item())
    kernel = frequency_sparse_kernel(k, n, keep, factors)
    torch.testing.assert_close(torch.fft.fft(kernel), symmetric * torch.fft.fft(k, n))
    full = frequency_sparse_conv(u, k, n, factors, factors, backend="monarch")
    torch.testing.assert_close(full, fft_conv(u, k, n))


def test_half_precision_is_computed_in_float32():
    u, k = random(1, 2, 30).half(), random(2, 30).half()
    for backend in ("naive", "filtered", "monarch"):
        y = frequency_sparse_conv(u, k, 64, (4, 8), (8, 8), backend=backend)
        exact = frequency_sparse_conv(u.double(), k.double(), 64, (4, 8), (8, 8))
        assert y.dtype == torch.float16
        assert (y - exact).abs().max() < 1e-3 * exact.abs().max()
        assert frequency_sparse_conv(u[:0], k, 64, (4, 8), (8, 8), backend=backend).shape == (0, 2, 30)


def test_wrong_arguments_are_named():
    u, k = random(1, 2, 6), random(2, 6)
    for arguments, message in [
        ((u, k[:1], 12, 3), r"u and k must be \(B, C, L\) and \(C, K\), got \(1, 2, 6\) and \(1, 6\)"),
        ((u, k, 5, 3), r"fft_size must not be smaller than the signal \(6\) or kernel \(6\), got 5"),
        ((u, k, 12, 0), "n and keep must be at least 1, got 12 and 0"),
        ((u, k, 12, 3, (3, 4)), "with factors, keep must have a number for each of them, got 3"),
        ((u, k, 12, (3, 2), (3, 5)), r"factors must have the product 12, got \(3, 5\)"),
        ((u, k, 12, (3, 2)), "factors must have the product 12, got None"),
        ((u, k, 12, (3, 5), (3, 4)), r"keep must be from 1 to each of the factors \(3, 4\), got \(3, 5\)"),
        ((u, k, 12, 3, None, u), "pregate and postgate must be given both or none"),
    ]:
        with pytest.raises(ValueError, match=message):
            frequency_sparse_conv(*arguments)
    with pytest.raises(ValueError, match=r"fft_size must not be smaller than the kernel \(6\), got 5"):
        frequency_sparse_kernel(k, 5, 2)
    with pytest.raises(ValueError, match=r"and state \(B, C, 5\), got \(1, 2, 6\) and \(1, 2, 4\)"):
        stream_conv(u, k, u[..., :4])
    with pytest.raises(ValueError, match="pregate and postgate must be given both or none"):
        stream_conv(u, k, None, u)
