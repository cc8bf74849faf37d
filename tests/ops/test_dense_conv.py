"""Dense convolutions beyond what the battery tests: what the backward pass keeps, and bad input."""

from __future__ import annotations

import pytest
import torch

from convatlas.ops.dense_conv import dense_conv
from convatlas.training.measure import kept_bytes


def _parameters(channels: int, layers: int) -> list[torch.Tensor]:
    found = []
    for number in range(1, layers + 1):
        found += [torch.randn(channels, number * channels, 3, 3), torch.randn(channels)]
    return [tensor.requires_grad_() for tensor in found]


def test_one_buffer_is_all_that_the_backward_pass_keeps():
    x, parameters = torch.randn(2, 4, 9, 8), _parameters(4, 5)
    kept = {
        backend: kept_bytes(
            lambda backend=backend: dense_conv(x, 0.01, *parameters, backend=backend), without=parameters
        )
        for backend in ("naive", "buffer")
    }
    assert kept["buffer"] == 5 * x.nbytes
    assert kept["naive"] >= 3 * kept["buffer"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, slope, parameters: (x[0, 0], slope, *parameters), "x must be"),
        (lambda x, slope, parameters: (x, -0.1, *parameters), "slope must not be negative"),
        (lambda x, slope, parameters: (x, slope), "weights and biases in turn, got 0"),
        (lambda x, slope, parameters: (x, slope, *parameters[:3]), "weights and biases in turn, got 3"),
        (
            lambda x, slope, parameters: (x, slope, *parameters[2:]),
            r"convolution 1 must have a weight \(F, 4, odd, odd\)",
        ),
        (lambda x, slope, parameters: (x, slope, parameters[0][..., :2], parameters[1]), "convolution 1 must have"),
    ],
)
def test_bad_input(change, message: str):
    with pytest.raises(ValueError, match=message):
        dense_conv(*change(torch.randn(2, 4, 9, 8), 0.01, _parameters(4, 2)))
