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
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # the meta device has none
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
