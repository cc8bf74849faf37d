"""Layers by name: one word puts a layer of this library wherever it belongs in any network."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

from torch import nn

from convatlas.catalog import LAYERS, resolve
from convatlas.errors import Unsupported, unknown
from convatlas.surgery.edit import ExampleInput, insert, swap
from convatlas.surgery.selection import Surgery

__all__ = ["place_layer"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SLOTS = "*.attention"


def place_layer(
    model: nn.Module, name: str, *, example_input: ExampleInput = None, inplace: bool = False, **options: Any
) -> Surgery:
    """Put a layer of this library into a model, wherever a user would.

    A conv-like layer takes the place of every convolution of more than one tap. A layer that keeps the shape goes into
    the empty slots called ``attention`` that residual blocks have, or where there are none behind every convolution of
    more than one tap. Places that it cannot take are skipped, with the reason.

    Args:
        model: any model; left as it is.
        name: of the layer, as `convatlas.catalog.LAYERS` has it.
        example_input, inplace: as `swap` takes them.
        **options: of the layer, e.g. ``kernel_size=5``.

    Raises:
        UnknownName: there is no such layer, or it has no such option.
        ValueError: an option is missing.
        Unsupported: it found no place.
    """
    if name not in LAYERS:
        raise unknown("layer", name, LAYERS)
    found = LAYERS[name]
    _check_options(name, resolve(found if isinstance(found, str) else next(iter(found.values()))), options)
    if not isinstance(found, str):

        def conv_like(conv: nn.Module, **options: Any) -> nn.Module:
            dims = len(conv.kernel_size)  # type: ignore[arg-type]
            if dims not in found:
                raise Unsupported(f"{name} has no form for {dims} position axes")
            layer: nn.Module = resolve(found[dims]).from_conv(conv, **options)
            return layer

        return swap(model, _reaches, conv_like, example_input=example_input, inplace=inplace, **options)
    kind = resolve(found)
    if "dims" in inspect.signature(kind).parameters:
        options = {"dims": _position_axes(model), **options}
    if any(type(module) is nn.Identity and slot.endswith(_SLOTS[1:]) for slot, module in model.named_modules()):
        return insert(model, kind, at=_SLOTS, example_input=example_input, inplace=inplace, **options)
    return insert(model, kind, after=_reaches, example_input=example_input, inplace=inplace, **options)


def _check_options(name: str, kind: Any, options: dict[str, Any]) -> None:
    known = {
        option.name: option
        for option in inspect.signature(kind).parameters.values()
        if option.kind is option.KEYWORD_ONLY and option.name not in ("device", "dtype")
    }
    for option in options:
        if option not in known:
            raise unknown(f"option of {name}", option, known)
    missing = [option for option, told in known.items() if told.default is told.empty and option not in options]
    if missing:
        raise ValueError(f"layer {name} needs the option {missing[0]}, got {', '.join(options) or 'none'}")


def _reaches(name: str, module: nn.Module) -> bool:
    """Whether a module is a convolution that sees more than one position."""
    return isinstance(module, _CONVS) and max(module.kernel_size) > 1


def _position_axes(model: nn.Module) -> int:
    """Those of most of its convolutions: a network may make images of waveforms, clips or points."""
    axes = Counter(len(module.kernel_size) for name, module in model.named_modules() if _reaches(name, module))
    return axes.most_common(1)[0][0] if axes else 2
