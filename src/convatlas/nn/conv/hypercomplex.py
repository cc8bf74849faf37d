"""Hypercomplex layers: convolutions and linear layers on numbers with n components, with 1/n of the parameters.

Grassucci, Zhang, Comminiello: "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions", IEEE
TNNLS 2022, arXiv 2110.04176. The channels of a group are n blocks, which hold the first, second, ... components of its
numbers. The weight is H = sum_i A_i (x) F_i (see `convatlas.ops.hypercomplex`): the matrices A say how numbers are
multiplied and are learned, the filters F are n times smaller than H. The parameters are ``original0`` = A (n, n, n) and
``original1`` = F, kept as (out, in / n / groups, *kernel): its n parts lie one behind another, so that it has as many
axes as any weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from convatlas.errors import Unsupported
from convatlas.nn.conv.derived import DerivedConv, copy_weights, derive, originals
from convatlas.ops.hypercomplex import hypercomplex_algebra, hypercomplex_filters, nearest_kronecker_sum, ph_weight
from convatlas.surgery import Selector, Surgery, swap
from convatlas.surgery.selection import predicate
from convatlas.weights import Layout

__all__ = [
    "PHNN_LAYOUT",
    "Algebra",
    "FixedAlgebra",
    "KroneckerSum",
    "PHConv1d",
    "PHConv2d",
    "PHConv3d",
    "PHConvTranspose1d",
    "PHConvTranspose2d",
    "PHConvTranspose3d",
    "PHLinear",
    "QuaternionConv1d",
    "QuaternionConv2d",
    "QuaternionConv3d",
    "algebra_l1",
    "convert_to_hypercomplex",
]

#: Rules of multiplication: ``learned``, or fixed by a name that `hypercomplex_algebra` knows or by its A (n, n, n).
Algebra = str | Tensor

_ORIGINAL = r"\1parametrizations.weight.original"


def _in_our_shape(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Put the n parts of the filters one behind another; r, i, j and k of a quaternion layer as well."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        layer = key.rpartition(".")[0]
        if key.endswith("original1"):
            value = value.flatten(0, 1)
        elif key.endswith("original.r"):
            key, value = layer, torch.cat([state[f"{layer}.{part}"] for part in "rijk"])
        elif key.endswith(("original.i", "original.j", "original.k")):
            continue
        result[key] = value
    return result


#: How the keys of the authors' layers map to ours, wherever in a network they stand.
PHNN_LAYOUT = Layout(
    renames=(
        (r"(^|\.)[Aa]$", f"{_ORIGINAL}0"),
        (r"(^|\.)[Fs]$", f"{_ORIGINAL}1"),
        (r"(^|\.)([rijk])_weight$", rf"{_ORIGINAL}.\2"),
    ),
    function=_in_our_shape,
)


class KroneckerSum(nn.Module):
    """Parametrization of a weight by A and F; its inverse finds the nearest sum of Kronecker products.

    Args:
        n: number of components.
        groups: of a grouped convolution.
        transposed: whether the weight is that of a transposed convolution, (in, out / groups, *kernel).
    """

    def __init__(self, n: int, groups: int = 1, *, transposed: bool = False) -> None:
        super().__init__()
        self.n = n
        self.groups = groups
        self.transposed = transposed

    def forward(self, algebra: Tensor, filters: Tensor) -> Tensor:
        """H of A (n, n, n) and F (out, in / n / groups, *kernel)."""
        weight = ph_weight(algebra, filters.unflatten(0, (self.n, -1)), self.groups)
        return self._turned(weight) if self.transposed else weight

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """A and F of the nearest H."""
        weight = self._turned(weight) if self.transposed else weight
        algebra, filters = nearest_kronecker_sum(weight, self.n, self.groups)
        return algebra, filters.flatten(0, 1)

    def _turned(self, weight: Tensor) -> Tensor:
        """From (out, in / groups, ...) to (in, out / groups, ...), or back."""
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def extra_repr(self) -> str:
        """Show the number of components."""
        return f"n={self.n}"


class FixedAlgebra(KroneckerSum):
    """Parametrization of a weight by F alone, with a given A.

    Args:
        algebra: A (n, n, n), not trained and not in the state dict.
        groups: of a grouped convolution.
        transposed: whether the weight is that of a transposed convolution, (in, out / groups, *kernel).
    """

    algebra: Tensor

    def __init__(self, algebra: Tensor, groups: int = 1, *, transposed: bool = False) -> None:
        super().__init__(len(algebra), groups, transposed=transposed)
        self.register_buffer("algebra", algebra, persistent=False)

    def forward(self, filters: Tensor) -> Tensor:  # type: ignore[override]
        """H of F (out, in / n / groups, *kernel)."""
        return super().forward(self.algebra, filters)

    def right_inverse(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        """F of the nearest H."""
        weight = self._turned(weight) if self.transposed else weight
        return hypercomplex_filters(weight, self.algebra, self.groups).flatten(0, 1)


def _derive(
    layer: nn.Module,
    sizes: Mapping[str, int],
    kernel: tuple[int, ...] = (),
    groups: int = 1,
    *,
    n: int,
    algebra: Algebra,
    transposed: bool = False,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Make the weight of a layer of torch hypercomplex; ``sizes`` are its input and output channels by name."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    for name, size in sizes.items():
        if size // groups % n:
            raise ValueError(f"{name}{' / groups' * (groups > 1)} ({size // groups}) must be divisible by n ({n})")
    inputs, outputs = sizes.values()
    filters = torch.empty(outputs, inputs // groups // n, *kernel, device=device, dtype=dtype)
    if isinstance(algebra, str) and algebra == "learned":
        learned = torch.empty(n, n, n, device=device, dtype=dtype)
        derive(layer, KroneckerSum(n, groups, transposed=transposed), learned, filters)
    else:
        fixed = hypercomplex_algebra(algebra) if isinstance(algebra, str) else algebra
        if fixed.shape != (n, n, n):
            given = repr(algebra) if isinstance(algebra, str) else tuple(algebra.shape)
            raise ValueError(f"algebra must have n = {n} components, got {given}")
        fixed = fixed.to(filters.device, filters.dtype)
        derive(layer, FixedAlgebra(fixed, groups, transposed=transposed), filters)
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype))
    layer.reset_parameters()  # type: ignore[operator]


def _reset(layer: nn.Module) -> None:
    """Draw A and F uniformly by Glorot's bound, each from its own sizes as the authors do, and the bias as torch."""
    if not is_parametrized(layer):
        return  # torch's constructor asks for it before there is something to draw
    kronecker: Any = layer.get_submodule("parametrizations.weight.0")
    *learned, filters = originals(layer)
    n = int(kronecker.n)
    outputs, inputs, area = len(filters) // kronecker.groups, filters.shape[1], math.prod(filters.shape[2:])
    # An element of H is a sum of n products or, with a fixed algebra, one element of F.
    fans = (outputs // n + n) * inputs * area if learned else (outputs + n * inputs) * area
    nn.init.uniform_(filters, -math.sqrt(6 / fans), math.sqrt(6 / fans))
    for algebra in learned:
        nn.init.uniform_(algebra, -math.sqrt(3) / n, math.sqrt(3) / n)
    if isinstance(layer.bias, Tensor):
        nn.init.uniform_(layer.bias, -1 / math.sqrt(n * inputs), 1 / math.sqrt(n * inputs))


class _PHConv(DerivedConv):
    """Body of the convolutions."""

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": PHNN_LAYOUT}
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        n: int,
        algebra: Algebra = "learned",
        unused_bias: bool = False,
    ) -> None:
        place = (stride, padding, dilation, groups, bias, padding_mode, "meta", dtype)
        super().__init__(in_channels, out_channels, kernel_size, *place)  # type: ignore[call-arg]
        sizes = {"in_channels": in_channels, "out_channels": out_channels}
        layer: Any = self
        _derive(layer, sizes, layer.kernel_size, groups, n=n, algebra=algebra, device=device, dtype=dtype)
        self.unused_bias = unused_bias
        if unused_bias and self.bias is not None:
            self.bias.requires_grad_(False)

    @classmethod
    def from_conv(cls, conv: nn.Module, **options: Any) -> Self:
        """A layer with the geometry and bias of a convolution, and the weight nearest to its own.

        Args:
            conv: the convolution of torch with as many position axes.
            **options: of the layer, at least ``n``.

        Raises:
            Unsupported: it is something else, n does not divide the channels of its groups, or its bias would be lost.
        """
        if options.get("unused_bias"):
            raise Unsupported("unused_bias must be off, or the bias of the convolution would be lost")
        return super().from_conv(conv, **options)

    def to_conv(self) -> Any:
        """The plain convolution that computes the same."""
        conv = super().to_conv()
        if self.unused_bias:
            conv.bias = None
        return conv

    def reset_parameters(self) -> None:
        """Draw A, F and the bias anew."""
        _reset(self)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, in_channels, *positions) as torch's convolution does with the weight H."""
        layer: Any = self
        return layer._conv_forward(x, self.weight, None if self.unused_bias else self.bias)


class PHConv1d(_PHConv, nn.Conv1d):
    """Convolution of a signal by a sum of n Kronecker products; see `PHConv2d` for the arguments."""


class PHConv2d(_PHConv, nn.Conv2d):
    """Convolution of an image by a sum of n Kronecker products: the paper's PHC layer.

    Has n^3 + out * in / groups * k^2 / n parameters and a bias.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch's convolution takes them.
        n: number of components of the numbers, which divides the channels of a group; with 1 nothing is saved.
        algebra: ``learned``, or fixed: ``complex`` (n = 2), ``quaternion`` (4), ``octonion`` (8) or a tensor (n, n, n).
        unused_bias: hold a bias that is never added and not trained, as the authors' code does, to read its files.

    Raises:
        ValueError: n is smaller than 1, does not divide the channels or is not that of the algebra.
        UnknownName: there is no such algebra.
    """


class PHConv3d(_PHConv, nn.Conv3d):
    """Convolution of a volume by a sum of n Kronecker products; see `PHConv2d` for the arguments."""


class _PHConvTranspose(DerivedConv):
    """Body of the transposed convolutions."""

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": PHNN_LAYOUT}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        n: int,
        algebra: Algebra = "learned",
    ) -> None:
        place = (stride, padding, output_padding, groups, bias, dilation, padding_mode, "meta", dtype)
        super().__init__(in_channels, out_channels, kernel_size, *place)  # type: ignore[call-arg]
        sizes = {"in_channels": in_channels, "out_channels": out_channels}
        layer: Any = self
        kernel, factory = layer.kernel_size, {"device": device, "dtype": dtype}
        _derive(layer, sizes, kernel, groups, n=n, algebra=algebra, transposed=True, **factory)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Draw A, F and the bias anew."""
        _reset(self)  # type: ignore[arg-type]


class PHConvTranspose1d(_PHConvTranspose, nn.ConvTranspose1d):
    """Transposed convolution of a signal by a sum of n Kronecker products; see `PHConvTranspose2d`."""


class PHConvTranspose2d(_PHConvTranspose, nn.ConvTranspose2d):
    """Transposed convolution of an image by a sum of n Kronecker products.

    Between the channels of each tap stands the transpose of a `PHConv2d` weight (in / groups, out), so that numbers are
    multiplied from the same side.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as torch's transposed convolution takes them.
        output_padding, groups, bias, dilation, padding_mode, device, dtype: the same.
        n, algebra: as `PHConv2d` takes them.

    Raises:
        ValueError: n is smaller than 1, does not divide the channels or is not that of the algebra.
        UnknownName: there is no such algebra.
    """


class PHConvTranspose3d(_PHConvTranspose, nn.ConvTranspose3d):
    """Transposed convolution of a volume by a sum of n Kronecker products; see `PHConvTranspose2d`."""


class _QuaternionConv(_PHConv):
    """Body of the quaternion convolutions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        place = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *place, n=4, algebra="quaternion")


class QuaternionConv1d(_QuaternionConv, nn.Conv1d):
    """Convolution of a signal of quaternions; see `QuaternionConv2d`."""


class QuaternionConv2d(_QuaternionConv, nn.Conv2d):
    """Convolution of an image of quaternions by quaternions, with Hamilton's rules: `PHConv2d` with a fixed algebra.

    The first quarter of the channels holds the real parts, then come those of i, j and k. The filters are the r, i, j
    and k parts of the authors' layer, one behind another.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch's convolution takes them.

    Raises:
        ValueError: 4 does not divide the channels.
    """


class QuaternionConv3d(_QuaternionConv, nn.Conv3d):
    """Convolution of a volume of quaternions; see `QuaternionConv2d`."""


class PHLinear(nn.Linear):
    """Linear layer whose weight is a sum of n Kronecker products: the paper's PHM layer.

    Args:
        in_features, out_features, bias, device, dtype: as torch's linear layer takes them.
        n, algebra: as `PHConv2d` takes them.

    Raises:
        ValueError: n is smaller than 1, does not divide the features or is not that of the algebra.
        UnknownName: there is no such algebra.
    """

    layouts: ClassVar[Mapping[str, Layout]] = {"authors": PHNN_LAYOUT}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        n: int,
        algebra: Algebra = "learned",
    ) -> None:
        super().__init__(in_features, out_features, bias, "meta", dtype)
        sizes = {"in_features": in_features, "out_features": out_features}
        _derive(self, sizes, n=n, algebra=algebra, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Module, **options: Any) -> Self:
        """A layer with the bias of a linear layer and the weight nearest to its own.

        Args:
            linear: a `torch.nn.Linear`.
            **options: of the layer, at least ``n``.

        Raises:
            Unsupported: it is something else, or n does not divide its features.
        """
        if type(linear) is not nn.Linear:
            raise Unsupported(f"it must be a Linear, got {type(linear).__name__}")
        options |= {"bias": linear.bias is not None, "device": linear.weight.device, "dtype": linear.weight.dtype}
        try:
            layer = cls(linear.in_features, linear.out_features, **options)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        copy_weights(layer, linear)
        return layer

    def merged(self) -> nn.Linear:
        """The plain linear layer that computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach().clone())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return linear.train(self.training)

    def reset_parameters(self) -> None:
        """Draw A, F and the bias anew."""
        _reset(self)


_HYPERCOMPLEX: dict[type[nn.Module], Any] = {
    nn.Conv1d: PHConv1d.from_conv,
    nn.Conv2d: PHConv2d.from_conv,
    nn.Conv3d: PHConv3d.from_conv,
    nn.ConvTranspose1d: PHConvTranspose1d.from_conv,
    nn.ConvTranspose2d: PHConvTranspose2d.from_conv,
    nn.ConvTranspose3d: PHConvTranspose3d.from_conv,
    nn.Linear: PHLinear.from_linear,
}


def convert_to_hypercomplex(
    model: nn.Module,
    n: int,
    *,
    algebra: Algebra = "learned",
    skip: Selector | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    inplace: bool = False,
) -> Surgery:
    """Replace the convolutions and linear layers of a model by hypercomplex ones with the nearest weights.

    What a trained model computes changes with its weights; it needs fine-tuning. Layers whose channels n does not
    divide stay, such as the one that reads RGB for n = 4; the result names them.

    Args:
        model: any model; left as it is.
        n: number of components.
        algebra: ``learned``, or fixed, as `PHConv2d` takes it.
        skip: layers that stay as they are, e.g. a pattern of names such as ``"head*"``.
        example_input, inplace: as `convatlas.surgery.swap` takes them.

    Raises:
        ValueError: n is smaller than 1, or another argument is of a wrong kind.
        Unsupported: nothing was replaced.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    skipped = (lambda name, module: False) if skip is None else predicate(skip)

    def hypercomplex(module: nn.Module) -> nn.Module:
        if is_parametrized(module):
            raise Unsupported("its weight is computed from others already")
        kind = next(kind for kind in _HYPERCOMPLEX if isinstance(module, kind))
        return _HYPERCOMPLEX[kind](module, n=n, algebra=algebra)

    return swap(
        model,
        tuple(_HYPERCOMPLEX),
        hypercomplex,
        where=lambda name, module: not skipped(name, module),
        example_input=example_input,
        inplace=inplace,
    )


def algebra_l1(model: nn.Module) -> Tensor:
    """Sum of the absolute values of every learned A in a model, by which the authors' loss may be extended (x 0.001).

    Raises:
        Unsupported: the model has no layer with a learned algebra.
    """
    algebras = [
        part.get_parameter("original0")
        for part in model.modules()
        if isinstance(part, nn.utils.parametrize.ParametrizationList) and type(part[0]) is KroneckerSum
    ]
    if not algebras:
        raise Unsupported(f"this {type(model).__name__} has no layer with a learned algebra")
    return torch.stack([algebra.abs().sum() for algebra in algebras]).sum()
