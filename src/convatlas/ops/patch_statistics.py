"""What patches of images have in common: means, principal components, whitening, clusters, independent components.

Patches are rows of a matrix P (n, D) with D = C k k, the channel changing slowest: (c, row, column). Coates, Ng:
"Learning Feature Representations with K-means", 2012; Chan et al.: "PCANet", arXiv 1404.3606; Hyvarinen: "Fast and
Robust Fixed-Point Algorithms for Independent Component Analysis", 1999.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Components",
    "contrast_normalised",
    "decorrelated",
    "fast_ica",
    "pcanet_components",
    "principal_components",
    "spherical_kmeans",
]

#: Patches whose similarities are held at once.
_CHUNK = 10_000


class Components(NamedTuple):
    """Principal components of patches.

    Attributes:
        mean: (D).
        covariance: (D, D), divided by n.
        values: eigenvalues, the largest first.
        vectors: eigenvectors as rows, (D, D); the entry of largest magnitude of each is positive.
    """

    mean: Tensor
    covariance: Tensor
    values: Tensor
    vectors: Tensor

    def whitening(self, eps: float = 0.1) -> Tensor:
        """PCA whitening, diag(1 / sqrt(w + eps)) V^T."""
        return self.vectors / (self.values + eps).sqrt()[:, None]

    def zca(self, eps: float = 0.1) -> Tensor:
        """ZCA whitening, V diag(1 / sqrt(w + eps)) V^T, which changes patches as little as can be."""
        return self.vectors.T @ self.whitening(eps)


def contrast_normalised(patches: Tensor, eps: float = 0.01) -> Tensor:
    """Each patch with its mean taken off, over sqrt(variance + eps); eps is 10 for values up to 255."""
    centred = patches - patches.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()


def principal_components(patches: Tensor) -> Components:
    """Principal components of patches (n, D), in one stream over them.

    Raises:
        ValueError: there are no patches, they are not finite, or all are equal.
    """
    _check(patches)
    mean = patches.mean(0)
    covariance = patches.new_zeros(len(mean), len(mean))
    for part in patches.split(_CHUNK):
        covariance += (part - mean).T @ (part - mean)
    covariance = covariance / len(patches)
    values, vectors = _eigen(covariance)
    if not float(values[0]) > 0:
        raise ValueError("patches must differ, but all are equal")
    return Components(mean, covariance, values, vectors)


def pcanet_components(patches: Tensor) -> Tensor:
    """Eigenvectors as rows (D, D) of X^T X / n, where X are the patches with their own means taken off (PCANet)."""
    _check(patches)
    centred = patches - patches.mean(1, keepdim=True)
    return _eigen(centred.T @ centred / len(patches))[1]


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    rows = vectors.flip(1).T
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values.flip(0).clamp_min(0), rows * largest.sign()


def spherical_kmeans(data: Tensor, start: Tensor, iterations: int = 10) -> Tensor:
    """Directions (m, D) that each stand for the samples that lie along them or against them.

    In each step every sample counts with the direction to which its projection has the largest magnitude s, and that
    direction gets s times the sample. No more than a chunk of similarities is held.

    Args:
        data: whitened patches (n, D).
        start: (m, D), normalised first.
        iterations: steps.
    """
    directions = start / torch.linalg.vector_norm(start, dim=1, keepdim=True).clamp_min(1e-12)
    for _ in range(iterations):
        sums = directions.clone()
        for part in data.split(_CHUNK):
            similarity = part @ directions.T
            nearest = similarity.abs().argmax(1)
            weight = similarity.gather(1, nearest[:, None])
            sums.index_add_(0, nearest, weight * part)
        directions = sums / (torch.linalg.vector_norm(sums, dim=1, keepdim=True) + 1e-12)
    return directions


def fast_ica(data: Tensor, start: Tensor, iterations: int = 200) -> Tensor:
    """Unmixing matrix W (q, q) of whitened data (n, q) by the parallel fixed point of FastICA with log cosh.

    The directions are chaotic on the way: rounding grows by orders of magnitude until they settle.
    """
    w = start
    for _ in range(iterations):
        projected = (data @ w.T).tanh()
        w = decorrelated(projected.T @ data / len(data) - (1 - projected.square()).mean(0)[:, None] * w)
    return w


def decorrelated(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows, U V^T."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def _check(patches: Tensor) -> None:
    if patches.dim() != 2 or not len(patches):
        raise ValueError(f"patches must be (n, D) and not empty, got {tuple(patches.shape)}")
    if not bool(patches.isfinite().all()):
        raise ValueError("patches must be finite, but some hold NaN or infinity")
