"""One signature, several implementations: how an operator picks the one that runs.

Every operator has a ``naive`` backend, a short literal definition that is documentation and test oracle at once. The
others compute the same numbers faster. ``backend="auto"`` chooses by device, dtype and size; a backend asked for by
name either runs or says why it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from convatlas.errors import Unsupported, unknown

__all__ = ["OPERATORS", "Backends", "chosen", "plainly"]

#: Every operator by name, filled as the modules of `convatlas.ops` are imported.
OPERATORS: dict[str, Backends] = {}

#: Backends that are what code in plain torch would call, where an operator has one of them; else it is the literal one.
_PLAIN = ("torch", "conv1d", "conv")


@dataclass(frozen=True)
class _Implementation:
    run: Callable[..., Tensor]
    refuses: Callable[..., str | None]


class Backends:
    """The implementations of one operator.

    Args:
        operator: the public name of the operator.
        auto: given the operator's positional arguments, names the backend to use. It must name one that serves them.
    """

    def __init__(self, operator: str, auto: Callable[..., str]) -> None:
        self.operator = operator
        self._auto = auto
        self._implementations: dict[str, _Implementation] = {}
        OPERATORS[operator] = self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the implementations, the literal definition first."""
        return tuple(self._implementations)

    def register(
        self, name: str, *, refuses: Callable[..., str | None] = lambda *_: None
    ) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
        """Decorate an implementation; ``refuses`` gives the reason why it cannot serve some arguments, or None."""

        def keep(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
            self._implementations[name] = _Implementation(run, refuses)
            return run

        return keep

    def refusal(self, backend: str, *args: Any) -> str | None:
        """Why ``backend`` cannot serve these arguments, or None when it can."""
        if backend not in self._implementations:
            raise unknown(f"backend of {self.operator}", backend, ["auto", *self.names])
        return self._implementations[backend].refuses(*args)

    def choose(self, *args: Any) -> str:
        """The backend that ``auto`` takes for these arguments."""
        return self._auto(*args)

    def plain(self, *args: Any) -> str:
        """The backend that does what code in plain torch would do: its own call, or the literal definition."""
        served = (name for name in _PLAIN if name in self._implementations and self.refusal(name, *args) is None)
        return next(served, self.names[0])

    @contextmanager
    def choosing(self, auto: Callable[..., str]) -> Iterator[None]:
        """Within, ``auto`` is decided by another function of the operator's positional arguments."""
        before, self._auto = self._auto, auto
        try:
            yield
        finally:
            self._auto = before

    def run(self, backend: str, *args: Any) -> Tensor:
        """Run the operator on its positional arguments.

        Raises:
            UnknownName: there is no backend of that name.
            Unsupported: the backend was asked for by name and cannot serve these arguments.
        """
        if backend == "auto":
            backend = self._auto(*args)
        elif reason := self.refusal(backend, *args):
            raise Unsupported(f"backend {backend!r} of {self.operator} cannot serve this call: {reason}")
        return self._implementations[backend].run(*args)


def chosen(operator: str, *args: Any) -> str:
    """The backend that ``operator(*args)`` would run with ``backend="auto"``."""
    if operator not in OPERATORS:
        raise unknown("operator", operator, OPERATORS)
    return OPERATORS[operator].choose(*args)


@contextmanager
def plainly() -> Iterator[None]:
    """Within, ``auto`` takes the plain form of every operator that has been imported: what the fast ones stand beside.

    For measuring, and for finding out whether a fast form is at fault. It holds for all threads of the process.
    """
    with ExitStack() as stack:
        for operator in OPERATORS.values():
            stack.enter_context(operator.choosing(operator.plain))
        yield
