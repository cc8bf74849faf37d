"""Meshes as images: layers around the Fourier transform of simplices, and a loss between shapes.

Jiang, Wang, Huang, Marcus, Niessner: "Convolutional Neural Networks on non-uniform geometrical signals using Euclidean
spectral transformation", ICLR 2019, arXiv 1901.02070; the loss: Jiang, Lansigan, Marcus, Niessner: "DDSL: Deep
Differentiable Simplex Layer for Learning Geometric Signals", ICCV 2019, arXiv 1901.11082. Put `SimplexRaster` in front
of any network for images or volumes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.ops.simplex_fourier import Mode, Smoothing, rasterize, simplex_fourier

__all__ = ["SimplexFourier", "SimplexRaster", "SpectralShapeLoss"]

#: One mesh, or one for each sample of a batch.
Meshes = Tensor | Sequence[Tensor]


class SimplexFourier(nn.Module):
    """Half spectra of meshes of points, lines, triangles or tetrahedra, differentiable in vertices and densities.

    A batch is a list of meshes of any sizes, or vertices (B, n_v, d); what all meshes share, elements or densities, is
    given once. Elements of density 0 fill up shorter meshes.

    Args:
        resolution: numbers of samples of the grid along each axis.
        period: of the signal, for all axes or each.
        mode: ``density`` or ``mass``, see `convatlas.ops.simplex_fourier.Mode`.
        boundary: elements are the facets of what they enclose.
        dtype: float32 to compute in that instead of float64.
    """

    def __init__(
        self,
        resolution: Sequence[int],
        *,
        period: float | Sequence[float] = 1.0,
        mode: Mode = "density",
        boundary: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.resolution = tuple(resolution)
        if not 1 <= len(self.resolution) <= 3 or min(self.resolution) < 1:
            raise ValueError(f"resolution must be one to three positive numbers, got {self.resolution}")
        if mode not in ("mass", "density", "first_axis_density"):
            raise unknown("mode", mode, ("mass", "density", "first_axis_density"))
        self.period, self.mode, self.boundary, self.dtype = period, mode, boundary, dtype

    def forward(self, vertices: Meshes, elements: Meshes, densities: Meshes | None = None) -> Tensor:
        """Spectra, complex (C, *resolution with half of the last axis), of a batch (B, C, ...).

        Args:
            vertices: (n_v, d); (B, n_v, d) or a list for a batch.
            elements: (n_e, j + 1), (B, n_e, j + 1) or a list.
            densities: (n_e, C), (B, n_e, C) or a list; 1 when left out.
        """
        if isinstance(vertices, Tensor) and vertices.dim() == 2:
            if not isinstance(elements, Tensor) or not (densities is None or isinstance(densities, Tensor)):
                raise ValueError("elements and densities must be tensors where vertices are those of one mesh")
            return self._one(vertices, elements, densities)
        count = len(vertices)
        batch = zip(vertices, _each("elements", elements, count), _each("densities", densities, count), strict=True)
        return torch.stack([self._one(mesh, parts, weights) for mesh, parts, weights in batch])  # type: ignore[arg-type]

    def _one(self, vertices: Tensor, elements: Tensor, densities: Tensor | None) -> Tensor:
        weights = vertices.new_ones(len(elements), 1) if densities is None else densities
        return simplex_fourier(
            vertices, elements, weights, self.resolution, self.period, self.mode, self.boundary, self.dtype
        )

    def extra_repr(self) -> str:
        """Show resolution and mode."""
        return f"resolution={self.resolution}, mode={self.mode!r}, boundary={self.boundary}"


class SimplexRaster(SimplexFourier):
    """Images or volumes (C, *resolution) of meshes, of a batch (B, C, *resolution): what a convolutional network takes.

    Args:
        resolution, period, mode, boundary, dtype: as for `SimplexFourier`.
        smoothing: of the spectrum, see `convatlas.ops.simplex_fourier.rasterize`; without any, edges ring.
        sigma: of the Gaussian, at the highest frequency.
    """

    def __init__(
        self,
        resolution: Sequence[int],
        *,
        smoothing: Smoothing = "gaussian",
        sigma: float = 2.0,
        period: float | Sequence[float] = 1.0,
        mode: Mode = "density",
        boundary: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(resolution, period=period, mode=mode, boundary=boundary, dtype=dtype)
        if smoothing not in ("gaussian", "lanczos", "exponential", "none"):
            raise unknown("smoothing", smoothing, ("gaussian", "lanczos", "exponential", "none"))
        self.smoothing, self.sigma = smoothing, sigma

    def forward(self, vertices: Meshes, elements: Meshes, densities: Meshes | None = None) -> Tensor:
        """Samples of the signal, real; arguments as for `SimplexFourier`."""
        spectrum = super().forward(vertices, elements, densities)
        return rasterize(spectrum, self.resolution, self.smoothing, self.sigma)

    def extra_repr(self) -> str:
        """Show resolution, mode and smoothing."""
        return f"{super().extra_repr()}, smoothing={self.smoothing!r}"


class SpectralShapeLoss(nn.Module):
    """Mean squared difference of the rasters of two shapes: smooth where intersection over union has no gradient.

    Args:
        resolution: of the rasters.
        boundary: shapes are given by what encloses them, as polygons usually are.
        smoothing, sigma: as for `SimplexRaster`.
    """

    def __init__(
        self,
        resolution: Sequence[int],
        *,
        boundary: bool = True,
        smoothing: Smoothing = "gaussian",
        sigma: float = 2.0,
    ) -> None:
        super().__init__()
        self.raster = SimplexRaster(resolution, boundary=boundary, smoothing=smoothing, sigma=sigma)

    def forward(
        self, vertices: Meshes, elements: Meshes, target: Meshes, target_elements: Meshes | None = None
    ) -> Tensor:
        """A scalar, the mean over the batch.

        Args:
            vertices, elements: the shape, or a batch of shapes, as `SimplexRaster` takes them.
            target: vertices of the shape that it should have, or its raster (C, *resolution) or (B, C, *resolution),
                which is made once where the target stays.
            target_elements: of the target; left out if the target is a raster.
        """
        ours = self.raster(vertices, elements)
        theirs = target if target_elements is None else self.raster(target, target_elements)
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            raise ValueError(f"target must be a raster {tuple(ours.shape)} where target_elements is left out")
        return (ours - theirs).square().mean()


def _each(name: str, given: Meshes | None, count: int) -> Sequence[Tensor | None]:
    """One tensor for each mesh of a batch."""
    if given is None or (isinstance(given, Tensor) and given.dim() == 2):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name} must be given once or for each of {count} meshes, got {len(given)}")
    return list(given)
