"""One-way convolutions: kernels that are sums of products of vectors from the start, so with few weights.

Boukraichi, Akkari, Casenave, Ryckelynck: "A priori compression of convolutional neural networks for wave simulators",
Engineering Applications of Artificial Intelligence 2023, arXiv 2304.04964. The kernel of every output filter, channels
x height x width, is replaced before the training by one-way filters, a vector along each of its ways:
K[o,i,u,v] = sum_r channel[r,o,i] axis0[r,o,u] axis1[r,o,v]. No dense network is trained first. Ranks above 1 and the
other formats, for comparison, are this library's (see `convatlas.nn.conv.kernel_formats`). The factors are the
parameters ``original0``, ``original1``, ... of the weight.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from convatlas.errors import Unsupported, unknown
from convatlas.nn.conv.derived import DerivedConv, derive, originals
from convatlas.nn.conv.geometry import geometry
from convatlas.nn.conv.kernel_formats import FORMATS, KernelFormat, KernelPlan, Stage
from convatlas.report import Cell, Report, Section, Table
from convatlas.surgery import Selector, Surgery, swap
from convatlas.surgery.selection import predicate
from convatlas.weights import Layout

__all__ = [
    "ONE_WAY_LAYOUT",
    "Evaluation",
    "OneWayConv1d",
    "OneWayConv2d",
    "OneWayConv3d",
    "OneWayConvTranspose1d",
    "OneWayConvTranspose2d",
    "OneWayConvTranspose3d",
    "compress_a_priori",
    "compression_report",
    "decompose",
]

#: How a layer computes: with its kernel by one convolution, factor by factor, or whichever is faster.
Evaluation = Literal["auto", "dense", "sequential"]

#: The factors under their names in the paper's notation.
ONE_WAY_LAYOUT = Layout(
    renames=(
        (r"(^|\.)channel$", r"\1parametrizations.weight.original0"),
        *((rf"(^|\.)axis_?{axis}$", rf"\1parametrizations.weight.original{axis + 1}") for axis in range(3)),
    )
)

#: How many times fewer multiply-adds, and how many channels of a group, make the factors one by one faster on the CPU.
_FEWER_MACS, _CHANNELS = 6.0, 32


class _OneWay(DerivedConv):
    """What convolutions and transposed ones have in common."""

    layouts: ClassVar[Mapping[str, Layout]] = {"factors": ONE_WAY_LAYOUT}
    weight: Tensor
    bias: Tensor | None
    evaluation: Evaluation

    def _factorise(
        self,
        rank: int,
        format: str,  # noqa: A002
        evaluation: Evaluation,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        layer: Any = self
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {rank}")
        if format not in FORMATS:
            raise unknown("format", format, FORMATS)
        if evaluation not in get_args(Evaluation):
            raise unknown("evaluation", evaluation, get_args(Evaluation))
        if rank > 1 and math.prod(layer.kernel_size) == 1:
            warnings.warn("a kernel of one tap gains nothing by a rank above 1", stacklevel=4)
        sizes = (layer.in_channels, layer.out_channels, layer.groups, layer.kernel_size)
        factors = FORMATS[format](KernelPlan(*sizes, rank, layer.transposed))
        self.evaluation = evaluation
        derive(layer, factors, *(torch.empty(shape, device=device, dtype=dtype) for shape in factors.shapes()))
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.empty(layer.out_channels, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def kernel_format(self) -> KernelFormat:
        """The format of the kernel."""
        found: Any = self.get_submodule("parametrizations.weight.0")  # type: ignore[attr-defined]
        return found

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """The factors of the kernel, in the order that its format tells."""
        return originals(self)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Draw the factors anew so that the kernel has the variance of Kaiming's for ReLU, 2 / (in / groups * taps)."""
        if not is_parametrized(self):  # type: ignore[arg-type]
            return  # torch's constructor asks for it before there is something to draw
        for factor, variance in zip(self.factors, self.kernel_format.variances, strict=True):
            nn.init.normal_(factor, std=math.sqrt(variance))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def normalise_filters(self) -> None:
        """Give all filters the length 1 and the first factor what they had; the kernel stays.

        Between the steps of a training it keeps the gradients of the factors on one scale.
        """
        for factor, value in zip(self.factors, self.kernel_format.unit_filters(*self.factors), strict=True):
            factor.copy_(value)

    def sequential(self, x: Tensor) -> bool:
        """Whether an input (B, in_channels, *positions) is convolved factor by factor instead of with the kernel."""
        layer: Any = self
        if self.evaluation != "auto":
            return self.evaluation == "sequential"
        inputs = layer.in_channels // layer.groups
        dense = inputs * layer.out_channels * math.prod(layer.kernel_size)
        few = dense >= _FEWER_MACS * self.kernel_format.macs and inputs >= _CHANNELS
        return few and max(layer.stride) == 1 and x.device.type == "cpu"

    def _bias_in(self, stage: Stage, stages: Sequence[Stage]) -> Tensor | None:
        return self.bias if stage is stages[-1] and stage.sums == 1 else None

    def _summed(self, x: Tensor, stage: Stage) -> Tensor:
        """Add up the terms behind the last stage of a format that has them apart."""
        if stage.sums == 1:
            return x
        x = x.unflatten(1, (-1, stage.sums)).sum(2)
        return x if self.bias is None else x + self.bias.view(-1, *(1 for _ in x.shape[2:]))

    def extra_repr(self) -> str:
        """Show format and rank behind what torch shows."""
        name = next(name for name, kind in FORMATS.items() if kind is type(self.kernel_format))
        return f"{super().extra_repr()}, rank={self.kernel_format.plan.rank}, format={name}"  # type: ignore[misc]


class _OneWayConv(_OneWay):
    """Body of the convolutions."""

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
        rank: int = 1,
        format: str = "oneway",  # noqa: A002
        evaluation: Evaluation = "auto",
    ) -> None:
        place = (stride, padding, dilation, groups, bias, padding_mode, "meta", dtype)
        super().__init__(in_channels, out_channels, kernel_size, *place)  # type: ignore[call-arg]
        self._factorise(rank, format, evaluation, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, in_channels, *positions) as torch's convolution does with the kernel."""
        layer: Any = self
        if not self.sequential(x):
            return layer._conv_forward(x, self.weight, self.bias)
        dims, padding = len(layer.kernel_size), layer.padding
        convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = (0,) * dims
        stages = self.kernel_format.stages(*self.factors)
        for stage in stages:
            own = [axis in stage.axes for axis in range(dims)]
            x = convolve(
                x,
                stage.weight,
                self._bias_in(stage, stages),
                _on(own, layer.stride, 1),
                padding if isinstance(padding, str) else _on(own, padding, 0),
                _on(own, layer.dilation, 1),
                stage.groups,
            )
            x = self._summed(x, stage)
        return x


class OneWayConv1d(_OneWayConv, nn.Conv1d):
    """Convolution of a signal with a kernel of low rank; see `OneWayConv2d` for the arguments."""


class OneWayConv2d(_OneWayConv, nn.Conv2d):
    """Convolution of an image with a kernel that is a sum of products of one-way filters.

    Has rank * out * (in / groups + k_h + k_w) parameters and a bias, a dense kernel out * in / groups * k_h * k_w.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch's convolution takes them.
        rank: number of terms R.
        format: ``oneway``; or for comparison ``separable`` (depthwise separable), ``cp_shared`` or ``tucker2``, see
            `convatlas.nn.conv.kernel_formats`.
        evaluation: ``dense`` makes the kernel and convolves once; ``sequential`` convolves factor by factor, with fewer
            operations; ``auto`` takes what is faster. All give the same up to rounding.

    Raises:
        ValueError: rank is smaller than 1.
        UnknownName: there is no such format or evaluation.
    """


class OneWayConv3d(_OneWayConv, nn.Conv3d):
    """Convolution of a volume with a kernel of low rank; see `OneWayConv2d` for the arguments."""


class _OneWayConvTranspose(_OneWay):
    """Body of the transposed convolutions."""

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
        rank: int = 1,
        format: str = "oneway",  # noqa: A002
        evaluation: Evaluation = "auto",
    ) -> None:
        place = (stride, padding, output_padding, groups, bias, dilation, padding_mode, "meta", dtype)
        super().__init__(in_channels, out_channels, kernel_size, *place)  # type: ignore[call-arg]
        self._factorise(rank, format, evaluation, device, dtype)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve (B, in_channels, *positions) as torch's transposed convolution does with the kernel."""
        layer: Any = self
        if not self.sequential(x):
            return super().forward(x, output_size)  # type: ignore[misc]
        dims = len(layer.kernel_size)
        place = (layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation)
        output_padding = layer._output_padding(x, output_size, *place)
        plain = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        stages = self.kernel_format.stages(*self.factors)
        for stage in stages:
            bias = self._bias_in(stage, stages)
            if not stage.axes:
                x = plain(x, stage.weight, bias, groups=stage.groups)
                continue
            own = [axis in stage.axes for axis in range(dims)]
            x = transposed(
                x,
                stage.weight.unflatten(0, (stage.groups, -1)).transpose(1, 2).flatten(0, 1),
                bias,
                _on(own, layer.stride, 1),
                _on(own, layer.padding, 0),
                _on(own, output_padding, 0),
                stage.groups,
                _on(own, layer.dilation, 1),
            )
            x = self._summed(x, stage)
        return x


class OneWayConvTranspose1d(_OneWayConvTranspose, nn.ConvTranspose1d):
    """Transposed convolution of a signal with a kernel of low rank; see `OneWayConvTranspose2d`."""


class OneWayConvTranspose2d(_OneWayConvTranspose, nn.ConvTranspose2d):
    """Transposed convolution of an image with K[i,o,u,v] = sum_r channel[r,o,i] axis0[r,o,u] axis1[r,o,v].

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as torch's transposed convolution takes them.
        output_padding, groups, bias, dilation, padding_mode, device, dtype: the same.
        rank, format, evaluation: as `OneWayConv2d` takes them.

    Raises:
        ValueError: rank is smaller than 1.
        UnknownName: there is no such format or evaluation.
    """


class OneWayConvTranspose3d(_OneWayConvTranspose, nn.ConvTranspose3d):
    """Transposed convolution of a volume with a kernel of low rank; see `OneWayConvTranspose2d`."""


def _on(own: Sequence[bool], values: Sequence[int], otherwise: int) -> list[int]:
    """The values of a stage's own axes, another one for the others."""
    return [value if mine else otherwise for mine, value in zip(own, values, strict=True)]


# -- whole models ------------------------------------------------------------------------------------------------------

_LAYERS: dict[type[nn.Module], Any] = {
    nn.Conv1d: OneWayConv1d,
    nn.Conv2d: OneWayConv2d,
    nn.Conv3d: OneWayConv3d,
    nn.ConvTranspose1d: OneWayConvTranspose1d,
    nn.ConvTranspose2d: OneWayConvTranspose2d,
    nn.ConvTranspose3d: OneWayConvTranspose3d,
}
_KINDS = tuple(_LAYERS)


def compress_a_priori(
    model: nn.Module,
    rank: int = 1,
    *,
    format: str = "oneway",  # noqa: A002
    evaluation: Evaluation = "auto",
    skip: Selector | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    inplace: bool = False,
) -> Surgery:
    """Replace the convolutions of an untrained model by one-way convolutions with fresh weights.

    Convolutions of one tap, and those that would not get fewer weights, stay; the result names them.

    Args:
        model: any model; left as it is.
        rank, format, evaluation: of the layers, as `OneWayConv2d` takes them.
        skip: layers that stay as they are, e.g. a pattern of names such as ``"stem*"``.
        example_input, inplace: as `convatlas.surgery.swap` takes them.

    Raises:
        ValueError: rank is smaller than 1.
        Unsupported: nothing was replaced.
    """
    return _compress(model, skip, example_input, inplace, trained=False, options=_options(rank, format, evaluation))


def decompose(
    model: nn.Module,
    rank: int = 1,
    *,
    format: str = "oneway",  # noqa: A002
    evaluation: Evaluation = "auto",
    skip: Selector | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    inplace: bool = False,
) -> Surgery:
    """Replace the convolutions of a trained model by the one-way convolutions nearest to them: the usual way round.

    The factors are found by a higher-order singular value decomposition and alternating least squares; they are exact
    where the kernels have that rank. What the model computes changes else; it needs fine-tuning.

    Args:
        model: any model; left as it is.
        rank, format, evaluation, skip, example_input, inplace: as `compress_a_priori` takes them.

    Raises:
        ValueError: rank is smaller than 1.
        Unsupported: nothing was replaced.
    """
    return _compress(model, skip, example_input, inplace, trained=True, options=_options(rank, format, evaluation))


def _options(rank: int, format: str, evaluation: Evaluation) -> dict[str, Any]:  # noqa: A002
    OneWayConv1d(1, 1, 2, rank=rank, format=format, evaluation=evaluation, device="meta")  # refuses bad ones once
    return {"rank": rank, "format": format, "evaluation": evaluation}


def _compress(
    model: nn.Module,
    skip: Selector | None,
    example_input: Tensor | tuple[Any, ...] | None,
    inplace: bool,
    *,
    trained: bool,
    options: Mapping[str, Any],
) -> Surgery:
    skipped = (lambda name, module: False) if skip is None else predicate(skip)

    def replacement(module: nn.Module) -> nn.Module:
        conv: Any = module
        if is_parametrized(conv):
            raise Unsupported("its weight is computed from others already")
        dims, transposed = len(conv.kernel_size), bool(conv.transposed)
        if math.prod(conv.kernel_size) == 1:
            raise Unsupported("its kernel has one tap")
        kind = next(kind for kind in _KINDS if isinstance(conv, kind))
        arguments = geometry(conv, dims, transposed=transposed)
        plan = KernelPlan(
            conv.in_channels, conv.out_channels, conv.groups, conv.kernel_size, options["rank"], transposed
        )
        count = sum(math.prod(shape) for shape in FORMATS[options["format"]](plan).shapes())
        if count >= conv.weight.numel():
            raise Unsupported(f"it would have {count:,} weights instead of {conv.weight.numel():,}")
        layer: nn.Module
        layer = _LAYERS[kind].from_conv(conv, **options) if trained else _LAYERS[kind](**arguments, **options)
        return layer

    return swap(
        model,
        _KINDS,
        replacement,
        where=lambda name, module: not skipped(name, module),
        example_input=example_input,
        inplace=inplace,
    )


def compression_report(model: nn.Module, original: nn.Module | None = None) -> Report:
    """What the one-way convolutions of a model save: weights and operations, and how far they are from others.

    Args:
        model: has such layers.
        original: a model with plain convolutions under the same names, with which the kernels are compared.

    Raises:
        Unsupported: the model has no such layer.
    """
    rows: list[list[Cell]] = []
    weights = dense = 0
    for name, module in model.named_modules():
        if not isinstance(module, _OneWay):
            continue
        layer: Any = module
        whole = layer.weight.numel()
        own = sum(factor.numel() for factor in layer.factors)
        weights, dense = weights + own, dense + whole
        shape = " x ".join(map(str, layer.kernel_size))
        row: list[Cell] = [name or "the model itself", shape, own, whole, whole / own, whole / layer.kernel_format.macs]
        if original is not None:
            with torch.no_grad():
                other: Any = original.get_submodule(name)
                row.append(float((layer.weight - other.weight).norm() / other.weight.norm()))
        rows.append(row)
    if not rows:
        raise Unsupported(f"this {type(model).__name__} has no one-way convolution")
    every = sum(parameter.numel() for parameter in model.parameters())
    without = every - weights + dense
    columns = ["layer", "kernel", "weights", "of the dense kernel", "times fewer", "times fewer multiply-adds"]
    if original is not None:
        columns.append("relative error")
    caption = "Multiply-adds factor by factor with stride 1; the dense evaluation has those of the dense kernel."
    totals: list[list[Cell]] = [
        ["weights of these layers", weights, dense, dense / weights],
        ["parameters of the model", every, without, without / every],
        ["training memory of parameters, gradients and Adam [MiB]", *(16 * n / 2**20 for n in (every, without)), None],
    ]
    total = Table("Altogether", ["", "here", "with dense kernels", "times fewer"], totals, "In float32.")
    summary = f"{len(rows)} one-way layers have {dense / weights:.2f} times fewer weights than dense ones."
    return Report(
        f"Compression of {type(model).__name__}",
        summary,
        [Section("Altogether", [total]), Section("Layers", [Table("Layers", columns, rows, caption)])],
    )
