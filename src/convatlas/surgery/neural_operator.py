"""From a network to a neural operator: each layer that counts in points is replaced by one that measures in space.

Berner, Liu-Schiaffini, Kossaifi, Duruisseaux, Bonev, Azizzadenesheli, Anandkumar: "Principled Approaches for Extending
Neural Architectures to Function Spaces for Operator Learning", 2025, arXiv 2506.10973, section 3.

| layer | becomes |
|---|---|
| pointwise map, activation, bias, norm of the channels or over space, softmax attention | stays as it is |
| convolution | kernel interpolation, or a spectral, local-integral or finite-difference layer |
| strided convolution, pooling | window of one length in space, with the stride as a factor of the resolution |
| transposed convolution | computed on the grid of the training, between two resizings |
| padding | margin of one length in space |

Layers on points in space replace what lives on graphs, dense layers on grid values and attention without softmax:
`convatlas.nn.graph_integral`, `convatlas.nn.attention_integral`. Position embeddings and patches are parameters of a
network, not layers: `convatlas.networks.neural_operators.vit` shows them as functions of space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported, unknown
from convatlas.nn.conv.disco import DiscreteContinuousConv2d
from convatlas.nn.conv.finite_difference import (
    FiniteDifferenceConv1d,
    FiniteDifferenceConv2d,
    FiniteDifferenceConv3d,
)
from convatlas.nn.conv.kernel_interpolation import (
    Interpolation,
    KernelInterpolatedConv1d,
    KernelInterpolatedConv2d,
    KernelInterpolatedConv3d,
    KernelInterpolatedConvTranspose2d,
)
from convatlas.nn.conv.spectral_conv import SpectralConv
from convatlas.nn.grid_window import PADS, POOLS, GridPad, GridPool
from convatlas.ops.disco import equidistant_basis
from convatlas.surgery.edit import swap
from convatlas.surgery.selection import Selector, Surgery, as_inputs, observe, predicate

__all__ = ["CONVERSIONS", "Conversion", "convert_kernel", "to_neural_operator"]

#: Makes the new layer from the old one and the points of each axis of its input on the grid of the training.
Conversion = Callable[[Any, tuple[int, ...]], nn.Module]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_INTERPOLATED: dict[type, Any] = {
    nn.Conv1d: KernelInterpolatedConv1d,
    nn.Conv2d: KernelInterpolatedConv2d,
    nn.Conv3d: KernelInterpolatedConv3d,
}
_DIFFERENCES: dict[type, Any] = {
    nn.Conv1d: FiniteDifferenceConv1d,
    nn.Conv2d: FiniteDifferenceConv2d,
    nn.Conv3d: FiniteDifferenceConv3d,
}


def _interpolated(layer: Any, grid: tuple[int, ...], interpolation: Interpolation = "bilinear") -> nn.Module:
    """A convolution, transposed convolution, pooling or padding that follows the grid, with the weights that it has."""
    options: dict[str, Any] = {"base_resolution": grid, "interpolation": interpolation}
    if type(layer) in _INTERPOLATED:
        return _INTERPOLATED[type(layer)].from_conv(layer, keep_ratio=True, **options)
    if type(layer) is nn.ConvTranspose2d:
        return KernelInterpolatedConvTranspose2d.from_conv(layer, **options)
    if type(layer) in POOLS:
        return GridPool(layer, grid)
    if isinstance(layer, PADS):
        return GridPad(layer, grid)
    raise Unsupported(f"a {type(layer).__name__} has no form that follows the grid")


def _spectral(layer: Any, grid: tuple[int, ...], n_modes: int = 16) -> nn.Module:
    """A spectral convolution with the response of the kernel at the lowest frequencies.

    It is the convolution with a circular border, without the higher frequencies; a stride becomes a resampling.
    """
    _plain(layer)
    depthwise = layer.groups > 1
    if depthwise and not layer.in_channels == layer.out_channels == layer.groups:
        raise Unsupported(f"groups must be 1 or depthwise, got {layer.groups}")
    modes = tuple(min(n_modes, n) for n in grid)
    scaling = [1 / step for step in layer.stride]
    new = SpectralConv(
        layer.in_channels,
        layer.out_channels,
        modes,
        layer.bias is not None,
        separable=depthwise,
        resolution_scaling=scaling if any(step > 1 for step in layer.stride) else None,
    ).to(layer.weight.device)
    with torch.no_grad():
        spectrum = torch.view_as_real(convert_kernel(layer.weight, grid, modes, depthwise))
        new.as_spectrum(new.weight).copy_(spectrum)
        if new.bias is not None:
            new.bias.copy_(layer.bias.view(new.bias.shape))
    return new


def convert_kernel(weight: Tensor, grid: Sequence[int], modes: Sequence[int], depthwise: bool = False) -> Tensor:
    """The response (I, O, *modes) of a kernel (O, I, *k) at the frequencies of a grid, complex.

    Args:
        weight: kernel, which torch applies without turning it round.
        grid: points of each axis.
        modes: frequencies of each axis, as `SpectralConv` counts them.
        depthwise: whether the kernel is (C, 1, *k); the response is (C, *modes).
    """
    response = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) + 0j
    for axis, (points, count) in enumerate(zip(grid, modes, strict=True)):
        last = axis == len(grid) - 1
        frequency = torch.arange(count // 2 + 1 if last else count) - (0 if last else count // 2)
        offset = torch.arange(weight.shape[2 + axis]) - (weight.shape[2 + axis] - 1) // 2
        angle = 2 * torch.pi * (frequency[:, None] * offset) / points
        waves = torch.polar(torch.ones_like(angle), angle).to(response)
        response = (response.movedim(2 + axis, -1) @ waves.t()).movedim(-1, 2 + axis)
    return response[:, 0] if depthwise else response.transpose(0, 1)


def _local_integral(layer: Any, grid: tuple[int, ...], angles: int = 8) -> nn.Module:
    """A local integral over the disk that the kernel spans, with the weights nearest to it: those of 3 x 3 are exact.

    A ring of hat functions sits at the distance of each tap. Lengths count in widths of the field.
    """
    _plain(layer)
    if type(layer) is not nn.Conv2d or len(set(layer.kernel_size)) > 1 or layer.kernel_size[0] % 2 == 0:
        raise Unsupported("it must be a Conv2d with an odd, square kernel")
    taps = layer.kernel_size[0]
    if taps == 1:
        raise Unsupported("a kernel of one tap is pointwise")
    lengths = (grid[0] / grid[1], 1.0)
    # The outermost hats end one point beyond the taps, which rounding must not leave out.
    radius = (taps + 1) / 2 / grid[1] * (1 + 1e-6)
    new = DiscreteContinuousConv2d(
        layer.in_channels,
        layer.out_channels,
        (taps, angles),
        radius,
        domain_length=lengths,
        stride=(layer.stride[0], layer.stride[1]),
        groups=layer.groups,
        bias=layer.bias is not None,
        periodic=layer.padding_mode == "circular",
    ).to(layer.weight.device)
    with torch.no_grad():
        basis = equidistant_basis((grid[0], grid[1]), lengths, new.kernel_shape, radius) / (grid[1] * grid[1])
        around = nn.functional.pad(layer.weight.double().cpu(), (1, 1, 1, 1))
        wanted = around.flip(-1, -2).transpose(-1, -2).flatten(2)
        found = torch.linalg.lstsq(basis.flatten(1).t(), wanted.flatten(0, 1).t()).solution.t()
        new.weight.zero_()
        new.weight[..., : len(basis)] = found.view(*wanted.shape[:2], -1).to(new.weight)
        if new.bias is not None and layer.bias is not None:
            new.bias.copy_(layer.bias)
    return new


def _difference(layer: Any, grid: tuple[int, ...]) -> nn.Module:
    """Finite differences by the kernel that the convolution has, over the distance of the points."""
    if type(layer) not in _DIFFERENCES:
        raise Unsupported(f"it must be a convolution, got {type(layer).__name__}")
    return _DIFFERENCES[type(layer)].from_conv(layer, base_resolution=grid[-1])


def _plain(layer: Any) -> None:
    if type(layer) not in _CONVS:
        raise Unsupported(f"it must be a convolution, got {type(layer).__name__}")
    if max(layer.dilation) > 1:
        raise Unsupported("it must not be dilated")


#: What a rule may be called.
CONVERSIONS: dict[str, Conversion] = {
    "interpolate": _interpolated,
    "interpolate_fourier": lambda layer, grid: _interpolated(layer, grid, "fourier"),
    "spectral": _spectral,
    "local_integral": _local_integral,
    "difference": _difference,
}


def _counts_in_points(name: str, module: nn.Module) -> bool:
    """Whether a layer is one that the default rules convert."""
    if isinstance(module, (*_CONVS, nn.ConvTranspose2d)):
        return max(module.kernel_size) > 1
    return type(module) in POOLS or isinstance(module, PADS)


def to_neural_operator(
    model: nn.Module,
    base_resolution: int | Sequence[int],
    rules: Mapping[Selector, str | Conversion] | None = None,
    *,
    example_input: Tensor | tuple[Any, ...] | None = None,
    inplace: bool = False,
) -> Surgery:
    """Turn a network into a neural operator: on the grid of its training it computes what it did, on others the like.

    By default every convolution of several taps, pooling and padding follows the grid (``interpolate``), with the
    weights of the model, so that a trained network needs no new training.

    Args:
        model: any network on fields; left as it is.
        base_resolution: points of each axis of its input on the grid of its training, or one number for all.
        rules: which layers become what, the first that fits; before the default rule. A value is a name of
            `CONVERSIONS`, ``keep``, or a function of the layer and its grid.
        example_input: an input on that grid, or a tuple of inputs; by default ``model.example_inputs()``.
        inplace: change the model itself instead of a copy.

    Raises:
        ValueError: the example is on another grid.
        UnknownName: there is no such conversion.
        Unsupported: nothing was converted, or there is no example.
    """
    chosen = [(predicate(selector), _conversion(rule)) for selector, rule in (rules or {}).items()]
    chosen.append((_counts_in_points, _interpolated))
    inputs = as_inputs(model, example_input)
    if inputs is None:
        raise Unsupported("example_input must be given to a model without example_inputs()")
    first = next((value for value in inputs if isinstance(value, Tensor) and value.dim() > 2), None)
    if first is None:
        raise ValueError("example_input must hold a field (B, C, *grid)")
    dims = first.dim() - 2
    base = (base_resolution,) * dims if isinstance(base_resolution, int) else tuple(base_resolution)
    if tuple(first.shape[2:]) != base:
        raise ValueError(f"example_input must be on the grid {base}, got {tuple(first.shape)}")

    conversions: dict[nn.Module, Conversion] = {}
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        found = next((conversion for meant, conversion in chosen if meant(name, module)), None)
        if found is not None and name:
            conversions[module], names[module] = found, name
    grids = {
        names[module]: {tuple(call.args[0].shape[2:]) for call in calls if call.args}
        for module, calls in observe(model, conversions, inputs).items()
    }
    by_name = {names[module]: conversion for module, conversion in conversions.items()}
    present: dict[nn.Module, str] = {}

    def meant(name: str, module: nn.Module) -> bool:
        if by_name.get(name, _keep) is _keep:
            return False
        present[module] = name
        return True

    def converted(module: nn.Module) -> nn.Module:
        name = present[module]
        if len(grids[name]) != 1:
            raise Unsupported(f"it is called on {len(grids[name])} grids of different sizes")
        return by_name[name](module, next(iter(grids[name])))

    return swap(model, meant, converted, example_input=inputs, inplace=inplace)


def _keep(layer: Any, grid: tuple[int, ...]) -> nn.Module:
    kept: nn.Module = layer
    return kept


def _conversion(rule: str | Conversion) -> Conversion:
    if callable(rule):
        return rule
    if rule == "keep":
        return _keep
    if rule not in CONVERSIONS:
        raise unknown("conversion", str(rule), ("keep", *CONVERSIONS))
    return CONVERSIONS[rule]
