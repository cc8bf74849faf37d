"""Exchange, insert and remove layers of any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from convatlas.errors import Unsupported
from convatlas.nn.drop import DropPath
from convatlas.nn.scale import LayerScale
from convatlas.surgery.selection import (
    Call,
    Selector,
    Slot,
    Surgery,
    as_inputs,
    has_hooks,
    like,
    observe,
    place,
    selected,
    tensors,
    undisturbed,
    working_copy,
)

__all__ = ["insert", "remove", "swap"]

ExampleInput = Tensor | tuple[Any, ...] | None

_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
)
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Softmax),
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, DropPath)
_KEEP_SHAPE = (*_NORMS, *_ACTIVATIONS, *_DROPOUTS, LayerScale)
_CHANNEL_NAMES = ("out_channels", "out_features", "num_features", "num_channels", "channels")


def swap(
    model: nn.Module,
    kind: Selector,
    layer: Callable[..., nn.Module],
    *,
    where: Selector | None = None,
    example_input: ExampleInput = None,
    inplace: bool = False,
    **options: Any,
) -> Surgery:
    """Replace every module of a kind by a layer that takes its place.

    With an example call each new layer is tried on what the old one was called with, and in the model; one that fails
    or returns another shape is not placed. Modules that the model does not call are left, because others may read
    their weights. A module that stands in several places is replaced by one layer in all of them. Inside a replaced
    module nothing else is replaced.

    Args:
        model: any model; left as it is.
        kind: which modules.
        layer: conv-like layer, made by ``layer.from_conv(module, **options)``; or any function
            ``layer(module, **options)`` that returns the new module. `ValueError` (as `Unsupported`) raised there is
            the reason why a module is skipped.
        where: a further condition on the modules, e.g. a pattern of names ``"layer4.*"``.
        example_input: input, or tuple of inputs, of an example call; by default ``model.example_inputs()`` where there
            is such a method, else nothing is tried.
        inplace: change the model itself instead of a copy.
        **options: passed to the layer.

    Raises:
        ValueError: an argument is of a wrong kind.
        Unsupported: nothing was replaced.
    """
    if not callable(layer):
        raise ValueError(f"layer must be a conv-like layer or a function of a module, got {layer!r}")
    make = getattr(layer, "from_conv", layer)

    def replacement(slot: Slot, calls: list[Call] | None) -> nn.Module:
        if isinstance(layer, type) and isinstance(slot.module, layer):
            raise Unsupported(f"it is a {layer.__name__} already")
        if has_hooks(slot.module):
            raise Unsupported("it has forward hooks, which would be lost")
        return make(slot.module, **options)

    def fits(new: nn.Module, call: Call) -> None:
        _try(new, call.args, call.kwargs, call.output)

    return _edit("swapped", model, kind, where, example_input, inplace, replacement, fits)


def insert(
    model: nn.Module,
    layer: Callable[..., nn.Module],
    *,
    after: Selector | None = None,
    at: Selector | None = None,
    where: Selector | None = None,
    example_input: ExampleInput = None,
    inplace: bool = False,
    **options: Any,
) -> Surgery:
    """Put a shape-keeping layer after modules of the model, or into its empty slots.

    After a module m stands ``nn.Sequential(m, layer)`` in its place, so its weights get the prefix ``0.``: load
    checkpoints of the original before. Empty slots are identities, such as ``attention`` in the residual blocks of
    `convatlas.networks.resnet`: ``insert(model, ECA, at="*.attention")``. Channels come from the module where it tells
    them (``out_channels``, ``out_features``, ``num_features``, the last of ``normalized_shape``), else from axis 1 of
    its output in the example call. With an example call each layer is tried on that output and must keep its shape.

    Args:
        model: any model; left as it is.
        layer: ``layer(channels, **options)`` makes a layer. `ValueError` raised there is the reason why a place is
            skipped.
        after: which modules to stand behind.
        at: which identities to replace. One of ``after`` and ``at`` must be given.
        where, example_input, inplace: as `swap` takes them.
        **options: passed to the layer.

    Raises:
        ValueError: an argument is of a wrong kind, or not exactly one of after and at is given.
        Unsupported: nothing was inserted.
    """
    if not callable(layer):
        raise ValueError(f"layer must be a function of the number of channels, got {layer!r}")
    target = at if after is None else after
    if target is None or (after is not None and at is not None):
        raise ValueError("exactly one of after and at must be given")

    def replacement(slot: Slot, calls: list[Call] | None) -> nn.Module:
        if at is not None and type(slot.module) is not nn.Identity:
            raise Unsupported(f"it is a {type(slot.module).__name__}, not an empty slot (nn.Identity)")
        if at is not None and has_hooks(slot.module):
            raise Unsupported("it has forward hooks, which would be lost")
        return layer(_channels(slot.module, calls), **options)

    def finish(slot: Slot, new: nn.Module) -> nn.Module:
        if at is not None:
            return new
        # The mode of a Sequential says nothing to the modules in it.
        pair = nn.Sequential(slot.module, new)
        pair.training = slot.module.training
        return pair

    def fits(new: nn.Module, call: Call) -> None:
        if not isinstance(call.output, Tensor):
            raise Unsupported(f"its output is a {type(call.output).__name__}, not one tensor")
        _try(new, (call.output,), {}, call.output)

    return _edit("inserted", model, target, where, example_input, inplace, replacement, fits, finish, nested=True)


def remove(
    model: nn.Module,
    kind: Selector,
    *,
    where: Selector | None = None,
    example_input: ExampleInput = None,
    inplace: bool = False,
) -> Surgery:
    """Replace modules by the identity, where their output has the shape of their input.

    Without an example call only norms, activations, dropout, DropPath and LayerScale are known to keep the shape.

    Args:
        model: any model; left as it is.
        kind: which modules.
        where, example_input, inplace: as `swap` takes them.

    Raises:
        ValueError: an argument is of a wrong kind.
        Unsupported: nothing was removed.
    """

    def replacement(slot: Slot, calls: list[Call] | None) -> nn.Module:
        if type(slot.module) is nn.Identity:
            raise Unsupported("it is the identity already")
        if has_hooks(slot.module):
            raise Unsupported("it has forward hooks, which would be lost")
        if calls is None and not isinstance(slot.module, _KEEP_SHAPE):
            raise Unsupported(
                f"only a run can tell whether a {type(slot.module).__name__} keeps the shape: give example_input"
            )
        return nn.Identity()

    def fits(new: nn.Module, call: Call) -> None:
        if len(call.args) != 1 or call.kwargs or not isinstance(call.args[0], Tensor):
            raise Unsupported("it takes more than one tensor")
        _try(new, call.args, call.kwargs, call.output)

    return _edit("removed", model, kind, where, example_input, inplace, replacement, fits)


def _edit(
    verb: str,
    model: nn.Module,
    kind: Selector,
    where: Selector | None,
    example_input: ExampleInput,
    inplace: bool,
    replacement: Callable[[Slot, list[Call] | None], nn.Module],
    fits: Callable[[nn.Module, Call], None],
    finish: Callable[[Slot, nn.Module], nn.Module] = lambda slot, new: new,
    *,
    nested: bool = False,
) -> Surgery:
    """Make, try and place a replacement for each selected slot; ``finish`` turns what was tried into what is placed."""
    holder = working_copy(model, inplace)
    work = holder.get_submodule("model")
    found = selected(holder, kind, where)
    inputs = as_inputs(work, example_input)
    calls = None if inputs is None or not found else observe(work, {slot.module for slot in found}, inputs)
    made: dict[nn.Module, nn.Module] = {}
    reasons: dict[nn.Module, str] = {}
    meant: list[tuple[Slot, nn.Module]] = []
    for slot in found:
        old = slot.module
        if not nested and any(_inside(slot.parent, outer) for _, outer in meant if outer in made):
            continue
        meant.append((slot, old))
        if old in made or old in reasons:
            continue
        own = None if calls is None else calls[old]
        try:
            if own == []:
                raise Unsupported("the model does not call it")
            new = like(replacement(slot, own), old, work)
            with undisturbed(new):
                for call in own or ():
                    fits(new, call)
            made[old] = finish(slot, new)
        except ValueError as error:
            reasons[old] = str(error)
    _place(holder, meant, made, reasons, inputs)
    skipped = [(slot.names[0], reasons[old]) for slot, old in meant if old in reasons]
    if not made:
        raise Unsupported(_nothing(verb, kind, skipped))
    changed = [slot.names[0] for slot, old in meant if old in made]
    return Surgery(holder.get_submodule("model"), tuple(changed), tuple(skipped))


def _place(
    holder: nn.Module,
    meant: list[tuple[Slot, nn.Module]],
    made: dict[nn.Module, nn.Module],
    reasons: dict[nn.Module, str],
    inputs: tuple[Any, ...] | None,
) -> None:
    """Place what was made. What the model does not run with moves from ``made`` to ``reasons``."""

    def put(old: nn.Module, module: nn.Module) -> None:
        place([(slot, module) for slot, inner in meant if inner is old])

    def error() -> str | None:
        model = holder.get_submodule("model")
        try:
            with undisturbed(model):
                model(*(inputs or ()))
        except Exception as error:
            return f"the model does not run with it: {error}"
        return None

    for old, new in made.items():
        put(old, new)
    if inputs is None or not made or error() is None:
        return
    # Something in the model reads more of a module than its output. One by one tells of which.
    for old in made:
        put(old, old)
    for old, new in list(made.items()):
        put(old, new)
        if reason := error():
            put(old, old)
            reasons[old] = reason
            del made[old]


def _inside(module: nn.Module, outer: nn.Module) -> bool:
    return any(part is module for part in outer.modules())


def _nothing(verb: str, kind: Selector, skipped: list[tuple[str, str]]) -> str:
    if not skipped:
        return f"nothing was {verb}: the model has no module that {_described(kind)} selects"
    reasons = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return f"nothing was {verb}: {reasons}{more}"


def _described(kind: Selector) -> str:
    if isinstance(kind, tuple):
        return " or ".join(entry.__name__ for entry in kind)
    if isinstance(kind, str):
        return repr(kind)
    return kind.__name__ if isinstance(kind, type) else "the function"


def _channels(module: nn.Module, calls: list[Call] | None) -> int:
    for name in _CHANNEL_NAMES:
        if isinstance(value := getattr(module, name, None), int):
            return value
    if shape := getattr(module, "normalized_shape", None):
        return int(shape[-1])
    for call in calls or ():
        if isinstance(call.output, Tensor) and call.output.dim() > 1:
            return call.output.shape[1]
    if calls is None:
        raise Unsupported(f"only a run can tell the channels after a {type(module).__name__}: give example_input")
    raise Unsupported("its output is not a tensor (B, C, ...)")


def _try(new: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any) -> None:
    def filled(value: Any) -> Any:
        # The blanks of a call have no memory of their own, in which some layers work.
        return value.clone().contiguous() if isinstance(value, Tensor) else value

    given = [tuple(tensor.shape) for tensor in tensors((args, kwargs))]
    try:
        output = new(*tree_map(filled, args), **tree_map(filled, kwargs))
    except Exception as error:
        raise Unsupported(f"{type(new).__name__} cannot run on {_shapes(given)}: {error}") from error
    before, after = ([tuple(tensor.shape) for tensor in tensors(value)] for value in (expected, output))
    if before != after:
        raise Unsupported(f"{type(new).__name__} makes {_shapes(after)} of {_shapes(given)}, not {_shapes(before)}")


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes)) or "nothing"
