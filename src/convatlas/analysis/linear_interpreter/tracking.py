"""Run a model on x0 and see every operation that depends on x0, whoever asks for it: module, function or method."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from convatlas.analysis.linear_interpreter.linear_rules import CONSTANT, LINEAR_RULES, view_rule
from convatlas.analysis.linear_interpreter.nonlinear_rules import NONLINEAR_RULES
from convatlas.analysis.linear_interpreter.rules import REGISTERED, Call, Frozen, Mode, Rule, Track, leaves_of, name_of
from convatlas.errors import Unsupported
from convatlas.hooks import watch

__all__ = ["Tracker", "evaluate"]

#: Operations in place whose result has nothing of what was there before.
_OVERWRITING = ("aten::copy_", "aten::fill_", "aten::zero_")
#: What stands for z of a tensor: a place on a tape, or z itself.
_Z = TypeVar("_Z")


class _Moving(NamedTuple, Generic[_Z]):
    """What is known of a tensor: its z (None for a constant), its track, and how many writes to its memory it has."""

    z: _Z | None
    track: Track
    writes: int = 0


class _Place(NamedTuple):
    """Where the elements of a tensor lie in its memory."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: Any
    bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Place:
        return cls(tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.element_size())

    def seen_in(self, numbers: Tensor) -> Tensor:
        """This place in a one-dimensional tensor with a number for each element of the memory."""
        return numbers.as_strided(self.size, self.stride, self.offset)


class Tracker(TorchDispatchMode, ABC, Generic[_Z]):
    """Follows z through a forward pass on x0, operation by operation.

    Operations are seen below autograd, where torch has taken composed functions apart, so activations that are
    functions, methods or in place are seen like modules. A subclass says what becomes of the frozen operations.

    Args:
        mode: "mask" or "tangent".
    """

    def __init__(self, mode: Mode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode
        self._known = WeakTensorKeyDictionary()
        #: Tensors that depend on x0 but are constant to the replay -> the operation that froze them.
        self._stopped = WeakTensorKeyDictionary()
        #: Memory that several tensors may show; what was written into it; what rules have kept of any memory.
        self._shared: set[StorageWeakRef] = set()
        self._writes: dict[StorageWeakRef, list[tuple[_Place, _Moving[_Z]]]] = {}
        self._captured: dict[StorageWeakRef, list[weakref.ref[Tensor]]] = defaultdict(list)
        self._modules: list[str] = []
        self._paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import the compiler, which takes longer than most studies.
        return False

    @abstractmethod
    def emit(self, frozen: Frozen, z: Sequence[_Z], outputs: Sequence[Any]) -> list[_Z | None]:
        """Take a frozen operation and z of its moving arguments; give z of each output, None where it does not move."""

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self, model: nn.Module, forward: Callable[..., Any], x0: Tensor, z: _Z, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` of the model on x0, which z goes along with, and return its output."""
        self._known[x0] = _Moving(z, Track())
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if any(model.children()):
                stack.enter_context(watch(model, self._entering, self._leaving, select=lambda name, _: bool(name)))
            stack.enter_context(self._ruled_modules(model))
            stack.enter_context(_Functions(self))
            stack.enter_context(self)
            return forward(x0, *args, **kwargs)

    def z_of(self, output: Any) -> _Z:
        """z of the output.

        Raises:
            Unsupported: it is no tensor, or does not move with x0.
        """
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            raise Unsupported(f"the output must be a tensor, got {kind}: choose one with output=lambda result: ...")
        known = self._read(output)
        if known is not None and known.z is not None:
            return known.z
        stopped = self._stopped.get(output)
        if stopped is None:
            raise Unsupported("the output does not depend on x0")
        raise Unsupported(
            f"the output comes from {stopped}, which is not interpreted: analyse what goes into it, such as the logits"
        )

    def _entering(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._modules.append(name)

    def _leaving(self, name: str, output: Any) -> None:
        self._modules.pop()

    # -- modules and functions with rules of their own -----------------------------------------------------------------

    @contextmanager
    def _ruled_modules(self, model: nn.Module) -> Iterator[None]:
        def as_one(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: self.whole(module, forward, args, kwargs)

        ruled = [module for module in model.modules() if _find_rule(module) is not None]
        before = [module.__dict__.get("forward") for module in ruled]
        for module in ruled:
            module.__dict__["forward"] = as_one(module, module.forward)
        try:
            yield
        finally:
            for module, own in zip(ruled, before, strict=True):
                del module.__dict__["forward"]
                if own is not None:
                    module.__dict__["forward"] = own

    def whole(self, function: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module or a function that has a rule as one operation."""
        inputs = [] if self._paused else self._inputs(args, kwargs)
        if not any(inputs):
            return forward(*args, **kwargs)
        self._paused = True
        try:
            leaves, spec = tree_flatten((args, kwargs))
            kept = [leaf if known is None else leaf.clone() for leaf, known in zip(leaves, inputs, strict=True)]
            output = forward(*args, **kwargs)
            moving = [pair for *pair, known in zip(leaves, kept, inputs, strict=True) if known is not None]
            if not all(torch.equal(leaf, before) for leaf, before in moving):
                raise Unsupported(f"{name_of(function)} changes its input in place, so it cannot have a rule")
            kept_args, kept_kwargs = tree_unflatten(kept, spec)
            self._apply(function, kept_args, kept_kwargs, inputs, output)
        finally:
            self._paused = False
        return output

    # -- operations ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if view_rule(func) is not None:
            self._shared |= {StorageWeakRef(leaf.untyped_storage()) for leaf in _tensors(args[:1]) if _lies(leaf)}
        inputs = self._inputs(args, kwargs)
        arguments = func._schema.arguments
        if arguments and arguments[0].is_write and torch.Tag.inplace_view not in func.tags:
            return self._write(func, args, kwargs, inputs)
        output = func(*args, **kwargs)
        if any(inputs):
            self._apply(func, args, kwargs, inputs, output)
        elif func._schema.name not in CONSTANT:
            self._pass_on(args, kwargs, output)
        return output

    def _inputs(self, args: Any, kwargs: Any) -> list[_Moving[_Z] | None]:
        """What is known of each leaf of the arguments; None for constants."""
        known = [self._read(leaf) for leaf in leaves_of(args, kwargs)]
        return [entry if entry is not None and entry.z is not None else None for entry in known]

    def _pass_on(self, args: Any, kwargs: Any, output: Any) -> None:
        """What comes from frozen tensors is frozen by the same operation."""
        if len(self._stopped):
            given = (leaf for leaf in leaves_of(args, kwargs) if isinstance(leaf, Tensor))
            name = next((name for leaf in given if (name := self._stopped.get(leaf))), None)
            if name is not None:
                self._stop(output, name)

    def _stop(self, output: Any, name: str) -> None:
        for leaf in _tensors(output):
            self._stopped[leaf] = name

    def _apply(self, func: Any, args: Any, kwargs: Any, inputs: list[_Moving[_Z] | None], output: Any) -> None:
        """Freeze an operation that ran, and say what is known of its output."""
        if isinstance(func, torch._ops.OpOverload) and func._schema.name in CONSTANT:
            return
        frozen = self._freeze(func, args, kwargs, inputs, output)
        if frozen is None:
            self._stop(output, name_of(func))
            return
        moving = [known for known in inputs if known is not None]
        outputs = tree_leaves(output)
        z = self.emit(frozen, [known.z for known in moving if known.z is not None], outputs)
        decisions = max(known.track.decisions for known in moving) + frozen.decides
        gate = frozen.gate or (not frozen.decides and all(known.track.gate for known in moving))
        for leaf, value in zip(outputs, z, strict=True):
            if value is not None:
                self._set(leaf, _Moving(value, Track(decisions, gate)))

    def _freeze(
        self, func: Any, args: Any, kwargs: Any, inputs: list[_Moving[_Z] | None], output: Any
    ) -> Frozen | None:
        if not any(map(_moves, _tensors(output))):
            return None  # indices, comparisons, numbers: decisions
        held_args = tuple(map(self._held, args))
        held_kwargs = {name: self._held(value) for name, value in kwargs.items()}
        tracks = [None if known is None else known.track for known in inputs]
        call = Call(func, held_args, held_kwargs, self._held(output), self.mode, tracks)
        rule = _find_rule(func)
        made = NotImplemented if rule is None else rule(call)
        if made is NotImplemented and self.mode == "tangent" and isinstance(func, torch._ops.OpOverload):
            made = _by_autograd(call)
        if made is NotImplemented:
            where = f" (in {self._modules[-1]!r})" if self._modules else ""
            also = ", or use mode='tangent'" if self.mode == "mask" else ""
            raise NotImplementedError(
                f"LinearScope has no rule for {name_of(func)}{where}; register one with register_rule{also}"
            )
        if made is None:
            return None
        if not isinstance(made, Frozen):
            if not callable(made):
                raise TypeError(f"the rule of {name_of(func)} must return a function, a Frozen or None, got {made!r}")
            made = Frozen(made, "missing")
        return _completed(made, call) if isinstance(made.bias, str) else made

    def _held(self, value: Any) -> Any:
        """What a rule may keep: tensors as objects of their own, so that a later write can be kept from them."""
        if isinstance(value, list | tuple | dict):
            return tree_map(self._held, value)
        if not isinstance(value, Tensor) or not _lies(value):
            return value
        held = value.detach()
        self._captured[StorageWeakRef(value.untyped_storage())].append(weakref.ref(held))
        return held

    # -- writing in place ----------------------------------------------------------------------------------------------

    def _write(self, func: Any, args: Any, kwargs: Any, inputs: list[_Moving[_Z] | None]) -> Any:
        """Run an operation that writes into its first argument, as one that does not and a copy if z is concerned."""
        target, name = args[0], func._schema.name
        if not isinstance(target, Tensor) or not _lies(target):
            if any(inputs):
                raise NotImplementedError(f"LinearScope cannot follow what {name_of(func)} writes")
            return func(*args, **kwargs)
        if name in _OVERWRITING:
            inputs = [None, *inputs[1:]]
        storage = StorageWeakRef(target.untyped_storage())
        result: _Moving[_Z] = _Moving(None, Track())
        if not any(inputs):
            self._protect(storage)
            func(*args, **kwargs)
            self._pass_on(args, kwargs, target)
        else:
            plain = getattr(torch.ops.aten, name.removeprefix("aten::").removesuffix("_"), None)
            plain = getattr(plain, func._overloadname, None)
            if plain is None or not name.endswith("_"):
                raise NotImplementedError(f"LinearScope cannot follow what {name_of(func)} writes")
            output = plain(*args, **kwargs)
            self._apply(plain, args, kwargs, inputs, output)
            result = self._known.get(output, result)
            self._protect(storage)
            target.copy_(output)
            if stopped := self._stopped.get(output):
                self._stopped[target] = stopped
        if storage in self._shared:
            self._writes = {key: log for key, log in self._writes.items() if not key.expired()}
            self._writes.setdefault(storage, []).append((_Place.of(target), result))
        self._set(target, result)
        return target

    def _protect(self, storage: StorageWeakRef) -> None:
        """Give what rules have kept of this memory a copy of its own, before it is written."""
        for reference in self._captured.pop(storage, ()):
            if (held := reference()) is not None:
                held.data = held.clone()

    def _set(self, tensor: Tensor, known: _Moving[_Z]) -> None:
        writes = 0
        if self._writes and _lies(tensor):
            writes = len(self._writes.get(StorageWeakRef(tensor.untyped_storage()), ()))
        self._known[tensor] = known._replace(writes=writes)

    def _read(self, tensor: Any) -> _Moving[_Z] | None:
        """What is known of a tensor, after all writes into its memory."""
        if not isinstance(tensor, Tensor):
            return None
        known: _Moving[_Z] | None = self._known.get(tensor)
        if not self._writes or not _lies(tensor):
            return known
        log = self._writes.get(StorageWeakRef(tensor.untyped_storage()), [])
        later = log[0 if known is None else known.writes :]
        for place, written in later:
            known = self._overlaid(tensor, known, place, written)
        if later and known is not None:
            self._set(tensor, known)
        return known

    def _overlaid(
        self, tensor: Tensor, below: _Moving[_Z] | None, place: _Place, written: _Moving[_Z]
    ) -> _Moving[_Z] | None:
        """What is known of a tensor when another view of its memory was written."""
        own = _Place.of(tensor)
        if place == own:
            return written
        under, over = None if below is None else below.z, written.z
        if under is None and over is None:
            return below
        if place.bytes != own.bytes:
            raise Unsupported("LinearScope cannot follow a write through a view of another type")
        # For each element of the memory its number in what was written, -1 for the others.
        size = tensor.untyped_storage().nbytes() // own.bytes
        numbers = torch.full((size,), -1, device=tensor.device)
        place.seen_in(numbers).copy_(torch.arange(place.size.numel(), device=tensor.device).view(place.size))
        source = own.seen_in(numbers).clone()
        covered = source >= 0
        if not bool(covered.any()):
            return below
        source.clamp_(min=0)

        def linear(*z: Tensor) -> Tensor:
            return torch.where(covered, 0 if over is None else z[-1].reshape(-1)[source], 0 if under is None else z[0])

        bias = None
        if under is None or over is None:
            bias = torch.where(covered if over is None else ~covered, tensor, 0)
        (z,) = self.emit(Frozen(linear, bias, decides=False), [z for z in (under, over) if z is not None], [tensor])
        return _Moving(z, written.track if below is None else below.track)


class _Functions(TorchFunctionMode):
    """Takes functions that have a rule as a whole, and lets LSTMs run where their gates are seen.

    That a function mode is active also keeps torch from its fused transformer layers.
    """

    def __init__(self, tracker: Tracker[Any]) -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in REGISTERED:
            return self.tracker.whole(func, func, args, kwargs)
        if func is torch.lstm:
            with warnings.catch_warnings():
                # Of other hardware, which switching off and on asks about.
                warnings.filterwarnings("ignore", message="TF32 acceleration")
                with torch.backends.mkldnn.flags(enabled=False):
                    return func(*args, **kwargs)
        return func(*args, **kwargs)


def evaluate(frozen: Frozen, z: Sequence[Tensor], bias: bool) -> list[Tensor | None]:
    """z of the outputs of a frozen operation, with or without its bias."""
    result = frozen.linear(*z)
    results = list(result) if frozen.many else [result]
    if not bias or frozen.bias is None:
        return results
    added = frozen.bias() if callable(frozen.bias) else frozen.bias
    several = added if isinstance(added, tuple) else (added,)
    return [
        part if part is None or one is None else (part + one).to(part.dtype)
        for part, one in zip(results, several, strict=True)
    ]


def _find_rule(function: Any) -> Rule | None:
    """The rule of an operation, a function or a module; None if there is none."""
    if isinstance(function, nn.Module):
        return next((REGISTERED[kind] for kind in type(function).__mro__ if kind in REGISTERED), None)
    if not isinstance(function, torch._ops.OpOverload):
        return REGISTERED.get(function)
    for name in (function.name(), function._schema.name):
        for rules in (REGISTERED, LINEAR_RULES, NONLINEAR_RULES):
            if name in rules:
                return rules[name]
    return view_rule(function)


def _by_autograd(call: Call) -> Frozen:
    """The tangent of any operation that torch can differentiate forwards."""
    values, function = tuple(call.values), call.on(*call.moving_names)

    def first(*given: Tensor) -> Tensor:
        return next(leaf for leaf in _tensors(function(*given)) if _moves(leaf))

    def linear(*z: Tensor) -> Any:
        return torch.func.jvp(first, values, z)[1]

    output = next(leaf for leaf in _tensors(call.output) if _moves(leaf))
    return Frozen(linear, lambda: output - linear(*values), deferred=name_of(call.function))


def _completed(frozen: Frozen, call: Call) -> Frozen:
    """The same with the bias that is missing at x0."""
    linear = frozen.linear(*call.values)
    if isinstance(linear, Tensor):
        return frozen._replace(bias=tree_leaves(call.output)[0] - linear)
    pairs = zip(tree_leaves(call.output), linear, strict=True)
    return frozen._replace(many=True, bias=tuple(None if part is None else leaf - part for leaf, part in pairs))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _moves(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _lies(leaf: Tensor) -> bool:
    """Whether the tensor has memory of its own kind, unlike a sparse one."""
    return leaf.layout == torch.strided
