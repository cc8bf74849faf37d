"""Densely connected convolutions: each sees the input and what all before it gave.

Huang, Liu, van der Maaten, Weinberger: "Densely Connected Convolutional Networks", CVPR 2017, arXiv 1608.06993; in the
form of the residual dense blocks of Wang et al.: "ESRGAN", ECCV Workshops 2018, arXiv 1809.00219, without norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.backend import Backends
from convatlas.ops.precision import without_autocast

__all__ = ["dense_conv"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _auto(x: Tensor, slope: float, *parameters: Tensor) -> str:
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return "naive"
    return "buffer"


_dense = Backends("dense_conv", auto=_auto)


def dense_conv(x: Tensor, slope: float, *parameters: Tensor, backend: str = "auto") -> Tensor:
    """y_k = act(conv_k(concat(x, y_1, ..., y_{k-1}))) for k < n, and the last convolution without its activation.

    Args:
        x: (B, C, *positions) with one, two or three position axes.
        slope: of the leaky ReLU below zero, not negative.
        parameters: weight and bias of each convolution in turn, (F_k, C + F_1 + ... + F_{k-1}, 3, ...) and (F_k,), with
            odd kernel sizes; padded with zeros so that positions stay.
        backend: ``auto``, ``naive`` (each concatenation is made anew and kept for the backward pass) or ``buffer`` (all
            results are written side by side into one tensor, which is all that the backward pass needs; it has no
            second derivative).

    Returns:
        (B, F_n, *positions).

    Raises:
        ValueError: x, slope or a parameter does not fit.
        Unsupported: the backend cannot serve the call.
    """
    _check(x, slope, parameters)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, *parameters = (tensor.to(kind) for tensor in (x, *parameters))  # type: ignore[assignment]
    with without_autocast(x):
        return _dense.run(backend, x, slope, *parameters)


def _check(x: Tensor, slope: float, parameters: Sequence[Tensor]) -> None:
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"x must be (B, C, *positions) with one to three position axes, got {tuple(x.shape)}")
    if slope < 0:
        raise ValueError(f"slope must not be negative, got {slope}")
    if not parameters or len(parameters) % 2:
        raise ValueError(f"parameters must be weights and biases in turn, got {len(parameters)}")
    channels = x.shape[1]
    for number, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True), 1):
        odd = all(size % 2 for size in weight.shape[2:])
        if weight.dim() != x.dim() or weight.shape[1] != channels or not odd or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"convolution {number} must have a weight (F, {channels}, {', '.join(['odd'] * (x.dim() - 2))}) and a "
                f"bias (F,), got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        channels += weight.shape[0]


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _CONVOLUTIONS[x.dim() - 2](x, weight, bias, padding=[size // 2 for size in weight.shape[2:]])


@_dense.register("naive")
def _dense_naive(x: Tensor, slope: float, *parameters: Tensor) -> Tensor:
    features = [x]
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        y = _convolved(torch.cat(features, 1), weight, bias)
        features.append(F.leaky_relu(y, slope))
    return y


@_dense.register("buffer")
def _dense_buffer(x: Tensor, slope: float, *parameters: Tensor) -> Tensor:
    return _buffered(x, slope, list(parameters))[0]


@torch.library.custom_op("convatlas::dense_conv", mutates_args=())
def _buffered(x: Tensor, slope: float, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The result, and x beside what every convolution but the last gave."""
    *earlier, (weight, bias) = zip(parameters[::2], parameters[1::2], strict=True)
    held = x.new_empty(x.shape[0], weight.shape[1], *x.shape[2:])
    held[:, : x.shape[1]] = x
    channels = x.shape[1]
    for each, offset in earlier:
        y = _convolved(held[:, :channels], each, offset)
        torch._C._nn.leaky_relu(y, slope, out=held[:, channels : channels + len(each)])
        channels += len(each)
    return _convolved(held, weight, bias), held


@_buffered.register_fake
def _(x: Tensor, slope: float, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    results, seen = parameters[-2].shape[:2]
    return x.new_empty(x.shape[0], results, *x.shape[2:]), x.new_empty(x.shape[0], seen, *x.shape[2:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.slope, parameters = inputs
    ctx.channels = x.shape[1]
    ctx.save_for_backward(output[1], *parameters)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    held, *parameters = ctx.saved_tensors
    gradients = _differentiated(grad, held, ctx.channels, ctx.slope, parameters)
    return gradients[0], None, gradients[1:]


@torch.library.custom_op("convatlas::dense_conv_backward", mutates_args=())
def _differentiated(grad: Tensor, held: Tensor, channels: int, slope: float, parameters: list[Tensor]) -> list[Tensor]:
    """Gradients of x and of each parameter."""
    passed = torch.zeros_like(held)  # what has come to each result so far
    found: list[Tensor] = []
    for weight, bias in zip(parameters[-2::-2], parameters[::-2], strict=True):
        seen = weight.shape[1]
        if found:
            width = slice(seen, seen + len(weight))
            # The sign of a leaky ReLU's result is that of what it got.
            grad = torch.ops.aten.leaky_relu_backward(passed[:, width], held[:, width], slope, True)
        ones = [1] * (held.dim() - 2)
        padding = [size // 2 for size in weight.shape[2:]]
        back, *of_parameters = torch.ops.aten.convolution_backward(
            *(grad, held[:, :seen], weight, [len(bias)], ones, padding, ones, False, [0] * len(ones), 1),
            [True, True, True],
        )
        passed[:, :seen] += back
        found = [*of_parameters, *found]
    return [passed[:, :channels].clone(), *found]


@_differentiated.register_fake
def _(grad: Tensor, held: Tensor, channels: int, slope: float, parameters: list[Tensor]) -> list[Tensor]:
    x = held.new_empty(held.shape[0], channels, *held.shape[2:])
    return [x, *(torch.empty_like(parameter) for parameter in parameters)]


_buffered.register_autograd(_backward, setup_context=_keep)
