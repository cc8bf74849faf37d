"""The exact Fourier transform of points, lines, triangles and tetrahedra with weights.

Jiang, Wang, Huang, Marcus, Niessner: "Convolutional Neural Networks on non-uniform geometrical signals using Euclidean
spectral transformation", ICLR 2019, arXiv 1901.02070; gradients: Jiang, Lansigan, Marcus, Niessner: "DDSL: Deep
Differentiable Simplex Layer for Learning Geometric Signals", ICCV 2019, arXiv 1901.11082.

A simplex with the vertices x_0 ... x_j, content V and density rho has the transform F(k) = rho j! V exp[z_0, ..., z_j],
z_a = -i k . x_a, where exp[...] is the divided difference of the exponential (Hermite-Genocchi). The paper's closed
form i^j sum_a exp(-i s_a) / prod_b (s_a - s_b) divides by zero where phases s_a = k . x_a are equal, which they are at
k = 0 and across every edge that lies along an axis; here no phases are special.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from convatlas.errors import unknown
from convatlas.ops.backend import Backends
from convatlas.ops.precision import without_autocast

__all__ = [
    "Mode",
    "Smoothing",
    "as_real_pairs",
    "exp_divided_difference",
    "normalize_vertices",
    "polygon_elements",
    "rasterize",
    "simplex_fourier",
    "spectral_gaussian",
    "sub_simplices",
]

#: How a transform is scaled: ``mass`` as it is, so that F(0) is the mass; ``density`` so that the inverse transform
#: has the value of the density inside (for j = d; lines and surfaces get the same power of the number of samples a
#: unit length); ``first_axis_density`` times (samples of the first axis)^j, as in the authors' code, which is the same
#: for equal resolutions and a period of 1.
Mode = Literal["mass", "density", "first_axis_density"]
Smoothing = Literal["gaussian", "lanczos", "exponential", "none"]

#: Three phases or more that are nearer than this are taken by a power series of so many terms, by type.
_NEAR = 0.25
_TERMS = {torch.float64: 12, torch.float32: 7}
#: Pairs of an element and a frequency that are computed at once: what the cache of a CPU holds, and more on a GPU.
_PAIRS = {"cpu": 2**16, "other": 2**22}
#: Decay at the highest frequency, and order, of the exponential filter.
_EXPONENTIAL = (36.0, 8)

_backends = Backends("simplex_fourier", auto=lambda *args: "separable" if args[1].shape[1] == 1 else "stable")


def simplex_fourier(
    vertices: Tensor,
    elements: Tensor,
    densities: Tensor,
    resolution: Sequence[int],
    period: float | Sequence[float] = 1.0,
    mode: Mode = "density",
    boundary: bool = False,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """F(k) = sum_n rho_n j! V_n exp[-i k . x_n0, ..., -i k . x_nj] for k = 2 pi m / period.

    Differentiable in vertices and densities; the backward pass computes everything again instead of keeping it.

    Args:
        vertices: (n_v, d), d from 1 to 3, in [0, period) along each axis; outside they wrap around.
        elements: (n_e, j + 1), indices of the vertices of points, lines, triangles or tetrahedra, j <= d.
        densities: (n_e, C), real.
        resolution: d numbers of samples of the grid.
        period: of the signal, for all axes or each.
        mode: see `Mode`.
        boundary: the elements (n_e, d) are the facets of closed surfaces or polygons, and the signal is what these
            enclose. Positive if edges go around counter-clockwise, and triangles as seen from outside.
        dtype: computed in float64 unless this is float32.
        backend: ``auto``, ``naive`` (exponentials of bidiagonal matrices), ``stable`` (divided differences block by
            block) or, for points, ``separable`` (a product of matrices).

    Returns:
        complex (C, *resolution with n // 2 + 1 samples of the last axis), the half spectrum of a real signal.

    Raises:
        ValueError: shapes, indices or options do not fit each other.
        Unsupported: the backend cannot serve the call.
    """
    resolution = tuple(resolution)
    periods = _periods(period, len(resolution))
    _check(vertices, elements, densities, resolution, periods, mode, boundary, dtype)
    work = dtype or torch.float64
    out = torch.promote_types(vertices.dtype, torch.float32)
    scale = _scale(resolution, periods, elements.shape[1] - (not boundary), mode)
    args = (vertices.to(work), elements, densities.to(work), resolution, periods, boundary)
    with without_autocast(vertices):
        spectrum = _backends.run(backend, *args) * scale
    return spectrum.to(torch.complex128 if out == torch.float64 else torch.complex64)


def exp_divided_difference(phases: Tensor) -> Tensor:
    """exp[z_0, ..., z_j] at z = -i phases, to the precision of the type wherever the phases lie; 1/j! at zeros.

    Differentiable: its derivative by a node is the divided difference in which that node stands twice.

    Args:
        phases: (..., j + 1), float64 or float32.

    Returns:
        complex (...).
    """
    if phases.dtype not in _TERMS or not phases.dim() or not phases.shape[-1]:
        raise ValueError(f"phases must be (..., j + 1) in float64 or float32, got {phases.dtype} {tuple(phases.shape)}")
    return _divided(phases.movedim(-1, 0), 1.0)


def as_real_pairs(spectrum: Tensor) -> Tensor:
    """A spectrum (C, *grid) in the layout of the authors' code: real (*grid, C, 2), real and imaginary part."""
    return torch.view_as_real(spectrum.movedim(0, -1).contiguous())


def rasterize(
    spectrum: Tensor, resolution: Sequence[int], smoothing: Smoothing = "gaussian", sigma: float = 2.0
) -> Tensor:
    """Filter the half spectrum (..., *grid) of a real signal, and return its samples (..., *resolution).

    Sample n lies at n period / resolution, not at the centre of a voxel.

    Args:
        spectrum: from `simplex_fourier`.
        resolution: numbers of samples that it was made for.
        smoothing: ``gaussian`` (`spectral_gaussian`), ``lanczos`` (sinc), ``exponential`` (flat, then steep) or
            ``none``.
        sigma: of the Gaussian, at the highest frequency.

    Raises:
        UnknownName: there is no such smoothing.
        ValueError: the spectrum is not of that resolution.
    """
    resolution = tuple(resolution)
    grid = (*resolution[:-1], resolution[-1] // 2 + 1)
    if spectrum.dim() < len(grid) or tuple(spectrum.shape[spectrum.dim() - len(grid) :]) != grid:
        raise ValueError(f"spectrum must be (..., {', '.join(map(str, grid))}), got {tuple(spectrum.shape)}")
    return torch.fft.irfftn(
        spectrum * _filter(resolution, smoothing, sigma).to(spectrum.real),
        s=resolution,
        dim=tuple(range(-len(grid), 0)),
    )


def spectral_gaussian(resolution: Sequence[int], sigma: float = 2.0) -> Tensor:
    """exp(-(2 sigma |m| / n)^2 / 2) over the half grid of integer frequencies m; n samples along the first axis."""
    radius = _frequencies(tuple(resolution)).square().sum(-1).sqrt()
    return torch.exp(-0.5 * (2 * sigma * radius / resolution[0]) ** 2)


def normalize_vertices(vertices: Tensor, margin: float = 0.2) -> Tensor:
    """Vertices (n_v, d) with the centre of their bounding box at 0.5 and a largest extent of 1 - margin.

    Raises:
        ValueError: margin is not in [0, 1).
    """
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be in [0, 1), got {margin}")
    low, high = vertices.amin(0), vertices.amax(0)
    extent = (high - low).amax()
    return (vertices - (low + high) / 2) / torch.where(extent > 0, extent, 1.0) * (1 - margin) + 0.5


def polygon_elements(n: int) -> Tensor:
    """The edges (n, 2) of a polygon whose vertices follow each other."""
    if n < 3:
        raise ValueError(f"n must be at least 3, got {n}")
    first = torch.arange(n)
    return torch.stack([first, (first + 1) % n], dim=1)


def sub_simplices(elements: Tensor, j: int) -> Tensor:
    """The different points (j = 0), edges (1) or triangles (2) of elements (n_e, k + 1), as (n, j + 1) sorted indices.

    Raises:
        ValueError: the elements have no parts of that kind.
    """
    if not 0 <= j < elements.shape[1]:
        raise ValueError(f"j must be from 0 to {elements.shape[1] - 1}, got {j}")
    ordered = elements.sort(dim=1).values
    parts = [ordered[:, list(corners)] for corners in itertools.combinations(range(elements.shape[1]), j + 1)]
    return torch.cat(parts).unique(dim=0)


# -- backends ----------------------------------------------------------------------------------------------------------


@_backends.register("naive")
def _naive(
    vertices: Tensor,
    elements: Tensor,
    densities: Tensor,
    resolution: tuple[int, ...],
    periods: tuple[float, ...],
    boundary: bool,
) -> Tensor:
    waves = 2 * math.pi * _frequencies(resolution).to(vertices) / vertices.new_tensor(periods)
    corners = _corners(vertices, elements, boundary)
    phases = torch.einsum("nad,...d->n...a", corners, waves)
    # exp[z_0, ..., z_j] stands in the corner of the exponential of a matrix with z on, and 1 above its diagonal.
    matrices = torch.diag_embed(torch.complex(torch.zeros_like(phases), -phases))
    matrices = matrices + torch.diag(torch.ones(phases.shape[-1] - 1), 1).to(matrices)
    differences = torch.linalg.matrix_exp(matrices)[..., 0, -1]
    weights = (densities * _content(corners, boundary).unsqueeze(-1)).to(differences)
    return torch.einsum("nc,n...->c...", weights, differences)


@_backends.register("stable")
def _stable(
    vertices: Tensor,
    elements: Tensor,
    densities: Tensor,
    resolution: tuple[int, ...],
    periods: tuple[float, ...],
    boundary: bool,
) -> Tensor:
    grid = _frequencies(resolution).to(vertices)
    corners = _corners(vertices, elements, boundary)
    turns_of = corners / vertices.new_tensor(periods)
    weights = (densities * _content(corners, boundary).unsqueeze(-1)).T  # (C, elements)
    waves = grid.flatten(0, -2).T
    pairs = _PAIRS.get(vertices.device.type, _PAIRS["other"])
    columns = min(waves.shape[1], max(pairs // 16, 1))
    rows = max(pairs // columns, 1)
    keep = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    blocks = []
    for wave in waves.split(columns, dim=1):
        total = None
        for weight, turns in zip(weights.split(rows, dim=1), turns_of.split(rows), strict=True):
            part = checkpoint(_block, weight, turns, wave, use_reentrant=False) if keep else _block(weight, turns, wave)
            total = part if total is None else total + part
        blocks.append(total)
    return torch.cat(blocks, dim=1).unflatten(1, grid.shape[:-1])  # type: ignore[arg-type]


def _block(weights: Tensor, corners: Tensor, waves: Tensor) -> Tensor:
    """The sum (C, modes) over elements (n, j + 1, d) of weights (C, n) times divided differences."""
    difference = _divided(corners.transpose(0, 1) @ waves, 2 * math.pi)
    return torch.complex(weights @ difference.real, weights @ difference.imag)


def _only_points(vertices: Tensor, elements: Tensor, *_: Any) -> str | None:
    return None if elements.shape[1] == 1 else "elements are not points"


@_backends.register("separable", refuses=_only_points)
def _separable(
    vertices: Tensor,
    elements: Tensor,
    densities: Tensor,
    resolution: tuple[int, ...],
    periods: tuple[float, ...],
    boundary: bool,
) -> Tensor:
    """Of points, the exponential is a product over the axes, and the sum over points one product of matrices."""
    points = vertices[elements[:, 0]]
    tables = []
    for axis, waves in enumerate(_axes(resolution)):
        turns = torch.outer(waves.to(points), points[:, axis] / periods[axis])
        angles = 2 * math.pi * (turns - turns.detach().floor())
        tables.append(torch.complex(torch.cos(angles), -torch.sin(angles)))  # (modes, points)
    last = densities.T.to(tables[-1]).unsqueeze(1) * tables[-1]  # (C, modes, points)
    if len(tables) == 1:
        return last.sum(-1)
    left = tables[0]
    if len(tables) == 3:
        left = (tables[0].unsqueeze(1) * tables[1]).flatten(0, 1)
    product = left @ last.flatten(0, 1).T
    return product.unflatten(1, last.shape[:2]).movedim(1, 0).unflatten(1, resolution[:-1])


# -- divided differences -----------------------------------------------------------------------------------------------


class _DividedDifference(torch.autograd.Function):
    """exp[-i unit s_0, ..., -i unit s_j] of real nodes s along the first axis."""

    @staticmethod
    def forward(nodes: Tensor, unit: float) -> Tensor:
        return _evaluated(list(nodes.unbind(0)), unit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        nodes, ctx.unit = inputs
        ctx.save_for_backward(nodes, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        nodes, output = ctx.saved_tensors
        # d exp[z_0, ..., z_j] / d z_a = exp[z_0, ..., z_j, z_a], and z = -i unit s. All of them add up to the output,
        # because exp[z_0 + t, ..., z_j + t] = exp(t) exp[z_0, ..., z_j].
        slopes = [_divided(torch.cat([nodes, nodes[a : a + 1]]), ctx.unit) for a in range(len(nodes) - 1)]
        slopes.append(output - sum(slopes[1:], slopes[0]) if slopes else output)
        weight = gradients[0].conj() * ctx.unit
        return torch.stack([(weight * slope).imag for slope in slopes]), None


def _divided(nodes: Tensor, unit: float) -> Tensor:
    difference: Tensor = _DividedDifference.apply(nodes, unit)  # type: ignore[no-untyped-call]
    return difference


def _evaluated(nodes: list[Tensor], unit: float) -> Tensor:
    """By the recursion exp[z_i, ..., z_k] = (exp[z_i, ..., z_k-1] - exp[z_i+1, ..., z_k]) / (z_i - z_k) over sorted
    nodes, so that its denominators are as large as can be; where they are small, by a series. It begins with
    exp[z_0, z_1] = exp((z_0 + z_1) / 2) sinc((z_0 - z_1) / 2i).
    """
    if len(nodes) == 1:
        return torch.complex(*_exponential(unit, nodes[0]))
    nodes = _sorted(nodes)
    level = []
    for low, high in itertools.pairwise(nodes):
        half = (high - low) * (unit / 2)
        sinc = torch.where(half == 0, 1.0, torch.sin(half) / half)
        real, imaginary = _exponential(unit, low + (high - low) / 2)
        level.append((real * sinc, imaginary * sinc))
    for order in range(2, len(nodes)):
        level = [
            _quotient(unit, nodes[first : first + order + 1], level[first], level[first + 1])
            for first in range(len(nodes) - order)
        ]
    return torch.complex(*level[0])


def _exponential(unit: float, node: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of exp(-i unit node)."""
    # Whole turns change nothing, and cost digits.
    angle = node * unit if unit == 1 else (node - node.floor()) * unit
    return torch.cos(angle), -torch.sin(angle)


def _quotient(
    unit: float, nodes: list[Tensor], first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The divided difference of sorted nodes from those without the last and without the first of them."""
    spread = (nodes[-1] - nodes[0]) * unit
    near = spread < _NEAR
    inverse = 1 / torch.where(near, 1.0, spread)
    # z_0 - z_j = i spread.
    real, imaginary = (first[1] - second[1]) * inverse, (second[0] - first[0]) * inverse
    if torch.compiler.is_compiling():  # a compiled program takes all of them both ways
        series = _series(unit, nodes)
        return torch.where(near, series[0], real), torch.where(near, series[1], imaginary)
    index = near.flatten().nonzero().squeeze(1)
    if len(index):
        series = _series(unit, [node.flatten()[index] for node in nodes])
        real, imaginary = (
            part.flatten().index_copy(0, index, values).view_as(part)
            for part, values in zip((real, imaginary), series, strict=True)
        )
    return real, imaginary


def _series(unit: float, nodes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """exp[z_0, ..., z_j] = exp(z_c) sum_m (-i)^m h_m / (m + j)! around a node c in the middle.

    h_m is the complete homogeneous symmetric polynomial of the offsets, to which the node c itself adds nothing.
    """
    order, terms = len(nodes) - 1, _TERMS[nodes[0].dtype]
    centre = nodes.pop(order // 2)
    offsets = [(node - centre) * unit for node in nodes]
    h = [torch.ones_like(centre)]
    for _ in range(1, terms):
        h.append(h[-1] * offsets[0])
    for offset in offsets[1:]:
        for m in range(1, terms):
            h[m] = torch.addcmul(h[m], offset, h[m - 1])
    signs = [(1, 0), (0, -1), (-1, 0), (0, 1)]  # of (-i)^m
    parts = [torch.zeros_like(centre), torch.zeros_like(centre)]
    for m in range(terms - 1, -1, -1):
        kind = m % 2
        parts[kind] = parts[kind].add(h[m], alpha=signs[m % 4][kind] / math.factorial(m + order))
    (real, imaginary), (cosine, sine) = parts, _exponential(unit, centre)
    return real * cosine - imaginary * sine, real * sine + imaginary * cosine


def _sorted(nodes: list[Tensor]) -> list[Tensor]:
    nodes = list(nodes)
    for last in range(len(nodes) - 1, 0, -1):
        for k in range(last):
            nodes[k], nodes[k + 1] = torch.minimum(nodes[k], nodes[k + 1]), torch.maximum(nodes[k], nodes[k + 1])
    return nodes


# -- geometry ----------------------------------------------------------------------------------------------------------


def _corners(vertices: Tensor, elements: Tensor, boundary: bool) -> Tensor:
    """(n_e, j + 1, d); facets of a boundary are joined with the origin."""
    corners = vertices[elements]
    return torch.cat([torch.zeros_like(corners[:, :1]), corners], dim=1) if boundary else corners


def _content(corners: Tensor, signed: bool) -> Tensor:
    """j! times length, area or volume, (n_e); its gradient is 0 where it is 0."""
    edges = corners[:, 1:] - corners[:, :1]
    j, dims = edges.shape[1:]
    if j == 0:
        return corners.new_ones(len(corners))
    if j < dims:
        normal = edges[:, 0] if j == 1 else torch.linalg.cross(edges[:, 0], edges[:, 1])
        return torch.linalg.vector_norm(normal, dim=-1)
    if j == 1:
        volume = edges[:, 0, 0]
    elif j == 2:
        volume = edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0]
    else:
        volume = (edges[:, 0] * torch.linalg.cross(edges[:, 1], edges[:, 2])).sum(-1)
    return volume if signed else volume.abs()


def _axes(resolution: tuple[int, ...]) -> list[Tensor]:
    """Integer frequencies along each axis, of the last axis half of them."""
    whole = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in resolution[:-1]]
    return [*whole, torch.arange(resolution[-1] // 2 + 1, dtype=torch.float64)]


def _frequencies(resolution: tuple[int, ...]) -> Tensor:
    """Integer frequencies (*half grid, d)."""
    return torch.stack(torch.meshgrid(*_axes(resolution), indexing="ij"), dim=-1)


def _filter(resolution: tuple[int, ...], smoothing: str, sigma: float) -> Tensor:
    if smoothing == "gaussian":
        return spectral_gaussian(resolution, sigma)
    shares = 2 * _frequencies(resolution).abs() / torch.tensor(resolution)  # 1 at the highest frequency
    if smoothing == "lanczos":
        return torch.sinc(shares).prod(-1)
    if smoothing == "exponential":
        decay, order = _EXPONENTIAL
        return torch.exp(-decay * shares**order).prod(-1)
    if smoothing == "none":
        return torch.ones(shares.shape[:-1])
    raise unknown("smoothing", smoothing, ("gaussian", "lanczos", "exponential", "none"))


def _scale(resolution: tuple[int, ...], periods: tuple[float, ...], j: int, mode: str) -> float:
    if mode == "mass":
        return 1.0
    if mode == "first_axis_density":
        return float(resolution[0] ** j)
    return float((math.prod(resolution) / math.prod(periods)) ** (j / len(resolution)))


def _periods(period: float | Sequence[float], dims: int) -> tuple[float, ...]:
    periods = tuple(float(t) for t in period) if isinstance(period, Sequence) else (float(period),) * dims
    if len(periods) != dims or min(periods, default=1.0) <= 0:
        raise ValueError(f"period must be positive, one for all axes or each of {dims}, got {period}")
    return periods


def _check(
    vertices: Tensor,
    elements: Tensor,
    densities: Tensor,
    resolution: tuple[int, ...],
    periods: tuple[float, ...],
    mode: str,
    boundary: bool,
    dtype: torch.dtype | None,
) -> None:
    if vertices.dim() != 2 or not 1 <= vertices.shape[1] <= 3 or not vertices.is_floating_point():
        raise ValueError(f"vertices must be real (n_v, d) with d from 1 to 3, got {tuple(vertices.shape)}")
    dims = vertices.shape[1]
    if len(resolution) != dims or min(resolution) < 1:
        raise ValueError(f"resolution must be {dims} positive numbers, one for each axis, got {resolution}")
    if mode not in ("mass", "density", "first_axis_density"):
        raise unknown("mode", mode, ("mass", "density", "first_axis_density"))
    if dtype not in (None, torch.float64, torch.float32):
        raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
    if elements.dim() != 2 or elements.is_floating_point() or elements.dtype == torch.bool:
        raise ValueError(f"elements must be integers (n_e, j + 1), got {elements.dtype} {tuple(elements.shape)}")
    columns = elements.shape[1]
    if boundary and dims == 1:
        raise ValueError("boundary must be False in 1-D: the ends of an interval have no direction")
    if boundary and columns != dims:
        raise ValueError(f"elements of a boundary must be (n_e, {dims}) in {dims}-D, got {tuple(elements.shape)}")
    if not 1 <= columns <= dims + 1:
        raise ValueError(f"elements must have from 1 to {dims + 1} vertices in {dims}-D, got {columns}")
    if densities.dim() != 2 or len(densities) != len(elements) or not densities.is_floating_point():
        raise ValueError(f"densities must be real ({len(elements)}, C), got {tuple(densities.shape)}")
    if torch.compiler.is_compiling() or vertices.device.type == "meta" or not len(elements):
        return
    if int(elements.min()) < 0 or int(elements.max()) >= len(vertices):
        raise ValueError(
            f"elements must be indices of the {len(vertices)} vertices, got {int(elements.min())} to "
            f"{int(elements.max())}"
        )
    if boundary and not bool((densities == densities[:1]).all()):
        raise ValueError("densities must be equal: boundary mode needs one common density")
    if boundary and not _closed(elements):
        warnings.warn("the boundary is not closed: what it encloses depends on the origin", stacklevel=3)
    limits = vertices.detach().new_tensor(periods)
    if bool(((vertices.detach() < 0) | (vertices.detach() >= limits)).any()):
        warnings.warn(f"vertices lie outside the period {periods} and wrap around", stacklevel=3)


def _closed(facets: Tensor) -> bool:
    """Whether every vertex of a polygon or edge of a surface is passed as often in both directions."""
    ends = facets.tolist()
    if facets.shape[1] == 2:
        return sorted(a for a, _ in ends) == sorted(b for _, b in ends)
    edges = [edge for a, b, c in ends for edge in ((a, b), (b, c), (c, a))]
    return sorted(edges) == sorted((b, a) for a, b in edges)
