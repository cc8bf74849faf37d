"""How far forecasts of a field are from the truth, on any grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from convatlas.data.fields import FieldPairs
from convatlas.ops.relative_error import relative_l2
from convatlas.training.progress import progress

__all__ = ["Measured", "coarser", "in_batches", "measure"]

Array = npt.NDArray[Any]

#: Points that are forecast together.
_TOGETHER = 2**20
#: Least points of an axis of a grid from which every second one is left out.
_LEAST = 16


@dataclass(frozen=True, eq=False)
class Measured:
    """Forecasts on one grid beside the truth.

    Attributes:
        pairs: inputs and true outputs.
        outputs: forecasts (N, C', *grid).
        errors: relative L2 error of each sample (N,).
    """

    pairs: FieldPairs
    outputs: Array
    errors: Array


@torch.inference_mode()
def in_batches(forecast: Callable[[Tensor], Tensor], network: nn.Module, x: Array) -> Array:
    """Forecasts (N, C', *grid) of inputs (N, C, *grid), so many at a time that the memory stays bounded."""
    network.eval()
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    size = max(1, _TOGETHER // int(np.prod(x.shape[2:])))
    starts = range(0, len(x), size)
    outputs = []
    with progress("forecasting", len(starts)) as advance:
        for start in starts:
            batch = torch.from_numpy(np.ascontiguousarray(x[start : start + size])).float().to(device)
            outputs.append(forecast(batch).float().cpu().numpy())
            advance()
    return np.concatenate(outputs)


def measure(forecast: Callable[[Tensor], Tensor], network: nn.Module, pairs: FieldPairs) -> Measured:
    """Forecast and compare with the truth, which ``pairs`` must hold."""
    outputs = in_batches(forecast, network, pairs.x)
    truth = torch.from_numpy(np.asarray(pairs.y, dtype=np.float64))
    return Measured(pairs, outputs, relative_l2(torch.from_numpy(outputs).double(), truth).numpy())


def coarser(pairs: FieldPairs) -> FieldPairs | None:
    """The pairs at every second point of each axis; None where few would be left."""
    if min(pairs.grid) < _LEAST:
        return None
    every = (slice(None), slice(None), *[slice(None, None, 2)] * len(pairs.grid))
    return FieldPairs(pairs.x[every], None if pairs.y is None else pairs.y[every])
