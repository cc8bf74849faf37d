"""Orthogonal convolutions: when they exist, how far a kernel is from one, and what that bounds.

Achour, Malgouyres, Mamalet: "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks", JMLR
23, 2022, arXiv 2108.05623. The regulariser is that of Wang, Chen, Chakraborty, Yu: "Orthogonal Convolutional Neural
Networks", CVPR 2020, arXiv 1911.12207.

K (M, C, k, ..., k) is the kernel, S the stride and d the number of axes; calligraphic K of the paper is the matrix of
the layer for circular padding. Where M <= C S^d its rows can be orthonormal (the case RO, K K^T = 1), where M >= C S^d
its columns (CO, K^T K = 1). Kernels are cubic and odd.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.errors import Unsupported, unknown
from convatlas.ops.backend import Backends
from convatlas.ops.conv_spectrum import conv_spectrum
from convatlas.ops.precision import without_autocast

__all__ = [
    "Existence",
    "OrthogonalCase",
    "conv_orth_dist",
    "conv_singular_values",
    "deconv_orth_dist",
    "l_orth",
    "orth_dist",
    "orthogonal_case",
    "orthogonal_conv_exists",
    "orthogonality_errors",
    "random_orthogonal_kernel",
    "spectral_bound_factor",
]

#: Whether rows (RO) or columns (CO) of the layer's matrix can be orthonormal.
OrthogonalCase = Literal["RO", "CO"]

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_PADDINGS = ("circular", "valid", "zeros")
_backends = Backends("l_orth", auto=lambda *_: "half")


class Existence(NamedTuple):
    """Whether there is an orthogonal convolution of some shape.

    Attributes:
        exists: whether there is.
        case: which of rows and columns are to be orthonormal.
        reason: in one sentence.
        square: whether M = C S^d, where optimisation may stall above zero.
    """

    exists: bool
    case: OrthogonalCase
    reason: str
    square: bool = False


def orthogonal_case(out_channels: int, in_channels: int, stride: int = 1, dims: int = 2) -> OrthogonalCase:
    """``RO`` where M <= C S^d, else ``CO``."""
    return "RO" if out_channels <= in_channels * stride**dims else "CO"


def orthogonal_conv_exists(
    out_channels: int,
    in_channels: int,
    kernel_size: int,
    stride: int = 1,
    *,
    dims: int = 2,
    groups: int = 1,
    padding_mode: str = "circular",
) -> Existence:
    """Whether an orthogonal convolution of a shape exists, for inputs that are not smaller than the kernel (theorem 4).

    Args:
        out_channels, in_channels, kernel_size, stride, groups: of the convolution; each group is one by itself. A
            dilated kernel exists where the plain one does.
        dims: number of position axes.
        padding_mode: ``circular``; ``valid`` for no padding; ``zeros`` for a padding that keeps the size (stride 1).

    Raises:
        ValueError: the kernel is even, or another argument is out of range.
        Unsupported: zeros are padded at a stride, of which nothing is known.
    """
    if padding_mode not in _PADDINGS:
        raise unknown("padding_mode", padding_mode, _PADDINGS)
    if groups < 1 or out_channels % groups or in_channels % groups:
        raise ValueError(f"groups must divide {out_channels} and {in_channels} channels, got {groups}")
    _check_shape(kernel_size, stride, dims)
    rows, channels = out_channels // groups, in_channels // groups
    case, inputs, taps = orthogonal_case(rows, channels, stride, dims), stride**dims, kernel_size**dims
    power, step = ("k", "S") if dims == 1 else (f"k^{dims}", f"S^{dims}")
    if case == "RO" and rows > channels * taps:
        reason = f"M ({rows}) exceeds C*{power} ({channels * taps}): no row-orthogonal convolution exists"
        return Existence(False, case, reason)
    if case == "CO" and stride > kernel_size:
        return Existence(False, case, f"stride ({stride}) larger than kernel size ({kernel_size}): inputs are left out")
    if padding_mode == "valid" and case == "CO" and kernel_size > stride:
        reason = "without padding the border is covered less often than the inside: no column-orthogonal one exists"
        return Existence(False, case, reason)
    if padding_mode == "zeros" and kernel_size > 1:
        if stride > 1:
            raise Unsupported("whether there are orthogonal convolutions with zeros padded at a stride is not known")
        return Existence(True, case, "with zeros padded every tap outside the centre must be zero: a pointwise layer")
    if rows == channels * inputs:
        return Existence(True, case, f"it exists, but M = C*{step} is hard to optimise", square=True)
    return Existence(True, case, "it exists")


def l_orth(weight: Tensor, stride: int = 1, groups: int = 1, dilation: int = 1, *, backend: str = "auto") -> Tensor:
    """L_orth(K) = ||CONV(K, K) - I_r0||_F^2 - max(0, M - C S^d), which is zero for orthogonal K alone (definition 1).

    It is 1/N^d of the squared error ||K K^T - 1||_F^2 or ||K^T K - 1||_F^2 of the layer's matrix for N^d outputs, for
    every N with S N >= 2 k - 1 (theorem 5). The weight of a transposed convolution, as torch keeps it, is that of the
    convolution whose transpose it is, and is taken as it is. Half precision is computed in float32.

    Args:
        weight: K (M, C / groups, *kernel_size).
        stride: S, the same along all axes.
        groups: each group of output channels is a convolution by itself; their values are added.
        dilation: of the kernel.
        backend: ``auto``, ``naive`` (as it is written) or ``half``: of two opposite shifts the one, whose block is the
            other's transpose; for S = 1 between the smaller number of channels.

    Returns:
        A scalar.

    Raises:
        ValueError: the weight is no convolution's with odd cubic kernels, or another argument is out of range.
    """
    dims = weight.dim() - 2
    if dims not in _CONVS or len(set(weight.shape[2:])) != 1:
        raise ValueError(f"weight must be (out, in, *kernel) with cubic kernels, got {tuple(weight.shape)}")
    _check_shape(weight.shape[2], stride, dims)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} output channels, got {groups}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    with without_autocast(weight):
        precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return _backends.run(backend, _dilated(precise, dilation), stride, groups)


@_backends.register("naive")
def _naive(weight: Tensor, stride: int, groups: int) -> Tensor:
    dims = weight.dim() - 2
    reach = (weight.shape[2] - 1) // stride * stride
    total = weight.new_zeros(())
    for kernel in weight.chunk(groups):
        products = _CONVS[dims](kernel, kernel, stride=stride, padding=reach)  # CONV(K, K)
        identity = torch.zeros_like(products)
        _tap(identity, reach // stride).copy_(torch.eye(len(kernel), dtype=weight.dtype, device=weight.device))
        unavoidable = max(0, len(kernel) - kernel.shape[1] * stride**dims)
        total = total + (products - identity).square().sum() - unavoidable
    return total


@_backends.register("half")
def _half(weight: Tensor, stride: int, groups: int) -> Tensor:
    dims = weight.dim() - 2
    reach = (weight.shape[2] - 1) // stride * stride
    total = weight.new_zeros(())
    for kernel in weight.chunk(groups):
        if stride == 1 and len(kernel) > kernel.shape[1]:
            kernel = kernel.transpose(0, 1)  # the transpose of the layer, up to a reflection, which changes nothing
        rows, channels = kernel.shape[:2]
        # Zeros before the first axis only: shifts up to 0 along it.
        padded = F.pad(kernel, (0, 0) * (dims - 1) + (reach, 0))
        products = _CONVS[dims](padded, kernel, stride=stride, padding=(0, *(reach,) * (dims - 1)))
        centre = products[:, :, -1]
        middle = _tap(centre, reach // stride)
        # ||X - 1||^2 = ||X||^2 - 2 tr X + M
        whole = 2 * products[:, :, :-1].square().sum() + centre.square().sum()
        total = total + whole - 2 * middle.diagonal().sum() + rows - max(0, rows - channels * stride**dims)
    return total


def conv_singular_values(
    weight: Tensor, size: int | tuple[int, ...], stride: int = 1, groups: int = 1, dilation: int = 1
) -> Tensor:
    """All singular values of the matrix of a circular convolution, the largest first.

    Args:
        weight: K (M, C / groups, *kernel_size).
        size: samples of the input along each axis, or one number for all: a multiple of the stride, and not less than
            the kernel.
        stride, groups, dilation: of the convolution.

    Raises:
        ValueError: an argument is out of range.
    """
    kernels = _dilated(weight, dilation).chunk(groups)
    found = [conv_spectrum(kernel, size, stride).flatten() for kernel in kernels]
    return torch.cat(found).sort(descending=True).values


def orthogonality_errors(singular_values: Tensor) -> tuple[Tensor, Tensor]:
    """err_F and err_s, the Frobenius and spectral norm of K K^T - 1 (RO) or K^T K - 1 (CO), of a layer's matrix.

    Args:
        singular_values: all min(M N^d, C S^d N^d) of them.
    """
    excess = singular_values.square() - 1
    return torch.linalg.vector_norm(excess), excess.abs().max()


def spectral_bound_factor(
    out_channels: int, in_channels: int, kernel_size: int, stride: int = 1, *, dims: int = 2
) -> int:
    """alpha, with which err_s^2 <= alpha L_orth whatever the size of the input (theorem 6)."""
    _check_shape(kernel_size, stride, dims)
    rows = out_channels * (2 * ((kernel_size - 1) // stride) + 1) ** dims
    columns = in_channels * (2 * kernel_size - 1) ** dims
    if out_channels == in_channels * stride**dims:
        return min(rows, columns)
    return rows if orthogonal_case(out_channels, in_channels, stride, dims) == "RO" else columns


def random_orthogonal_kernel(
    out_channels: int,
    in_channels: int,
    kernel_size: int,
    stride: int = 1,
    *,
    dims: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """An orthogonal kernel (M, C, k, ..., k) in float64: different taps for the outputs, then a random rotation.

    Output m reads the m-th of the triples of channel and tap, of the min(k, S)^d taps in the middle; outputs beyond
    them are zero. An orthogonal matrix over the outputs keeps it orthogonal. For S = 1 only the centre is used: it is
    the delta-orthogonal initialisation, which is orthogonal with zeros padded as well.

    Raises:
        ValueError: no such kernel exists.
    """
    existence = orthogonal_conv_exists(out_channels, in_channels, kernel_size, stride, dims=dims)
    if not existence.exists:
        raise ValueError(existence.reason)
    used = min(kernel_size, stride)
    start = (kernel_size - used) // 2
    block = torch.zeros(out_channels, in_channels * used**dims, dtype=torch.float64)
    block.diagonal().fill_(1)
    gaussian = torch.randn(out_channels, out_channels, dtype=torch.float64, generator=generator)
    rotation, upper = torch.linalg.qr(gaussian)
    rotation = rotation * upper.diagonal().sign()  # evenly distributed over all rotations
    kernel = torch.zeros(out_channels, in_channels, *(kernel_size,) * dims, dtype=torch.float64)
    middle = (slice(start, start + used),) * dims
    kernel[(slice(None), slice(None), *middle)] = (rotation @ block).view(out_channels, in_channels, *(used,) * dims)
    return kernel


# -- the distances of Wang et al. --------------------------------------------------------------------------------------


def deconv_orth_dist(weight: Tensor, stride: int = 2, padding: int = 1) -> Tensor:
    """||conv(K, K) - I_r0||_F as in the code of Wang et al.: not squared, with the identity in the middle.

    Their trainings pad by 1: of 3x3 kernels with stride 1 that compares neighbours one tap apart only, and with stride
    2 the identity is asked of a shift by one. The padding of the theory is floor((k - 1) / S) S, see `l_orth`.
    """
    products = F.conv2d(weight, weight, stride=stride, padding=padding)
    target = torch.zeros_like(products)
    middle = products.shape[-1] // 2
    target[:, :, middle, middle] = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return torch.linalg.vector_norm(products - target)


def orth_dist(weight: Tensor) -> Tensor:
    """||A^T A - 1||_F of A (out, in k k), or of its transpose where it is wider than high (Wang et al.)."""
    matrix = weight.flatten(1)
    matrix = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    return torch.linalg.vector_norm(
        matrix.T @ matrix - torch.eye(matrix.shape[1], dtype=weight.dtype, device=weight.device)
    )


def conv_orth_dist(weight: Tensor, stride: int = 1) -> Tensor:
    """How far the columns of a layer's matrix are from orthonormal, by images of one pixel each (Wang et al.).

    Each input channel's pixel in the middle of an image of S (k - 1) + k pixels is compared with all pixels.

    Raises:
        ValueError: the kernel is not square, or the stride is not smaller.
    """
    channels, height, width = weight.shape[1:]
    if height != width or not 1 <= stride < height:
        raise ValueError(f"weight must have square kernels larger than the stride {stride}, got {tuple(weight.shape)}")
    side = stride * (height - 1) + height
    pixels = torch.eye(channels * side**2, dtype=weight.dtype, device=weight.device)
    columns = F.conv2d(pixels.view(-1, channels, side, side), weight, stride=stride).flatten(1)
    middle = torch.arange(channels, device=weight.device) * side**2 + side**2 // 2
    return torch.linalg.vector_norm(columns[middle] @ columns.T - pixels[middle])


def _check_shape(kernel_size: int, stride: int, dims: int) -> None:
    if dims not in _CONVS:
        raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"the theory requires odd kernels, received {kernel_size}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")


def _tap(products: Tensor, place: int) -> Tensor:
    """The same place along every axis behind the channels, (out, out), as a view."""
    while products.dim() > 2:
        products = products.select(-1, place)
    return products


def _dilated(weight: Tensor, dilation: int) -> Tensor:
    """The kernel with zeros between its taps."""
    if dilation == 1:
        return weight
    sizes = [dilation * (size - 1) + 1 for size in weight.shape[2:]]
    spread = weight.new_zeros(*weight.shape[:2], *sizes)
    taps = spread
    for axis in range(2, weight.dim()):
        taps = taps.unfold(axis, 1, dilation).squeeze(-1)
    taps.copy_(weight)
    return spread
