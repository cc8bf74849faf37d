"""The torch Dataset over a set of images, whose augmentation depends on a seed and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from convatlas.data.image_files import Unreadable
from convatlas.data.images import ImageSet
from convatlas.data.transforms import Augment, Preprocess
from convatlas.data.volume_transforms import VolumeAugment, VolumePreprocess

__all__ = ["Augmented", "ImageDataset", "Views", "collate"]


@dataclass(frozen=True)
class Augmented:
    """A training transform made whole: ``Augmented(augment, preprocess)(image, generator)`` gives a tensor.

    Both parts are for images, or both for volumes.
    """

    augment: Augment | VolumeAugment
    preprocess: Preprocess | VolumePreprocess

    def __call__(self, image: npt.NDArray[Any], generator: torch.Generator) -> Tensor:
        """Augment an image (H, W, C) or volume (D, H, W, C) into a normalised tensor of the size of ``preprocess``."""
        augment: Any = self.augment
        tensor: Tensor = augment(image, self.preprocess, generator)
        return tensor


@dataclass(frozen=True)
class Views:
    """Several random augmentations of one image, for averages of predictions: a tensor (count, C, ...)."""

    augmented: Augmented
    count: int

    def __call__(self, image: npt.NDArray[Any], generator: torch.Generator) -> Tensor:
        """Augment an image or a volume ``count`` times, one after the other."""
        return torch.stack([self.augmented(image, generator) for _ in range(self.count)])


class ImageDataset(Dataset[dict[str, Any]]):
    """Samples of an :class:`~convatlas.data.images.ImageSet`, indexed by position or by (position, seed).

    A sample is ``{"image": Tensor (C, H, W) or (C, D, H, W), "label": int, "index": int}`` or, where a file fails after
    the set was read, ``{"unreadable": name}``. With a seed (any training sampler gives one) the transform gets a
    generator of that seed, so that the sample does not depend on the worker or on what was read before; without one
    (evaluation) the seed is the position. torch's CPU generator tells only the low 32 bits of seeds apart.

    Args:
        image_set: the images.
        transform: called with an image (H, W, C) or (D, H, W, C) and a generator, gives the tensor.
    """

    def __init__(self, image_set: ImageSet, transform: Callable[[npt.NDArray[Any], torch.Generator], Tensor]) -> None:
        self.image_set = image_set
        self.transform = transform

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple | list) else (key, key)
        try:
            image = self.image_set.image(index)
        except Unreadable as error:
            return {"unreadable": error.name}
        tensor = self.transform(image, torch.Generator().manual_seed(int(seed)))
        return {"image": tensor, "label": int(self.image_set.labels[index]), "index": int(index)}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples into a batch, without those that could not be read.

    Returns:
        ``"image"`` (B, C, ...), ``"label"`` (B,) and ``"index"`` (B,) int64, and ``"unreadable"``, the list of names.
        Where no sample could be read, B is 0 and ``"image"`` has the shape (0,).
    """
    read = [sample for sample in samples if "unreadable" not in sample]
    return {
        "image": torch.stack([sample["image"] for sample in read]) if read else torch.empty(0),
        "label": torch.tensor([sample["label"] for sample in read], dtype=torch.int64),
        "index": torch.tensor([sample["index"] for sample in read], dtype=torch.int64),
        "unreadable": [sample["unreadable"] for sample in samples if "unreadable" in sample],
    }
