"""Size, shape and number of a network's filters: receptive fields, separability, redundancy, spectra.

"On filter design in deep convolutional neural network", 2024, and the measures that it surveys: singular values of
circular convolutions (Sedghi et al., arXiv 1805.10408), the effective rank of Roy and Vetterli (EUSIPCO 2007), pruning
by the norm of filters (Li et al., arXiv 1608.08710) or by their geometric median (He et al., arXiv 1811.00250).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported, unknown
from convatlas.hooks import record
from convatlas.ops.conv_spectrum import conv_spectrum
from convatlas.report import Bars, Cell, Heatmap, Images, Report, Section, Table
from convatlas.training.measure import provenance

__all__ = [
    "FilterMeasures",
    "analyse_filters",
    "cosine_similarity",
    "effective_rank",
    "filter_importance",
    "frame_upper_bound",
    "hexagonal_mask",
    "mean_frequency",
    "measure_filters",
    "mutual_coherence",
    "orthogonality_defect",
    "receptive_field",
    "separability",
    "separable_factors",
    "stacked",
]

_MOST_LAYERS = 200
_KEPT = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.AvgPool2d, nn.Flatten, nn.Identity, nn.PixelShuffle, nn.Upsample)


class FilterMeasures(NamedTuple):
    """What was measured of the filters of one convolution.

    Attributes:
        name: of the layer.
        shape: of its weight.
        effective_rank: of the matrix of its filters.
        coherence: largest cosine of two filters, in magnitude.
        separability: mean over the slices.
        frequency: mean over the slices, in cycles a pixel.
        spectral_norm: largest singular value for circular padding.
        condition: its ratio to the smallest.
        orthogonality: ||W W^T - 1||_F^2 of the matrix of its filters.
    """

    name: str
    shape: tuple[int, ...]
    effective_rank: float
    coherence: float
    separability: float
    frequency: float
    spectral_norm: float
    condition: float
    orthogonality: float


def _rows(weight: Tensor) -> Tensor:
    if weight.dim() < 2 or not weight.numel():
        raise ValueError(f"weight must be (out, in, ...) and not empty, got {tuple(weight.shape)}")
    return weight.flatten(1)


def cosine_similarity(weight: Tensor) -> Tensor:
    """Cosines between the filters of a weight (out, in, ...), (out, out)."""
    rows = _rows(weight)
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)
    return rows @ rows.T


def mutual_coherence(weight: Tensor) -> Tensor:
    """Largest magnitude of the cosine of two different filters; 0 if there is one filter."""
    cosines = cosine_similarity(weight).abs()
    return (cosines - cosines.diagonal().diag()).max()


def effective_rank(weight: Tensor) -> Tensor:
    """exp of the entropy of the shares s^2 / sum s^2 of the singular values of the matrix of filters."""
    shares = torch.linalg.svdvals(_rows(weight)).square()
    return torch.special.entr(shares / shares.sum()).sum().exp()


def orthogonality_defect(weight: Tensor) -> Tensor:
    """||W W^T - 1||_F^2 of the matrix of filters (out, in taps)."""
    gram = _rows(weight) @ _rows(weight).T
    return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()


def separability(weight: Tensor) -> Tensor:
    """s_1^2 / sum s_i^2 of every slice of a weight (out, in, k, k), (out * in): 1 for a column times a row."""
    values = torch.linalg.svdvals(_slices(weight)).square()
    return values[:, 0] / values.sum(1).clamp_min(1e-300)


def separable_factors(weight: Tensor, rank: int = 1) -> tuple[Tensor, Tensor]:
    """The best k x 1 and 1 x k factors of every slice, (out, in, rank, k, 1) and (out, in, rank, 1, k).

    Raises:
        ValueError: the rank is not between 1 and k.
    """
    if not 1 <= rank <= min(weight.shape[2:]):
        raise ValueError(f"rank must be between 1 and {min(weight.shape[2:])}, got {rank}")
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[..., :rank].sqrt()
    columns = (u[..., :rank] * root[..., None, :]).mT
    return columns[..., None], (vh[..., :rank, :] * root[..., None])[..., None, :]


def mean_frequency(weight: Tensor, size: int = 8) -> Tensor:
    """Mean radial frequency of every slice of a weight (out, in, k, k), weighted by its power, in cycles a pixel."""
    power = torch.fft.fft2(_slices(weight), s=(size, size)).abs().square()
    frequency = torch.fft.fftfreq(size, dtype=weight.dtype, device=weight.device)
    radius = torch.hypot(frequency[:, None], frequency)
    return (power * radius).sum((1, 2)) / power.sum((1, 2)).clamp_min(1e-300)


def frame_upper_bound(weight: Tensor, size: int = 8) -> Tensor:
    """Largest sum over the filters of their power at one frequency, over frequencies and input channels."""
    return torch.fft.fft2(weight, s=(size, size)).abs().square().sum(0).max()


def _slices(weight: Tensor) -> Tensor:
    if weight.dim() != 4:
        raise ValueError(f"weight must be (out, in, k, k), got {tuple(weight.shape)}")
    return weight.flatten(0, 1)


def filter_importance(weight: Tensor, how: Literal["l1", "geometric_median"] = "l1") -> Tensor:
    """How much each filter counts (out): what is smallest can be pruned first.

    Args:
        weight: (out, in, ...).
        how: ``l1``: sum of magnitudes; ``geometric_median``: sum of the distances to all other filters, which is small
            for those that the others can stand for.
    """
    if how == "l1":
        return _rows(weight).abs().sum(1)
    if how != "geometric_median":
        raise unknown("how", str(how), ("l1", "geometric_median"))
    return torch.cdist(_rows(weight), _rows(weight)).sum(1)


def stacked(kernel_size: int) -> tuple[int, float]:
    """How many 3 x 3 convolutions see as far as one of k x k, and their share of its weights: 2 and 18/25 for 5.

    Raises:
        ValueError: the kernel is even or smaller than 3.
    """
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size}")
    count = (kernel_size - 1) // 2
    return count, 9 * count / kernel_size**2


def hexagonal_mask(k: int) -> Tensor:
    """Which taps of a k x k kernel lie in a hexagon, in coordinates along two of its axes; k is odd.

    Raises:
        ValueError: k is even.
    """
    if k < 1 or k % 2 == 0:
        raise ValueError(f"k must be odd, got {k}")
    places = torch.arange(k) - k // 2
    return (places[:, None] + places).abs() <= k // 2


def receptive_field(model: nn.Module, input_size: Sequence[int], layer: str | None = None) -> tuple[int, ...]:
    """How many inputs along each axis one output of a layer can depend on, branches and dilation included.

    A copy of the model with positive weights and without activations and norms is asked which inputs have a gradient.
    Attention and pooling over the whole map see everything.

    Args:
        model: any network of convolutions.
        input_size: channels and sizes of an input, (C, H, W); a field that is cut off by it is at least so large.
        layer: name of the layer; the last that puts out a map when left out.

    Raises:
        Unsupported: no layer puts out a map, or there is none of that name.
    """
    plain = _positive_copy(model)
    x = torch.ones(1, *input_size, requires_grad=True)
    dims = len(input_size) - 1
    leaves = {name for name, module in plain.named_modules() if not list(module.children())}
    wanted = leaves if layer is None else {layer}
    if layer is not None and layer not in dict(plain.named_modules()):
        raise unknown("layer", layer, (name for name, _ in plain.named_modules()))
    with record(plain, lambda name, _: name in wanted) as records:
        plain(x)
    maps = [r.output for r in records if isinstance(r.output, Tensor) and r.output.dim() == dims + 2]
    maps = [each for each in maps if each.requires_grad and max(each.shape[2:]) > 1] or maps
    if not maps:
        raise Unsupported("no layer of the model puts out a map")
    output = maps[-1]
    middle = output[0]
    for size in reversed(output.shape[2:]):
        middle = middle.select(-1, size // 2)
    (gradient,) = torch.autograd.grad(middle.sum(), x)
    reached = gradient[0].abs().sum(0) > 0
    extents = []
    for axis in range(dims):
        others = tuple(other for other in range(dims) if other != axis)
        places = reached.any(others).nonzero()[:, 0] if others else reached.nonzero()[:, 0]
        extents.append(int(places[-1] - places[0]) + 1 if len(places) else 0)
    return tuple(extents)


def _positive_copy(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model).cpu().float().eval()
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MaxPool2d):
                new = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(parent, name, new)
            elif not list(child.children()) and not isinstance(child, (*_KEPT, nn.Linear, *_POOLS)):
                setattr(parent, name, nn.Identity())
    for parameter in plain.parameters():
        nn.init.constant_(parameter, 1 / max(1, parameter[0].numel()) if parameter.dim() > 1 else 0.0)
    return plain


_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AvgPool1d, nn.AvgPool3d)


def measure_filters(weight: Tensor, name: str = "weight", size: int = 8) -> FilterMeasures:
    """Measure one weight (out, in, k, k).

    Args:
        weight: of a convolution of images.
        name: of the layer.
        size: side of the maps for which spectra are taken, at least the kernel.
    """
    weight = weight.detach().double()
    size = max(size, *weight.shape[2:])
    values = conv_spectrum(weight, size)
    smallest = float(values.min())
    return FilterMeasures(
        name,
        tuple(weight.shape),
        float(effective_rank(weight)),
        float(mutual_coherence(weight)),
        float(separability(weight).mean()),
        float(mean_frequency(weight, size).mean()),
        float(values.max()),
        float(values.max()) / smallest if smallest > 0 else math.inf,
        float(orthogonality_defect(weight)),
    )


def analyse_filters(subject: nn.Module | Tensor, *, size: int = 8) -> Report:
    """A report on the filters of every convolution of images of a model, or on one weight (out, in, k, k).

    Raises:
        ValueError: there is no such convolution, or the weight has another shape.
    """
    if isinstance(subject, Tensor):
        _slices(subject)
        weights = {"weight": subject}
    else:
        convs = {name: module for name, module in subject.named_modules() if isinstance(module, nn.Conv2d)}
        weights = {name: conv.weight for name, conv in convs.items()}
    if not weights:
        raise ValueError("the model must have a convolution of images")
    weights = dict(list(weights.items())[:_MOST_LAYERS])
    measured = [measure_filters(weight, name, size) for name, weight in weights.items()]
    rows: list[list[Cell]] = [
        [each.name, " x ".join(map(str, each.shape)), *(value if math.isfinite(value) else None for value in each[2:])]
        for each in measured
    ]
    columns = [
        *("layer", "weight", "effective rank", "coherence", "separability", "mean frequency [1/px]"),
        *("spectral norm", "condition", "||W W^T - 1||^2"),
    ]
    first = next(iter(weights.values())).detach().double().cpu()
    count = min(len(first), 16)
    cosines = cosine_similarity(first[:count]).abs().tolist()
    labels = [str(i) for i in range(count)]
    parts: list[Any] = [
        Table("Filters of each layer", columns, rows, f"Spectra are those of circular maps of {size} x {size}."),
        Bars(
            "Effective rank over the number of filters",
            "share",
            {each.name: each.effective_rank / min(each.shape[0], math.prod(each.shape[1:])) for each in measured[:24]},
        ),
        Heatmap(
            "Cosines of the first filters of the first layer, in magnitude", cosines, labels, labels, "filter", "filter"
        ),
        Images("Filters of the first layer", [(_picture(first), f"{len(first)} filters")]),
    ]
    worst = max(measured, key=lambda each: each.coherence)
    summary = (
        f"{len(measured)} layers; the most alike filters are in {worst.name}, with a cosine of {worst.coherence:.3g}."
    )
    return Report("Filters", summary, [Section("Filters", parts)], provenance())


def _picture(weight: Tensor, most: int = 64, zoom: int = 8) -> Any:
    """Filters as grey squares, first channel mean, in rows of eight."""
    tiles = weight[:most].mean(1)
    low, high = tiles.amin((1, 2), keepdim=True), tiles.amax((1, 2), keepdim=True)
    tiles = (tiles - low) / (high - low).clamp_min(1e-12)
    side = tiles.shape[1] + 1
    rows = -(-len(tiles) // 8)
    sheet = torch.ones(rows * side + 1, 8 * (tiles.shape[2] + 1) + 1, dtype=tiles.dtype)
    for number, tile in enumerate(tiles):
        y, x = 1 + number // 8 * side, 1 + number % 8 * (tile.shape[1] + 1)
        sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return (255 * sheet).round().numpy().astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
