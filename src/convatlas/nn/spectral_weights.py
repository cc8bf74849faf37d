"""Weights of layers that keep only the lowest modes of a spectrum: initial values and order of memory.

Poli et al.: "Transform Once: Efficient Operator Learning in Frequency Domain", NeurIPS 2022, arXiv 2211.14453, section
3.4: what is cut off takes its share of the energy away, and the weights can give it back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from convatlas.errors import unknown

__all__ = ["SpectralInit", "as_complex", "spectral_deviation", "spectral_weight"]

#: ``naive``: 1 / (fan_in fan_out), as in FNO; ``vp``: keeps the variance at each point of the grid; ``zero``: 1e-8;
#: ``fan_in``: sqrt(1 / fan_in).
SpectralInit = Literal["naive", "vp", "zero", "fan_in"]


def spectral_deviation(
    rule: SpectralInit, fan_in: int, fan_out: int, modes: int, points: int, *, complex_valued: bool = False
) -> float:
    """Standard deviation of a weight, and of both parts of a complex one.

    Args:
        rule: how to choose it.
        fan_in, fan_out: channels (or modes) that are summed, and that come out.
        modes: how many are kept.
        points: of the grid, of all axes together.
        complex_valued: halves it: a complex weight acts on mirrored frequencies at once.

    Raises:
        UnknownName: there is no such rule.
    """
    deviations = {
        "naive": 1 / (fan_in * fan_out),
        "vp": math.sqrt(points / (fan_in * modes)),
        "zero": 1e-8,
        "fan_in": math.sqrt(1 / fan_in),
    }
    if rule not in deviations:
        raise unknown("init", str(rule), get_args(SpectralInit))
    return deviations[rule] / 2 if complex_valued else deviations[rule]


def spectral_weight(
    *shape: int, deviation: float, layout: Callable[[Tensor], Tensor], complex_valued: bool = False
) -> nn.Parameter:
    """A normal weight of this shape; of a complex one both parts, on a last axis of two, as checkpoints hold them.

    Args:
        shape: of the weight.
        deviation: standard deviation.
        layout: lays out the memory: `mode_major` or `channel_major` of `convatlas.ops.mode_mixing`.
        complex_valued: whether it has two parts.
    """
    if not complex_valued:
        return nn.Parameter(layout(deviation * torch.randn(shape)))
    parts = deviation * torch.randn(*shape, 2)
    return nn.Parameter(torch.view_as_real(layout(torch.view_as_complex(parts))))


def as_complex(weight: Tensor) -> Tensor:
    """The complex weight whose parts are on the last axis, in single precision at least."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    # Torch moves weights of four axes to the channels-last layout of images, where the parts lie apart.
    return torch.view_as_complex(wide if wide.stride(-1) == 1 else wide.contiguous())
