"""Low-rank decompositions of many small tensors at once: CP (a sum of outer products of vectors) and Tucker.

Kolda, Bader: "Tensor Decompositions and Applications", SIAM Review 2009. The canonical polyadic (CP) decomposition is
found by alternating least squares that start from the higher-order singular value decomposition; two axes and ranks
that suffice for any tensor have exact answers.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["cp_decomposition", "cp_product", "tucker_decomposition"]

#: Sweeps of the alternating least squares, and after how many the error is looked at.
_SWEEPS, _CHECKED_EVERY = 100, 10
#: Relative error, and its relative change between two looks, below which a decomposition counts as done.
_EXACT, _SETTLED = 1e-12, 1e-4


def cp_product(factors: Sequence[Tensor]) -> Tensor:
    """Sums of outer products (N, d_1, ..., d_M) of factors (N, d_m, R)."""
    axes = string.ascii_lowercase[: len(factors)]
    return torch.einsum(",".join(f"N{axis}R" for axis in axes) + f"->N{axes}", *factors)


def cp_decomposition(tensors: Tensor, rank: int) -> list[Tensor]:
    """Factors (N, d_m, R) of the nearest sums of R outer products that were found, for each of N tensors.

    Args:
        tensors: (N, d_1, ..., d_M), each decomposed by itself; M is at least 2.
        rank: number R of products. From the product of all d_m but the largest on, every tensor is represented exactly.

    Raises:
        ValueError: rank is smaller than 1, or the tensors have fewer than two axes.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if tensors.dim() < 3:
        raise ValueError(f"tensors must be (N, d_1, d_2, ...), got {tuple(tensors.shape)}")
    sizes = tensors.shape[1:]
    if tensors.is_meta or not tensors.numel():
        return [tensors.new_zeros(len(tensors), size, rank) for size in sizes]
    exact = tensors.detach().double()
    if rank >= math.prod(sizes) // max(sizes):
        factors = _by_unit_vectors(exact, rank)
    elif len(sizes) == 2:
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        root = values[:, None, :rank].sqrt()
        factors = [left[..., :rank] * root, right.mT[..., :rank] * root]
    else:
        factors = _compressed_least_squares(exact, rank)
    return [factor.to(tensors.dtype) for factor in _balanced(factors)]


def tucker_decomposition(tensors: Tensor, ranks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Cores and orthonormal factors (N, d_m, R_m) on the first axes: truncated HOSVD, refined by orthogonal iteration.

    Args:
        tensors: (N, d_1, ..., d_M), each decomposed by itself.
        ranks: of the first axes; the others stay whole. A rank above what its axis can have is filled up with zeros.

    Returns:
        Cores (N, R_1, ..., R_m, d_m+1, ..., d_M) and the factors.

    Raises:
        ValueError: a rank is smaller than 1, or there are more than axes.
    """
    if min(ranks, default=0) < 1 or len(ranks) > tensors.dim() - 1:
        raise ValueError(
            f"ranks must be at least 1 for up to {tensors.dim() - 1} axes, got {', '.join(map(str, ranks)) or 'none'}"
        )
    exact = tensors.detach().double()
    factors = [_singular_vectors(exact, axis, rank) for axis, rank in enumerate(ranks)]
    for _ in range(10 if len(ranks) > 1 else 0):
        for axis, rank in enumerate(ranks):
            others = {other: factor for other, factor in enumerate(factors) if other != axis}
            factors[axis] = _singular_vectors(_projected(exact, others), axis, rank)
    core = _projected(exact, dict(enumerate(factors)))
    return core.to(tensors.dtype), [factor.to(tensors.dtype) for factor in factors]


def _unfolded(tensors: Tensor, axis: int) -> Tensor:
    """(N, d_axis, product of the other axes in their order)."""
    return tensors.movedim(1 + axis, 1).flatten(2)


def _singular_vectors(tensors: Tensor, axis: int, rank: int) -> Tensor:
    """The leading left singular vectors (N, d, R) of an unfolding, zeros where there are fewer."""
    vectors = torch.linalg.svd(_unfolded(tensors, axis), full_matrices=False)[0][..., :rank]
    return torch.nn.functional.pad(vectors, (0, rank - vectors.shape[-1]))


def _projected(tensors: Tensor, factors: dict[int, Tensor]) -> Tensor:
    for axis, factor in factors.items():
        moved = torch.einsum("nd...,ndr->nr...", tensors.movedim(1 + axis, 1), factor)
        tensors = moved.movedim(1, 1 + axis)
    return tensors


def _by_unit_vectors(tensors: Tensor, rank: int) -> list[Tensor]:
    """Exact: one product for each fibre along the longest axis, unit vectors on the others."""
    sizes = tensors.shape[1:]
    longest = max(range(len(sizes)), key=lambda axis: sizes[axis])
    fibres = _unfolded(tensors, longest)
    factors = [torch.nn.functional.pad(fibres, (0, rank - fibres.shape[-1]))]
    others = [size for axis, size in enumerate(sizes) if axis != longest]
    places = torch.cartesian_prod(*(torch.arange(size, device=tensors.device) for size in others))
    for size, place in zip(others, places.view(-1, len(others)).T, strict=True):
        unit = torch.nn.functional.one_hot(place, size).T.to(tensors.dtype)
        factors.append(torch.nn.functional.pad(unit, (0, rank - unit.shape[-1])).expand(len(tensors), -1, -1))
    factors.insert(longest, factors.pop(0))
    return factors


def _compressed_least_squares(tensors: Tensor, rank: int) -> list[Tensor]:
    """Alternating least squares after an axis that is longer than the product of the others has lost its empty part."""
    sizes = tensors.shape[1:]
    longest = max(range(len(sizes)), key=lambda axis: sizes[axis])
    most = math.prod(sizes) // sizes[longest]
    if sizes[longest] <= most:
        return _alternating_least_squares(tensors, rank)
    basis = _singular_vectors(tensors, longest, most)
    factors = _alternating_least_squares(_projected(tensors, {longest: basis}), rank)
    factors[longest] = basis @ factors[longest]
    return factors


def _alternating_least_squares(tensors: Tensor, rank: int) -> list[Tensor]:
    """From several starts at once; the best is kept for each tensor."""
    count = len(tensors)
    starts = [_from_singular_vectors(tensors, rank), *([start] if (start := _from_slices(tensors, rank)) else [])]
    factors = [torch.cat(parts) for parts in zip(*starts, strict=True)]
    unfolded = [_unfolded(tensors.repeat(len(starts), *(1 for _ in factors)), axis) for axis in range(len(factors))]
    norm = tensors.flatten(1).norm(dim=1).clamp_min(torch.finfo(tensors.dtype).tiny)
    previous = torch.full((count,), math.inf, dtype=tensors.dtype, device=tensors.device)
    best, chosen = previous, torch.zeros_like(previous, dtype=torch.long)
    for sweep in range(_SWEEPS + 1):
        if sweep % _CHECKED_EVERY == 0:
            factors = _balanced(factors)
            difference = unfolded[0] - factors[0] @ _columns(factors[1:]).mT
            best, chosen = (difference.flatten(1).norm(dim=1).view(len(starts), count) / norm).min(0)
            if sweep == _SWEEPS or bool(((best < _EXACT) | (previous - best < _SETTLED * best)).all()):
                break
            previous = best
        for axis in range(len(factors)):
            others = [factor for other, factor in enumerate(factors) if other != axis]
            gram = torch.stack([factor.mT @ factor for factor in others]).prod(0)
            factors[axis] = unfolded[axis] @ _columns(others) @ torch.linalg.pinv(gram, hermitian=True, rtol=1e-14)
    rows = chosen * count + torch.arange(count, device=tensors.device)
    return [factor[rows] for factor in factors]


def _from_singular_vectors(tensors: Tensor, rank: int) -> list[Tensor]:
    """The start of HOSVD; random vectors where an axis has fewer than R singular ones."""
    generator = torch.Generator().manual_seed(0)
    factors = []
    for axis, size in enumerate(tensors.shape[1:]):
        random = torch.randn(len(tensors), size, rank, generator=generator, dtype=tensors.dtype).to(tensors.device)
        found = min(size, tensors[0].numel() // size)
        absent = torch.arange(rank, device=tensors.device) >= found
        factors.append(torch.where(absent, random, _singular_vectors(tensors, axis, rank)))
    return factors


def _from_slices(tensors: Tensor, rank: int) -> list[Tensor] | None:
    """Exact for a tensor of rank R with two axes of at least R: two slices share their factors (Jennrich's algorithm).

    Slices mixed over the other axes are S = A D B^T, S' = A D' B^T, so that A are the eigenvectors of S S'^-1.
    """
    axes = sorted(range(tensors.dim() - 1), key=lambda axis: -tensors.shape[1 + axis])
    first, second, *rest = axes
    if min(tensors.shape[1 + first], tensors.shape[1 + second]) < rank:
        return None
    bases = {axis: _singular_vectors(tensors, axis, rank) for axis in (first, second)}
    small = _projected(tensors, bases).permute(0, 1 + first, 1 + second, *(1 + axis for axis in rest)).flatten(3)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(small.shape[3], 2, generator=generator, dtype=tensors.dtype).to(tensors.device)
    slices = small @ mixing
    quotient = slices[..., 0] @ torch.linalg.pinv(slices[..., 1])
    mixed = torch.linalg.eig(quotient).eigenvectors
    factor = bases[first] @ torch.where(mixed.imag.abs() > 0, mixed.real + mixed.imag, mixed.real)
    products = torch.linalg.pinv(factor) @ _unfolded(tensors, first)
    others = [size for axis, size in enumerate(tensors.shape[1:]) if axis != first]
    products = products.flatten(0, 1).unflatten(1, others)
    vectors = [_singular_vectors(products, axis, 1)[..., 0] for axis in range(len(others))]
    factors = [vector.unflatten(0, (len(tensors), rank)).mT for vector in vectors]
    factors.insert(first, factor)
    return factors


def _columns(factors: Sequence[Tensor]) -> Tensor:
    """Products of the columns of factors (N, d_m, R), (N, product of d_m, R): the Khatri-Rao product."""
    columns = factors[0]
    for factor in factors[1:]:
        columns = (columns[:, :, None] * factor[:, None]).flatten(1, 2)
    return columns


def _balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same products, the vectors of each of equal length."""
    lengths = torch.stack([factor.norm(dim=1, keepdim=True) for factor in factors])
    mean = lengths.clamp_min(torch.finfo(lengths.dtype).tiny).log().mean(0).exp()
    mean = torch.where((lengths > 0).all(0), mean, 0.0)
    return [
        torch.where(length > 0, factor / length * mean, 0.0) for factor, length in zip(factors, lengths, strict=True)
    ]
