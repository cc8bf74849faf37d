"""TrAct: train the first layer of a network by a step on its outputs.

Petersen, Borgelt, Ermon: "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024, arXiv 2410.23970.

The gradient of first-layer weights grows with the pixels, so dark or low-contrast images hardly train it. TrAct makes a
gradient step on the layer's outputs Z = A W^T, Z* = Z - eta G, where the rows of A are the inputs, G = dL/dZ, and takes
the change of the weights that comes nearest to it: the minimum of 1/N |A D^T - (Z* - Z)|^2 + lambda |D|^2 over D is
D = -(eta / N) G^T A (A^T A / N + lambda I)^-1. The 1/N in front belongs to the mean loss. So the optimizer gets

    G^T A (A^T A / N + lambda I)^-1    in place of the gradient    G^T A;

outputs, gradients of input and bias, parameters and checkpoints are those of the plain layer.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd

from convatlas.errors import Unsupported, unknown
from convatlas.hooks import record
from convatlas.training.method import Method

__all__ = [
    "Distributed",
    "Solver",
    "TrAct",
    "TrActConv1d",
    "TrActConv2d",
    "TrActConv3d",
    "TrActLinear",
    "apply_tract",
    "step_calls",
    "tract",
    "tract_weight_grad",
    "without_tract",
]

#: How the regularised second moment is inverted.
Solver: TypeAlias = Literal["cholesky", "inverse", "eigh"]
#: Whose rows make the second moment: those of each process, or of all.
Distributed: TypeAlias = Literal["local", "allreduce"]

#: Elements of the unfolded input that are held at once: the fastest size measured on two cores.
_PIECE = 1 << 20
#: In float32 the weak directions of the input drown where its second moment exceeds lambda by this factor.
_WORST_CONDITION = 1e6


def tract_weight_grad(a: Tensor, g: Tensor, lam: float = 0.1, *, solver: Solver = "cholesky") -> Tensor:
    """The TrAct gradient of a weight, G^T A (A^T A / N + lambda I)^-1.

    With fewer rows than features it is computed as G^T (A A^T / N + lambda I)^-1 A, which is the same.

    Args:
        a: inputs A of the layer, one a row, (N, n).
        g: gradient G of the loss with respect to the outputs, (N, m).
        lam: ridge lambda > 0, in the units of the squared input; made for standardised inputs, for which 0.02 to 0.5
            work.
        solver: ``cholesky``, ``inverse``, or ``eigh`` (eigenvalues, exact also where float32 loses weak directions).

    Returns:
        (m, n), the shape of the weight.

    Raises:
        ValueError: lam is not positive, or the shapes do not fit.
        UnknownName: there is no such solver.
    """
    _check(lam, solver, "local")
    if a.dim() != 2 or g.dim() != 2 or len(a) != len(g):
        raise ValueError(f"a and g must be (N, n) and (N, m), got {tuple(a.shape)} and {tuple(g.shape)}")
    rows, features = a.shape
    if rows < features:
        return _few_rows(a.mT, g.mT, lam, solver)
    return _solve(a.mT @ a / rows, a.mT @ g, lam, solver).mT


def _few_rows(a: Tensor, g: Tensor, lam: float, solver: str) -> Tensor:
    """The gradient (m, n) from A^T (n, N) and G^T (m, N) through an N x N system."""
    rows = a.mT
    return g @ _solve(rows @ a / max(a.shape[-1], 1), rows, lam, solver)


def _solve(moment: Tensor, right: Tensor, lam: float, solver: str) -> Tensor:
    """(moment + lam I)^-1 right, for a positive semi-definite ``moment``."""
    ridge = lam * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    if solver == "cholesky":
        return torch.cholesky_solve(right, torch.linalg.cholesky(moment + ridge))
    if solver == "inverse":
        return torch.linalg.inv(moment + ridge) @ right
    values, vectors = torch.linalg.eigh(moment)
    return vectors @ ((vectors.mT @ right) / (values.clamp(min=0) + lam).unsqueeze(-1))


def _check(lam: float, solver: str, distributed: str) -> None:
    if not lam > 0:
        raise ValueError(f"lam must be positive, got {lam}")
    if solver not in get_args(Solver):
        raise unknown("solver", solver, get_args(Solver))
    if distributed not in get_args(Distributed):
        raise unknown("distributed", distributed, get_args(Distributed))


# -- the gradient of a layer -------------------------------------------------------------------------------------------


class _Geometry(NamedTuple):
    """How a convolution reads its input."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...]
    padding_mode: str

    def unfold(self, x: Tensor) -> Tensor:
        """View of the padded patches of (B, C, ...) as (groups, C / groups, taps..., B, positions...)."""
        if any(self.padding):
            x = F.pad(x, self.padding, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        for axis, (size, step, distance) in enumerate(zip(self.kernel_size, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + axis, distance * (size - 1) + 1, step)[..., ::distance]
        dims = len(self.kernel_size)
        x = x.unflatten(1, (self.groups, -1))  # (B, groups, C / groups, positions..., taps...)
        return x.movedim((0, *range(3, 3 + dims)), tuple(range(-1 - dims, 0)))


def _weight_gradient(
    x: Tensor, gradient: Tensor, geometry: _Geometry | None, lam: float, solver: str, distributed: str, warn: bool
) -> Tensor:
    """The gradient (groups, m, n) for the input ``x`` and the ``gradient`` of the output of a whole layer."""
    if geometry is None:
        a, g = x.reshape(1, -1, x.shape[-1]).mT, gradient.reshape(1, -1, gradient.shape[-1]).mT
        features, rows_axis = a.shape[1], 2
    else:
        if x.dim() == 1 + len(geometry.kernel_size):
            x, gradient = x.unsqueeze(0), gradient.unsqueeze(0)
        a, g = geometry.unfold(x), gradient.unflatten(1, (geometry.groups, -1)).movedim(0, 2)
        features, rows_axis = a.shape[1] * math.prod(geometry.kernel_size), 2 + len(geometry.kernel_size)
    groups, outputs = g.shape[:2]
    rows = g[0, 0].numel()
    if warn:
        _warn_of_large_inputs(a, features, lam)
    if rows < features and distributed == "local":
        return _few_rows(a.reshape(groups, features, rows), g.reshape(groups, outputs, rows), lam, solver)
    moment, plain = a.new_zeros(groups, features, features), a.new_zeros(groups, features, outputs)
    # The patches of a whole batch would take many times the memory of the input.
    pieces = max(1, min(a.shape[rows_axis], a.numel() // _PIECE))
    for part, part_g in zip(a.tensor_split(pieces, rows_axis), g.tensor_split(pieces, 2), strict=True):
        part, part_g = part.reshape(groups, features, -1), part_g.reshape(groups, outputs, -1)
        moment.baddbmm_(part, part.mT)
        plain.baddbmm_(part, part_g.mT)
    total: float | Tensor = rows
    if distributed == "allreduce" and dist.is_available() and dist.is_initialized():
        total = moment.new_tensor(float(rows))
        dist.all_reduce(moment)
        dist.all_reduce(total)
    return _solve(moment / total, plain, lam, solver).mT


def _warn_of_large_inputs(a: Tensor, features: int, lam: float) -> None:
    # Patches of images point mostly one way, so that the largest eigenvalue is almost the trace.
    condition = (a.square().mean() * features / lam).item()
    if condition > _WORST_CONDITION:
        warnings.warn(
            f"the second moment of the first layer's input is up to {condition:.1e} times lam: standardise the input, "
            "raise lam or compute in float64",
            stacklevel=2,
        )


class _WeightGradient(torch.autograd.Function):
    """The identity on the output of a layer whose weight is cut off from the graph; gives the weight its gradient.

    The gradients of input and bias take the ordinary way through the layer.
    """

    @staticmethod
    def forward(
        y: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: _Geometry | None,
        lam: float,
        solver: str,
        distributed: str,
        warn: bool,
    ) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, weight, *ctx.settings = inputs
        ctx.save_for_backward(x)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        # The second moment and its inverse lose too much in half precision.
        exact = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            found = _weight_gradient(x.to(exact), gradient.to(exact), *ctx.settings)
        return gradient, None, found.reshape(ctx.shape).to(ctx.dtype), None, None, None, None, None


# -- layers ------------------------------------------------------------------------------------------------------------


class _TrActLayer(nn.Module):
    """What the layers share: the settings, and the gradient in place of the plain one.

    Attributes:
        enabled: whether the weight gets the TrAct gradient; otherwise the layer is the plain one. See `without_tract`.
    """

    weight: Tensor
    enabled: bool

    def _configure(self, lam: float, solver: str, distributed: str) -> None:
        _check(lam, solver, distributed)
        if self.weight.is_complex():
            raise Unsupported(f"TrAct is defined for real weights, got {self.weight.dtype}")
        self.lam, self.solver, self.distributed = lam, solver, distributed
        self.enabled, self._warned = True, False

    def _replaces(self, weight: Tensor) -> bool:
        return self.enabled and torch.is_grad_enabled() and weight.requires_grad

    def _attach(self, y: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry | None) -> Tensor:
        # Once a layer, because it waits for the device.
        warn = not self._warned and weight.dtype != torch.float64 and not torch.compiler.is_compiling()
        self._warned = self._warned or warn
        settings = (geometry, self.lam, self.solver, self.distributed, warn)
        attached: Tensor = _WeightGradient.apply(y, x, weight, *settings)  # type: ignore[no-untyped-call]
        return attached

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lam={self.lam}"


class TrActLinear(_TrActLayer, nn.Linear):
    """`torch.nn.Linear` whose weight gets the TrAct gradient; all leading axes of (..., in_features) are rows.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear` takes them.
        lam, solver: as `tract_weight_grad` takes them.
        distributed: ``local``, where every process uses the second moment of its own rows, or ``allreduce``, where it
            is that of the rows of all; the processes' gradients are averaged afterwards as usual.

    Raises:
        ValueError: lam is not positive.
        UnknownName: there is no such solver or way to distribute.
        Unsupported: the dtype is complex.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lam: float = 0.1,
        solver: Solver = "cholesky",
        distributed: Distributed = "local",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._configure(lam, solver, distributed)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (..., in_features) to (..., out_features) as `torch.nn.Linear`."""
        weight = self.weight
        if not self._replaces(weight):
            return F.linear(input, weight, self.bias)
        return self._attach(F.linear(input, weight.detach(), self.bias), input, weight, None)


class _TrActConv(_TrActLayer, _ConvNd):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lam: float = 0.1,
        solver: Solver = "cholesky",
        distributed: Distributed = "local",
    ) -> None:
        plain = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        super().__init__(*plain, device, dtype)  # type: ignore[arg-type]
        self._configure(lam, solver, distributed)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Convolve (B, in_channels, ...) or (in_channels, ...) as the plain layer."""
        weight = self.weight
        if not self._replaces(weight):
            return self._conv_forward(input, weight, self.bias)
        padding = tuple(self._reversed_padding_repeated_twice)
        geometry = _Geometry(self.kernel_size, self.stride, self.dilation, self.groups, padding, self.padding_mode)
        return self._attach(self._conv_forward(input, weight.detach(), self.bias), input, weight, geometry)


class TrActConv1d(_TrActConv, nn.Conv1d):
    """`torch.nn.Conv1d` whose weight gets the TrAct gradient; every position is a row, every group a layer of its own.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            `torch.nn.Conv1d` takes them.
        lam, solver, distributed: as `TrActLinear` takes them.

    Raises:
        ValueError, UnknownName, Unsupported: as `TrActLinear`.
    """


class TrActConv2d(_TrActConv, nn.Conv2d):
    """`torch.nn.Conv2d` whose weight gets the TrAct gradient; see `TrActConv1d`."""


class TrActConv3d(_TrActConv, nn.Conv3d):
    """`torch.nn.Conv3d` whose weight gets the TrAct gradient; see `TrActConv1d`."""


_CONVS: dict[type[nn.Module], type[_TrActConv]] = {
    nn.Conv1d: TrActConv1d,
    nn.Conv2d: TrActConv2d,
    nn.Conv3d: TrActConv3d,
}


# -- on a network ------------------------------------------------------------------------------------------------------


def tract(
    layer: nn.Module, lam: float = 0.1, *, solver: Solver = "cholesky", distributed: Distributed = "local"
) -> nn.Module:
    """The TrAct form of a plain layer, with the very parameters of the layer.

    Args:
        layer: `torch.nn.Linear`, `Conv1d`, `Conv2d` or `Conv3d`, of any geometry.
        lam, solver, distributed: as `TrActLinear` takes them.

    Raises:
        Unsupported: it is another layer, also a subclass, or it has hooks or parametrizations, which would be lost.
        ValueError, UnknownName: as `TrActLinear`.
    """
    kind = type(layer)
    if kind is not nn.Linear and kind not in _CONVS:
        raise Unsupported(
            f"TrAct needs torch.nn.Linear, Conv1d, Conv2d or Conv3d themselves, got {kind.__module__}.{kind.__name__}"
        )
    if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks:
        raise Unsupported(f"this {kind.__name__} has hooks, which its TrAct form would lose: apply TrAct before them")
    factory: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}
    options: dict[str, Any] = {"lam": lam, "solver": solver, "distributed": distributed}
    replacement: TrActLinear | _TrActConv
    if isinstance(layer, nn.Linear):
        replacement = TrActLinear(layer.in_features, layer.out_features, layer.bias is not None, **factory, **options)
    else:
        conv: Any = layer
        replacement = _CONVS[kind](
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            **factory,
            **options,
        )
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(replacement, name, parameter)
    return replacement.train(layer.training)


def apply_tract(
    model: nn.Module,
    name: str | None = None,
    lam: float = 0.1,
    *,
    example_input: Tensor | tuple[Any, ...] | None = None,
    solver: Solver = "cholesky",
    distributed: Distributed = "local",
) -> nn.Module:
    """Give the first layer of a network its TrAct form, in place; optimizers that hold its parameters stay valid.

    Args:
        model: any network.
        name: of the layer, e.g. ``"conv1"``. By default the first linear or convolutional layer: of those that a
            forward pass of ``example_input`` calls, in the order of the calls. Without one, those that a network of
            this library names as its stem, or else the first of all in the order in which they were registered, which
            need not be that of the calls.
        lam, solver, distributed: as `TrActLinear` takes them.
        example_input: input of the network, or the tuple of its inputs.

    Returns:
        ``model``, or the new layer where the model is the layer itself.

    Raises:
        UnknownName: the model has no layer of that name, or as `TrActLinear`.
        Unsupported: the first layer is none that `tract` takes, or there is none.
        ValueError: as `TrActLinear`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name is not None and name not in modules:
        raise unknown("layer", name, modules)
    for first in _first_layers(model, example_input) if name is None else [name]:
        layer = modules[first]
        replacement = tract(layer, lam, solver=solver, distributed=distributed)
        if layer is model:
            return replacement
        for path in [path for path, module in modules.items() if module is layer]:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
    return model


def _first_layers(model: nn.Module, example_input: Tensor | tuple[Any, ...] | None) -> Sequence[str]:
    kinds = (nn.Linear, _ConvNd)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    stem: Sequence[str] = getattr(model, "stem_modules", ())
    if example_input is None and stem:
        return stem
    if names and example_input is not None:
        inputs = example_input if isinstance(example_input, tuple) else (example_input,)
        training = {module: module.training for module in model.modules()}
        try:
            with record(model.eval(), kinds, keep=lambda tensor: None) as calls, torch.no_grad():
                model(*inputs)
        finally:
            for module, mode in training.items():
                module.training = mode
        names = [call.name for call in calls]
    if not names:
        raise Unsupported(f"{type(model).__name__} has no linear or convolutional layer that TrAct could train")
    return names[:1]


@contextmanager
def without_tract(model: nn.Module) -> Iterator[None]:
    """Within the context, forward passes of ``model`` give all weights their ordinary gradients."""
    layers = {module: module.enabled for module in model.modules() if isinstance(module, _TrActLayer)}
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in layers.items():
            layer.enabled = enabled


def step_calls(model: nn.Module, inputs: Tensor, targets: Tensor, method: TrAct) -> dict[str, Callable[[], Tensor]]:
    """One training step of a classifier with TrAct and one without it, to be timed one against the other.

    Each trains a copy of ``model`` in full: forward, cross-entropy, backward, a step of SGD with momentum. The learning
    rate is 0, so that every call computes the same loss, which is what it returns.
    """

    def step(trained: nn.Module) -> Callable[[], Tensor]:
        optimizer = torch.optim.SGD(trained.train().parameters(), lr=0.0, momentum=0.9)

        def call() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(trained(inputs), targets)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return call

    return {"TrAct": step(method.prepare(copy.deepcopy(model))), "plain": step(copy.deepcopy(model))}


@dataclass(frozen=True, kw_only=True)
class TrAct(Method):
    """The method with its settings: the first layer of a network gets its TrAct form before training.

    Attributes:
        lam, solver, distributed: as `TrActLinear` takes them.
        layer: name of the layer; by default the first, as `apply_tract` finds it without an input.
    """

    lam: float = 0.1
    layer: str | None = None
    solver: Solver = "cholesky"
    distributed: Distributed = "local"

    def __post_init__(self) -> None:
        _check(self.lam, self.solver, self.distributed)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Give the first layer of ``model`` its TrAct form, as `apply_tract`."""
        return apply_tract(model, self.layer, self.lam, solver=self.solver, distributed=self.distributed)
