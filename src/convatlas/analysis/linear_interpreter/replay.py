"""The frozen network of one x0: recorded on a tape and replayed, or run beside the real network and forgotten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from convatlas.analysis.linear_interpreter.rules import Frozen, Mode
from convatlas.analysis.linear_interpreter.tracking import Tracker, evaluate
from convatlas.errors import Unsupported

__all__ = ["LinearScope", "Tape", "check_model", "record"]


class _Step(NamedTuple):
    frozen: Frozen
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    #: Places that nothing reads afterwards.
    done: tuple[int, ...]


class Tape:
    """A linear network: the frozen operations of one forward pass in their order, which z runs through.

    Place 0 holds z of the input; every operation reads places and fills new ones.
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._places = 1
        self._result = 0

    def add(self, frozen: Frozen, inputs: Sequence[int], outputs: Sequence[Any]) -> list[int | None]:
        """Put an operation at the end; the place of each of its outputs, None for those that do not move."""
        places: list[int | None] = []
        for leaf in outputs if frozen.many else outputs[:1]:
            moves = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
            places.append(self._places if moves else None)
            self._places += moves
        self._steps.append(_Step(frozen, tuple(inputs), tuple(places), ()))
        return places + [None] * (len(outputs) - len(places))

    def finish(self, result: int) -> None:
        """Say where the output stands, and drop what it does not need."""
        needed, steps = {result}, []
        for step in reversed(self._steps):
            if needed & set(step.outputs):
                done = tuple(set(step.inputs) - needed)
                needed |= set(step.inputs)
                steps.append(step._replace(done=done))
        self._steps, self._result = steps[::-1], result

    def run(self, z: Tensor, bias: bool) -> Tensor:
        """The output for z, with biases or without."""
        held = {0: z}
        for step in self._steps:
            results = evaluate(step.frozen, [held[place] for place in step.inputs], bias)
            for place in step.done:
                del held[place]
            pairs = zip(step.outputs, results, strict=True)
            held |= {place: value for place, value in pairs if place is not None and value is not None}
        return held[self._result]

    def __len__(self) -> int:
        """Number of operations."""
        return len(self._steps)


class _Recorder(Tracker[int]):
    """Writes the frozen operations on a tape."""

    def __init__(self, mode: Mode) -> None:
        super().__init__(mode)
        self.tape = Tape()

    def emit(self, frozen: Frozen, z: Sequence[int], outputs: Sequence[Any]) -> list[int | None]:
        return self.tape.add(frozen, z, outputs)


class _Beside(Tracker[Tensor]):
    """Applies each frozen operation to z at once; z has the probes on a leading axis."""

    def __init__(self, mode: Mode, bias: bool) -> None:
        super().__init__(mode)
        self.bias = bias

    def emit(self, frozen: Frozen, z: Sequence[Tensor], outputs: Sequence[Any]) -> list[Tensor | None]:
        if frozen.deferred:
            raise NotImplementedError(
                f"LinearScope has no tangent of {frozen.deferred}; use LinearInterpreter, "
                "or register one with register_rule"
            )
        probes = [evaluate(frozen, probe, self.bias) for probe in zip(*z, strict=True)]
        results = [None if parts[0] is None else torch.stack(parts) for parts in zip(*probes, strict=True)]
        return results + [None] * (len(outputs) - len(results))


def record(
    model: nn.Module,
    mode: Mode,
    x0: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Callable[[Any], Any] | None,
) -> tuple[Tensor, Tape]:
    """Run the model on x0; its output, or what ``output`` makes of it, and the frozen network."""
    recorder = _Recorder(mode)

    def forward(*given: Any, **options: Any) -> Any:
        result = model(*given, **options)
        return result if output is None else output(result)

    y = recorder.run(model, forward, x0.detach().clone(), 0, *args, **kwargs)
    recorder.tape.finish(recorder.z_of(y))
    return y.detach(), recorder.tape


def check_model(model: nn.Module, mode: str) -> None:
    """Raise what is wrong with a model or a mode.

    Raises:
        ValueError: the model is no module, or is in training mode, or the mode is unknown.
        Unsupported: the model runs on several devices at once or is compiled.
    """
    if mode not in ("mask", "tangent"):
        raise ValueError(f"mode must be 'mask' or 'tangent', got {mode!r}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise Unsupported(f"{type(model).__name__} cannot be interpreted; give the model inside, model.module")
    if type(model).__name__ == "OptimizedModule":  # of torch.compile, whose import would take long
        raise Unsupported("a compiled model cannot be interpreted; give the module inside, model._orig_mod")
    if isinstance(model, torch.jit.ScriptModule):
        raise Unsupported("a scripted model cannot be interpreted; give the module that it was made from")
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f" ({training!r} is in training mode)" if training else ""
        raise ValueError(f"call model.eval(): BatchNorm and Dropout must be frozen{where}")


class LinearScope:
    """Hooks that make a model run its frozen linear system beside itself, in one forward pass.

    While attached, the model takes a batch [x0; z] and returns [y; A(x0) z]: the first part runs as ever, bit by bit,
    and each operation of the second uses the decisions that the first has just made: masks of activations, places of
    maxima, statistics of normalisation, gates. Nothing is stored but the two parts (paper, section 3).

        with LinearScope(model):
            y, response = model(torch.cat([x0, z])).chunk(2)

    Hooked are the operations themselves, so functional activations take part like modules. Further arguments of the
    model are those for x0 alone. If the output is nested, each tensor in it holds both parts.

    Args:
        model: in evaluation mode.
        mode: "mask" for the secant through the origin (the paper), "tangent" for the Jacobian.
        bias: add the biases to the second part, which then is A z + r.
        probes: number of z for each x0; they follow each other as [x0; z1; z2; ...], each as long as x0.

    Raises:
        ValueError: the model is in training mode, or an argument is out of range.
        Unsupported: the model is wrapped for several devices, or scripted.
    """

    def __init__(self, model: nn.Module, mode: Mode = "mask", *, bias: bool = False, probes: int = 1) -> None:
        check_model(model, mode)
        if probes < 1:
            raise ValueError(f"probes must be at least 1, got {probes}")
        self.model, self.mode, self.bias, self.probes = model, mode, bias, probes
        self._own: Any = None
        self._attached = False

    def attach(self) -> Self:
        """Hook the model.

        Raises:
            RuntimeError: it is hooked already.
        """
        if self._attached:
            raise RuntimeError("this LinearScope is attached already; detach() it first")
        self._own = self.model.__dict__.get("forward")
        self.model.__dict__["forward"] = self._both(self.model.forward)
        self._attached = True
        return self

    def detach(self) -> None:
        """Leave the model as it was. Does nothing if it is not hooked."""
        if self._attached:
            del self.model.__dict__["forward"]
            if self._own is not None:
                self.model.__dict__["forward"] = self._own
            self._attached = False

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _both(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(both: Tensor, *args: Any, **kwargs: Any) -> Any:
            check_model(self.model, self.mode)
            parts = 1 + self.probes
            if not isinstance(both, Tensor) or not both.is_floating_point() or not both.dim() or len(both) % parts:
                shape = tuple(both.shape) if isinstance(both, Tensor) else type(both).__name__
                raise ValueError(f"the input must be {parts} floating-point batches of one length, got {shape}")
            x0, *z = both.detach().chunk(parts)
            scope = _Beside(self.mode, self.bias)
            result = scope.run(self.model, forward, x0.clone(), torch.stack(z), *args, **kwargs)
            return tree_map_only(Tensor, lambda leaf: _joined(leaf, scope.z_of(leaf)), result)

        return run


def _joined(y: Tensor, z: Tensor) -> Tensor:
    if not y.dim():
        raise Unsupported("LinearScope needs outputs with a batch axis, got a number; use LinearInterpreter")
    return torch.cat([y, *z])
