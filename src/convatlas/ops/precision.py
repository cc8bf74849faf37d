"""Arithmetic that keeps its precision under autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

__all__ = ["without_autocast"]


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast does not lower the precision of operations on the device of ``x``.

    It is entered only where there is something to switch off, because it leaves a trace in exported programs.
    """
    device = x.device.type
    lowered = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if lowered else contextlib.nullcontext()
