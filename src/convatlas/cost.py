"""What a forward pass of any module takes: operations, bytes, activations, counted without running it.

The unit of operations is the multiply-add (MAC): one multiplication and one addition of real numbers, two FLOPs.
Counted are, from the sizes of the tensors,

- convolutions of every dimension, transposed and grouped, and products of matrices and vectors, however they are
  called (`torch.nn.Linear`, ``@``, ``einsum``): one MAC a product; for complex numbers four, in convolutions three, as
  torch computes them;
- scaled dot-product attention: its two products of matrices, also where a causal mask would save a half; bilinear
  layers and distances of points (`torch.cdist`), one MAC a term;
- Fourier transforms: 2.5 N log2 N MACs (5 N log2 N FLOPs) for N complex points over all transformed axes, half of it
  where the input or the output is real;
- normalisation, apart from the others: 2 MACs for each element that torch's norms put out;
- averages, apart as well: 1 MAC for each element that mean and average pooling read.

Published figures of networks are often ``macs`` alone, or with ``norm_macs``, or with both of the others.

Activation functions, additions, products of elements, interpolation, recurrent gates, decompositions of matrices are
counted in activations and bytes only.

`cost` sums this up by module; `trace` lists the operations one by one, in the order in which they run.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from convatlas.errors import Unsupported
from convatlas.hooks import watch
from convatlas.report import Cell, Table

__all__ = ["Cost", "ModuleCall", "ModuleCost", "Operand", "Operation", "Trace", "cost", "trace"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class ModuleCost:
    """What the calls of one module took, with everything that was called within them.

    Attributes:
        name: of the module; "" is the whole.
        kind: name of its class.
        calls: how often it was called.
        parameters: number of learned values in it, shared ones once.
        macs: multiply-adds of convolutions, products of matrices, attention and Fourier transforms.
        norm_macs, mean_macs: multiply-adds of normalisation and of averages.
        activations: elements that its operations wrote; views write nothing.
        bytes_read, bytes_written: traffic of its operations if each reads its inputs once and writes its outputs once,
            without fusion and without cache.
    """

    name: str
    kind: str
    calls: int
    parameters: int
    macs: int
    norm_macs: int
    mean_macs: int
    activations: int
    bytes_read: int
    bytes_written: int

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add in ``macs``."""
        return 2 * self.macs

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Cost:
    """What a forward pass takes.

    Attributes:
        modules: the whole first, then every module that was called, parents before children. A module with several
            names goes by the first; what it took counts for all modules that called it.
        operations: multiply-adds (``macs``) by operator, e.g. ``{"convolution": 1814073344}``, largest first.
    """

    modules: tuple[ModuleCost, ...]
    operations: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> ModuleCost:
        """The whole."""
        return self.modules[0]

    def __getitem__(self, name: str) -> ModuleCost:
        for module in self.modules:
            if module.name == name:
                return module
        raise KeyError(name)

    def table(self, depth: int | None = None) -> Table:
        """One row a module, to ``depth`` levels of names (0: the whole alone), for a report."""
        columns = ["module", "kind", "calls", "parameters", "MACs", "FLOPs", "of norms", "of means", "elements written"]
        rows: list[list[Cell]] = []
        for row in self.modules:
            if depth is None or (row.name.count(".") + 1 if row.name else 0) <= depth:
                counts: list[Cell] = [row.calls, row.parameters, row.macs, row.flops, row.norm_macs, row.mean_macs]
                rows.append([row.name or "(all)", row.kind, *counts, row.activations, row.bytes])
        caption = (
            "A MAC is one multiplication and one addition, two FLOPs; those of norms and means stand apart. "
            "Bytes are read and written without fusion and cache."
        )
        return Table("Cost of a forward pass", [*columns, "bytes"], rows, caption)


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation or a module reads or writes.

    Attributes:
        elements, bytes: that lie in memory; an expanded tensor repeats what lies there once.
        dims: number of its axes.
        weight: whether it is a parameter or buffer of the model, or a view of one.
    """

    elements: int
    bytes: int
    dims: int
    weight: bool


@dataclass(frozen=True)
class Operation:
    """One operation of a forward pass.

    Attributes:
        operator: e.g. ``convolution``.
        module: name of the innermost module that called it; "" is the whole.
        macs: multiply-adds, as `cost` counts them without norms and means.
        read, written: its tensors.
        kernel_size, stride: of a convolution, else empty.
        seconds: that it took, where it was timed.
    """

    operator: str
    module: str
    macs: int
    read: tuple[Operand, ...]
    written: tuple[Operand, ...]
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: its operations are those from ``first`` to before ``last``, the tensors its own."""

    name: str
    kind: str
    first: int
    last: int
    read: tuple[Operand, ...]
    written: tuple[Operand, ...]


@dataclass(frozen=True)
class Trace:
    """A forward pass: its operations in the order in which they ran, and the calls of modules that made them."""

    operations: tuple[Operation, ...]
    calls: tuple[ModuleCall, ...]


def trace(model: nn.Module, *inputs: Any, timed: bool = False, **named_inputs: Any) -> Trace:
    """List the operations of ``model(*inputs, **named_inputs)`` in evaluation mode, and leave the model as it was.

    Args:
        model: any module.
        inputs, named_inputs: what its forward takes.
        timed: run a copy of the model for real and take the time of each operation; else nothing is computed, as in
            `cost`.

    Raises:
        Unsupported: as `cost`.
    """
    tracer = _Tracer(model, timed)
    _run(model, inputs, named_inputs, tracer, real=timed)
    return Trace(tuple(tracer.list), tuple(tracer.calls))


def cost(model: nn.Module, *inputs: Any, **named_inputs: Any) -> Cost:
    """Count what ``model(*inputs, **named_inputs)`` takes in evaluation mode, and leave the model as it was.

    Nothing is computed: a copy of the model runs on tensors without content, so that size costs neither memory nor
    time, and model and inputs may be on the meta device. A model whose operations depend on values, such as that
    of sparse data, is copied and run for real. The counts are those of the operations on the CPU, on
    whichever device model and inputs lie.

    An operator from ``torch.library`` is counted by the formula that was registered for it with
    `torch.utils.flop_counter.register_flop_formula`; half of the FLOPs are its multiply-adds.

    Args:
        model: any module.
        inputs, named_inputs: what its forward takes; of tensors only shape and dtype count, unless operations depend
            on values.

    Raises:
        Unsupported: operations depend on values, and the model or an input is on the meta device.
    """
    counter = _Counter()
    return _summed(_run(model, inputs, named_inputs, counter), counter)


def _run(model: nn.Module, inputs: Any, named_inputs: Any, counter: _Counter, *, real: bool = False) -> nn.Module:
    """Run a copy of the model for a counter, and return it."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        if not real:
            with fake:
                stand_in, arguments = _without_content(fake, model, (inputs, named_inputs))
            _count(stand_in.eval(), arguments[0], arguments[1], counter, mode=fake)
            return stand_in
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        tensors = [*model.parameters(), *model.buffers(), *tree_leaves((inputs, named_inputs))]
        if any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors):
            raise Unsupported(
                f"{getattr(error, 'func', error)} of {type(model).__name__} depends on values: "
                "model and inputs must not be on the meta device"
            ) from None
        counter.clear()
    stand_in = copy.deepcopy(model).eval()
    _count(stand_in, inputs, named_inputs, counter, fast=real)
    return stand_in


# -- counting ----------------------------------------------------------------------------------------------------------


class _Tally:
    """Running sums of one module."""

    def __init__(self) -> None:
        self.calls = self.macs = self.norm_macs = self.mean_macs = 0
        self.activations = self.bytes_read = self.bytes_written = 0


class _Counter(TorchDispatchMode):
    """Counts every operation for all modules whose calls are under way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clear()

    def clear(self) -> None:
        self.tallies: dict[str, _Tally] = {}
        self.under_way: list[str] = []
        self.operations: dict[str, int] = {}

    def begin(self, model: nn.Module) -> None:
        """Called with the model that is going to run."""

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.under_way.append(name)
        self.tallies.setdefault(name, _Tally()).calls += 1

    def leave(self, name: str, output: Any) -> None:
        self.under_way.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a property, such as the device
            return func(*args, **kwargs)
        packet = func._overloadpacket
        formula = _FORMULAS.get(packet)
        if formula is None and packet not in flop_registry:
            with self:  # within inference mode operations come whole that otherwise come as their parts
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        start = time.perf_counter()
        output = func(*args, **kwargs)
        if not func.is_view and packet not in _FREE:
            self._add(packet, args, kwargs, output, start)
        return output

    def _add(self, packet: Any, args: Any, kwargs: Any, output: Any, start: float) -> None:
        macs = _macs(packet, args, kwargs, output)
        norm_macs = 2 * tree_leaves(output)[0].numel() if packet in _NORMS else 0
        mean_macs = args[0].numel() if packet in _MEANS else 0
        written = _written(packet, output)
        read = sum(_bytes(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        for name in set(self.under_way):
            tally = self.tallies[name]
            tally.macs += macs
            tally.norm_macs += norm_macs
            tally.mean_macs += mean_macs
            tally.activations += sum(leaf.numel() for leaf in written)
            tally.bytes_read += read
            tally.bytes_written += sum(map(_bytes, written))
        if macs:
            operator = packet.__name__.strip("_")
            self.operations[operator] = self.operations.get(operator, 0) + macs


class _Tracer(_Counter):
    """Lists every operation, and every call of a module."""

    def __init__(self, model: nn.Module, timed: bool) -> None:
        super().__init__()
        self.timed = timed
        self.kinds = {name: type(module).__name__ for name, module in model.named_modules()}

    def clear(self) -> None:
        super().clear()
        self.list: list[Operation] = []
        self.calls: list[ModuleCall] = []
        self.open: list[ModuleCall] = []
        self.storages: set[int] = set()

    def begin(self, model: nn.Module) -> None:
        self.storages = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().enter(name, args, kwargs)
        self.open.append(ModuleCall(name, self.kinds[name], len(self.list), 0, self._operands((args, kwargs)), ()))

    def leave(self, name: str, output: Any) -> None:
        super().leave(name, output)
        call = self.open.pop()
        self.calls.append(replace(call, last=len(self.list), written=self._operands(output)))

    def _add(self, packet: Any, args: Any, kwargs: Any, output: Any, start: float) -> None:
        written = _written(packet, output)
        seconds = None
        if self.timed:
            if written and written[0].is_cuda:
                torch.cuda.synchronize(written[0].device)
            seconds = time.perf_counter() - start
        convolves = packet is _aten.convolution
        self.list.append(
            Operation(
                packet.__name__.strip("_"),
                self.under_way[-1] if self.under_way else "",
                _macs(packet, args, kwargs, output),
                self._operands((args, kwargs)),
                self._operands(written),
                tuple(args[1].shape[2:]) if convolves else (),
                tuple(args[3]) if convolves else (),
                seconds,
            )
        )

    def _operands(self, value: Any) -> tuple[Operand, ...]:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        return tuple(Operand(_elements(x), _bytes(x), x.dim(), _storage(x) in self.storages) for x in tensors)


def _storage(tensor: Tensor) -> int:
    # Tensors without content have no address; what holds them has.
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _macs(packet: Any, args: Any, kwargs: Any, output: Any) -> int:
    if packet in _FORMULAS:
        return _FORMULAS[packet](args, output)
    return flop_registry[packet](*args, **kwargs, out_val=output) // 2 if packet in flop_registry else 0


def _written(packet: Any, output: Any) -> list[Tensor]:
    written = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return written[:1] if packet in _ATTENTION else written  # the others serve the backward pass


def _bytes(tensor: Tensor) -> int:
    return tensor.element_size() * _elements(tensor)


def _elements(tensor: Tensor) -> int:
    # An expanded tensor repeats what lies in memory once.
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)


def _count(
    model: nn.Module,
    inputs: Any,
    named_inputs: Any,
    counter: _Counter,
    *,
    mode: FakeTensorMode | None = None,
    fast: bool = False,
) -> None:
    counter.begin(model)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_composed_of_counted_operations(fast))
        stack.enter_context(watch(model, counter.enter, counter.leave))
        if mode is not None:
            stack.enter_context(mode)
        stack.enter_context(counter)
        model(*inputs, **named_inputs)


def _summed(model: nn.Module, counter: _Counter) -> Cost:
    rows = []
    for name, module in model.named_modules():
        if name in counter.tallies:
            parameters = sum(parameter.numel() for parameter in module.parameters())
            rows.append(ModuleCost(name, type(module).__name__, parameters=parameters, **vars(counter.tallies[name])))
    largest_first = sorted(counter.operations.items(), key=lambda entry: -entry[1])
    return Cost(tuple(rows), dict(largest_first))


@contextmanager
def _composed_of_counted_operations(fast: bool = False) -> Iterator[None]:
    """Keep torch from taking a whole attention layer or, unless its libraries are to be fast, recurrent network as one
    operation.
    """
    switches = [
        (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
        (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
        (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    ][: 1 if fast else None]
    with ExitStack() as stack:
        for get, switch in switches:
            stack.callback(switch, get())
            switch(False)
        yield


def _without_content(fake: FakeTensorMode, model: nn.Module, arguments: Any) -> tuple[nn.Module, Any]:
    """A copy of the model, and the arguments, whose tensors have shape and dtype and lie on the CPU, but no content."""

    def empty(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            return tensor
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    replaced: dict[int, Any] = {}
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in own:
            if isinstance(tensor, nn.Parameter):
                replaced.setdefault(id(tensor), nn.Parameter(empty(tensor), tensor.requires_grad))
            elif isinstance(tensor, Tensor):
                replaced.setdefault(id(tensor), empty(tensor))
    return copy.deepcopy(model, replaced), tree_map_only(Tensor, empty, arguments)


# -- formulas ----------------------------------------------------------------------------------------------------------


def _product(args: Any, output: Tensor) -> int:
    """A product of matrices or vectors: the last two tensors among the arguments, with an addend before them or not."""
    left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
    columns = right.shape[-1] if right.dim() > 1 else 1
    return (4 if output.is_complex() else 1) * left.numel() * columns


def _convolution(args: Any, output: Tensor) -> int:
    # The whole kernel at each position: of the output, or of the input where that is what is spread out.
    x, weight, transposed = args[0], args[1], args[6]
    return _positions(x if transposed else output) * weight.numel()


def _convolution_backward(args: Any, output: Any) -> int:
    gradient, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    return sum(wanted[:2]) * _positions(x if transposed else gradient) * weight.numel()


def _scaled_dot_product(args: Any, output: Any) -> int:
    query, key, value = args[:3]
    return math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _bilinear(args: Any, output: Tensor) -> int:
    return output.numel() * math.prod(args[1].shape[1:])


def _distances(args: Any, output: Tensor) -> int:
    return output.numel() * args[0].shape[-1]


def _fourier(args: Any, output: Tensor) -> int:
    x, axes = args[:2]
    whole = output if not output.is_complex() else x  # the other side of a real transform holds half of the spectrum
    points = math.prod(whole.shape[axis] for axis in axes)
    share = 0.5 if not (x.is_complex() and output.is_complex()) else 1
    return round(share * 2.5 * whole.numel() * math.log2(points)) if whole.numel() else 0


def _positions(x: Tensor) -> int:
    return math.prod((x.shape[0], *x.shape[2:]))


def _operators(*names: str) -> set[Any]:
    """Those of the names that this version of torch has."""
    return {getattr(_aten, name) for name in names if hasattr(_aten, name)}


_ATTENTION = _operators(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
_FORMULAS: dict[Any, Callable[[Any, Any], int]] = {
    **dict.fromkeys(_operators("mm", "bmm", "mv", "dot", "vdot"), _product),
    **dict.fromkeys(_operators("addmm", "addmm_", "addbmm", "baddbmm", "baddbmm_", "addmv", "addmv_"), _product),
    **dict.fromkeys(_operators("_addmm_activation", "_grouped_mm", "_int_mm"), _product),
    **dict.fromkeys(_ATTENTION, _scaled_dot_product),
    **dict.fromkeys(_operators("_fft_c2c", "_fft_r2c", "_fft_c2r"), _fourier),
    _aten.convolution: _convolution,
    _aten.convolution_backward: _convolution_backward,
    _aten._trilinear: _bilinear,
    _aten._cdist_forward: _distances,
}
_NORMS = _operators(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "native_layer_norm",
    "native_group_norm",
    "_fused_rms_norm",
)
_MEANS = _operators("mean", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
#: Give memory or another view of it, and touch no element.
_FREE = _operators("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize_")
