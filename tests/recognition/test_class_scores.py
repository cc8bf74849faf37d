"""Measures of classes of unequal size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as reference
from sklearn.metrics import precision_recall_fscore_support

from convatlas.recognition.class_scores import balanced_weights, class_scores, confusion_matrix


def test_scores_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    labels, predicted = generator.integers(0, 4, (2, 60))
    confusion = confusion_matrix(torch.from_numpy(labels), torch.from_numpy(predicted), 4)
    assert (confusion.numpy() == reference(labels, predicted)).all()
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted)
    scores = class_scores(confusion)
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        np.testing.assert_allclose(scores[name].numpy(), expected)
    flipped = class_scores(
        confusion_matrix(torch.from_numpy(labels == 0).long(), torch.from_numpy(predicted == 0).long(), 2)
    )
    torch.testing.assert_close(scores["specificity"][0], flipped["recall"][0])


def test_classes_that_never_occur_score_zero():
    scores = class_scores(confusion_matrix(torch.tensor([0, 0]), torch.tensor([0, 0]), 2))
    assert scores["precision"].tolist() == [1, 0]
    assert scores["specificity"].tolist() == [0, 1]


def test_weights_balance_the_classes():
    counts = torch.tensor([1, 3, 6])
    weights = balanced_weights(counts)
    torch.testing.assert_close(weights * counts, torch.full((3,), 10 / 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="counts must be"):
        balanced_weights(torch.tensor([1, 0]))
