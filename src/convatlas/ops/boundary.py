"""What lies beyond the ends of a signal: the ways to go on that filters and transforms ask for."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Boundary", "extend"]

#: How a signal a b c d goes on behind its end: ``zero`` 0 0 0, ``constant`` d d d, ``symmetric`` d c b,
#: ``reflect`` c b a, ``periodic`` a b c, ``smooth`` the line through c and d, ``antisymmetric`` -d -c -b,
#: ``antireflect`` 2d-c 2d-b 2d-a; and so on without end, with the names of PyWavelets.
Boundary = Literal["zero", "constant", "symmetric", "reflect", "periodic", "smooth", "antisymmetric", "antireflect"]


def extend(x: Tensor, axis: int, left: int, right: int, boundary: Boundary) -> Tensor:
    """Put samples before and after those of one axis, as many as asked for, also more than there are.

    Args:
        x: a tensor.
        axis: which of its axes, from 0.
        left, right: how many samples to put before the first and behind the last.
        boundary: what they are.
    """
    if left == right == 0:
        return x
    axis = axis % x.dim()
    n, later = x.shape[axis], x.dim() - 1 - axis
    if boundary == "zero":
        return F.pad(x, (*[0, 0] * later, left, right))
    position = torch.arange(-left, n + right, device=x.device)
    if boundary == "periodic":
        return x.index_select(axis, position % n)
    if boundary in ("constant", "smooth"):
        y = x.index_select(axis, position.clamp(0, n - 1))
        if boundary == "constant":
            return y
        before, beyond = (part.view(-1, *[1] * later).to(x.dtype) for part in (position, position - (n - 1)))
        first, second, last_but_one, last = (x.narrow(axis, max(at, 0), 1) for at in (0, min(1, n - 1), n - 2, n - 1))
        return y + before.clamp(max=0) * (second - first) + beyond.clamp(min=0) * (last - last_but_one)
    # There and back again: the ends are repeated in the symmetric modes and not in the reflecting ones.
    span = n if boundary in ("symmetric", "antisymmetric") else max(n - 1, 1)
    back = position // span % 2
    index = torch.where(back == 1, n - 1 - position % span, position % span)
    if boundary in ("symmetric", "reflect"):
        return x.index_select(axis, index)
    sign = (1 - 2 * back).view(-1, *[1] * later).to(x.dtype)
    if boundary == "antisymmetric":
        return sign * x.index_select(axis, index)
    # Less the line through its ends, the signal is antisymmetric around both.
    first, last = x.narrow(axis, 0, 1), x.narrow(axis, n - 1, 1)
    slope = (last - first) / span
    inside, everywhere = (p.view(-1, *[1] * later).to(x.dtype) for p in (position[left : left + n], position))
    rest = x - first - slope * inside
    return first + slope * everywhere + sign * rest.index_select(axis, index)
