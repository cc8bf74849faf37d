"""Look at what passes through the modules of any network, and leave the network as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from convatlas.errors import unknown

__all__ = ["Record", "Select", "record", "walk", "watch"]

#: Chooses modules: a pattern for names in the manner of a shell ("layer?.*"), a class or several, or a predicate of
#: name and module. None chooses every module.
Select: TypeAlias = str | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Module], bool] | None


@dataclass
class Record:
    """One call of a module.

    Attributes:
        name: of the module; "" is the network itself. A module with several names goes by the first.
        call: how often the module was called before within the same recording.
        args, kwargs: what the module was given.
        output: what it returned; None when it raised an exception.
    """

    name: str
    call: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    _gradients: tuple[list[Any], Any] = field(default=([], None), repr=False)

    @property
    def gradient(self) -> Any:
        """Gradient of each tensor of the output, in the structure of the output; None where there is none (yet).

        After several backward passes through the same call it is that of the last.
        """
        gradients, structure = self._gradients
        return None if structure is None else tree_unflatten(gradients, structure)


def walk(model: nn.Module, select: Select = None) -> Iterator[tuple[str, nn.Module]]:
    """The chosen modules with their names, parents first; a module with several names comes once, by the first.

    Raises:
        UnknownName: ``select`` is a pattern and no module has such a name.
        ValueError: ``select`` chooses no module.
    """
    modules = list(model.named_modules())
    chosen = [(name, module) for name, module in modules if _matches(select, name, module)]
    if not chosen and isinstance(select, str):
        raise unknown("module", select, (name for name, _ in modules))
    if not chosen:
        raise ValueError(f"select must choose at least one of the {len(modules)} modules, got {select!r}")
    return iter(chosen)


def _matches(select: Select, name: str, module: nn.Module) -> bool:
    if select is None:
        return True
    if isinstance(select, str):
        return fnmatchcase(name, select)
    if isinstance(select, type | tuple):
        return isinstance(module, select)
    return select(name, module)


@contextmanager
def watch(
    model: nn.Module,
    before: Callable[[str, tuple[Any, ...], dict[str, Any]], None],
    after: Callable[[str, Any], None],
    *,
    select: Select = None,
) -> Iterator[None]:
    """Within the context, report each call of the chosen modules.

    Calls of ``before`` and ``after`` nest like the calls of the modules, also when a module raises an exception.

    Args:
        model: the network.
        before: given name, positional and keyword arguments when a module is called.
        after: given name and output when it returns; the output is None when it raises an exception.
        select: the modules; see `Select`.

    Raises:
        UnknownName, ValueError: as `walk`.
    """

    def entering(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: before(name, args, kwargs)

    def leaving(name: str) -> Callable[..., None]:
        return lambda module, args, output: after(name, output)

    with ExitStack() as handles:
        for name, module in walk(model, select):
            handles.callback(module.register_forward_pre_hook(entering(name), with_kwargs=True).remove)
            handles.callback(module.register_forward_hook(leaving(name), always_call=True).remove)
        yield


@contextmanager
def record(
    model: nn.Module,
    select: Select = None,
    *,
    keep: Callable[[Tensor], Any] | None = None,
    gradients: bool = False,
) -> Iterator[list[Record]]:
    """Within the context, record inputs and outputs of the chosen modules, one record for each call in order.

    The records stay when the context ends; nothing stays in the model. ``keep`` is applied at once, so that
    ``keep=lambda tensor: tensor.std().item()`` holds one number a tensor instead of the tensor. Without it the very
    tensors are kept, with their graph; a later operation in place changes them, and ``keep=torch.clone`` prevents that.

    Args:
        model: the network.
        select: the modules; see `Select`.
        keep: what to keep of each tensor of the inputs, outputs and gradients.
        gradients: also record the gradients of the outputs, of backward passes within the context.

    Raises:
        UnknownName, ValueError: as `walk`.
    """
    records: list[Record] = []
    running: list[Record] = []
    calls: dict[str, int] = {}

    def kept(value: Any) -> Any:
        return value if keep is None else tree_map_only(Tensor, keep, value)

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(Record(name, calls.get(name, 0), kept(args), kept(kwargs)))
        records.append(running[-1])
        calls[name] = calls.get(name, 0) + 1

    def after(name: str, output: Any) -> None:
        entry = running.pop()
        entry.output = kept(output)
        if gradients:
            leaves, structure = tree_flatten(output)
            found: list[Any] = [None] * len(leaves)
            entry._gradients = found, structure
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    handles.callback(leaf.register_hook(arriving(found, index)).remove)

    def arriving(found: list[Any], index: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            found[index] = kept(gradient)

        return hook

    with ExitStack() as handles, watch(model, before, after, select=select):
        yield records
