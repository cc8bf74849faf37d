"""Mixup in pairs, and accuracies of labels, of pairs of labels and of sets of labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from convatlas.ops.accuracy import label_sets, real_accuracy, top_k_accuracy
from convatlas.ops.mixup import mixed_accuracy, mixed_cross_entropy, mixup_batch

SCORES = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 3, 0, 2], [2, 0, 3, 1]], dtype=torch.float64)


def test_batch_is_mixed_with_a_permutation_of_itself() -> None:
    images, labels = torch.randn(6, 3, 4, 4, dtype=torch.float64), torch.arange(6)
    mixed = mixup_batch(images, labels, 0.8, generator=torch.Generator().manual_seed(3))
    again = mixup_batch(images, labels, 0.8, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(mixed[:3], again[:3], strict=True))
    assert mixed.ratio == again.ratio
    assert sorted(mixed.partner_labels.tolist()) == list(range(6))
    assert 0 < mixed.ratio < 1
    expected = mixed.ratio * images + (1 - mixed.ratio) * images[mixed.partner_labels]
    torch.testing.assert_close(mixed.images, expected)
    torch.testing.assert_close(mixup_batch(images, labels, 0.0).images, images)
    with pytest.raises(ValueError, match=r"alpha must not be negative, got -0\.1"):
        mixup_batch(images, labels, -0.1)


def test_ratios_are_those_of_the_beta_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    pair, labels = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)
    ratios = torch.tensor([mixup_batch(pair, labels, 0.8, generator=generator).ratio for _ in range(2000)])
    assert ratios.mean().item() == pytest.approx(0.5, abs=0.03)
    assert ratios.var().item() == pytest.approx(0.25 / (2 * 0.8 + 1), rel=0.06)


def test_mixed_loss() -> None:
    labels, partners = torch.tensor([0, 1, 2, 3]), torch.tensor([3, 3, 1, 0])
    first, second = (F.cross_entropy(SCORES, each, label_smoothing=0.3) for each in (labels, partners))
    loss = mixed_cross_entropy(SCORES, labels, partners, 0.25, label_smoothing=0.3)
    torch.testing.assert_close(loss, 0.25 * first + 0.75 * second)
    plain = mixed_cross_entropy(SCORES, labels, partners, 1.0)
    torch.testing.assert_close(plain, F.cross_entropy(SCORES, labels))
    soft = 0.25 * F.one_hot(labels, 4) + 0.75 * F.one_hot(partners, 4)
    torch.testing.assert_close(loss, F.cross_entropy(SCORES, 0.7 * soft + 0.3 / 4))


def test_accuracies() -> None:
    labels = torch.tensor([0, 2, 1, 3])
    assert [top_k_accuracy(SCORES, labels, k).item() for k in (1, 2, 3, 4)] == [0.5, 0.75, 1.0, 1.0]
    partners = torch.tensor([0, 3, 1, 1])
    assert mixed_accuracy(SCORES, labels, partners).item() == 0.75
    assert mixed_accuracy(SCORES, labels, partners, 3).item() == 1.0
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k must be from 1 to 4, the number of classes, got {k}"):
            top_k_accuracy(SCORES, labels, k)
    with pytest.raises(ValueError, match="at least one sample"):
        top_k_accuracy(SCORES[:0], labels[:0])


def test_samples_without_labels_do_not_count() -> None:
    sets = label_sets([[1, 0], [0, 1, 2], [], [2]])
    assert sets.tolist() == [[1, 0, -1], [0, 1, 2], [-1, -1, -1], [2, -1, -1]]
    assert real_accuracy(SCORES, sets).item() == pytest.approx(2 / 3)
    assert real_accuracy(SCORES[2:3], sets[2:3]).isnan()
