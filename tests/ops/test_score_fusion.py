"""Late fusion: scores become one, weights are found, differences of classifiers are counted."""

from __future__ import annotations

import math

import pytest
import torch

from convatlas.errors import UnknownName
from convatlas.ops.score_fusion import best_fusion_weights, disagreement, fuse_scores, q_statistic


def _scores(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)


def test_rules():
    scores = _scores(3, 4, 5)
    torch.testing.assert_close(fuse_scores(scores), scores.mean(0))
    torch.testing.assert_close(
        fuse_scores(list(scores), "product"), scores.prod(0) / scores.prod(0).sum(1, keepdim=True)
    )
    torch.testing.assert_close(fuse_scores(scores, "max"), scores.amax(0))
    expected = (2 * scores[0] + scores[2]) / 3
    torch.testing.assert_close(fuse_scores(scores, "weighted", (4, 0, 2)), expected)  # only the ratios matter
    for fused in (fuse_scores(scores), fuse_scores(scores, "product"), fuse_scores(scores, "weighted", (1, 2, 3))):
        torch.testing.assert_close(fused.sum(1), torch.ones(4, dtype=torch.float64))
    sure = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert fuse_scores(sure, "product").isfinite().all()


def test_weights_are_the_best_on_the_grid_and_else_equal():
    labels = torch.tensor([0, 1, 0, 1])
    right = torch.nn.functional.one_hot(labels, 2).double()
    wrong = 1 - right
    assert best_fusion_weights([wrong, right], labels) == pytest.approx((0.4, 0.6))
    assert best_fusion_weights([right, right], labels) == pytest.approx((0.5, 0.5))
    assert sum(best_fusion_weights(_scores(4, 4, 2), labels)) == pytest.approx(1)


def test_diversity():
    labels = torch.zeros(8, dtype=torch.long)
    first = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    second = torch.tensor([0, 0, 0, 0, 0, 1, 0, 1])
    assert disagreement(first, second, labels) == 2 / 8
    assert q_statistic(first, second, labels) == pytest.approx((5 * 1 - 1 * 1) / (5 * 1 + 1 * 1))
    assert disagreement(first, first, labels) == 0
    assert q_statistic(first, first, labels) == 1
    assert math.isnan(q_statistic(labels, labels, labels))


def test_bad_arguments_are_told():
    scores = _scores(2, 3, 4)
    with pytest.raises(UnknownName, match="unknown method 'median'"):
        fuse_scores(scores, "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights must be 2 numbers of at least 0, not all 0, got none"):
        fuse_scores(scores, "weighted")
    with pytest.raises(ValueError, match=r"not all 0, got \(0, 0\)"):
        fuse_scores(scores, "weighted", (0, 0))
    with pytest.raises(ValueError, match="weights are for the method 'weighted', got them with 'mean'"):
        fuse_scores(scores, weights=(1, 1))
    with pytest.raises(ValueError, match=r"scores must be \(B, K\) of one shape, got \(3, 4\), \(2, 4\)"):
        fuse_scores([scores[0], scores[1, :2]])
    with pytest.raises(ValueError, match=r"step must divide 1, got 0\.3"):
        best_fusion_weights(scores, torch.zeros(3), step=0.3)
