"""Decisions for shape or texture."""

from __future__ import annotations

import math

import pytest
import torch

from convatlas.analysis.shape_bias import CATEGORIES, category_probabilities, cue_conflict_labels, shape_bias


def logits_for(category: torch.Tensor) -> torch.Tensor:
    names = list(CATEGORIES)
    logits = torch.zeros(len(category), 1000)
    for row, index in enumerate(category.tolist()):
        logits[row, list(CATEGORIES[names[index]])] = 9.0
    return logits


def test_there_are_sixteen_categories_of_207_classes():
    assert list(CATEGORIES) == sorted(CATEGORIES)
    assert len(CATEGORIES) == 16
    indices = [index for indices in CATEGORIES.values() for index in indices]
    assert len(indices) == len(set(indices)) == 207
    assert len(CATEGORIES["dog"]) == 109
    assert len(CATEGORIES["bird"]) == 49


def test_oracles_of_shape_and_of_texture():
    shape, texture = torch.tensor([0, 5, 10, 3, 4]), torch.tensor([1, 2, 15, 3, 9])
    for cue, bias in ((shape, 1.0), (texture, 0.0)):
        found = shape_bias(logits_for(cue), shape, texture)
        assert torch.equal(found.decisions, cue)
        assert found.shape_hits + found.texture_hits == 4  # where both are the same there is no conflict
        assert found.bias == bias
    assert math.isnan(shape_bias(logits_for(shape + 1), shape, shape).bias)


def test_category_probabilities_are_means():
    probabilities = torch.randn(2, 1000).softmax(1)
    means = category_probabilities(probabilities)
    assert means.shape == (2, 16)
    torch.testing.assert_close(means[:, 1], probabilities[:, 294:298].mean(1))
    with pytest.raises(ValueError, match="probabilities must sum to 1"):
        category_probabilities(torch.ones(2, 1000))
    with pytest.raises(ValueError, match=r"probabilities must be \(N, classes\) with at least 899|at least"):
        category_probabilities(torch.ones(2, 10) / 10)


def test_names_tell_shape_and_texture():
    shape, texture = cue_conflict_labels(["dog10-bird2.png", "folder/airplane1-truck3.png"])
    assert shape.tolist() == [10, 0]
    assert texture.tolist() == [3, 15]
    for wrong in ("dog.png", "dog1-wolf2.png"):
        with pytest.raises(ValueError, match=f"shape and then texture, got '{wrong}'"):
            cue_conflict_labels([wrong])
    with pytest.raises(ValueError, match=r"shape and texture must be \(N\)"):
        shape_bias(torch.zeros(2, 1000), torch.zeros(3), torch.zeros(2))
