"""Scattering in scikit-learn's pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from convatlas.nn.scattering import HarmonicScattering3D, Scattering1D, Scattering2D
from convatlas.recognition.scattering import ScatteringTransformer


def test_digits_are_told_apart_from_few_labels():
    images, labels = load_digits(return_X_y=True)
    features = ScatteringTransformer(J=2, shape=(8, 8), options={"L": 4}, batch_size=50)
    model = make_pipeline(features, StandardScaler(), LogisticRegression(max_iter=200))
    model.fit(images[:200], labels[:200])
    assert model.score(images[200:500], labels[200:500]) > 0.75


@pytest.mark.parametrize(
    ("shape", "options", "layer"),
    [
        (100, {"Q": 2}, lambda: Scattering1D(1, 100, 2)),
        ((5, 6), {"max_order": 1}, lambda: Scattering2D(1, (5, 6), max_order=1)),
        ((3, 4, 4), {"L": 1}, lambda: HarmonicScattering3D(1, (3, 4, 4), 1)),
    ],
)
def test_rows_are_the_features_of_the_layer(shape, options, layer):
    samples = np.random.default_rng(0).random((5, *([shape] if isinstance(shape, int) else shape)))
    transformer = ScatteringTransformer(J=1, shape=shape, options=options, batch_size=2)
    found = clone(transformer).fit(samples).transform(samples.reshape(5, -1))
    expected = layer()(torch.from_numpy(samples).float()).flatten(1)
    torch.testing.assert_close(torch.from_numpy(found), expected)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"X must be \(rows, 64\) or \(rows, \*\(8, 8\)\), got \(2, 63\)"):
        ScatteringTransformer(shape=(8, 8)).fit(np.zeros((2, 63)))
    with pytest.raises(ValueError, match=r"shape must be a length, \(H, W\) or \(D, H, W\), got \(1, 2, 3, 4\)"):
        ScatteringTransformer(shape=(1, 2, 3, 4)).fit(np.zeros((2, 24)))
