"""Convolutions whose weight is computed from other parameters, by `torch.nn.utils.parametrize`.

The parameters are in the state dict under ``parametrizations.weight.``; ``layer.weight`` is computed when it is read,
which a forward pass does once, and assigning to it finds the parameters whose weight is nearest. Nothing is kept behind
the back: ``with torch.nn.utils.parametrize.cached():`` around an evaluation computes each weight once, and
`convatlas.surgery.merge` makes plain convolutions for good. Such a layer can be deep-copied and saved by its state
dict; torch refuses to pickle it.

A layer of one, two and three dimensions has one body::

    class _XConv(DerivedConv):
        def __init__(self, in_channels, ..., *, own_option):  # the arguments of torch, then its own
            super().__init__(in_channels, ..., device="meta")
            derive(self, Parametrization(own_option), *originals)

    class XConv2d(_XConv, nn.Conv2d): ...
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from convatlas.errors import Unsupported
from convatlas.nn.conv.geometry import PLAIN, TRANSPOSED, geometry, plain_conv

__all__ = ["DerivedConv", "copy_weights", "derive", "originals"]


class DerivedConv:
    """Mixin of a conv-like layer with a parametrized weight; stands before one of torch's convolutions."""

    @classmethod
    def from_conv(cls, conv: nn.Module, **options: Any) -> Self:
        """A layer with the geometry and bias of a convolution, and the weight nearest to its own.

        Args:
            conv: the convolution of torch that the layer is a subclass of.
            **options: of the layer.

        Raises:
            Unsupported: it is something else, or the layer cannot have its geometry.
        """
        dims, transposed = _place(cls)
        arguments = geometry(conv, dims, transposed=transposed)
        try:
            layer: Any = cls(**arguments, **options)
        except ValueError as error:
            raise Unsupported(str(error)) from None
        copy_weights(layer, conv)
        return layer

    def to_conv(self) -> Any:
        """The plain convolution with the present weight and bias."""
        return plain_conv(self)


def _place(cls: type) -> tuple[int, bool]:
    """Number of position axes of a layer, and whether it is transposed, by the convolution that it stands on."""
    kinds = [(kind, dims, kinds is TRANSPOSED) for kinds in (PLAIN, TRANSPOSED) for dims, kind in kinds.items()]
    return next((dims, transposed) for kind, dims, transposed in kinds if issubclass(cls, kind))


def copy_weights(layer: Any, plain: Any) -> None:
    """Give a layer with a parametrized weight the weight, bias, mode and freezing of a plain one."""
    with torch.no_grad():
        layer.weight = plain.weight.detach()  # torch lets no Parameter be assigned
        if plain.bias is not None:
            layer.bias.copy_(plain.bias)
            layer.bias.requires_grad_(plain.bias.requires_grad)
    if not plain.weight.requires_grad:
        layer.parametrizations.requires_grad_(False)
    layer.train(plain.training)


def derive(layer: nn.Module, parametrization: nn.Module, *values: Tensor, name: str = "weight") -> None:
    """Make a parameter of a layer the result of ``parametrization(*values)``.

    `torch.nn.utils.parametrize.register_parametrization` would ask the parametrization for the values by its
    ``right_inverse``, which may take long; here they are given. The parameter that the layer has is dropped, so it may
    lie on the meta device.

    Args:
        layer: has the parameter.
        parametrization: a module that computes it. Its ``right_inverse`` is what assigning to the parameter calls.
        values: become parameters, named ``original``, or ``original0``, ``original1``, ... if there are several.
        name: of the parameter.
    """
    parametrization.right_inverse = lambda _: values if len(values) > 1 else values[0]  # type: ignore[assignment]
    setattr(layer, name, nn.Parameter(values[0].new_empty(0)))
    register_parametrization(layer, name, parametrization, unsafe=True)
    del parametrization.right_inverse


def originals(layer: nn.Module, name: str = "weight") -> tuple[nn.Parameter, ...]:
    """The parameters from which a parametrized parameter of a layer is computed, in the order they were given in."""
    return tuple(layer.get_submodule(f"parametrizations.{name}").parameters(recurse=False))
