"""Operations that decide: pointwise units, pooling, normalisation, softmax and attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convatlas.analysis.linear_interpreter.rules import Call, Frozen, Rule

__all__ = ["NONLINEAR_RULES", "SMALLEST"]

_aten = torch.ops.aten

#: Rules by the name of the operation.
NONLINEAR_RULES: dict[str, Rule] = {}

#: Inputs of a pointwise unit that are no larger than this count as 0: the slope of their secant is 1.
SMALLEST = 1e-12


# -- piecewise linear through the origin: secant and tangent are the same ----------------------------------------------


def _relu(call: Call) -> Frozen:
    mask = call["self"] > 0
    return Frozen(lambda z: z * mask)


def _leaky(slope: Callable[[Call], Any]) -> Rule:
    def rule(call: Call) -> Frozen:
        if call.moving != [0]:
            return NotImplemented
        mask, below = call["self"] > 0, slope(call)
        return Frozen(lambda z: torch.where(mask, z, z * below))

    return rule


def _hard_shrink(call: Call) -> Frozen:
    mask = call["self"].abs() > call["lambd"]
    return Frozen(lambda z: z * mask)


NONLINEAR_RULES |= {
    "aten::relu": _relu,
    "aten::leaky_relu": _leaky(lambda call: call["negative_slope"]),
    "aten::_prelu_kernel": _leaky(lambda call: call["weight"]),
    "aten::rrelu_with_noise": _leaky(lambda call: (call["lower"] + call["upper"]) / 2),
    "aten::hardshrink": _hard_shrink,
}


# -- other pointwise units ---------------------------------------------------------------------------------------------

#: Derivative of each unit from its input h and output f.
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor, Call], Any]] = {
    "tanh": lambda h, f, _: 1 - f**2,
    "sigmoid": lambda h, f, _: f * (1 - f),
    "gelu": lambda h, f, call: _aten.gelu_backward(torch.ones_like(h), h, approximate=call["approximate"]),
    "silu": lambda h, f, _: _aten.silu_backward(torch.ones_like(h), h),
    "mish": lambda h, f, _: _aten.mish_backward(torch.ones_like(h), h),
    "hardswish": lambda h, f, _: _aten.hardswish_backward(torch.ones_like(h), h),
    "hardsigmoid": lambda h, f, _: _aten.hardsigmoid_backward(torch.ones_like(h), h),
    "hardtanh": lambda h, f, call: (h > call["min_val"]) & (h < call["max_val"]),
    "elu": lambda h, f, call: _aten.elu_backward(
        torch.ones_like(h), call["alpha"], call["scale"], call["input_scale"], False, h
    ),
    "celu": lambda h, f, call: (h.clamp(max=0) / call["alpha"]).exp(),
    "softplus": lambda h, f, call: _aten.softplus_backward(torch.ones_like(h), h, call["beta"], call["threshold"]),
    "log_sigmoid_forward": lambda h, f, _: torch.sigmoid(-h),
    "softshrink": lambda h, f, call: h.abs() > call["lambd"],
    "threshold": lambda h, f, call: h > call["threshold"],
    "clamp": lambda h, f, call: _within(h, call["min"], call["max"]),
    "clamp_min": lambda h, f, call: _within(h, call["min"], None),
    "clamp_max": lambda h, f, call: _within(h, None, call["max"]),
    "abs": lambda h, f, _: h.sgn(),
    "sqrt": lambda h, f, _: 0.5 / f,
    "rsqrt": lambda h, f, _: -0.5 * f / h,
    "reciprocal": lambda h, f, _: -f * f,
    "pow": lambda h, f, call: call["exponent"] * h ** (call["exponent"] - 1),
    "exp": lambda h, f, _: f,
    "expm1": lambda h, f, _: f + 1,
    "log": lambda h, f, _: 1 / h,
    "log1p": lambda h, f, _: 1 / (1 + h),
    "log2": lambda h, f, _: 1 / (h * math.log(2)),
    "log10": lambda h, f, _: 1 / (h * math.log(10)),
    "sin": lambda h, f, _: h.cos(),
    "cos": lambda h, f, _: -h.sin(),
    "tan": lambda h, f, _: 1 + f**2,
    "atan": lambda h, f, _: 1 / (1 + h**2),
    "sinh": lambda h, f, _: h.cosh(),
    "cosh": lambda h, f, _: h.sinh(),
    "asinh": lambda h, f, _: 1 / (h**2 + 1).sqrt(),
    "erf": lambda h, f, _: 2 / math.sqrt(math.pi) * (-(h**2)).exp(),
}
_GATES = ("sigmoid", "hardsigmoid", "softplus")


def _within(h: Tensor, low: Any, high: Any) -> Tensor:
    inside = torch.ones_like(h, dtype=torch.bool)
    if low is not None:
        inside &= h >= low
    if high is not None:
        inside &= h <= high
    return inside


def _pointwise(name: str) -> Rule:
    """Secant through the origin, f(h) / h, or tangent."""

    def rule(call: Call) -> Frozen:
        if call.moving != [0]:
            return NotImplemented
        (h,) = call.values
        f = call.output if isinstance(call.output, Tensor) else call.output[0]
        if h.is_complex() and not f.is_complex():  # the modulus: Re(z h*) / |h|
            direction = h.sgn()
            return Frozen(lambda z: z.real * direction.real + z.imag * direction.imag)
        if call.mode == "tangent":
            slope = _DERIVATIVES[name](h, f, call)
            bias = f - slope * h
            left = bias != 0
        else:
            left = h.abs() <= SMALLEST
            slope = torch.where(left, 1, f / torch.where(left, 1, h))
            bias = torch.where(left, f - h, 0)
        return Frozen(lambda z: z * slope, bias if bool(left.any()) else None, gate=name in _GATES)

    return rule


NONLINEAR_RULES |= {f"aten::{name}": _pointwise(name) for name in _DERIVATIVES}


def _glu(call: Call) -> Frozen:
    """a * sigmoid(b)."""
    dim, (a, b) = call["dim"], call["self"].chunk(2, call["dim"])
    gate = b.sigmoid()
    if call.mode == "mask":
        return Frozen(lambda z: z.chunk(2, dim)[0] * gate)
    slope = a * gate * (1 - gate)
    return Frozen(lambda z: z.chunk(2, dim)[0] * gate + z.chunk(2, dim)[1] * slope, "missing")


def _larger(sign: int) -> Rule:
    """The larger, or the smaller, of two tensors."""

    def rule(call: Call) -> Frozen:
        a, b, moving = call["self"], call["other"], call.moving_names
        mask = a >= b if sign > 0 else a <= b
        if len(moving) == 2:
            return Frozen(lambda x, y: torch.where(mask, x, y))
        if moving == ["self"]:
            return Frozen(lambda z: torch.where(mask, z, 0), torch.where(mask, 0, b))
        return Frozen(lambda z: torch.where(mask, 0, z), torch.where(mask, a, 0))

    return rule


NONLINEAR_RULES |= {"aten::glu": _glu, "aten::maximum": _larger(1), "aten::minimum": _larger(-1)}


# -- choices: the place that was chosen for x0 is read -----------------------------------------------------------------


def _pooled(dims: int) -> Rule:
    """Max-pooling over the last ``dims`` axes, by the indices that it returns."""

    def rule(call: Call) -> Frozen:
        shape, places = call.output[0].shape, call.output[1].flatten(-dims)
        return Frozen(lambda z: z.flatten(-dims).gather(-1, places).view(shape))

    return rule


def _picked(call: Call) -> Frozen:
    """The values of sort, topk, max, ... along one axis, by the indices that they return."""
    dim, places = call["dim"], call.output[1]
    if places.dim() == call["self"].dim():
        return Frozen(lambda z: z.gather(dim, places))
    places = places.unsqueeze(dim)
    return Frozen(lambda z: z.gather(dim, places).squeeze(dim))


def _extreme(call: Call) -> Frozen:
    """The largest or smallest over several axes; equal ones share."""
    h, named = call["self"], call.function._schema.name in ("aten::amax", "aten::amin")
    dims = tuple(call["dim"]) or tuple(range(h.dim())) if named else tuple(range(h.dim()))
    keep = call["keepdim"] if named else False
    value = call.output
    for dim in sorted(dim % h.dim() for dim in dims) if not keep and h.dim() else ():
        value = value.unsqueeze(dim)
    share = (h == value).to(h.dtype)
    share /= share.sum(dims, keepdim=True)
    return Frozen(lambda z: (z * share).sum(dims, keepdim=keep))


NONLINEAR_RULES |= {
    **{f"aten::{name}": _pooled(2) for name in ("max_pool2d_with_indices", "adaptive_max_pool2d")},
    **{f"aten::{name}": _pooled(3) for name in ("max_pool3d_with_indices", "adaptive_max_pool3d")},
    **{f"aten::fractional_max_pool{dims}d": _pooled(dims) for dims in (2, 3)},
    **{f"aten::{name}": _picked for name in ("sort", "topk", "kthvalue", "median.dim", "mode", "max.dim", "min.dim")},
    **{f"aten::{name}": _picked for name in ("cummax", "cummin")},
    **{f"aten::{name}": _extreme for name in ("amax", "amin", "max", "min")},
}


# -- normalisation: statistics are frozen ------------------------------------------------------------------------------


def _normalised(
    call: Call, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, dims: tuple[int, ...]
) -> Any:
    """(h - mean) * rstd * weight + bias, where ``dims`` are the axes of the statistics; all tensors broadcast."""
    if call.moving != [0]:
        return NotImplemented

    def scaled(z: Tensor) -> Tensor:
        return z * rstd if weight is None else z * rstd * weight

    if call.mode == "tangent" and dims:
        (h,) = call.values
        normal = (h if mean is None else h - mean) * rstd

        def tangent(z: Tensor) -> Tensor:
            centred = z if mean is None else z - z.mean(dims, keepdim=True)
            return scaled(centred - normal * (normal * z).mean(dims, keepdim=True))

        return Frozen(tangent, "missing")
    if mean is None:
        return Frozen(scaled)
    # The product can be as large as h, so it is made when needed.
    return Frozen(scaled, lambda: -scaled(mean) if bias is None else bias - scaled(mean), decides=bool(dims))


def _parameters(call: Call) -> tuple[Any, Any]:
    """Weight and bias over the channels, on axis 1."""
    shape = (-1, *[1] * (call["input"].dim() - 2))
    weight, bias = call["weight"], call["bias"]
    return None if weight is None else weight.view(shape), None if bias is None else bias.view(shape)


def _batch_norm(call: Call) -> Any:
    """With running statistics, or with those of h as in instance norm."""
    h, epsilon = call["input"], call.args[-1]
    names = [argument.name for argument in call.function._schema.arguments]
    if "training" in names and call["training"]:
        dims: tuple[int, ...] = (0, *range(2, h.dim()))
        mean, variance = h.mean(dims, keepdim=True), h.var(dims, correction=0, keepdim=True)
    else:
        shape = (-1, *[1] * (h.dim() - 2))
        dims, mean, variance = (), call["running_mean"].view(shape), call["running_var"].view(shape)
    return _normalised(call, mean, (variance + epsilon).rsqrt(), *_parameters(call), dims)


def _layer_norm(call: Call) -> Any:
    dims = tuple(range(-len(call["normalized_shape"]), 0))
    return _normalised(call, call.output[1], call.output[2], call["weight"], call["bias"], dims)


def _rms_norm(call: Call) -> Any:
    dims = tuple(range(-len(call["normalized_shape"]), 0))
    return _normalised(call, None, call.output[1], call["weight"], None, dims)


def _group_norm(call: Call) -> Any:
    h, groups = call["input"], call["group"]
    samples, channels, each = h.shape[0], h.shape[1], h.shape[1] // groups
    weight, bias = _parameters(call)
    mean, rstd = (
        part.repeat_interleave(each, 1).view(samples, channels, *[1] * (h.dim() - 2)) for part in call.output[1:]
    )
    frozen = _normalised(call, mean, rstd, weight, bias, tuple(range(2, h.dim())))
    if call.mode == "mask" or frozen is NotImplemented:
        return frozen
    normal = ((h - mean) * rstd).reshape(samples, groups, -1)

    def tangent(z: Tensor) -> Tensor:
        flat = z.reshape(samples, groups, -1)
        flat = flat - flat.mean(2, keepdim=True) - normal * (normal * flat).mean(2, keepdim=True)
        result = flat.reshape(z.shape) * rstd
        return result if weight is None else result * weight

    return Frozen(tangent, "missing")


NONLINEAR_RULES |= {
    **{f"aten::{name}": _batch_norm for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")},
    "aten::_native_batch_norm_legit": _batch_norm,
    "aten::_native_batch_norm_legit_no_training": _batch_norm,
    "aten::_batch_norm_no_update": _batch_norm,
    "aten::native_layer_norm": _layer_norm,
    "aten::_fused_rms_norm": _rms_norm,
    "aten::native_group_norm": _group_norm,
}


# -- statistics as operations of their own -----------------------------------------------------------------------------


def _vector_norm(call: Call) -> Frozen:
    """|h|_2 or |h|_1: secant and tangent are the same."""
    named = call.function._schema.name == "aten::linalg_vector_norm"
    order, h = call["ord" if named else "p"], call["self"]
    names = [argument.name for argument in call.function._schema.arguments]
    dims = tuple(call["dim"] or ()) if "dim" in names else ()
    dims = dims or tuple(range(h.dim()))
    keep = call["keepdim"] if "keepdim" in names else False
    if order not in (None, 1, 2) or h.is_complex():
        return NotImplemented
    if order == 1:
        sign = h.sign()
        return Frozen(lambda z: (z * sign).sum(dims, keepdim=keep))
    norm = torch.linalg.vector_norm(h, dim=dims, keepdim=True)
    direction = torch.where(norm > 0, h / torch.where(norm > 0, norm, 1), 0)
    return Frozen(lambda z: (z * direction).sum(dims, keepdim=keep))


def _variance(call: Call) -> Frozen:
    """Variance or standard deviation, alone or before the mean: a product of h less its mean with itself."""
    name, h = call.function._schema.name, call["self"]
    dims = tuple(call["dim"] or range(h.dim()))
    keep, correction = call["keepdim"], call["correction"]
    count = math.prod(h.shape[dim] for dim in dims) - (1 if correction is None else correction)
    centred = (h - h.mean(dims, keepdim=True)) / count
    if "std" in name:
        deviation = h.std(dims, correction=1 if correction is None else correction, keepdim=True)
        centred = torch.where(deviation > 0, centred / torch.where(deviation > 0, deviation, 1), 0)
    elif call.mode == "tangent":
        centred = 2 * centred

    def linear(z: Tensor) -> Any:
        spread = (z * centred).sum(dims, keepdim=keep)
        return (spread, z.mean(dims, keepdim=keep)) if name.endswith("_mean") else spread

    bias: Any = None
    if "std" not in name and call.mode == "tangent":
        variance = call.output[0] if name.endswith("_mean") else call.output
        bias = (-variance, None) if name.endswith("_mean") else -variance
    return Frozen(linear, bias, many=name.endswith("_mean"))


NONLINEAR_RULES |= {
    "aten::linalg_vector_norm": _vector_norm,
    "aten::norm": _vector_norm,
    **{f"aten::{name}.correction": _variance for name in ("var", "std", "var_mean", "std_mean")},
}


# -- softmax and attention: the map is a frozen gate -------------------------------------------------------------------


def _softmax(call: Call) -> Frozen | None:
    if call.mode == "mask":
        return None
    p, dim = call.output, call["dim"]

    def tangent(z: Tensor) -> Tensor:
        z = torch.where(p > 0, z, 0)  # what a mask excludes is minus infinity
        return p * (z - (p * z).sum(dim, keepdim=True))

    return Frozen(tangent, "missing")


def _log_softmax(call: Call) -> Frozen | None:
    if call.mode == "mask":
        return None
    p, dim = call.output.exp(), call["dim"]
    return Frozen(lambda z: z - (p * z).sum(dim, keepdim=True), "missing")


def _attention(call: Call) -> Any:
    """Attention in one operation: softmax(q k^T * scale + mask) v."""
    names = [argument.name for argument in call.function._schema.arguments]
    moving = call.moving_names
    q, k, v = call["query"], call["key"], call["value"]
    scale = call["scale"]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    added = next((call[name] for name in ("attn_mask", "attn_bias") if name in names and call[name] is not None), None)
    causal = call["is_causal"]
    if not set(moving) <= {"query", "key", "value"}:
        return NotImplemented

    def attention() -> Tensor:
        scores = q @ k.mT * scale
        if causal:
            above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(above, -math.inf)
        return (scores if added is None else scores + added).softmax(-1)

    if call.mode == "mask":
        index = moving.index("value") if "value" in moving else None
        return None if index is None else Frozen(lambda *z: attention() @ z[index])

    def tangent(*z: Tensor) -> Tensor:
        given, p = dict(zip(moving, z, strict=True)), attention()
        result = p @ given["value"] if "value" in given else torch.zeros((), dtype=v.dtype, device=v.device)
        if "query" in given or "key" in given:
            parts = [given["query"] @ k.mT] if "query" in given else []
            parts += [q @ given["key"].mT] if "key" in given else []
            scores = scale * (parts[0] if len(parts) == 1 else parts[0] + parts[1])
            result = result + (p * (scores - (p * scores).sum(-1, keepdim=True))) @ v
        return result

    return Frozen(tangent, "missing")


def _sampled(call: Call) -> Any:
    """Sampling at the places of a grid, which is frozen."""
    image, grid, options, moving = call["input"], call["grid"], call.args[2:], call.moving_names
    sample = getattr(_aten, call.function._schema.name.removeprefix("aten::"))
    back = getattr(_aten, call.function._schema.name.removeprefix("aten::") + "_backward")
    if moving == ["input"]:
        return Frozen(lambda z: sample(z, grid, *options), decides=False)
    if call.mode == "mask":
        return Frozen(lambda x, y: sample(x, grid, *options)) if "input" in moving else None
    slopes = []
    for channel in range(image.shape[1]):
        one = torch.zeros_like(call.output)
        one[:, channel] = 1
        slopes.append(back(one, image, grid, *options, [False, True])[1])
    slope = torch.stack(slopes, 1)

    def tangent(*z: Tensor) -> Tensor:
        change = (z[-1].unsqueeze(1) * slope).sum(-1)
        return sample(z[0], grid, *options) + change if len(z) > 1 else change

    return Frozen(tangent, "missing")


def _constant(call: Call) -> None:
    """Piecewise constant."""
    return None


NONLINEAR_RULES |= {
    "aten::_softmax": _softmax,
    "aten::_safe_softmax": _softmax,
    "aten::_log_softmax": _log_softmax,
    **{
        f"aten::_scaled_dot_product_{kind}": _attention
        for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    },
    **{f"aten::grid_sampler_{dims}d": _sampled for dims in (2, 3)},
    **{f"aten::{name}": _constant for name in ("floor", "ceil", "round", "trunc", "sign", "sgn")},
}
