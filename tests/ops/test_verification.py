"""Verification of pairs, against a literal search for the threshold; masks of disc and cup."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from convatlas.errors import UnknownName
from convatlas.ops.disc_cup import dice, disc_and_cup, largest_region
from convatlas.ops.verification import verification_accuracy


def pairs(count: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    same = torch.arange(count) % 2 == 0
    return left, torch.where(same[:, None], left + 0.7 * noise, noise), same


@pytest.mark.parametrize("method", ["l2_distance", "cosine"])
def test_it_is_the_literal_search(method: str):
    left, right, same = pairs()
    result = verification_accuracy(left, right, same, method=method, independent_folds=True)  # type: ignore[arg-type]
    thresholds = torch.linspace(-3, 3, 20001, dtype=torch.float64)
    for fold in range(10):
        here = torch.arange(40) // 4 == fold
        a, b = F.normalize(left, dim=1), F.normalize(right, dim=1)
        mean = torch.cat([a[~here], b[~here]]).mean(0)
        a, b = F.normalize(a - mean, dim=1), F.normalize(b - mean, dim=1)
        scores = (a - b).square().sum(1) if method == "l2_distance" else -(a * b).sum(1)
        limits = thresholds[:, None]
        right_of = torch.where(same, scores < limits, scores > limits)[:, ~here].sum(1)
        best = thresholds[right_of == right_of.max()].mean()
        found = torch.where(same, scores < best, scores > best)[here]
        torch.testing.assert_close(result.accuracies[fold], 100 * found.double().mean())
        torch.testing.assert_close(result.thresholds[fold], best if method == "l2_distance" else -best)
    assert result.accuracy > 60


def test_order_of_the_folds_counts_in_the_authors_form():
    left, right, same = pairs()
    folds = torch.arange(40) % 4
    first = verification_accuracy(left, right, same, folds).thresholds
    turned = verification_accuracy(left, right, same, 3 - folds).thresholds.flip(0)
    assert not torch.allclose(first, turned, atol=1e-6)
    apart = verification_accuracy(left, right, same, folds, independent_folds=True).thresholds
    turned = verification_accuracy(left, right, same, 3 - folds, independent_folds=True).thresholds.flip(0)
    torch.testing.assert_close(apart, turned)


def test_numbers_say_which_pairs_are_the_same():
    left, right, same = pairs()
    signs = torch.where(same, 1, -1)
    assert verification_accuracy(left, right, signs)[0].equal(verification_accuracy(left, right, same.int())[0])


def test_bad_pairs():
    left, right, same = pairs()
    with pytest.raises(ValueError, match=r"left and right must be \(N, D\) and same \(N\)"):
        verification_accuracy(left, right[:3], same)
    with pytest.raises(ValueError, match="there must be at least 2 folds, got 1"):
        verification_accuracy(left, right, same, torch.zeros(40))
    with pytest.raises(UnknownName, match="unknown method 'l1'"):
        verification_accuracy(left, right, same, method="l1")  # type: ignore[arg-type]


def test_the_largest_region_without_holes_is_kept():
    mask = torch.zeros(8, 9, dtype=torch.bool)
    mask[1:6, 1:6] = True
    mask[3, 3] = False
    mask[7, 8] = True
    expected = torch.zeros(8, 9, dtype=torch.bool)
    expected[1:6, 1:6] = True
    assert torch.equal(largest_region(mask), expected)
    assert not largest_region(torch.zeros(3, 3)).any()


def test_thresholds_of_disc_and_cup():
    probabilities = torch.zeros(1, 2, 4, 4)
    probabilities[0, 0, 1, 1] = 0.3
    probabilities[0, 1, 1:3, 1:3] = 0.6
    assert not disc_and_cup(probabilities).any()
    assert disc_and_cup(probabilities, cup=0.1, disc=0.5).sum((2, 3)).tolist() == [[1, 4]]
    with pytest.raises(ValueError, match=r"probabilities must be \(B, 2, H, W\), got \(1, 3, 4, 4\)"):
        disc_and_cup(torch.zeros(1, 3, 4, 4))


def test_dice():
    first, second = torch.zeros(3, 2, 4), torch.zeros(3, 2, 4)
    first[0, 0, :2] = second[0, 0, 1:4] = 1
    first[1] = 1
    assert dice(first, second).tolist() == [2 / 5, 0.0, 1.0]
    with pytest.raises(ValueError, match="masks must be of one shape"):
        dice(first, second[:1])
