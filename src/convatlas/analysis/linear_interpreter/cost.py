"""What an interpretation costs beside autograd: time and memory, as ratios measured in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convatlas.analysis.linear_interpreter.interpreter import LinearInterpreter
from convatlas.analysis.linear_interpreter.replay import LinearScope

__all__ = ["MatrixCost", "ScopeMemory", "matrix_cost", "peak_bytes", "scope_memory"]


class MatrixCost(NamedTuple):
    """The matrix A in tangent mode beside `torch.func.jacrev` of the model; ratios above 1 where ours wins.

    Attributes:
        time: median over pairs of their time by ours. Ours includes the forward pass that is recorded.
        spread: distance between the quartiles of this ratio.
        memory: their peak of memory by ours.
        difference: largest difference of the two matrices, relative to the largest entry.
    """

    time: float
    spread: float
    memory: float
    difference: float


class ScopeMemory(NamedTuple):
    """Peak of memory by that of a forward pass on [x0; z] without gradients.

    Attributes:
        scope: of a `LinearScope` pass on [x0; z].
        autograd: of a forward pass on x0 and a backward pass to x0, which keeps activations.
        tape: of an interpretation and one replay, which keep decisions.
    """

    scope: float
    autograd: float
    tape: float


def matrix_cost(
    model: nn.Module,
    x0: Tensor,
    *,
    pairs: int = 15,
    chunk_size: int = 32,
    clock: Callable[[], float] = time.perf_counter,
) -> MatrixCost:
    """Build A of one sample here and by `torch.func.jacrev`, by turns.

    Args:
        model: in evaluation mode; it returns a tensor.
        x0: one sample.
        pairs: how often each side is timed, after one pass to warm up.
        chunk_size: products at once, the same for both sides.
        clock: `time.process_time` for one thread on a busy machine.
    """

    def ours() -> Tensor:
        return LinearInterpreter(model, "tangent", chunk_size=chunk_size)(x0).matrix()

    def theirs() -> Tensor:
        with torch.no_grad():
            jacobian: Tensor = torch.func.jacrev(model, chunk_size=chunk_size)(x0)
        return jacobian

    a, b = ours(), theirs()
    difference = float((a.flatten() - b.flatten()).abs().max() / b.abs().max())
    del a, b
    ratios = []
    for pair in range(pairs):
        seconds = {}
        for side in (theirs, ours) if pair % 2 else (ours, theirs):
            start = clock()
            side()
            if x0.is_cuda:
                torch.cuda.synchronize(x0.device)
            seconds[side] = clock() - start
        ratios.append(seconds[theirs] / seconds[ours])
    quarters = statistics.quantiles(ratios, n=4) if pairs > 1 else [ratios[0]] * 3
    memory = peak_bytes(theirs) / peak_bytes(ours)
    return MatrixCost(statistics.median(ratios), quarters[2] - quarters[0], memory, difference)


def scope_memory(model: nn.Module, x0: Tensor) -> ScopeMemory:
    """Peaks of memory of the ways to see A z or A^T c for one x0, which has a batch axis."""
    z = torch.randn_like(x0)
    both = torch.cat([x0, z])

    def forward() -> Any:
        with torch.no_grad():
            return model(both)

    def scope() -> Any:
        with LinearScope(model):
            return model(both)

    def autograd() -> Any:
        leaf = x0.clone().requires_grad_()
        return torch.autograd.grad(model(leaf).sum(), leaf)

    def tape() -> Any:
        with torch.no_grad():
            return LinearInterpreter(model)(x0).apply(z)

    whole = peak_bytes(forward)
    return ScopeMemory(*(peak_bytes(call) / whole for call in (scope, autograd, tape)))


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that tensors made during a call take at once, in bytes, without buffers within an operation."""
    with _Memory() as memory:
        call()
    return memory.peak


class _Memory(TorchDispatchMode):
    """Adds up the memory of tensors that are alive, after every operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import the compiler.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {StorageWeakRef(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _lies(leaf)}
        output = func(*args, **(kwargs or {}))
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        for leaf in tree_leaves(output):
            if _lies(leaf) and (storage := StorageWeakRef(leaf.untyped_storage())) not in given:
                self._alive[storage] = leaf.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self._alive.values()))
        return output


def _lies(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided
