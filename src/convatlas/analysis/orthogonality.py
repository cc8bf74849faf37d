"""How near the convolutions of a network are to orthogonal ones, and how much the network can stretch a difference.

Achour, Malgouyres, Mamalet: "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks", JMLR
23, 2022, arXiv 2108.05623. With err_s <= eps < 1 all singular values of a layer lie between sqrt(1 - eps) and
sqrt(1 + eps), and err_s^2 <= alpha L_orth whatever the size of the input.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.hooks import record
from convatlas.ops.orthogonality import (
    conv_singular_values,
    l_orth,
    orthogonality_errors,
    spectral_bound_factor,
)
from convatlas.report import Cell, Lines, Report, Section, Table
from convatlas.training.measure import provenance
from convatlas.training.orthogonality import conv_existence

__all__ = ["LayerOrthogonality", "layer_orthogonality", "lipschitz_upper_bound", "measure_orthogonality", "study"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: Activations and others that stretch no difference.
_CONTRACTIONS = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout2d, nn.Dropout3d),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


class LayerOrthogonality(NamedTuple):
    """What was measured of one convolution.

    Attributes:
        name: of the layer.
        case: ``RO`` or ``CO``.
        exists: whether an orthogonal one of its shape exists.
        note: in words, on existence and padding.
        l_orth: L_orth(K).
        frobenius, spectral: err_F and err_s for its input.
        bound: sqrt(alpha L_orth), which err_s does not exceed.
        singular_values: all, the largest first.
    """

    name: str
    case: str
    exists: bool
    note: str
    l_orth: float
    frobenius: float
    spectral: float
    bound: float
    singular_values: Tensor


def layer_orthogonality(conv: Any, size: int | tuple[int, ...], name: str = "") -> LayerOrthogonality:
    """Measure a convolution on inputs of a size, rounded up to the stride and to the kernel, with circular padding.

    Raises:
        Unsupported: it is no convolution of torch, or its kernel is even or not cubic.
    """
    existence = conv_existence(conv)
    dims, stride, dilation = len(conv.kernel_size), conv.stride[0], conv.dilation[0]
    sizes = (size,) * dims if isinstance(size, int) else tuple(size)
    least = dilation * (conv.kernel_size[0] - 1) + 1
    sizes = tuple(stride * math.ceil(max(length, least) / stride) for length in sizes)
    weight = conv.weight.detach().double()
    with torch.no_grad():
        values = conv_singular_values(weight, sizes, stride, conv.groups, dilation)
        loss = float(l_orth(weight, stride, conv.groups, dilation))
        frobenius, spectral = map(float, orthogonality_errors(values))
    shape = (weight.shape[0] // conv.groups, weight.shape[1], least if least % 2 else least + 1)
    factor = spectral_bound_factor(*shape, stride, dims=dims)
    approximate = "" if conv.padding_mode == "circular" else "; measured as if padding were circular"
    return LayerOrthogonality(
        name,
        existence.case,
        existence.exists,
        existence.reason + approximate,
        loss,
        frobenius,
        spectral,
        math.sqrt(max(0.0, factor * loss)),
        values,
    )


def measure_orthogonality(
    model: nn.Module, example_input: Tensor | tuple[Any, ...]
) -> tuple[list[LayerOrthogonality], dict[str, str]]:
    """Measure every convolution that an example call reaches, on inputs of the size that it gets there.

    Returns:
        The measures, and the reasons of layers that cannot be measured by name.

    Raises:
        ValueError: the model has no convolution.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    with torch.no_grad(), record(model, _CONVS, keep=lambda tensor: tuple(tensor.shape)) as records:
        model(*inputs)
    modules = dict(model.named_modules())
    measured: list[LayerOrthogonality] = []
    skipped: dict[str, str] = {}
    for entry in records:
        if entry.call:
            continue
        try:
            measured.append(layer_orthogonality(modules[entry.name], entry.args[0][2:], entry.name))
        except Unsupported as error:
            skipped[entry.name] = str(error)
    return measured, skipped


def study(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> Report:
    """A report on the convolutions of a network: case, L_orth, errors, bound and singular values of each layer."""
    measured, skipped = measure_orthogonality(model, example_input)
    rows: list[list[Cell]] = [
        [
            each.name,
            each.case,
            "yes" if each.exists else "no",
            each.l_orth,
            each.frobenius,
            each.spectral,
            each.bound,
            float(each.singular_values[-1]),
            float(each.singular_values[0]),
            each.note,
        ]
        for each in measured
    ]
    columns = [
        *("layer", "case", "exists", "L_orth", "err_F", "err_s", "sqrt(alpha L_orth)"),
        *("smallest singular value", "largest", "note"),
    ]
    caption = "RO: rows of the layer's matrix can be orthonormal; CO: its columns."
    curves = {}
    for each in measured:
        values = each.singular_values[:: max(1, len(each.singular_values) // 200)]
        curves[each.name] = ([i / max(1, len(values) - 1) for i in range(len(values))], values.tolist())
    parts: list[Any] = [Table("Convolutions", columns, rows, caption)]
    if curves:
        parts.append(Lines("Singular values", "share of all", "singular value", curves))
    if skipped:
        parts.append(Table("Not measured", ["layer", "reason"], [[name, reason] for name, reason in skipped.items()]))
    worst = max(measured, key=lambda each: each.spectral, default=None)
    summary = "No convolution could be measured."
    if worst is not None:
        summary = (
            f"{len(measured)} convolutions; the furthest from orthogonal is {worst.name}: err_s {worst.spectral:.3g}."
        )
    sections = [Section("Orthogonality", parts)]
    return Report(f"Orthogonality of {type(model).__name__}", summary, sections, provenance())


def lipschitz_upper_bound(model: nn.Module, example_input: Tensor) -> float:
    """How much a chain of layers can stretch the distance of two inputs of a size: the product of its layers' norms.

    Convolutions count with their largest singular value, for zeros padded with that of a circular one on the padded
    input, which is not smaller; batch norms with their largest factor in evaluation.

    Args:
        model: its layers follow one another, as in a `torch.nn.Sequential`; in evaluation mode.
        example_input: one batch.

    Raises:
        ValueError: the model is in training mode.
        Unsupported: a layer's norm is not known, or the layers do not form a chain.
    """
    if model.training:
        raise ValueError("model must be in evaluation mode, in which batch norms are fixed")
    leaves = tuple(module for module in model.modules() if not list(module.children()))
    with torch.no_grad(), record(model, lambda _, module: module in leaves) as records:
        output = model(example_input)
    modules = dict(model.named_modules())
    bound, last = 1.0, example_input
    for entry in records:
        x = entry.args[0]
        if x.data_ptr() != last.data_ptr() or x.numel() != last.numel():
            raise Unsupported(f"the layers must form a chain, but {entry.name} does not read the output before it")
        bound *= _norm(entry.name, modules[entry.name], tuple(x.shape[2:]))
        last = entry.output
    if output.data_ptr() != last.data_ptr():
        raise Unsupported("the layers must form a chain, but the output is not that of the last layer")
    return bound


def _norm(name: str, layer: Any, size: tuple[int, ...]) -> float:
    if isinstance(layer, _CONVS):
        return _conv_norm(name, layer, size)
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
    if isinstance(layer, _NORMS) and layer.running_var is not None:
        scale = (layer.running_var + layer.eps).rsqrt()
        return float((scale if layer.weight is None else layer.weight.detach().abs() * scale).max())
    if isinstance(layer, _POOLS):
        sizes = [value if isinstance(value, tuple) else (value,) for value in (layer.kernel_size, layer.stride)]
        if min(sizes[1]) >= max(sizes[0]) and getattr(layer, "dilation", 1) == 1:
            return 1.0
        raise Unsupported(f"{name}: the windows of its pooling overlap")
    if isinstance(layer, _CONTRACTIONS):
        slope = getattr(layer, "negative_slope", getattr(layer, "alpha", 1.0))
        return max(1.0, float(slope))
    raise Unsupported(f"{name}: the norm of a {type(layer).__name__} is not known")


def _conv_norm(name: str, conv: Any, size: tuple[int, ...]) -> float:
    if conv.padding_mode not in ("zeros", "circular") or isinstance(conv.padding, str):
        raise Unsupported(f"{name}: padding must be a number of zeros or circular")
    sizes = []
    for length, pad, taps, step, spread in zip(
        size, conv.padding, conv.kernel_size, conv.stride, conv.dilation, strict=True
    ):
        if conv.padding_mode == "circular" and (pad != spread * (taps - 1) // 2 or length % step):
            raise Unsupported(f"{name}: circular padding must keep the size of its input, a multiple of the stride")
        whole = length if conv.padding_mode == "circular" else length + 2 * pad
        sizes.append(step * math.ceil(max(whole, spread * (taps - 1) + 1) / step))
    if len(set(conv.stride)) > 1 or len(set(conv.dilation)) > 1:
        raise Unsupported(f"{name}: stride or dilation differs between axes")
    weight = conv.weight.detach()
    return float(conv_singular_values(weight, tuple(sizes), conv.stride[0], conv.groups, conv.dilation[0])[0])
