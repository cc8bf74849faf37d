"""Scores of untrained networks: condition of the neural tangent kernel, and how long a circle becomes.

Both look at features of an image: for a network for images, by default, the mean of its last feature map. They leave
the network as it was, and take it in evaluation mode.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "Features",
    "condition",
    "extrinsic_curvature",
    "gauss_length",
    "length_distortion",
    "ntk_condition",
    "ntk_gram",
    "random_plane",
    "raw_features",
    "without_norms",
]

#: Features (B, C) of images (B, C, H, W) by a network.
Features = Callable[[nn.Module, Tensor], Tensor]

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def raw_features(model: nn.Module, x: Tensor) -> Tensor:
    """The mean (B, C) of the last feature map of a network for images, before the norm of its head."""
    maps: list[Tensor] = model.forward_features(x)  # type: ignore[operator]
    return maps[-1].flatten(2).mean(2)


# -- condition of the neural tangent kernel ----------------------------------------------------------------------------


def ntk_gram(model: nn.Module, images: Tensor, *, features: Features = raw_features) -> Tensor:
    """G_nm = g_n . g_m, where g_n is the gradient of the summed features of image n; in float64.

    The gradient is that by all parameters with "weight" in their name, norms included, that the features depend on.

    Args:
        model: any network.
        images: (N, C, H, W), at least two.
        features: what is summed.

    Returns:
        (N, N).

    Raises:
        ValueError: there are fewer than two images, or no parameter is a weight.
    """
    if len(images) < 2:
        raise ValueError(f"images must be at least 2, got {len(images)}")
    weights = [value for name, value in model.named_parameters() if "weight" in name and value.requires_grad]
    if not weights:
        raise ValueError("model must have parameters with 'weight' in their name, got none")
    rows = []
    with _evaluated(model):
        for image in images:
            total = features(model, image[None]).sum()
            gradients = torch.autograd.grad(total, weights, allow_unused=True)
            rows.append(torch.cat([value.flatten() for value in gradients if value is not None]))
    jacobian = torch.stack(rows).double()
    return jacobian @ jacobian.T


def condition(gram: Tensor) -> float:
    """Largest over smallest eigenvalue of a Gram matrix; infinite where it is singular, NaN where it is not finite."""
    if not gram.isfinite().all():
        return math.nan
    values = torch.linalg.eigvalsh(gram.double())
    return (values[-1] / values[0]).item() if values[0] > 0 else math.inf


def ntk_condition(model: nn.Module, images: Tensor, *, features: Features = raw_features) -> float:
    """Condition number of the neural tangent kernel on a batch of images: the lower, the easier to train.

    Args:
        model: any network.
        images: (N, C, H, W), at least two; the authors take 16.
        features: see `ntk_gram`.
    """
    return condition(ntk_gram(model, images, features=features))


# -- a circle through the network --------------------------------------------------------------------------------------


def random_plane(size: int, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An orthonormal basis (size, 2) of a random plane."""
    return torch.linalg.svd(torch.randn(size, 2, generator=generator, dtype=dtype), full_matrices=False).U


def without_norms(model: nn.Module) -> nn.Module:
    """A copy of a network in which every norm is the identity; only a norm that keeps the shape can be left out."""
    bare = copy.deepcopy(model)
    for parent in list(bare.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _NORMS):
                setattr(parent, name, nn.Identity())
    return bare


def length_distortion(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    theta: int | Tensor = 10,
    plane: Tensor | None = None,
    generator: torch.Generator | None = None,
    features: Features = raw_features,
) -> float:
    """L^E, the length that a unit circle of images has as a curve h of features: the sum of |h'(theta_j)|.

    The images lie on a circle in a random plane; the norms of the network are left out. 10 angles and the identity
    give 10. Computed by differentiating forward, in one pass for all angles. The higher, the more complex a function
    the network is.

    Args:
        model: any network; its dtype is that of the images.
        shape: (C, H, W) of an image.
        theta: angles, or how many of them from 0 to 2 pi, both included.
        plane: basis (C * H * W, 2) of the plane; a random one when left out.
        generator: of the random plane.
        features: what the curve consists of.
    """
    velocity, _ = _curve(model, shape, theta, plane, generator, features, second=False)
    return velocity.norm(dim=1).sum().item()


def gauss_length(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    theta: int | Tensor = 10,
    plane: Tensor | None = None,
    generator: torch.Generator | None = None,
    features: Features = raw_features,
    reference_chunk: int | None = None,
) -> float:
    """The sum of |h''| / |h'| over the angles, with the arguments of `length_distortion`.

    As in the authors' code |h'| is a constant, so that this is not the length of the curve of unit tangents.

    Args:
        model, shape, theta, plane, generator, features: as for `length_distortion`.
        reference_chunk: give what the authors' code gives that takes so many angles at once (6 by default there): it
            divides each |h''| by every |h'| of its chunk.
    """
    velocity, acceleration = _curve(model, shape, theta, plane, generator, features, second=True)
    speeds, changes = velocity.norm(dim=1), acceleration.norm(dim=1)
    if reference_chunk is None:
        return (changes / speeds).sum().item()
    chunks = zip(changes.split(reference_chunk), (1 / speeds).split(reference_chunk), strict=True)
    return sum((change.sum() * inverse.sum()).item() for change, inverse in chunks)


def extrinsic_curvature(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    theta: int | Tensor = 10,
    plane: Tensor | None = None,
    generator: torch.Generator | None = None,
    features: Features = raw_features,
) -> float:
    """The sum of (v.v)^(-3/2) sqrt((v.v)(a.a) - (v.a)^2) with v = h' and a = h''; arguments as `length_distortion`."""
    v, a = _curve(model, shape, theta, plane, generator, features, second=True)
    vv, aa, va = (v * v).sum(1), (a * a).sum(1), (v * a).sum(1)
    return (vv ** (-3 / 2) * (vv * aa - va**2).clamp(min=0).sqrt()).sum().item()


def _curve(
    model: nn.Module,
    shape: tuple[int, ...],
    theta: int | Tensor,
    plane: Tensor | None,
    generator: torch.Generator | None,
    features: Features,
    *,
    second: bool,
) -> tuple[Tensor, Tensor]:
    """First derivatives (T, C) of the features along the circle; second ones too, or zeros."""
    if len(shape) < 1 or min(shape) < 1:
        raise ValueError(f"shape must be (C, H, W), got {tuple(shape)}")
    parameter = next(model.parameters())
    basis = random_plane(math.prod(shape), generator=generator, dtype=parameter.dtype) if plane is None else plane
    if basis.shape != (math.prod(shape), 2):
        raise ValueError(
            f"plane must be ({math.prod(shape)}, 2) for images of {tuple(shape)}, got {tuple(basis.shape)}"
        )
    basis = basis.to(parameter)
    angles = torch.linspace(0, 2 * math.pi, theta, dtype=torch.float64) if isinstance(theta, int) else theta
    angles = angles.to(parameter)
    bare = without_norms(model)

    def curve(t: Tensor) -> Tensor:
        points = torch.stack([t.cos(), t.sin()], 1) @ basis.T
        return features(bare, points.unflatten(1, shape))

    def velocity(t: Tensor) -> Tensor:
        # Each angle moves its own image only, so one direction serves them all.
        return jvp(curve, (t,), (torch.ones_like(t),))[1]

    # Fused attention has neither forward nor second derivatives.
    with _evaluated(bare), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        if not second:
            first = velocity(angles)
            return first, torch.zeros_like(first)
        both: Any = jvp(velocity, (angles,), (torch.ones_like(angles),))
        return both[0], both[1]


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, without changing which parts were training."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
