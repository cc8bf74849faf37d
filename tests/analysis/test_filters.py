"""Measures of filters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convatlas.analysis.filters import (
    analyse_filters,
    effective_rank,
    filter_importance,
    hexagonal_mask,
    measure_filters,
    receptive_field,
    separability,
    separable_factors,
    stacked,
)
from convatlas.networks.registry import create_model
from convatlas.ops.conv_spectrum import conv_spectrum
from convatlas.ops.image_filters import EDGE_FILTERS


def test_separable_filters_are_products():
    sobel = EDGE_FILTERS["sobel_x"][None, None]
    assert float(separability(sobel)) == pytest.approx(1)
    columns, rows = separable_factors(sobel)
    torch.testing.assert_close((columns @ rows).sum(2), sobel)
    assert float(separability(EDGE_FILTERS["laplacian4"][None, None])) < 0.99
    weight = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    columns, rows = separable_factors(weight, 5)
    torch.testing.assert_close((columns @ rows).sum(2), weight)


def test_spectra_of_a_pointwise_filter_are_those_of_its_matrix():
    weight = torch.zeros(4, 3, 3, 3, dtype=torch.float64)
    weight[..., 1, 1] = matrix = torch.randn(4, 3, dtype=torch.float64)
    values = conv_spectrum(weight, 6)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix).expand(6, 6, -1))
    assert measure_filters(weight).frequency > 0.3  # as white noise


def test_rank_and_importance():
    assert float(effective_rank(torch.eye(5).view(5, 5, 1, 1))) == pytest.approx(5)
    assert float(effective_rank(torch.ones(5, 2, 1, 1))) == pytest.approx(1)
    weight = torch.tensor([[1.0, 0], [1.1, 0], [0, -5]])
    assert filter_importance(weight).argmin() == 0
    assert filter_importance(weight, "geometric_median").argmax() == 2


def test_shapes():
    assert stacked(5) == (2, 18 / 25)
    assert hexagonal_mask(3).tolist() == [[False, True, True], [True, True, True], [True, True, False]]
    for call in (stacked, hexagonal_mask):
        with pytest.raises(ValueError, match="odd"):
            call(4)


def test_receptive_fields():
    chain = nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(2, 2, (3, 5), dilation=2, padding=(2, 4)), nn.GELU()),
    )
    # Behind the pooling a step is two pixels: 1 + (3 - 1) + 1 + 2 * 2 * 2 and 1 + 2 + 1 + 2 * 2 * 4.
    assert receptive_field(chain, (1, 64, 64)) == (12, 20)
    assert receptive_field(chain, (1, 64, 64), "0") == (3, 3)
    model = create_model("resnet18", depths=(1, 1), widths=(4, 4), stem_width=4, num_classes=2)
    assert receptive_field(model, (3, 128, 128), "layer1") == (27, 27)


def test_report():
    report = analyse_filters(create_model("resnet18", depths=(1,), widths=(4,), stem_width=4))
    assert "3 layers" in report.summary
    assert len(report.to_html()) > 10_000
    with pytest.raises(ValueError, match="convolution of images"):
        analyse_filters(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weight must be"):
        analyse_filters(torch.zeros(2, 2))
