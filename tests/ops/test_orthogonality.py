"""Orthogonal convolutions: the theorems, on random kernels."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import UnknownName, Unsupported
from convatlas.ops.conv_spectrum import conv_spectrum
from convatlas.ops.orthogonality import (
    conv_singular_values,
    l_orth,
    orthogonal_conv_exists,
    orthogonality_errors,
    random_orthogonal_kernel,
    spectral_bound_factor,
)

#: M, C, k, S, d and N of the output.
SHAPES = [(4, 5, 3, 1, 2, 5), (6, 2, 3, 1, 2, 5), (6, 2, 3, 2, 2, 3), (9, 2, 3, 2, 2, 4), (5, 2, 5, 2, 1, 6)]
#: Where an orthogonal kernel exists, the square case too.
ORTHOGONAL = [*SHAPES, (4, 4, 3, 1, 2, 5), (3, 2, 1, 1, 3, 2), (20, 2, 3, 3, 2, 2), (4, 2, 3, 4, 1, 2)]


def matrix(weight: Tensor, stride: int, outputs: int) -> Tensor:
    """The matrix of a circular convolution, column by column."""
    channels, dims = weight.shape[1], weight.dim() - 2
    side, reach = stride * outputs, weight.shape[2] // 2
    pixels = torch.eye(channels * side**dims, dtype=weight.dtype).view(-1, channels, *(side,) * dims)
    padded = F.pad(pixels, (reach, reach) * dims, mode="circular")
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    return conv(padded, weight, stride=stride).flatten(1).T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_and_errors_are_those_of_the_matrix(shape: tuple[int, ...]):
    m, c, k, s, d, n = shape
    weight = 0.3 * torch.randn(m, c, *(k,) * d, dtype=torch.float64)
    dense = matrix(weight, s, n)
    values = conv_singular_values(weight, s * n, s)
    torch.testing.assert_close(values, torch.linalg.svdvals(dense))
    frobenius, spectral = orthogonality_errors(values)
    gram = dense @ dense.T if m <= c * s**d else dense.T @ dense
    torch.testing.assert_close(frobenius, torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype)))
    loss = l_orth(weight, s)
    if s * n >= 2 * k - 1:
        torch.testing.assert_close(frobenius**2, n**d * loss)
    assert spectral**2 <= spectral_bound_factor(m, c, k, s, dims=d) * loss


@pytest.mark.parametrize("shape", ORTHOGONAL, ids=str)
def test_constructed_kernels_are_orthogonal(shape: tuple[int, ...]):
    m, c, k, s, d, n = shape
    weight = random_orthogonal_kernel(m, c, k, s, dims=d, generator=torch.Generator().manual_seed(0))
    assert abs(float(l_orth(weight, s))) < 1e-12
    values = conv_singular_values(weight, s * max(n, k), s)
    torch.testing.assert_close(values, torch.ones_like(values))


def test_an_orthogonal_layer_preserves_norms():
    weight = random_orthogonal_kernel(7, 3, 3)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    y = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight)
    torch.testing.assert_close(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))


def test_errors_do_not_grow_with_the_input():
    weight = 0.2 * torch.randn(4, 3, 3, 3, dtype=torch.float64)
    bound = (spectral_bound_factor(4, 3, 3) * l_orth(weight)).sqrt()
    found = [orthogonality_errors(conv_singular_values(weight, n))[1] for n in (8, 16, 32)]
    assert max(found) <= bound
    assert max(found) - min(found) < 0.1 * max(found)


def test_spectra_stand_at_their_frequencies():
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    kernels = torch.fft.fft2(weight, s=(4, 7))
    expected = torch.linalg.svdvals(kernels.permute(2, 3, 0, 1))
    torch.testing.assert_close(conv_spectrum(weight, (4, 7)), expected)


def test_transposed_pointwise_and_grouped_kernels():
    weight = torch.randn(3, 5, 1, 1, dtype=torch.float64)
    gram = weight[..., 0, 0] @ weight[..., 0, 0].T
    torch.testing.assert_close(l_orth(weight), (gram - torch.eye(3, dtype=gram.dtype)).square().sum())
    # The columns of a transposed convolution are the rows of the convolution with its weight: delta = M - C S^2.
    layer = torch.nn.ConvTranspose2d(9, 2, 3, stride=2, bias=False).double()
    kernel = random_orthogonal_kernel(9, 2, 3, 2)
    assert abs(float(l_orth(kernel, 2))) < 1e-12
    layer.weight.data.copy_(kernel)
    y = torch.randn(1, 9, 4, 4, dtype=torch.float64)
    image = matrix(kernel, 2, 4).T @ y.flatten()
    spread = F.pad(layer(y), (0, 0, 0, 0))
    folded = spread[..., :8, :8].clone()
    folded[..., :1, :] += spread[..., 8:, :8]
    folded[..., :, :1] += spread[..., :8, 8:]
    folded[..., :1, :1] += spread[..., 8:, 8:]
    torch.testing.assert_close(folded.roll((-1, -1), (2, 3)).flatten(), image)
    grouped = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(l_orth(grouped, groups=3), sum(l_orth(part) for part in grouped.chunk(3)))


def test_existence():
    for arguments, exists, case, words in (
        ((28, 3, 3, 4), False, "RO", r"M \(28\) exceeds C\*k\^2 \(27\): no row-orthogonal convolution exists"),
        ((49, 3, 3, 4), False, "CO", r"stride \(4\) larger than kernel size \(3\)"),
        ((64, 3, 3), True, "CO", "it exists"),
        ((8, 8, 3), True, "RO", r"hard to optimise"),
    ):
        found = orthogonal_conv_exists(*arguments)
        assert (found.exists, found.case) == (exists, case)
        assert re.search(words, found.reason)
    assert not orthogonal_conv_exists(8, 4, 3, padding_mode="valid").exists
    assert orthogonal_conv_exists(4, 8, 3, padding_mode="valid").exists
    assert orthogonal_conv_exists(48, 3, 3, 3, padding_mode="valid").exists
    assert "pointwise" in orthogonal_conv_exists(4, 8, 3, padding_mode="zeros").reason
    assert orthogonal_conv_exists(6, 2, 3, 2, dims=1).case == "CO"


def test_bad_input():
    with pytest.raises(ValueError, match="requires odd kernels, received 4"):
        orthogonal_conv_exists(4, 4, 4)
    with pytest.raises(ValueError, match="requires odd kernels, received 2"):
        l_orth(torch.zeros(2, 2, 2, 2))
    with pytest.raises(ValueError, match="cubic"):
        l_orth(torch.zeros(2, 2, 3, 1))
    with pytest.raises(UnknownName, match="padding_mode"):
        orthogonal_conv_exists(4, 4, 3, padding_mode="reflect")
    with pytest.raises(Unsupported, match="not known"):
        orthogonal_conv_exists(4, 4, 3, 2, padding_mode="zeros")
    with pytest.raises(ValueError, match="exceeds"):
        random_orthogonal_kernel(28, 3, 3, 4)
    with pytest.raises(ValueError, match="size must be a multiple"):
        conv_singular_values(torch.zeros(2, 2, 3, 3), 7, 2)
