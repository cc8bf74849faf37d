"""Operations and memory traffic of each kernel of a forward pass, single or fused."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from convatlas.cost import ModuleCall, Operand, Operation, Trace, trace
from convatlas.errors import unknown

__all__ = ["LayerCost", "LayerCosts", "halo_overlap", "layer_costs"]

#: Timed passes of a model, after one to warm up.
_PASSES = 3


@dataclass(frozen=True)
class LayerCost:
    """One kernel of a forward pass.

    Attributes:
        name: of the module that it belongs to; with the operator where a module has several.
        kind: class of that module, or the operator where it is not a layer of its own.
        ops: operations, two for a multiply-add.
        bytes: memory traffic.
        seconds: measured, with what rides along; None where it was not.
    """

    name: str
    kind: str
    ops: float
    bytes: float
    seconds: float | None = None

    @property
    def intensity(self) -> float:
        """Operational intensity, operations a byte."""
        return self.ops / self.bytes if self.bytes else math.inf


@dataclass(frozen=True)
class LayerCosts:
    """The kernels of a forward pass in the order in which they run.

    Attributes:
        layers: the kernels.
        trace: the operations that they come from.
        bytes_per_element: that was counted with; None is that of the tensors.
    """

    layers: tuple[LayerCost, ...]
    trace: Trace
    bytes_per_element: float | None
    _starts: tuple[int, ...] = ()

    def fused(
        self, select: Sequence[type[nn.Module] | str], halo: tuple[int, int] | None = None
    ) -> tuple[LayerCost, ...]:
        """The kernels where each call of the selected modules is one: it reads its inputs and all weights, and writes
        its outputs; features within it never reach memory.

        Args:
            select: classes of modules, their names, or names of single modules.
            halo: height and width of the tiles of the output that such a kernel works on; what lies before a
                convolution is computed again at the border of every tile (`halo_overlap`). None counts nothing twice.
                Convolutions count as if they followed each other.

        Raises:
            UnknownName: a name is that of no class and no module that was called.
        """
        wanted = {kind if isinstance(kind, str) else kind.__name__ for kind in select}
        known = {name for call in self.trace.calls for name in (call.name, call.kind)}
        for name in sorted(wanted - known):
            raise unknown("module or class of modules", name, known - {""})
        # Inner calls end before outer ones, which take them in.
        units: list[ModuleCall] = []
        for call in self.trace.calls:
            if wanted & {call.name, call.kind}:
                units = [unit for unit in units if unit.first < call.first] + [call]
        kernels: list[LayerCost] = []
        position = 0
        for unit in sorted(units, key=lambda unit: unit.first):
            kernels += self._between(position, unit.first)
            kernels += self._unit(unit, halo)
            position = unit.last
        return (*kernels, *self._between(position, len(self.trace.operations)))

    def _between(self, first: int, last: int) -> list[LayerCost]:
        return [layer for layer, start in zip(self.layers, self._starts, strict=True) if first <= start < last]

    def _unit(self, unit: ModuleCall, halo: tuple[int, int] | None) -> list[LayerCost]:
        inside = self._between(unit.first, unit.last)
        if not inside:
            return []
        operations = [op for op in self.trace.operations[unit.first : unit.last] if op.macs]
        ops = 2.0 * sum(op.macs * again for op, again in zip(operations, _overlaps(operations, halo), strict=True))
        weights = [operand for op in operations for operand in op.read if operand.weight and operand.dims > 1]
        features = [operand for operand in (*unit.read, *unit.written) if not operand.weight]
        moved = sum(_size(operand, self.bytes_per_element) for operand in (*weights, *features))
        times = [layer.seconds for layer in inside if layer.seconds is not None]
        return [LayerCost(unit.name or "(all)", unit.kind, ops, moved, sum(times) if times else None)]


def halo_overlap(tile: tuple[int, int], kernel_size: int, *, stride: int = 1, depth: int = 1) -> float:
    """How often features before ``depth`` convolutions in a row are computed, if their output is made tile by tile.

    One convolution of stride 1 gives (th + R - 1) (tw + R - 1) / (th tw).

    Args:
        tile: height and width of the tiles of the output.
        kernel_size, stride: of the convolutions.
        depth: number of convolutions between these features and the output.
    """
    step = Operation("convolution", "", 1, (), (), (kernel_size,) * 2, (stride,) * 2)
    return _overlaps([replace(step, kernel_size=(), stride=()), *[step] * depth], tile)[0]


def _overlaps(operations: Sequence[Operation], tile: tuple[int, int] | None) -> list[float]:
    """How often the result of each operation is computed."""
    if tile is None:
        return [1.0] * len(operations)
    needed, own = list(map(float, tile)), list(map(float, tile))
    again = []
    for op in reversed(operations):
        again.append(math.prod(needed) / math.prod(own))
        if len(op.kernel_size) == len(tile):
            needed = [
                (size - 1) * step + taps for size, step, taps in zip(needed, op.stride, op.kernel_size, strict=True)
            ]
            own = [size * step for size, step in zip(own, op.stride, strict=True)]
    return again[::-1]


def layer_costs(
    model: nn.Module,
    *inputs: Any,
    bytes_per_element: float | None = None,
    folded: bool = True,
    measure: bool = False,
) -> LayerCosts:
    """What each kernel of ``model(*inputs)`` takes, in evaluation mode; the model stays as it is.

    A kernel is an operation with multiply-adds: a convolution, a product of matrices, attention, a Fourier transform.

    Args:
        model: any module.
        inputs: of an example call; on the meta device nothing is computed.
        bytes_per_element: size of an element, e.g. 2 for half precision; None is that of the tensors.
        folded: whether norms, activations and other operations ride along with the kernel before them; else each is a
            kernel of its own without operations, as they run without fusion.
        measure: run the model and take the times of the kernels, medians of some passes.

    Raises:
        ValueError: model is no module, or bytes_per_element is not positive.
        Unsupported: operations depend on values, and the model is on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if bytes_per_element is not None and not bytes_per_element > 0:
        raise ValueError(f"bytes_per_element must be positive, got {bytes_per_element}")
    if measure:
        *first, found = [trace(model, *inputs, timed=True) for _ in range(1 + _PASSES)]
        # A model that draws its own way may run other operations every time.
        alike = [each for each in first[1:] if len(each.operations) == len(found.operations)]
        times: list[float] | None = [
            statistics.median(op.seconds or 0.0 for op in same)
            for same in zip(*(each.operations for each in (*alike, found)), strict=True)
        ]
    else:
        found, times = trace(model, *inputs), None
    kinds = {call.name: call.kind for call in found.calls}
    parents = {name.rpartition(".")[0] for name in kinds if name}
    products = Counter(op.module for op in found.operations if op.macs)
    layers: list[LayerCost] = []
    starts: list[int] = []
    waiting = 0.0
    for index, op in enumerate(found.operations):
        seconds = times[index] if times is not None else None
        if op.macs or not folded:
            leaf = op.module not in parents
            name = op.module or "(all)"
            label = name if leaf and op.macs and products[op.module] == 1 else f"{name} ({op.operator})"
            kind = kinds[op.module] if leaf and op.module in kinds else op.operator
            operands = [x for x in (*op.read, *op.written) if not (x.weight and x.dims < 2)]
            moved = sum(_size(operand, bytes_per_element) for operand in operands)
            own = None if seconds is None else seconds + waiting
            layers.append(LayerCost(label, kind, 2.0 * op.macs, moved, own))
            starts.append(index)
            waiting = 0.0
        elif seconds is not None and layers:
            layers[-1] = replace(layers[-1], seconds=(layers[-1].seconds or 0.0) + seconds)
        elif seconds is not None:
            waiting += seconds
    return LayerCosts(tuple(layers), found, bytes_per_element, tuple(starts))


def _size(operand: Operand, bytes_per_element: float | None) -> float:
    return float(operand.bytes if bytes_per_element is None else operand.elements * bytes_per_element)
