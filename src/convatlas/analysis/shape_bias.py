"""Does a classifier decide by shape or by texture? Decisions on images whose shape and texture are of two classes.

Geirhos, Rubisch, Michaelis, Bethge, Wichmann, Brendel: "ImageNet-trained CNNs are biased towards texture", ICLR 2019,
arXiv 1811.12231: 1280 images of 16 categories.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CATEGORIES", "ShapeBias", "category_probabilities", "cue_conflict_labels", "shape_bias"]


def _classes(*ranges: int | tuple[int, int]) -> tuple[int, ...]:
    pairs = [(entry, entry) if isinstance(entry, int) else entry for entry in ranges]
    return tuple(index for first, last in pairs for index in range(first, last + 1))


#: The 16 categories in alphabetical order, and the classes of ImageNet-1K that each of them holds.
CATEGORIES: dict[str, tuple[int, ...]] = {
    "airplane": _classes(404),
    "bear": _classes((294, 297)),
    "bicycle": _classes(444, 671),
    "bird": _classes(8, (10, 16), (18, 20), (22, 24), (80, 83), (87, 96), (98, 100), (127, 133), (135, 145)),
    "boat": _classes(472, 554, 625, 814, 914),
    "bottle": _classes(440, 720, 737, 898, 899, 901, 907),
    "car": _classes(436, 511, 817),
    "cat": _classes((281, 286)),
    "chair": _classes(423, 559, 765, 857),
    "clock": _classes(409, 530, 892),
    "dog": _classes(
        (152, 191), (193, 203), (205, 226), (228, 241), (243, 250), (252, 257), 259, (261, 263), (265, 268)
    ),
    "elephant": _classes(385, 386),
    "keyboard": _classes(508, 878),
    "knife": _classes(499),
    "oven": _classes(766),
    "truck": _classes(555, 569, 656, 675, 717, 734, 864, 867),
}
_NAME = re.compile(r"([a-z]+)\d+-([a-z]+)\d+")


class ShapeBias(NamedTuple):
    """Decisions on images whose shape and texture differ.

    Attributes:
        decisions: category of each image, as an index; of all images, also of those without a conflict.
        shape_hits: decisions for the shape, where shape and texture differ.
        texture_hits: decisions for the texture, where shape and texture differ.
    """

    decisions: Tensor
    shape_hits: int
    texture_hits: int

    @property
    def bias(self) -> float:
        """Share of the shape among the decisions for shape or texture; NaN where there is none."""
        hits = self.shape_hits + self.texture_hits
        return self.shape_hits / hits if hits else float("nan")


def category_probabilities(probabilities: Tensor, categories: Mapping[str, tuple[int, ...]] = CATEGORIES) -> Tensor:
    """The mean probability over the classes of each category.

    Args:
        probabilities: (N, classes), each row summing to 1.
        categories: indices of the classes of each category.

    Returns:
        (N, categories), which do not sum to 1.

    Raises:
        ValueError: probabilities lack a class, or do not sum to 1.
    """
    needed = 1 + max(index for indices in categories.values() for index in indices)
    if probabilities.dim() != 2 or probabilities.shape[1] < needed:
        raise ValueError(f"probabilities must be (N, classes) with at least {needed}, got {tuple(probabilities.shape)}")
    if not torch.allclose(probabilities.sum(1), torch.ones_like(probabilities[:, 0]), atol=1e-3):
        raise ValueError("probabilities must sum to 1 in each row; give softmax(logits)")
    means = [probabilities[:, list(indices)].mean(1) for indices in categories.values()]
    return torch.stack(means, dim=1)


def shape_bias(
    logits: Tensor,
    shape: Tensor,
    texture: Tensor,
    categories: Mapping[str, tuple[int, ...]] = CATEGORIES,
) -> ShapeBias:
    """Decide for the category of the largest mean probability and count decisions for shape and for texture.

    Args:
        logits: (N, classes).
        shape, texture: (N), index of the category of either, as `cue_conflict_labels` gives them.
        categories: as of `category_probabilities`.

    Raises:
        ValueError: sizes do not fit each other.
    """
    if not shape.shape == texture.shape == logits.shape[:1]:
        raise ValueError(
            f"shape and texture must be (N) for logits (N, classes), got {tuple(shape.shape)}, {tuple(texture.shape)} "
            f"and {tuple(logits.shape)}"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    decisions = category_probabilities(wide.softmax(1), categories).argmax(1)
    conflict = shape != texture
    hits = [int((conflict & (decisions == cue)).sum()) for cue in (shape, texture)]
    return ShapeBias(decisions, *hits)


def cue_conflict_labels(
    names: Iterable[str], categories: Mapping[str, tuple[int, ...]] = CATEGORIES
) -> tuple[Tensor, Tensor]:
    """Categories of shape and texture from file names: ``dog10-bird2.png`` has the shape of a dog.

    Raises:
        ValueError: a name is not of this pattern, or names no category.
    """
    order = {name: index for index, name in enumerate(categories)}
    pairs = []
    for name in names:
        match = _NAME.fullmatch(PurePath(name).stem)
        if match is None or not set(match.groups()) <= set(order):
            raise ValueError(f"names must be like 'dog10-bird2.png', shape and then texture, got {name!r}")
        pairs.append([order[word] for word in match.groups()])
    labels = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return labels[:, 0], labels[:, 1]
