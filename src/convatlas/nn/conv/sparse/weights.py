"""Weights of spconv in our layout and back, and convolutions that take in the norms behind them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from convatlas.errors import CheckpointError
from convatlas.nn.conv.sparse.base import SparseSequential
from convatlas.nn.conv.sparse.conv import SparseConvolution

__all__ = ["fold_norms", "from_spconv", "to_spconv"]


def from_spconv(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of spconv with the same names, in our layout.

    Weights of spconv 2.2 and later have our shape (C_out, *k, C_in); older ones, (*k, C_in, C_out) of 1.x or
    (*k, C_out, C_in) of 2.1, are told by their shapes. A convolution of one tap is another matter: spconv 2 multiplies
    by its memory read as (C_in, C_out), which is not the transpose that its shape promises. Checkpoints were trained
    so, and are converted to what was computed.

    Raises:
        CheckpointError: old weights are all square, so that their layout cannot be told.
    """
    converted = dict(state)
    weights = {key: layer for key, layer in _weights(model) if key in state}
    layout = _layout({key: (state[key].shape, layer) for key, layer in weights.items()})
    for key, layer in weights.items():
        weight = state[key]
        channels_out, channels_in = layer.out_channels, layer.in_channels
        if weight.dim() != layer.weight.dim():
            continue
        if _one_tap(layer) and layout != "in_out":
            matrix = weight.reshape(channels_in, channels_out).T
        elif layout == "native":
            continue
        else:
            matrix = weight.movedim(-1, 0) if layout == "in_out" else weight.movedim(-2, 0)
        converted[key] = matrix.reshape(layer.weight.shape)
    return converted


def to_spconv(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours, or gradients by the same names, in the layout of spconv 2.2 and later."""
    converted = dict(state)
    for key, layer in _weights(model):
        if key in state and _one_tap(layer):
            matrix = state[key].reshape(layer.out_channels, layer.in_channels)
            converted[key] = matrix.T.reshape(layer.weight.shape)
    return converted


def _weights(model: nn.Module) -> Iterator[tuple[str, SparseConvolution]]:
    for name, module in model.named_modules():
        if isinstance(module, SparseConvolution):
            yield f"{name}.weight".removeprefix("."), module


def _one_tap(layer: SparseConvolution) -> bool:
    """Whether spconv takes its short cut, a matrix product."""
    if math.prod(layer.kernel.size) > 1 or layer.kind == "inverse":
        return False
    return layer.kind == "submanifold" or max(layer.kernel.stride) == 1


def _old_shape(layer: SparseConvolution, layout: str) -> tuple[int, ...]:
    last = (layer.in_channels, layer.out_channels)
    return (*layer.kernel.size, *(last if layout == "in_out" else reversed(last)))


def _layout(weights: Mapping[str, tuple[torch.Size, SparseConvolution]]) -> str:
    """``native``, ``in_out`` (1.x) or ``out_in`` (2.1): the one whose shapes are found."""
    fits: dict[str, Callable[[SparseConvolution], tuple[int, ...]]] = {
        "native": lambda layer: tuple(layer.weight.shape),
        "in_out": lambda layer: _old_shape(layer, "in_out"),
        "out_in": lambda layer: _old_shape(layer, "out_in"),
    }
    found = [
        name for name, wanted in fits.items() if all(tuple(shape) == wanted(layer) for shape, layer in weights.values())
    ]
    if found == ["in_out", "out_in"]:
        raise CheckpointError("weights of an old spconv are all square: whether C_in or C_out is last cannot be told")
    return found[0] if found else "native"


@torch.no_grad()
def fold_norms(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose convolutions hold the batch norms that follow them in a `SparseSequential`.

    What is folded leaves an identity behind, so that the other layers keep their places.
    """
    folded = copy.deepcopy(model).eval()
    for sequence in folded.modules():
        if not isinstance(sequence, SparseSequential):
            continue
        for index, (layer, norm) in enumerate(pairwise(list(sequence))):
            if not isinstance(layer, SparseConvolution | nn.Linear) or not isinstance(norm, nn.BatchNorm1d):
                continue
            if norm.running_mean is None or norm.running_var is None:
                continue
            scale = (norm.running_var + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight
            shift = -norm.running_mean * scale + (0 if norm.bias is None else norm.bias)
            layer.weight.mul_(scale.reshape(-1, *(1,) * (layer.weight.dim() - 1)))
            layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias * scale + shift)
            sequence[index + 1] = nn.Identity()
    return folded
