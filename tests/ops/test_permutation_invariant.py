"""The assignment of least loss: found by trying all, its gradient, order of equals, reordering and errors."""

from __future__ import annotations

import itertools

import pytest
import torch

from convatlas.ops.permutation_invariant import best_permutation, permutation_invariant_loss, reorder_sources
from convatlas.ops.signal_ratios import pairwise_signal_ratio


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_no_other_assignment_is_better(count: int):
    losses = torch.randn(6, count, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    least, order = best_permutation(losses)
    for sample, found, loss in zip(losses, order, least, strict=True):
        every = [
            sum(sample[estimate, reference] for reference, estimate in enumerate(trial)) / count
            for trial in itertools.permutations(range(count))
        ]
        assert loss.item() == pytest.approx(min(every).item())
        assert sorted(found.tolist()) == list(range(count))
        assert sample[found, torch.arange(count)].mean().item() == pytest.approx(loss.item())


def test_of_equal_assignments_the_first_wins():
    assert best_permutation(torch.ones(1, 3, 3))[1].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("count", [3, 4])
def test_the_loss_has_the_gradient_of_its_assignment(count: int):
    losses = torch.randn(2, count, count, dtype=torch.float64, requires_grad=True)
    least, order = best_permutation(losses)
    least.sum().backward()
    expected = torch.zeros_like(losses)
    for sample, found in enumerate(order):
        expected[sample, found, torch.arange(count)] = 1 / count
    torch.testing.assert_close(losses.grad, expected)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_shuffled_sources_are_put_back_and_cost_the_same(count: int):
    generator = torch.Generator().manual_seed(count)
    references = torch.randn(3, count, 64, generator=generator)
    estimates = references + 0.3 * torch.randn(3, count, 64, generator=generator)
    shuffle = torch.stack([torch.randperm(count, generator=generator) for _ in range(3)])

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return -pairwise_signal_ratio(a, b)

    plain, ordered = permutation_invariant_loss(loss, estimates, references)
    shuffled, again = permutation_invariant_loss(loss, reorder_sources(estimates, shuffle), references)
    torch.testing.assert_close(ordered, estimates)
    torch.testing.assert_close(again, estimates)
    torch.testing.assert_close(shuffled, plain)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"losses must be \(B, C, C\), got \(2, 3, 2\)"):
        best_permutation(torch.zeros(2, 3, 2))
    with pytest.raises(ValueError, match="more than three sources must be finite"):
        best_permutation(torch.full((1, 4, 4), torch.nan))
    with pytest.raises(ValueError, match=r"order must be \(2, 3\), got \(2, 2\)"):
        reorder_sources(torch.zeros(2, 3, 5), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must be \(B, C, T\) alike, got \(2, 9\) and \(2, 9\)"):
        permutation_invariant_loss(pairwise_signal_ratio, torch.zeros(2, 9), torch.zeros(2, 9))
