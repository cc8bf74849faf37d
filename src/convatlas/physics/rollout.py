"""Forecasting many steps of a field by a network that forecasts one.

Poli et al.: "Transform Once: Efficient Operator Learning in Frequency Domain", NeurIPS 2022, arXiv 2211.14453, section
4.3: the network may answer the next frame, its change, or the change of its change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from convatlas.networks.base import FieldNetwork

__all__ = ["Order", "rollout"]

#: What the network answers: the next frame (0), its difference from the last one (1), or the change of that difference.
Order = Literal[0, 1, 2]


def rollout(model: Callable[[Tensor], Tensor], x: Tensor, steps: int, order: Order = 0) -> Tensor:
    """Feed a model its own forecasts: y[t + 1] from f = model(the last K frames).

    - order 0: y[t + 1] = f
    - order 1: y[t + 1] = y[t] + f
    - order 2: v[t + 1] = v[t] + f and y[t + 1] = y[t] + v[t + 1], where v[t] = y[t] - y[t - 1]

    Args:
        model: takes frames as channels (B, K * C, *grid), oldest first, and gives (B, C, *grid). A `FieldNetwork` that
            answers in modes is brought back to the grid.
        x: the K frames to start from, (B, K, C, *grid).
        steps: how many frames to forecast.
        order: what the model answers.

    Returns:
        The forecasts (B, steps, C, *grid). Differentiable through all steps.

    Raises:
        ValueError: x has a wrong shape, order or steps is out of range, or order 2 has only one frame to start from.
    """
    if x.dim() < 4:
        raise ValueError(f"x must be (B, K, C, *grid), got {tuple(x.shape)}")
    if order not in (0, 1, 2):
        raise ValueError(f"order must be 0, 1 or 2, got {order}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if x.shape[1] < (2 if order == 2 else 1):
        raise ValueError(f"order {order} needs {2 if order == 2 else 1} frames to start from, got {x.shape[1]}")
    frames = list(x.unbind(1))
    speed = frames[-1] - frames[-2] if order == 2 else None
    for _ in range(steps):
        answer = model(torch.cat(frames[-x.shape[1] :], 1))
        if isinstance(model, FieldNetwork):
            answer = model.as_field(answer, x.shape[3:])
        if answer.shape != frames[-1].shape:
            wanted, got = tuple(frames[-1].shape), tuple(answer.shape)
            raise ValueError(f"model must give one frame {wanted} of {x.shape[1]}, got {got}")
        if speed is not None:
            speed = speed + answer
            answer = speed
        frames.append(answer if order == 0 else frames[-1] + answer)
    return torch.stack(frames[x.shape[1] :], 1)
