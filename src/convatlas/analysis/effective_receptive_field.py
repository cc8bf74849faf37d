"""The effective receptive field of any network: which pixels decide what its middle unit computes.

Luo, Li, Urtasun, Zemel: "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS
2016, arXiv 1701.04128; measured as in Ding, Zhang, Han, Ding: "Scaling Up Your Kernels to 31x31", CVPR 2022, arXiv
2203.06717, appendix, and in UniRepLKNet, CVPR 2024, arXiv 2311.15599.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported, unknown
from convatlas.hooks import record
from convatlas.networks.base import Backbone
from convatlas.ops.precision import without_autocast
from convatlas.report import Cell, Images, Part, Section, Table

__all__ = [
    "THRESHOLDS",
    "Area",
    "contribution_map",
    "erf_area",
    "erf_parts",
    "erf_picture",
    "erf_section",
    "log_contributions",
]

#: Shares of all contributions that the published tables give the areas of.
THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
#: Random images that stand for real ones where only the model is known.
_RANDOM_IMAGES = 4
_SQUARES = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0))


class Area(NamedTuple):
    """The smallest centred square that holds more than a share of the contributions; None where none below all does.

    Attributes:
        threshold: the share.
        side: of the square, in pixels.
        ratio: its area over that of the image.
    """

    threshold: float
    side: int | None
    ratio: float | None


def contribution_map(model: nn.Module, images: Tensor | Iterable[Tensor], *, layer: str | None = None) -> Tensor:
    """How much each pixel contributes to the middle unit of a feature map F, averaged over images.

    For one image it is relu(d/dx sum_c relu(F_c[h // 2, w // 2])), summed over its channels. Images whose gradient is
    not finite are left out. The model is used in evaluation mode and stays as it is.

    Args:
        model: any module that takes images.
        images: (N, C, H, W), or single images or batches of one size, one after the other.
        layer: name of the module whose output is the feature map; by default the last map of a backbone's pyramid, and
            of any other model the last map (B, C, h, w) larger than one position that a module puts out.

    Returns:
        (H, W), not negative.

    Raises:
        ValueError: an image is not (C, H, W), there is none, sizes differ, or no image has a finite gradient.
        UnknownName: the model has no such layer.
        Unsupported: the model puts out no such map, or its gradient does not reach the image.
    """
    names = dict(model.named_modules())
    if layer is not None and layer not in names:
        raise unknown("layer", layer, names)
    total: Tensor | None = None
    count = given = 0
    with _evaluated(model):
        for image in _single(images):
            given += 1
            if total is not None and image.shape[2:] != total.shape:
                raise ValueError(f"images must have one size, got {tuple(total.shape)} and {tuple(image.shape[2:])}")
            contribution = _contribution(model, image, layer)
            total = torch.zeros_like(contribution) if total is None else total
            if contribution.isfinite().all():
                total += contribution
                count += 1
    if total is None:
        raise ValueError("images must hold at least one image")
    if count == 0:
        raise ValueError(f"images must have finite gradients, got none in {given}")
    return total / count


def log_contributions(contributions: Tensor) -> Tensor:
    """log10(map + 1) over its largest value, as published pictures and tables take a contribution map."""
    values = (contributions.double() + 1).log10()
    return values / values.max().clamp_min(torch.finfo(values.dtype).tiny)


def erf_area(contributions: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> list[Area]:
    """The smallest centred squares, of odd sides from 3, that hold more than each share of a contribution map.

    The map is taken as `log_contributions` gives it.

    Args:
        contributions: (H, W) of `contribution_map`.
        thresholds: shares, between 0 and 1.

    Raises:
        ValueError: contributions are not (H, W) or less than 0, or a threshold is out of range.
    """
    if contributions.dim() != 2 or bool((contributions < 0).any()):
        raise ValueError(f"contributions must be (H, W) and not negative, got {tuple(contributions.shape)}")
    if not all(0 < threshold < 1 for threshold in thresholds):
        raise ValueError(f"thresholds must lie between 0 and 1, got {tuple(thresholds)}")
    height, width = contributions.shape
    values = log_contributions(contributions)
    total = float(values.sum())
    shares = []
    for reach in range(1, min(height, width) // 2):
        rows, columns = (slice(size // 2 - reach, size // 2 + reach + 1) for size in (height, width))
        shares.append(float(values[rows, columns].sum()) / total if total else 0.0)
    areas = []
    for threshold in thresholds:
        side = next((2 * reach + 1 for reach, share in enumerate(shares, 1) if share > threshold), None)
        areas.append(Area(threshold, side, None if side is None else side**2 / (height * width)))
    return areas


def erf_picture(contributions: Tensor, areas: Sequence[Area] = ()) -> npt.NDArray[np.uint8]:
    """`log_contributions` from black to white, with the squares drawn in: (H, W, 3)."""
    # The square root brings out the faint margin.
    grey = (255 * log_contributions(contributions).sqrt()).round().to(torch.uint8).cpu().numpy()
    picture = np.repeat(grey[..., None], 3, axis=2)
    height, width = grey.shape
    for area, colour in zip(areas, _SQUARES, strict=False):
        if area.side is not None:
            reach = area.side // 2
            top, bottom, left, right = height // 2 - reach, height // 2 + reach, width // 2 - reach, width // 2 + reach
            picture[[top, bottom], left : right + 1] = colour
            picture[top : bottom + 1, [left, right]] = colour
    return picture


def erf_parts(maps: dict[str, Tensor], thresholds: Sequence[float] = THRESHOLDS) -> list[Part]:
    """A table of the areas and a picture for each map by name, for a report."""
    areas = {name: erf_area(contributions, thresholds) for name, contributions in maps.items()}
    rows: list[list[Cell]] = [
        [
            100 * share,
            *(cell for some in areas.values() for cell in (some[at].side, _percent(some[at].ratio))),
        ]
        for at, share in enumerate(thresholds)
    ]
    several = len(maps) > 1
    columns = ["share [%]"]
    for name in maps:
        of = f" of {name}" if several else ""
        columns += [f"side{of} [pixels]", f"area{of} [%]"]
    caption = (
        "The smallest centred square that holds more than a share of all contributions, log10(map + 1); the area in "
        "percent of the image, a dash where no square below the whole image does."
    )
    shown = [(erf_picture(contributions, areas[name]), name) for name, contributions in maps.items()]
    squares = ", ".join(f"{share:.0%}" for share in thresholds)
    explained = f"Contribution of each pixel to the middle unit, with the squares for {squares}."
    return [Table("Effective receptive field", columns, rows, caption), Images("Contributions", shown, explained)]


def erf_section(model: nn.Module, inputs: tuple[Any, ...], *, layer: str | None = None) -> Section | None:
    """A section on a model that takes images, measured on random ones; None for any other model.

    Args:
        model: any module.
        inputs: of an example call, whose size is taken.
        layer: as of `contribution_map`.
    """
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].dim() != 4:
        return None
    example = inputs[0]
    if not example.is_floating_point() or example.is_meta or min(example.shape[2:]) < 8:
        return None
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_RANDOM_IMAGES, *example.shape[1:], generator=generator).to(example)
    try:
        contributions = contribution_map(model, images, layer=layer)
    except (Unsupported, ValueError, RuntimeError):
        return None  # it has no map, or its gradient cannot be taken
    if not bool(contributions.any()):
        return None
    label = f"mean of {_RANDOM_IMAGES} random images of {' x '.join(map(str, example.shape[2:]))}"
    return Section("Effective receptive field", erf_parts({label: contributions}))


def _percent(ratio: float | None) -> float | None:
    return None if ratio is None else 100 * ratio


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _single(images: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    for entry in [images] if isinstance(images, Tensor) else images:
        if not isinstance(entry, Tensor) or entry.dim() not in (3, 4):
            raise ValueError(f"images must be (C, H, W) or (N, C, H, W), got {tuple(getattr(entry, 'shape', ()))}")
        for image in entry if entry.dim() == 4 else entry[None]:
            yield image[None]


def _contribution(model: nn.Module, image: Tensor, layer: str | None) -> Tensor:
    image = image.detach().clone().requires_grad_()
    with torch.enable_grad(), without_autocast(image):
        feature = _feature(model, image, layer)
        middle = feature[0, :, feature.shape[2] // 2, feature.shape[3] // 2]
        if not middle.requires_grad:
            raise Unsupported("the gradient of the feature map does not reach the image")
        (gradient,) = torch.autograd.grad(middle.relu().sum(), image, allow_unused=True)
    if gradient is None:
        raise Unsupported("the feature map does not depend on the image")
    return gradient[0].relu().sum(0)


def _feature(model: nn.Module, image: Tensor, layer: str | None) -> Tensor:
    if layer is None and isinstance(model, Backbone):
        return model.forward_features(image)[-1]
    with record(model, None if layer is None else layer) as calls:
        model(image)
    outputs = [call.output for call in calls if isinstance(call.output, Tensor) and call.output.dim() == 4]
    maps = [output for output in outputs if layer is not None or output.shape[2:].numel() > 1]
    if not maps:
        what = type(model).__name__ if layer is None else layer
        raise Unsupported(f"{what} puts out no map (B, C, h, w)")
    return maps[-1]
