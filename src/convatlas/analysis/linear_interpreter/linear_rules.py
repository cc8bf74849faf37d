"""Operations that are linear already, sums with constants, and products, of which one factor is frozen."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from convatlas.analysis.linear_interpreter.rules import Call, Frozen, Rule, zero

__all__ = ["CONSTANT", "LINEAR_RULES", "view_rule"]

_aten = torch.ops.aten

#: Rules by the name of the operation.
LINEAR_RULES: dict[str, Rule] = {}

#: Operations whose output has the shape or type of the argument, but not its values.
CONSTANT = frozenset(
    f"aten::{name}"
    for name in (
        *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
    )
)

#: Operations that are linear in the named arguments together, whatever the others are.
_LINEAR = {
    ("self",): (
        *("sum", "mean", "cumsum", "trace", "neg", "flip", "roll", "rot90", "repeat", "tril", "triu", "diag_embed"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
        *("adaptive_avg_pool1d", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "max_unpool2d"),
        *("replication_pad1d", "replication_pad2d", "replication_pad3d", "max_unpool3d"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "im2col", "col2im"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d"),
        *("_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d"),
        *("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
        *("gather", "index", "_unsafe_index", "index_select", "take", "masked_select"),
        *("_fft_r2c", "_fft_c2c", "_fft_c2r", "unsafe_split", "unsafe_split_with_sizes"),
    ),
    ("theta",): ("affine_grid_generator",),
    ("tensors",): ("cat", "stack"),
    ("real", "imag"): ("complex",),
    ("self", "end"): ("lerp",),
    ("self", "other"): ("where",),
    ("self", "value"): ("masked_fill", "scatter.value"),
    ("self", "src"): ("scatter", "scatter_add", "slice_scatter", "select_scatter", "diagonal_scatter"),
    ("self", "source"): ("index_add", "index_copy", "masked_scatter"),
    ("self", "values"): ("index_put", "_index_put_impl", "_unsafe_index_put"),
}


def _together(*names: str) -> Rule:
    """The rule of an operation that is linear in all the named arguments together."""

    def rule(call: Call) -> Any:
        moving = call.moving_names
        many = not isinstance(call.output, Tensor)
        if set(moving) <= set(names):
            return Frozen(call.on(*names, zeroed=names), _rest(call, names), many, decides=False)
        # Another argument, such as the grid of a sampler, moves too: it is frozen at its value.
        if call.mode == "tangent":
            return NotImplemented
        if not set(moving) & set(names):
            return None
        linear = call.on(*names, zeroed=names)
        picked = [index for index, name in enumerate(moving) if name in names]
        return Frozen(lambda *z: linear(*(z[index] for index in picked)), _rest(call, names))

    return rule


def _rest(call: Call, names: tuple[str, ...]) -> Tensor | None:
    """What the constants among the named arguments contribute."""
    constants = [
        value
        for value, name, track in zip(call.leaves, call.names, call.tracks, strict=True)
        if name in names and track is None and value is not None
    ]
    if not any(bool(value.any()) if isinstance(value, Tensor) else value for value in constants):
        return None
    zeros = [zero(call.leaves[index]) for index in call.moving if call.names[index] in names]
    bias: Tensor = call.on(*names)(*zeros)
    return bias


for _names, _operations in _LINEAR.items():
    LINEAR_RULES |= {f"aten::{operation}": _together(*_names) for operation in _operations}


def _pad(call: Call) -> Frozen:
    pad, value = call["pad"], call["value"]
    bias = _aten.constant_pad_nd(zero(call["self"]), pad, value) if value else None
    return Frozen(lambda z: _aten.constant_pad_nd(z, pad), bias, decides=False)


def _cast(call: Call) -> Frozen:
    dtype, device = call.output.dtype, call.output.device
    if call.values[0].is_complex() and not dtype.is_complex:
        return Frozen(lambda z: z.real.to(dtype=dtype, device=device), decides=False)
    return Frozen(lambda z: z.to(dtype=dtype, device=device), decides=False)


def _spread(call: Call) -> Frozen:
    """The one moving argument in the shape and type of the output."""
    shape, dtype = call.output.shape, call.output.dtype
    return Frozen(lambda z: z.to(dtype).expand(shape), decides=False)


def _same(call: Call) -> Frozen:
    return Frozen(lambda z: z, decides=False)


def _conjugate(call: Call) -> Frozen:
    # A view that conjugates when it is read would not be read so within a forward pass.
    return Frozen(lambda z: torch.complex(z.real, -z.imag), decides=False)


def _negated(call: Call) -> Frozen:
    return Frozen(lambda z: -z, decides=False)


LINEAR_RULES |= {
    "aten::constant_pad_nd": _pad,
    "aten::_to_copy": _cast,
    "aten::copy": _spread,
    "aten::fill": _spread,
    **{f"aten::{name}": _conjugate for name in ("_conj", "_conj_physical", "conj_physical")},
    "aten::_neg_view": _negated,
    **{f"aten::{name}": _same for name in ("clone", "alias", "detach", "lift_fresh", "lift_fresh_copy")},
}


# -- views -------------------------------------------------------------------------------------------------------------


@cache
def view_rule(function: Any) -> Rule | None:
    """The rule of an operation that returns views of its first argument; None for any other."""
    if function.name() in ("aten::view.dtype", "aten::resize_", "aten::resize_as_", "aten::as_strided_"):
        return None
    returns = [entry.alias_info for entry in function._schema.returns]
    arguments = [entry.alias_info for entry in function._schema.arguments]
    inplace = torch.Tag.inplace_view in function.tags
    aliases = bool(returns) and all(alias is not None and (inplace or not alias.is_write) for alias in returns)
    return _view if aliases and bool(arguments) and arguments[0] is not None else None


def _view(call: Call) -> Frozen:
    name = call.function._schema.name.removeprefix("aten::")
    if name in ("view", "_reshape_alias"):
        shape = call.output.shape
        return Frozen(lambda z: z.reshape(shape), decides=False)
    if name == "view_as_complex":
        return Frozen(lambda z: torch.view_as_complex(z.contiguous()), decides=False)
    if name == "as_strided":
        return _as_strided(call)
    # Of a view in place, the form that leaves its argument alone.
    function, rest, options = getattr(_aten, name.removesuffix("_")), call.args[1:], call.kwargs
    return Frozen(lambda z: function(z, *rest, **options), many=not isinstance(call.output, Tensor), decides=False)


def _unsafe_view(call: Call) -> Frozen:
    shape = call.output.shape
    return Frozen(lambda z: z.reshape(shape), decides=False)


def _as_strided(call: Call) -> Frozen:
    """Gather by the positions that the view reads, because z may lie otherwise in memory than h."""
    (h,) = call.values
    reach = h.untyped_storage().nbytes() // h.element_size()
    where = torch.zeros(reach, dtype=torch.long, device=h.device)
    where.as_strided(h.shape, h.stride(), h.storage_offset()).copy_(
        torch.arange(h.numel(), device=h.device).view(h.shape)
    )
    seen = where.as_strided(call.output.shape, call.output.stride(), call.output.storage_offset()).clone()
    return Frozen(lambda z: z.reshape(-1)[seen], decides=False)


LINEAR_RULES |= {"aten::_unsafe_view": _unsafe_view}


# -- sums --------------------------------------------------------------------------------------------------------------


def _sum(weigh: Callable[[Any], tuple[Any, Any]]) -> Rule:
    """The rule of a * self + b * other, where (a, b) = weigh(alpha)."""

    def rule(call: Call) -> Frozen:
        weights = dict(zip(("self", "other"), weigh(call["alpha"]), strict=True))
        shape, dtype, moving = call.output.shape, call.output.dtype, call.moving_names
        scales = [weights.pop(name) for name in moving] if len(moving) == 1 else list(weights.values())

        def linear(*z: Tensor) -> Tensor:
            first, *others = (part if scale == 1 else part * scale for part, scale in zip(z, scales, strict=True))
            return sum(others, start=first).to(dtype).expand(shape)

        if len(moving) == 2:
            return Frozen(linear, decides=False)
        ((constant, scale),) = weights.items()
        return Frozen(linear, call[constant] if scale == 1 else call[constant] * scale, decides=False)

    return rule


LINEAR_RULES |= {
    "aten::add": _sum(lambda alpha: (1, alpha)),
    "aten::sub": _sum(lambda alpha: (1, -alpha)),
    "aten::rsub": _sum(lambda alpha: (-alpha, 1)),
}


# -- products ----------------------------------------------------------------------------------------------------------


def _product(call: Call, operation: Callable[[Any, Any], Any], a: str, b: str, *, tie: str) -> Frozen:
    """a times b. Where both move, one is the frozen gate in mask mode; the tangent is the product rule."""
    moving, first, second = call.moving_names, call[a], call[b]
    if a not in moving:
        return Frozen(lambda z: operation(first, z), decides=False)
    if b not in moving:
        return Frozen(lambda z: operation(z, second), decides=False)
    if call.mode == "tangent":
        return Frozen(lambda x, y: operation(x, second) + operation(first, y), "missing")
    if (_gate(call, a, b) or tie) == a:
        return Frozen(lambda x, y: operation(first, y))
    return Frozen(lambda x, y: operation(x, second))


def _gate(call: Call, a: str, b: str) -> str | None:
    """Which of two moving factors is the gate; None if nothing tells them apart.

    It is the one that comes last from a gating unit such as a sigmoid; else the smaller one of an elementwise product,
    which is broadcast; else the one behind more decisions. A kernel is always the gate of what it is applied to.
    """
    if call.function._schema.name in ("aten::convolution", "aten::linear"):
        return b
    first, second = call.track(a), call.track(b)
    if first.gate != second.gate:
        return a if first.gate else b
    sizes = call[a].numel(), call[b].numel()
    if call.function._schema.name == "aten::mul" and sizes[0] != sizes[1]:
        return a if sizes[0] < sizes[1] else b
    if first.decisions != second.decisions:
        return a if first.decisions > second.decisions else b
    return None


def _multiply(call: Call) -> Frozen:
    return _product(call, torch.mul, "self", "other", tie="other")


def _matrix_product(a: str, b: str) -> Rule:
    # Of query and key, or of attention and value, the first is frozen.
    return lambda call: _product(call, call.function, a, b, tie=a)


def _bilinear(call: Call) -> Any:
    """The operation of `torch.nn.Bilinear`."""
    weight, expansions = call["i2"], call.args[3:]
    if "i2" in call.moving_names:
        return NotImplemented
    return _product(call, lambda x, y: _aten._trilinear(x, weight, y, *expansions), "i1", "i3", tie="i3")


LINEAR_RULES |= {
    "aten::_trilinear": _bilinear,
    "aten::mul": _multiply,
    "aten::mm": _matrix_product("self", "mat2"),
    "aten::bmm": _matrix_product("self", "mat2"),
    "aten::mv": _matrix_product("self", "vec"),
    "aten::dot": _matrix_product("self", "tensor"),
    "aten::matmul": _matrix_product("self", "other"),
}


def _product_plus(
    call: Call, operation: Callable[[Any, Any], Any], a: str, b: str, added: str, place: Callable[[Any], Any]
) -> Frozen:
    """operation(a, b) + place(added); no bias if ``added`` is None."""
    moving, value = call.moving_names, call[added]
    if added not in moving:
        product = _product(call, operation, a, b, tie=a)
        return product if value is None or product.bias == "missing" else product._replace(bias=place(value))
    position = moving.index(added)
    if len(moving) == 1:
        shape = call.output.shape
        return Frozen(lambda z: place(z).expand(shape), operation(call[a], call[b]), decides=False)
    product = _product(call, operation, a, b, tie=a)
    inner = product.linear
    return product._replace(linear=lambda *z: inner(*z[:position], *z[position + 1 :]) + place(z[position]))


def _fused(operation: Callable[[Any, Any], Any], a: str, b: str, scale: str = "alpha") -> Rule:
    """The rule of beta * self + alpha * operation(a, b), in one operation."""

    def rule(call: Call) -> Frozen:
        alpha, beta = call[scale], 1 if scale == "value" else call["beta"]
        scaled = operation if alpha == 1 else lambda x, y: operation(x, y) * alpha
        return _product_plus(call, scaled, a, b, "self", lambda added: added if beta == 1 else added * beta)

    return rule


def _convolution(call: Call) -> Frozen:
    """Convolution and transposed convolution."""
    geometry, channels = call.args[3:], (-1, *[1] * (call["weight"].dim() - 2))

    def convolve(x: Tensor, weight: Tensor) -> Any:
        return _aten.convolution(x, weight, None, *geometry)

    return _product_plus(call, convolve, "input", "weight", "bias", lambda bias: bias.reshape(channels))


def _linear(call: Call) -> Frozen:
    return _product_plus(call, torch.nn.functional.linear, "input", "weight", "bias", lambda bias: bias)


def _divide(call: Call) -> Frozen | None:
    """The divisor is frozen."""
    if call.function._overloadname.endswith("_mode") and call["rounding_mode"]:
        return None
    moving, numerator, divisor, quotient = call.moving_names, call["self"], call["other"], call.output
    if moving == ["self"]:
        return Frozen(lambda z: z / divisor, decides=False)
    if call.mode == "mask":
        if moving == ["other"]:
            return Frozen(lambda z: z * (numerator / divisor**2))  # c / h by the secant through the origin
        return Frozen(lambda x, y: x / divisor)
    if moving == ["other"]:
        return Frozen(lambda z: -quotient * z / divisor, "missing")
    return Frozen(lambda x, y: (x - quotient * y) / divisor, "missing")


LINEAR_RULES |= {
    "aten::addmm": _fused(torch.mm, "mat1", "mat2"),
    "aten::addmv": _fused(torch.mv, "mat", "vec"),
    "aten::baddbmm": _fused(torch.bmm, "batch1", "batch2"),
    "aten::addbmm": _fused(lambda x, y: torch.bmm(x, y).sum(0), "batch1", "batch2"),
    "aten::addcmul": _fused(torch.mul, "tensor1", "tensor2", "value"),
    "aten::convolution": _convolution,
    "aten::linear": _linear,
    "aten::div": _divide,
}
