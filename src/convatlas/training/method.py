"""What a training method is: a change to plain training that works on any network, in every task and in one's own loop.

A method replaces the hooks of `Method` that it needs; the others do what plain training does. In a loop of one's own:

    model = method.prepare(model)
    for epoch in range(epochs):
        method.start_epoch(model, epoch)
        for batch in batches:
            losses = method.losses(model, batch, loss_fn)  # with loss_fn(model, batch) -> {"loss": ...}
            losses["loss"].backward()
            ...

The setting ``methods`` of a run names the methods of a task, in Python and on the command line.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from convatlas.catalog import METHODS, resolve
from convatlas.errors import Unsupported, unknown
from convatlas.training.run import from_mapping
from convatlas.training.settings import SettingsError, Training

__all__ = ["LossFn", "Method", "Together", "make_methods"]

#: The losses of a network on a batch; ``"loss"`` is the one that is minimised.
LossFn: TypeAlias = Callable[[nn.Module, Any], dict[str, Tensor]]


class Method:
    """One way to train. Every hook does what plain training does, until a subclass replaces it.

    A method with weights of its own (a teacher, a decoder) is a `torch.nn.Module` as well: its parameters are trained
    with those of the network, its state lies in the checkpoints, and the trained network is saved without it.
    """

    #: Whether a step may leave parameters without a gradient, as those of a branch that it skips.
    unused_parameters = False  # without a type: the settings of a subclass are read in a module that may lack its name

    def prepare(self, model: nn.Module) -> nn.Module:
        """Change the network once, before its optimizer is made; the names of its weights stay as they are."""
        return model

    def losses(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> dict[str, Tensor]:
        """Losses of one step, ``"loss"`` being the one that is minimised.

        Args:
            model: the network.
            batch: of the task; images stand under ``"image"``.
            loss_fn: the losses without this method: the task's, or those of the methods before.
        """
        return loss_fn(model, batch)

    def optimizers(self, model: nn.Module, training: Training) -> Sequence[Optimizer]:
        """What takes the place of the optimizer that the settings ask for; several of them take `turns`."""
        return ()

    def turns(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The steps that one batch is for: which of the `optimizers` makes it, and its losses.

        Numbers beside ``"loss"`` become columns of ``metrics.csv``, such as ``train_critic`` of ``"critic"``. Whoever
        iterates makes each step before asking for the next:

            optimizers = method.optimizers(model, training)
            for number, losses in method.turns(model, batch, loss_fn):
                optimizers[number].zero_grad()
                losses["loss"].backward()
                optimizers[number].step()
        """
        yield 0, self.losses(model, batch, loss_fn)

    def start_epoch(self, model: nn.Module, epoch: int) -> None:
        """Called before each epoch (from 0), and again where a stopped run goes on within one."""


class Together(Method):
    """Several methods as one: each sees the losses of those before it.

    Args:
        methods: by name.

    Raises:
        ValueError: two of them bring optimizers.
    """

    def __init__(self, methods: Mapping[str, Method]) -> None:
        self.methods = dict(methods)
        self.unused_parameters = any(method.unused_parameters for method in methods.values())
        stepping = [name for name, method in methods.items() if _replaces(method, "optimizers", "turns")]
        if len(stepping) > 1:
            raise ValueError(f"one method at most may bring its optimizers, got {' and '.join(stepping)}")
        self._stepping = self.methods[stepping[0]] if stepping else Method()

    @property
    def alternates(self) -> bool:
        """Whether a batch may be for several steps."""
        return _replaces(self._stepping, "turns")

    def parts(self) -> list[nn.Module]:
        """The methods that have weights of their own."""
        return [method for method in self.methods.values() if isinstance(method, nn.Module)]

    def prepare(self, model: nn.Module) -> nn.Module:
        """Change the network by each method in turn.

        Raises:
            Unsupported: a method changes the names of the network's weights.
        """
        for name, method in self.methods.items():
            before = set(model.state_dict())
            model = method.prepare(model)
            if changed := before.symmetric_difference(model.state_dict()):
                raise Unsupported(f"the method {name} changes the names of weights, as {min(changed)}; it must not")
        return model

    def losses(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> dict[str, Tensor]:
        """The losses of the last method, which sees those of the one before it, and so on."""
        return self._chained(loss_fn)(model, batch)

    def optimizers(self, model: nn.Module, training: Training) -> Sequence[Optimizer]:
        """Those of the one method that brings some."""
        return self._stepping.optimizers(model, training)

    def turns(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Those of the one method that takes turns, which sees the losses of all others."""
        return self._stepping.turns(model, batch, self._chained(loss_fn, without=self._stepping))

    def start_epoch(self, model: nn.Module, epoch: int) -> None:
        """Tell every method."""
        for method in self.methods.values():
            method.start_epoch(model, epoch)

    def _chained(self, loss_fn: LossFn, *, without: Method | None = None) -> LossFn:
        for method in self.methods.values():
            if method is not without:
                loss_fn = partial(method.losses, loss_fn=loss_fn)
        return loss_fn


def _replaces(method: Method, *hooks: str) -> bool:
    return any(getattr(type(method), hook) is not getattr(Method, hook) for hook in hooks)


def make_methods(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Method]:
    """The methods that the setting ``methods`` describes.

    Args:
        settings: options by name; a name is one of `catalog.METHODS`, or ``package.module:Class``.

    Raises:
        UnknownName: there is no such method.
        SettingsError: a method has no such option, or the option has a wrong type.
        Unsupported: the class is no `Method`.
        ImportError: the module of a class cannot be imported.
    """
    methods = {}
    for name, options in settings.items():
        cls = _method_class(name)
        try:
            methods[name] = from_mapping(cls, options)
        except SettingsError as error:
            raise SettingsError(f"methods: {name}: {error}") from None
    return methods


def _method_class(name: str) -> type[Method]:
    module, colon, path = name.partition(":")
    if not colon and name not in METHODS:
        raise unknown("method", name, METHODS)
    cls = getattr(importlib.import_module(module), path, None) if colon else resolve(METHODS[name])
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise Unsupported(f"a method must be a class below convatlas.training.method.Method, {name} is none")
    return cls
