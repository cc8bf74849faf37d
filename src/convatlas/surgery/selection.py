"""Finding the modules of a model, running it without leaving a trace, and putting others in their places."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from convatlas.errors import Unsupported

__all__ = [
    "Call",
    "Selector",
    "Slot",
    "Surgery",
    "as_inputs",
    "has_hooks",
    "like",
    "named",
    "observe",
    "place",
    "predicate",
    "selected",
    "slots",
    "tensors",
    "undisturbed",
    "working_copy",
]

#: Which modules are meant: a type, several types, a pattern of names with ``*`` and ``?``, or a function of name and
#: module that says so.
Selector = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Surgery:
    """A changed model and the account of what was done to it.

    Attributes:
        model: the changed model. Use this one even with ``inplace=True``: where the whole model was replaced, it is
            another object.
        changed: names of the modules that were replaced, as `torch.nn.Module.named_modules` gives them; the model
            itself has the name ``""``.
        skipped: names of the modules that were meant but left as they are, each with the reason.
    """

    model: nn.Module
    changed: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


class Slot(NamedTuple):
    """A place that holds a module: its names from the root, the module around it, and its key in there."""

    names: tuple[str, ...]
    parent: nn.Module
    key: str

    @property
    def module(self) -> nn.Module:
        """What the slot holds now."""
        return self.parent._modules[self.key]  # type: ignore[return-value]


class Call(NamedTuple):
    """One call of a module: arguments, keyword arguments and result, every tensor blank but of the right shape."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def working_copy(model: nn.Module, inplace: bool) -> nn.Module:
    """The model inside a holder, so that it can be replaced as a whole; a deep copy unless ``inplace``.

    Raises:
        ValueError: model is not a module.
        Unsupported: the model cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        try:
            model = copy.deepcopy(model)
        except (RuntimeError, TypeError) as error:
            raise Unsupported(
                f"this {type(model).__name__} cannot be copied; inplace=True changes the model itself: {error}"
            ) from error
    holder = nn.Module()
    # Not by add_module: the holder must not decide whether the model trains.
    holder._modules["model"] = model
    return holder


def slots(holder: nn.Module) -> Iterator[Slot]:
    """Every place of a module below the holder, outer ones first, each once with all its names."""
    names: dict[tuple[int, str], list[str]] = {}
    parents: dict[tuple[int, str], nn.Module] = {}
    for prefix, parent in holder.named_modules(remove_duplicate=False):
        for key, child in parent._modules.items():
            if child is not None:
                names.setdefault((id(parent), key), []).append(f"{prefix}.{key}".removeprefix(".")[len("model.") :])
                parents[id(parent), key] = parent
    for (address, key), found in names.items():
        yield Slot(tuple(found), parents[address, key], key)


def selected(holder: nn.Module, selector: Selector, where: Selector | None = None) -> list[Slot]:
    """The slots whose module is meant by both selectors.

    Raises:
        ValueError: a selector is none of the kinds that `Selector` lists.
    """
    meant, also = predicate(selector), (lambda name, module: True) if where is None else predicate(where)
    return [
        slot
        for slot in slots(holder)
        if any(meant(name, slot.module) and also(name, slot.module) for name in slot.names)
    ]


def predicate(selector: Selector) -> Callable[[str, nn.Module], bool]:
    """A selector of any kind as a function of name and module.

    Raises:
        ValueError: it is none of the kinds that `Selector` lists.
    """
    if isinstance(selector, str):
        return lambda name, module: fnmatchcase(name, selector)
    types = selector if isinstance(selector, tuple) else (selector,)
    if all(isinstance(entry, type) for entry in types):
        return lambda name, module: isinstance(module, types)  # type: ignore[arg-type]
    if callable(selector):
        return cast(Callable[[str, nn.Module], bool], selector)
    raise ValueError(f"modules are selected by type, types, name pattern or function, got {selector!r}")


def place(replacements: Iterable[tuple[Slot, nn.Module]]) -> None:
    """Put each module into its slot."""
    for slot, module in replacements:
        slot.parent._modules[slot.key] = module


def named(holder: nn.Module) -> dict[nn.Module, str]:
    """Every module of the model and its first name."""
    found: dict[nn.Module, str] = {}
    for slot in slots(holder):
        found.setdefault(slot.module, slot.names[0])
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether something happens before or after its forward that a replacement would not do."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def like(new: nn.Module, old: nn.Module, model: nn.Module) -> nn.Module:
    """Give a new module the device, floating type and mode of the old one; of the model where the old one has none.

    Parts of the old module that the new one holds stay as they are.
    """
    kept = set(old.modules())
    sources = (tensor for source in (old, model) for tensor in (*source.parameters(), *source.buffers()))
    pattern = next((tensor for tensor in sources if tensor.is_floating_point()), torch.empty(0))

    def convert(tensor: Tensor) -> Tensor:
        # Complex parameters keep their type, which Module.to would make real.
        return tensor.to(pattern.device, dtype=pattern.dtype if tensor.is_floating_point() else None)

    for module in new.modules():
        if module not in kept:
            module.training = old.training
            module._apply(convert, recurse=False)
    return new


def as_inputs(model: nn.Module, example_input: Tensor | tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """The arguments of an example call: those given, else those that the model offers itself, else None."""
    if example_input is not None:
        return example_input if isinstance(example_input, tuple) else (example_input,)
    offer = getattr(model, "example_inputs", None)
    if not callable(offer):
        return None
    parameter = next(model.parameters(), torch.empty(0))

    def moved(x: Any) -> Any:
        return x.to(parameter.device, dtype=parameter.dtype if x.is_floating_point() else None) if _is_tensor(x) else x

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tuple(tree_map(moved, offer()))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients, after which modes, buffers and random states are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(0)
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, before in buffers:
                if not buffer.is_meta:
                    buffer.copy_(before)


def observe(model: nn.Module, parts: Iterable[nn.Module], inputs: tuple[Any, ...]) -> dict[nn.Module, list[Call]]:
    """Run the model once and tell how each of the parts was called."""
    calls: dict[nn.Module, list[Call]] = {part: [] for part in parts}

    def blank(value: Any) -> Any:
        # One number behind every element: no memory until the call is repeated.
        return value.new_zeros(()).expand(value.shape) if _is_tensor(value) else value

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[module].append(Call(*(tree_map(blank, item) for item in (args, kwargs, output))))

    handles = [part.register_forward_hook(keep, with_kwargs=True) for part in calls]
    try:
        with undisturbed(model):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in nested sequences, mappings, dataclasses and plain objects."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, str | bytes | int | float | type):
        seen.add(id(value))
        if isinstance(value, Mapping):
            inner: list[Any] = list(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            inner = list(value)
        elif dataclasses.is_dataclass(value):
            inner = [getattr(value, entry.name) for entry in dataclasses.fields(value)]
        else:
            inner = list(getattr(value, "__dict__", {}).values())
        for item in inner:
            yield from tensors(item, seen)
