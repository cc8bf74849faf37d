"""What every conv-like layer needs to take the place of a plain convolution, and to give it back.

A conv-like layer has the constructor of `torch.nn.Conv1d`, `Conv2d` or `Conv3d`, with its own options keyword-only. Its
class method ``from_conv(conv, **options)`` takes the place of an existing convolution or raises `Unsupported`, and
``to_conv()`` returns the plain convolution that computes the same in evaluation, or None where none does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from convatlas.errors import Unsupported

__all__ = ["PLAIN", "as_tuple", "geometry", "plain_conv"]

#: Torch's convolution by its number of position axes.
PLAIN: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def geometry(conv: nn.Module, dims: int | None = None) -> dict[str, Any]:
    """The constructor arguments of a plain convolution, device and dtype included.

    Args:
        conv: a `torch.nn.Conv1d`, `Conv2d` or `Conv3d`, no subclass of it: what that computes is not known.
        dims: number of position axes that it must have; any when left out.

    Raises:
        Unsupported: it is something else.
    """
    wanted = tuple(PLAIN.values()) if dims is None else (PLAIN[dims],)
    if type(conv) not in wanted:
        kinds = " or ".join(kind.__name__ for kind in wanted)
        raise Unsupported(f"it must be a {kinds}, got {type(conv).__name__}")
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    weight: torch.Tensor = conv.weight  # type: ignore[assignment]
    return {
        **{name: getattr(conv, name) for name in names},
        "bias": conv.bias is not None,
        "device": weight.device,
        "dtype": weight.dtype,
    }


def plain_conv(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """A plain convolution with the present weight, bias and geometry of a layer that derives its weight from others."""
    kind = PLAIN[len(layer.kernel_size)]
    conv = kind(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
        device="meta",
    )
    with torch.no_grad():
        conv.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=True)
        if layer.bias is not None:
            conv.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    conv.train(layer.training)
    return conv


def as_tuple(value: int | tuple[int, ...], dims: int, name: str) -> tuple[int, ...]:
    """A size for each of ``dims`` axes, from one number for all or from a tuple.

    Raises:
        ValueError: it is a tuple of another length.
    """
    sizes = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(sizes) != dims:
        raise ValueError(f"{name} must be one number or {dims}, got {value}")
    return sizes
