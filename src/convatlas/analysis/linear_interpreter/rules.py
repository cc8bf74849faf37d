"""What a rule is: how one operation acts on z once its decisions for x0 are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["REGISTERED", "Call", "Frozen", "Mode", "Rule", "Track", "leaves_of", "name_of", "register_rule", "zero"]

#: Linearise by the secant through the origin, f(h) / h ("mask", as the paper), or by the derivative ("tangent").
Mode: TypeAlias = Literal["mask", "tangent"]


class Track(NamedTuple):
    """What is known of the way from x0 to a tensor: how many decisions lie on it, and whether the last is a gate."""

    decisions: int = 0
    gate: bool = False


class Frozen(NamedTuple):
    """One operation with its decisions made: z -> linear(z) + bias.

    Attributes:
        linear: given z of each moving tensor argument, in their order, returns z of the output.
        bias: what is added in the affine replay; a function makes it when it is needed. "missing": whatever the output
            at x0 has and ``linear`` of the arguments at x0 has not.
        many: whether ``linear`` returns a sequence with z of each leaf of the output (and ``bias`` a tuple, if any).
            Otherwise only the first leaf of the output moves.
        decides: whether a decision was made, as by any operation that is not linear itself.
        gate: whether the output is made to weight something, as that of a sigmoid.
        deferred: the name of the operation if ``linear`` runs only outside the forward pass.
    """

    linear: Callable[..., Any]
    bias: Tensor | float | tuple[Any, ...] | Callable[[], Tensor] | Literal["missing"] | None = None
    many: bool = False
    decides: bool = True
    gate: bool = False
    deferred: str = ""


class Call:
    """One call of an operation, a function or a module at x0.

    Args:
        function: the operation, function or module.
        args, kwargs: what it was given.
        output: what it returned.
        mode: "mask" or "tangent".
        tracks: of each of the ``leaves``, its `Track` if it is a tensor that moves with x0.

    Attributes:
        leaves: the arguments, flattened.
    """

    def __init__(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        mode: Mode,
        tracks: Sequence[Track | None],
    ) -> None:
        self.function, self.args, self.kwargs, self.output, self.mode = function, args, kwargs, output, mode
        self.leaves, self.tracks = leaves_of(args, kwargs), tracks

    def __getitem__(self, name: str) -> Any:
        """An argument of an operation by its name in the schema, or its default."""
        for index, argument in enumerate(self.function._schema.arguments):
            if argument.name == name:
                default = argument.default_value if argument.has_default_value() else None
                return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)
        raise KeyError(name)

    @cached_property
    def names(self) -> list[str]:
        """The name of the argument of an operation that each leaf belongs to."""
        given = [argument.name for argument in self.function._schema.arguments[: len(self.args)]]
        values = [*zip(given, self.args, strict=True), *self.kwargs.items()]
        return [name for name, value in values for _ in leaves_of((value,), {})]

    @cached_property
    def moving(self) -> list[int]:
        """The leaves that move with x0."""
        return [index for index, track in enumerate(self.tracks) if track is not None]

    @cached_property
    def moving_names(self) -> list[str]:
        """The arguments that the moving leaves of an operation belong to."""
        return [self.names[index] for index in self.moving]

    @property
    def values(self) -> list[Tensor]:
        """The moving tensors at x0."""
        return [self.leaves[index] for index in self.moving]

    def track(self, name: str) -> Track:
        """What is known of a moving argument."""
        return next(
            track for track, own in zip(self.tracks, self.names, strict=True) if own == name and track is not None
        )

    def on(self, *names: str, zeroed: Sequence[str] = ()) -> Callable[..., Any]:
        """The operation as a function of its moving arguments of these names.

        All others keep their values at x0, but those named in ``zeroed`` are zero. The values of the arguments that
        the function takes are not kept.
        """
        leaves, spec = tree_flatten((self.args, self.kwargs))
        slots = []
        for index, name in enumerate(self.names):
            if self.tracks[index] is not None and name in names:
                slots.append(index)
                leaves[index] = None
            elif name in zeroed:
                leaves[index] = zero(leaves[index])
        function = self.function

        def run(*z: Tensor) -> Any:
            given = list(leaves)
            for index, value in zip(slots, z, strict=True):
                given[index] = value
            args, kwargs = tree_unflatten(given, spec)
            return function(*args, **kwargs)

        return run


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments, flattened. Most hold nothing nested, and torch's own way through them is slow."""
    leaves: list[Any] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple | dict):
            leaves += tree_leaves(value)
        else:
            leaves.append(value)
    return leaves


def zero(value: Any) -> Any:
    """Zeros like a tensor, with one number in memory behind every element; the zero of a number's type; else None."""
    if isinstance(value, Tensor):
        return value.new_zeros(()).expand(value.shape)
    return None if value is None else type(value)(0)


#: See `register_rule`. NotImplemented stands for "not in this case".
Rule: TypeAlias = Callable[[Call], Any]
_R = TypeVar("_R", bound=Rule)

#: The user's rules by module type, function, or name of the operation.
REGISTERED: dict[Any, Rule] = {}


@overload
def register_rule(target: Any, rule: None = None) -> Callable[[_R], _R]: ...
@overload
def register_rule(target: Any, rule: _R) -> _R: ...
def register_rule(target: Any, rule: Rule | None = None) -> Any:
    """Say how a module, a function or an operation acts on z once its decisions for x0 are made.

    The rule is called with the `Call` at x0 and returns a function: given z of each tensor argument that depends on x0
    (in the order of the arguments), it returns z of the output and must be linear. What the output at x0 has beyond it
    becomes bias, so that no rule can break y = A x0 + r. A rule may also return a `Frozen`, which says more, or None if
    the output is to be constant. Rules registered here go before those of the package; the last registered counts.

        @register_rule(MyNorm)
        def my_norm(call):
            (h,) = call.args
            scale = 1 / h.std()
            return lambda z: z * scale

    Args:
        target: a subclass of `torch.nn.Module` (its subclasses follow), a function of torch such as
            ``torch.nn.functional.softmin``, or an operation such as ``torch.ops.aten.cumprod``.
        rule: the rule; without it, a decorator is returned.

    Raises:
        TypeError: target is none of these.
    """
    if rule is None:
        return lambda decorated: register_rule(target, decorated)
    if isinstance(target, torch._ops.OpOverload):
        key: Any = target.name()
    elif isinstance(target, torch._ops.OpOverloadPacket):
        key = str(target).replace(".", "::")
    elif callable(target) and not isinstance(target, nn.Module):
        if isinstance(target, type) and not issubclass(target, nn.Module):
            raise TypeError(f"target must be a module type, a function or an operation, got {target.__name__}")
        key = target
    else:
        raise TypeError(f"target must be a module type, a function or an operation, got {type(target).__name__}")
    REGISTERED[key] = rule
    return rule


def name_of(function: Any) -> str:
    """How messages call an operation, function or module."""
    if isinstance(function, nn.Module):
        return type(function).__name__
    if isinstance(function, torch._ops.OpOverload):
        return str(function.name())
    return str(getattr(function, "__name__", function))
