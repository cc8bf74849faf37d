"""Weighted convolution: the taps of a kernel count by their distance to its centre.

Cammarasana, Patane: "Optimal Weighted Convolution for Classification and Denosing", 2025, arXiv 2505.24558, and
"Optimal Density Functions for Weighted Convolution in Learning Models", 2025, arXiv 2505.24527. The kernel is W * Phi
with a fixed density Phi, the outer product of alpha = (d_1, ..., d_r, 1, d_r, ..., d_1) over the axes; d_1 belongs to
the outermost neighbour. W is trained, so that the gradient by W is Phi times that by the kernel: a preconditioning, not
another class of functions. Weight decay acts on W, and the first kernels are smaller by Phi (see ``rescale_init``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from convatlas.errors import Unsupported
from convatlas.nn.conv.derived import DerivedConv, derive, originals
from convatlas.surgery import Selector, Surgery, swap
from convatlas.surgery.selection import predicate
from convatlas.weights import Layout

__all__ = [
    "BEST_DENSITIES",
    "Density",
    "DensityWeight",
    "TunedDensity",
    "WeightedConv1d",
    "WeightedConv2d",
    "WeightedConv3d",
    "WeightedConvTranspose1d",
    "WeightedConvTranspose2d",
    "WeightedConvTranspose3d",
    "apply_weighted_conv",
    "bake",
    "density_kernel",
    "density_param_groups",
    "radial_energy",
    "tune_density",
]

#: Density values, the outermost first: for all axes of a kernel; for each axis; or by kernel size.
Density = Sequence[float] | Sequence[Sequence[float]] | Mapping[int, Sequence[float]]

#: Values that the papers found best, by kernel size; those of 7 are for denoising.
BEST_DENSITIES: dict[int, tuple[float, ...]] = {1: (), 3: (0.7,), 5: (0.2, 0.8), 7: (0.25, 0.15, 0.55)}

_PARAMETRIZATION = "parametrizations.weight"


def density_kernel(density: Sequence[float] | Tensor, ndim: int) -> Tensor:
    """Phi (k, ..., k) of the density values of one axis, for as many axes; differentiable."""
    values = torch.as_tensor(density, dtype=None if isinstance(density, Tensor) else torch.get_default_dtype())
    return _outer([_alpha(values)] * ndim)


def _alpha(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_ones(1), values.flip(0)])


def _outer(alphas: Sequence[Tensor]) -> Tensor:
    phi = alphas[0]
    for alpha in alphas[1:]:
        phi = phi[..., None] * alpha
    return phi


class DensityWeight(nn.Module):
    """Parametrization of a weight by W: W * Phi.

    Args:
        density: values of each axis, the outermost first.
        trainable: whether they are trained. Axes of equal values share them.
        device, dtype: of the values.
    """

    density: Tensor

    def __init__(
        self,
        density: Sequence[Sequence[float]],
        *,
        trainable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # Sorted out once: most kernels have one set of values for all their axes.
        distinct = list(dict.fromkeys(tuple(values) for values in density))
        self.lengths = tuple(len(values) for values in distinct)
        self.axes = tuple(distinct.index(tuple(values)) for values in density)
        values = torch.tensor([value for each in distinct for value in each], device=device, dtype=dtype)
        if trainable:
            self.density = nn.Parameter(values)
        else:
            self.register_buffer("density", values)

    def phi(self) -> Tensor:
        """Phi, of the shape of a kernel."""
        alphas = [_alpha(values) for values in self.density.split(self.lengths)]
        return _outer([alphas[axis] for axis in self.axes])

    def forward(self, weight: Tensor) -> Tensor:
        """W * Phi of W (out, in, *kernel)."""
        return weight * self.phi().to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """W of a kernel.

        Raises:
            Unsupported: a density value is zero.
        """
        if bool((self.density == 0).any()):
            raise Unsupported("density holds a zero, so that no W gives the kernel: use other values")
        return weight / self.phi().to(weight.dtype)

    def extra_repr(self) -> str:
        """Show the values."""
        shown = [f"{value:g}" for value in self.density.tolist()] if not self.density.is_meta else []
        return f"density=({', '.join(shown)}), trainable={isinstance(self.density, nn.Parameter)}"


def _per_axis(density: Density, kernel_size: tuple[int, ...]) -> list[tuple[float, ...]]:
    """The values of each axis of a kernel."""
    if any(size % 2 == 0 for size in kernel_size):
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    each: list[Any]
    if isinstance(density, Mapping):
        missing = sorted({size for size in kernel_size if size not in density and size > 1})
        if missing:
            raise ValueError(f"density must hold values for a kernel of size {missing[0]}, it has {sorted(density)}")
        each = [density.get(size, ()) for size in kernel_size]
    elif any(isinstance(values, Sequence) for values in density):
        each = list(density)
    elif len(set(kernel_size)) > 1:
        raise ValueError(f"density must be given for each axis of a kernel of {kernel_size}, got {tuple(density)}")
    else:
        each = [density] * len(kernel_size)
    if len(each) != len(kernel_size):
        raise ValueError(f"density must be given for each of {len(kernel_size)} axes, got {len(each)}")
    for values, size in zip(each, kernel_size, strict=True):
        if len(values) != size // 2:
            needed = "1 density value" if size == 3 else f"{size // 2} density values"
            raise ValueError(f"a kernel of size {size} needs {needed}, outermost first, got {tuple(values)}")
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"density must be finite, got {tuple(values)}")
    return [tuple(map(float, values)) for values in each]


def _authors_layout() -> Layout:
    def function(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        result = {}
        for key, value in state.items():
            if key.endswith(".alfa") or key == "alfa":
                # Outermost first, up to the one in the middle.
                result[f"{key.removesuffix('alfa')}{_PARAMETRIZATION}.0.density"] = value[: len(value) // 2]
            elif not (key.endswith(".Phi") or key == "Phi"):
                result[key] = value
        weighted = {key.removesuffix(".density") for key in result if key.endswith(f"{_PARAMETRIZATION}.0.density")}
        for place in weighted:
            layer = place.removesuffix(f"{_PARAMETRIZATION}.0")
            result[f"{layer}{_PARAMETRIZATION}.original"] = result.pop(f"{layer}weight")
        return result

    return Layout(renames=((r"(^|\.)den$", rf"\1{_PARAMETRIZATION}.0.density"),), function=function)


class _Weighted(DerivedConv):
    """What all weighted layers share; the density is on the state dict beside W."""

    #: The authors' keys: ``weight`` and ``bias`` with the buffers ``alfa`` and ``Phi``, or with the parameter ``den``.
    layouts: ClassVar[Mapping[str, Layout]] = {"authors": _authors_layout()}

    def _weigh(
        self,
        kernel_size: tuple[int, ...],
        shape: tuple[int, ...],
        density: Density,
        trainable: bool,
        rescale_init: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        values = _per_axis(density, kernel_size)
        place: Any = {"device": device, "dtype": dtype}
        derive(self, DensityWeight(values, trainable=trainable, **place), torch.empty(shape, **place))  # type: ignore[arg-type]
        layer: Any = self
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.empty(layer.out_channels, **place))
        self.rescale_init = rescale_init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W anew: Kaiming normal of the outputs, for ReLU; the bias is zero."""
        layer: Any = self
        if not is_parametrized(layer):  # called by torch's constructor
            return
        (weight,) = originals(layer)
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        with torch.no_grad():
            if self.rescale_init:
                phi = layer.parametrizations.weight[0].phi()
                weight.mul_((phi.numel() / phi.square().sum()).sqrt())
            if layer.bias is not None:
                layer.bias.zero_()

    @property
    def phi(self) -> Tensor:
        """Phi, of the shape of a kernel."""
        layer: Any = self
        phi: Tensor = layer.parametrizations.weight[0].phi()
        return phi


class _WeightedConv(_Weighted):
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
        density: Density,
        trainable_density: bool = False,
        rescale_init: bool = False,
    ) -> None:
        place = (stride, padding, dilation, groups, bias, padding_mode, "meta", dtype)
        super().__init__(in_channels, out_channels, kernel_size, *place)  # type: ignore[call-arg]
        layer: Any = self
        shape = tuple(layer.weight.shape)
        self._weigh(layer.kernel_size, shape, density, trainable_density, rescale_init, device, dtype)

    @classmethod
    def as_published(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        den: Sequence[float],
        *,
        padding: int = 1,
        bias: bool = False,
        **options: Any,
    ) -> Self:
        """A layer with the defaults of the authors' code: a padding of 1 whatever the kernel, and no bias."""
        return cls(in_channels, out_channels, kernel_size, padding=padding, bias=bias, density=den, **options)


class WeightedConv1d(_WeightedConv, nn.Conv1d):
    """Convolution of a signal with a density; see `WeightedConv2d` for the arguments."""


class WeightedConv2d(_WeightedConv, nn.Conv2d):
    """Convolution of an image with the kernel W * Phi, as fast as a plain one and without further parameters.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            torch's convolution takes them; kernels must be odd.
        density: values of the (k - 1) / 2 neighbours, the outermost first, for all axes, for each axis, or by kernel
            size; see `BEST_DENSITIES`.
        trainable_density: whether they are trained with the weights.
        rescale_init: draw the first W larger, so that the kernels have the variance of those of a plain convolution;
            tells the effect of the density from that of a smaller start.

    Raises:
        ValueError: the kernel is even, or there are not as many values as neighbours.
    """


class WeightedConv3d(_WeightedConv, nn.Conv3d):
    """Convolution of a volume with a density; see `WeightedConv2d` for the arguments."""


class _WeightedConvTranspose(_Weighted):
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
        density: Density,
        trainable_density: bool = False,
        rescale_init: bool = False,
    ) -> None:
        place = (stride, padding, output_padding, groups, bias, dilation, padding_mode, "meta", dtype)
        super().__init__(in_channels, out_channels, kernel_size, *place)  # type: ignore[call-arg]
        layer: Any = self
        shape = tuple(layer.weight.shape)
        self._weigh(layer.kernel_size, shape, density, trainable_density, rescale_init, device, dtype)


class WeightedConvTranspose1d(_WeightedConvTranspose, nn.ConvTranspose1d):
    """Transposed convolution of a signal with a density; see `WeightedConv2d` for its arguments."""


class WeightedConvTranspose2d(_WeightedConvTranspose, nn.ConvTranspose2d):
    """Transposed convolution of an image with a density; see `WeightedConv2d` for its arguments."""


class WeightedConvTranspose3d(_WeightedConvTranspose, nn.ConvTranspose3d):
    """Transposed convolution of a volume with a density; see `WeightedConv2d` for its arguments."""


_FORMS: dict[type[nn.Module], Any] = {
    nn.Conv1d: WeightedConv1d,
    nn.Conv2d: WeightedConv2d,
    nn.Conv3d: WeightedConv3d,
    nn.ConvTranspose1d: WeightedConvTranspose1d,
    nn.ConvTranspose2d: WeightedConvTranspose2d,
    nn.ConvTranspose3d: WeightedConvTranspose3d,
}


def bake(layer: nn.Module) -> nn.Module:
    """The plain convolution with the kernel W * Phi; `convatlas.surgery.merge` does it to a whole model.

    Raises:
        Unsupported: it is no weighted convolution.
    """
    if not isinstance(layer, _Weighted):
        raise Unsupported(f"it must be a weighted convolution, got {type(layer).__name__}")
    conv: nn.Module = layer.to_conv()
    return conv


def apply_weighted_conv(
    model: nn.Module,
    density_by_kernel: Mapping[int, Sequence[float]] = BEST_DENSITIES,
    *,
    preserve_function: bool = False,
    by_name: Mapping[str, Density] | None = None,
    skip: Selector | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    inplace: bool = False,
    trainable_density: bool = False,
) -> Surgery:
    """Give every convolution of a model a density.

    Args:
        model: any model, trained or not; left as it is.
        density_by_kernel: density values by kernel size, the outermost first. Convolutions of other sizes, even ones
            and pointwise ones stay as they are.
        preserve_function: divide the weights by Phi, so that the model computes what it did and goes on to be trained
            in another geometry; by default W is the weight, and the kernels change.
        by_name: other values for single layers, by patterns of names such as ``"layer1.*"``; the first that fits.
        skip: layers that stay as they are, e.g. a pattern of names such as ``"conv1"``.
        example_input, inplace: as `convatlas.surgery.swap` takes them.
        trainable_density: whether the values are trained.

    Raises:
        Unsupported: nothing was replaced.
    """
    skipped = (lambda name, module: False) if skip is None else predicate(skip)
    densities: dict[nn.Module, Density] = {}

    def meant(name: str, module: nn.Module) -> bool:
        if type(module) not in _FORMS or skipped(name, module):
            return False
        single = [density for pattern, density in (by_name or {}).items() if predicate(pattern)(name, module)]
        densities[module] = single[0] if single else density_by_kernel
        return True

    def weighted(conv: Any) -> nn.Module:
        if is_parametrized(conv):
            raise Unsupported("its weight is computed from others already")
        if max(conv.kernel_size) == 1:
            raise Unsupported("its kernel is one tap, which a density leaves as it is")
        options = {"density": densities[conv], "trainable_density": trainable_density}
        layer: nn.Module = _FORMS[type(conv)].from_conv(conv, **options)
        if not preserve_function:
            with torch.no_grad():
                originals(layer)[0].copy_(conv.weight)
        return layer

    return swap(model, meant, weighted, example_input=example_input, inplace=inplace)


def density_param_groups(
    model: nn.Module, *, lr: float = 1e-4, density_lr: float = 1e-2, weight_decay: float = 1e-2
) -> list[dict[str, Any]]:
    """Parameters for an optimizer, in two groups: weights, and trained density values, which learn faster.

    The papers train both by AdamW with these numbers: the weights along a cosine over 100 epochs down to 1e-6, the
    density along cosines that begin again after 10, 30, 70, ... epochs.

    Raises:
        Unsupported: the model has no trained density.
    """
    layers = [module for module in model.modules() if isinstance(module, DensityWeight)]
    densities = {id(layer.density): layer.density for layer in layers if isinstance(layer.density, nn.Parameter)}
    if not densities:
        raise Unsupported(f"this {type(model).__name__} has no trained density")
    weights = [parameter for parameter in model.parameters() if id(parameter) not in densities]
    return [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": list(densities.values()), "lr": density_lr, "weight_decay": weight_decay},
    ]


class TunedDensity(NamedTuple):
    """What `tune_density` found.

    Attributes:
        density: the best values, the outermost first.
        tried: every density that was tried, with its score, in order.
    """

    density: tuple[float, ...]
    tried: tuple[tuple[tuple[float, ...], float], ...]


def tune_density(
    train: Callable[[tuple[float, ...]], float], start: Sequence[float], *, step: float = 0.1, most: int = 20
) -> TunedDensity:
    """Search the density values one after another, from the innermost to the outermost, as the papers do.

    Of each value d the scores of d (1 - step), d and d (1 + step) are compared, and the search moves on to the best
    until the one in the middle wins.

    Args:
        train: trains with density values, always from the same seed, and gives a score; more is better.
        start: values to begin with, the outermost first.
        step: share of a value.
        most: moves of one value at most.

    Raises:
        ValueError: step is not between 0 and 1.
    """
    if not 0 < step < 1:
        raise ValueError(f"step must be between 0 and 1, got {step}")
    scores: dict[tuple[float, ...], float] = {}

    def score(density: tuple[float, ...]) -> float:
        if density not in scores:
            scores[density] = float(train(density))
        return scores[density]

    best = tuple(map(float, start))
    for place in reversed(range(len(best))):
        for _ in range(most):
            ways = [(*best[:place], best[place] * factor, *best[place + 1 :]) for factor in (1.0, 1 - step, 1 + step)]
            winner = max(ways, key=score)  # of equal ones the first: the middle
            if winner == best:
                break
            best = winner
    score(best)
    return TunedDensity(best, tuple(scores.items()))


def radial_energy(weight: Tensor) -> Tensor:
    """Share of the sum of squares of kernels (out, in, *kernel) at each distance from the centre, (r + 1), in taps.

    The distance is the larger one along the axes. Before and after a training it tells whether the density was undone.
    """
    grids = torch.meshgrid(*(torch.arange(size) - size // 2 for size in weight.shape[2:]), indexing="ij")
    distance = torch.stack([grid.abs() for grid in grids]).amax(0).to(weight.device)
    energy = weight.detach().square().sum((0, 1))
    sums = energy.new_zeros(int(distance.max()) + 1).index_add(0, distance.flatten(), energy.flatten())
    return sums / sums.sum()
