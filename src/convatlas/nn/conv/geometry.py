"""What every conv-like layer needs to take the place of a plain convolution, and to give it back.

A conv-like layer has the constructor of `torch.nn.Conv1d`, `Conv2d` or `Conv3d`, or of their transposed forms, with its
own options keyword-only. Its class method ``from_conv(conv, **options)`` takes the place of an existing convolution or
raises `Unsupported`, and ``to_conv()`` returns the plain convolution that computes the same in evaluation, or None
where none does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from convatlas.errors import Unsupported

__all__ = ["PLAIN", "TRANSPOSED", "PlainConv", "as_tuple", "geometry", "plain_conv"]

PlainConv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

#: Torch's convolution by its number of position axes.
PLAIN: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
#: Torch's transposed convolution by its number of position axes.
TRANSPOSED: dict[int, type[nn.ConvTranspose1d] | type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_NAMES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def geometry(conv: nn.Module, dims: int | None = None, *, transposed: bool = False) -> dict[str, Any]:
    """The constructor arguments of a plain convolution, device and dtype included.

    Args:
        conv: a `torch.nn.Conv1d`, `Conv2d` or `Conv3d`; a subclass only if it says by ``computes_convolution`` that it
            computes the same.
        dims: number of position axes that it must have; any when left out.
        transposed: whether it must be a transposed convolution instead.

    Raises:
        Unsupported: it is something else.
    """
    kinds: dict[int, Any] = dict(TRANSPOSED if transposed else PLAIN)
    wanted = tuple(kinds.values()) if dims is None else (kinds[dims],)
    same = getattr(conv, "computes_convolution", False) is True
    if type(conv) not in wanted and not (same and isinstance(conv, wanted)):
        names = " or ".join(kind.__name__ for kind in wanted)
        raise Unsupported(f"it must be a {names}, got {type(conv).__name__}")
    weight: torch.Tensor = conv.weight  # type: ignore[assignment]
    return {**_arguments(conv), "device": weight.device, "dtype": weight.dtype}


def plain_conv(layer: Any) -> Any:
    """A plain convolution with the present weight, bias and geometry of a layer that derives its weight from others.

    Args:
        layer: of a subclass of one of torch's convolutions, plain or transposed.
    """
    kind: Any = (TRANSPOSED if layer.transposed else PLAIN)[len(layer.kernel_size)]
    conv = kind(**_arguments(layer), device="meta")
    with torch.no_grad():
        conv.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=True)
        if layer.bias is not None:
            conv.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return conv.train(layer.training)


def _arguments(conv: Any) -> dict[str, Any]:
    names = (*_NAMES, "output_padding") if conv.transposed else _NAMES
    return {**{name: getattr(conv, name) for name in names}, "bias": conv.bias is not None}


def as_tuple(value: int | tuple[int, ...], dims: int, name: str) -> tuple[int, ...]:
    """A size for each of ``dims`` axes, from one number for all or from a tuple.

    Raises:
        ValueError: it is a tuple of another length.
    """
    sizes = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(sizes) != dims:
        raise ValueError(f"{name} must be one number or {dims}, got {value}")
    return sizes
