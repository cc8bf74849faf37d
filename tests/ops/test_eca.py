"""ECA and the gates it is compared with: every backend against the definition, gradients, precision, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convatlas.errors import UnknownName, Unsupported
from convatlas.ops.backend import OPERATORS, chosen
from convatlas.ops.eca import channel_gate, eca, eca_kernel_size

BACKENDS = ["naive", "shifts", "conv1d"]


def sigmoid_gate(x: Tensor, matrix: Tensor) -> Tensor:
    """The definition with a dense matrix over the channel means."""
    z = x.flatten(2).mean(2) @ matrix.T
    return x * (1 / (1 + torch.exp(-z))).reshape(*z.shape, *[1] * (x.dim() - 2))


def toeplitz(weight: Tensor, channels: int, padding: str) -> Tensor:
    """The matrix of ECA, entry by entry."""
    size = weight.shape[2]
    matrix = torch.zeros(channels, channels, dtype=weight.dtype)
    for row in range(channels):
        for tap in range(size):
            column = row + tap - (size - 1) // 2
            if padding == "circular" or 0 <= column < channels:
                matrix[row, column % channels] += weight[min(row, weight.shape[0] - 1), 0, tap]
    return matrix


def test_every_backend_is_tried_here() -> None:
    assert set(OPERATORS["eca"].names) == set(BACKENDS)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("padding", ["zeros", "circular"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("shape", "size"), [((1, 8, 5), 3), ((3, 7, 2, 3), 5), ((2, 5, 2, 3, 2), 1), ((2, 3, 4, 4), 7)]
)
def test_equals_the_dense_matrix(backend: str, padding: str, shared: bool, shape: tuple[int, ...], size: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(1 if shared else shape[1], 1, size, dtype=torch.float64)
    if backend == "conv1d" and not shared:
        with pytest.raises(Unsupported, match="one kernel for all channels"):
            eca(x, weight, padding, backend=backend)
        return
    expected = sigmoid_gate(x, toeplitz(weight, shape[1], padding))
    torch.testing.assert_close(eca(x, weight, padding, backend=backend), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "kernels"), [("naive", 1), ("naive", 4), ("shifts", 1), ("shifts", 4), ("conv1d", 1)]
)
@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_gradients(backend: str, kernels: int, padding: str) -> None:
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(kernels, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: eca(x, w, padding, backend=backend), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: eca(x, w, padding, backend=backend), (x, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_means_of_half_precision_are_kept_in_float32(backend: str) -> None:
    x = torch.full((1, 2, 2, 2), 256.0)
    x[0, 0, 0] = 258  # the mean, 257, has no bfloat16
    weight = torch.tensor([[[0.0, 1.0, -1.0]]])
    result = eca(x.bfloat16(), weight.bfloat16(), backend=backend)
    assert result.dtype == torch.bfloat16
    gate = torch.sigmoid(torch.tensor(257.0 - 256.0))
    torch.testing.assert_close(result[0, 0, 1], (256 * gate).bfloat16().expand(2), rtol=4e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    x, weight = torch.randn(2, 16, 4, 4), torch.randn(1, 1, 5)
    with torch.autocast("cpu", torch.bfloat16):
        result = eca(x, weight, backend=backend)
        gate = channel_gate(x, weight.new_ones(16, 4))
    torch.testing.assert_close(result, eca(x, weight, backend=backend), rtol=0, atol=0)
    torch.testing.assert_close(gate, channel_gate(x, weight.new_ones(16, 4)), rtol=0, atol=0)


def test_auto_takes_the_fast_backend_of_each_case() -> None:
    weight = torch.randn(1, 1, 3)
    assert chosen("eca", torch.randn(1, 8, 2, 2), weight) == "conv1d"
    assert chosen("eca", torch.randn(2, 8, 2, 2), weight) == "shifts"
    assert chosen("eca", torch.randn(1, 8, 2, 2), torch.randn(8, 1, 3)) == "shifts"
    assert chosen("eca", torch.randn(1, 8, 2, 2, device="meta"), weight.to("meta")) == "shifts"


@pytest.mark.parametrize("block", [1, 2, 3, 6])
def test_channel_gate_is_a_block_diagonal_matrix(block: int) -> None:
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    weight = torch.randn(6, block, dtype=torch.float64)
    expected = sigmoid_gate(x, torch.block_diag(*weight.split(block)))
    torch.testing.assert_close(channel_gate(x, weight), expected, rtol=1e-12, atol=1e-12)
    arguments = (x[:, :, :1].requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(channel_gate, arguments)


def test_channel_gate_without_weight() -> None:
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(channel_gate(x), sigmoid_gate(x, torch.eye(6, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("channels", "size"), [(1, 1), (8, 3), (16, 3), (64, 3), (96, 3), (128, 5), (256, 5), (1024, 5), (2048, 7)]
)
def test_adaptive_kernel_size(channels: int, size: int) -> None:
    assert eca_kernel_size(channels) == size


def test_adaptive_kernel_size_with_other_constants() -> None:
    assert eca_kernel_size(256, gamma=1, beta=0) == 9
    assert eca_kernel_size(256, gamma=1, beta=1) == 9
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        eca_kernel_size(0)
    with pytest.raises(ValueError, match="gamma must not be 0"):
        eca_kernel_size(64, gamma=0)


@pytest.mark.parametrize(
    ("x", "weight", "padding", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(1, 1, 3), "zeros", r"x must be \(B, C, L\).* got 2 dimensions"),
        (torch.zeros(2, 4, 3, dtype=torch.int64), torch.zeros(1, 1, 3), "zeros", "floating point, got torch.int64"),
        (torch.zeros(2, 4, 3), torch.zeros(2, 1, 3), "zeros", r"weight must be \(1, 1, k\) or \(4, 1, k\)"),
        (torch.zeros(2, 4, 3), torch.zeros(3), "zeros", r"weight must be .* got \(3,\)"),
        (torch.zeros(2, 4, 3), torch.zeros(1, 1, 4), "zeros", "ECA kernel size must be odd, got 4"),
        (torch.zeros(2, 4, 3), torch.zeros(1, 1, 3), "reflect", "padding must be 'zeros' or 'circular', got 'reflect'"),
        (torch.zeros(2, 2, 3), torch.zeros(1, 1, 7), "circular", "at least as many channels, got 2"),
    ],
)
def test_bad_input(x: Tensor, weight: Tensor, padding: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eca(x, weight, padding)


def test_bad_input_of_the_gate_and_the_backend() -> None:
    x = torch.zeros(2, 6, 3)
    with pytest.raises(ValueError, match=r"weight must be \(6, n\) with n a divisor of 6, got \(6, 4\)"):
        channel_gate(x, torch.zeros(6, 4))
    with pytest.raises(ValueError, match="got 2 dimensions"):
        channel_gate(torch.zeros(2, 6))
    with pytest.raises(UnknownName, match="shifts"):
        eca(x, torch.zeros(1, 1, 3), backend="shift")
