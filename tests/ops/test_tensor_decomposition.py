"""Low-rank decompositions: exact where the rank allows, the best where that is known, better with more terms."""

from __future__ import annotations

import itertools

import pytest
import torch

from convatlas.ops.tensor_decomposition import cp_decomposition, cp_product, tucker_decomposition


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("sizes", "rank"), [((8, 3, 3), 1), ((8, 3, 3), 3), ((20, 5, 3), 2), ((6, 3, 3, 3), 2), ((9, 4), 3), ((1, 1, 4), 1)]
)
def test_tensors_of_a_rank_are_found_again(sizes: tuple[int, ...], rank: int):
    tensors = cp_product([_random(7, size, rank) for size in sizes])
    factors = cp_decomposition(tensors, rank)
    assert [factor.shape for factor in factors] == [(7, size, rank) for size in sizes]
    torch.testing.assert_close(cp_product(factors), tensors, rtol=1e-9, atol=1e-9)


def test_enough_terms_represent_everything():
    for sizes in ((12, 3, 2), (2, 3), (2, 2, 7, 2)):
        tensors = _random(5, *sizes)
        most = tensors[0].numel() // max(sizes)
        torch.testing.assert_close(cp_product(cp_decomposition(tensors, most + 1)), tensors)


def test_matrices_get_the_best_that_there_is():
    tensors = _random(4, 7, 5)
    error = (cp_product(cp_decomposition(tensors, 2)) - tensors).flatten(1).norm(dim=1)
    torch.testing.assert_close(error, torch.linalg.svdvals(tensors)[:, 2:].norm(dim=1))


def test_more_terms_are_nearer_and_no_start_is_better():
    tensors = _random(6, 6, 3, 3)
    errors = [(cp_product(cp_decomposition(tensors, rank)) - tensors).flatten(1).norm(dim=1) for rank in (1, 2, 3, 5)]
    for more, less in itertools.pairwise(errors):
        assert (less < more).all()
    # The gradient of the error by each factor is zero: nothing near it is better.
    factors = [factor.requires_grad_() for factor in cp_decomposition(tensors, 1)]
    loss = (cp_product(factors) - tensors).square().sum()
    for gradient in torch.autograd.grad(loss, factors):
        assert gradient.abs().max() < 0.02 * tensors.norm()


def test_tucker_on_the_first_axes():
    core, (first, second) = tucker_decomposition(_random(3, 6, 5, 2, 2), (6, 5))
    rebuilt = torch.einsum("nabxy,noa,nib->noixy", core, first, second)
    torch.testing.assert_close(rebuilt, _random(3, 6, 5, 2, 2))
    torch.testing.assert_close(first.mT @ first, torch.eye(6, dtype=torch.float64).expand(3, -1, -1))
    core, (first,) = tucker_decomposition(_random(2, 3, 2), (4,))
    assert core.shape == (2, 4, 2)
    torch.testing.assert_close(torch.einsum("na...,noa->no...", core, first), _random(2, 3, 2))


def test_half_precision_and_zeros_keep_their_type():
    for tensors in (torch.zeros(2, 3, 3, 3), torch.randn(2, 4, 3, 3, dtype=torch.bfloat16)):
        for factor in cp_decomposition(tensors, 2):
            assert factor.dtype == tensors.dtype
            assert factor.isfinite().all()
    assert not cp_product(cp_decomposition(torch.zeros(2, 3, 3, 3), 2)).any()


def test_bad_arguments_are_told():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        cp_decomposition(torch.zeros(1, 2, 2), 0)
    with pytest.raises(ValueError, match=r"tensors must be \(N, d_1, d_2, ...\), got \(2, 2\)"):
        cp_decomposition(torch.zeros(2, 2), 1)
    with pytest.raises(ValueError, match="ranks must be at least 1 for up to 2 axes, got none"):
        tucker_decomposition(torch.zeros(1, 2, 2), ())
