"""What happens to one image before a network sees it: evaluation preprocessing and training augmentation.

An image is a numpy array (H, W, C), uint8 or float32 in [0, 1]. Resizing is Pillow's own, bit by bit, because published
accuracies were measured with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from convatlas.data.auto_augment import auto_augment
from convatlas.data.rand_augment import parse_rand_augment
from convatlas.data.trivial_augment import trivial_augment
from convatlas.errors import unknown

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augment",
    "Interpolation",
    "Preprocess",
    "affine",
    "random_erase",
    "resize",
]

Interpolation = Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_LARGEST_MARGIN = 64  # an enlarged image of more than so many times the crop is never made whole
_parse_rand_augment = lru_cache(parse_rand_augment)


def resize(
    image: npt.NDArray[Any],
    size: tuple[int, int],
    interpolation: Interpolation = "bicubic",
    box: tuple[float, float, float, float] | None = None,
) -> npt.NDArray[Any]:
    """Resize an image (H, W, C) to ``size`` = (height, width) as Pillow does, with antialiasing when it shrinks.

    uint8 with 1 or 3 channels is bit-equal to ``PIL.Image.resize``; other channel counts and float32 are resized one
    channel at a time in floating point (and rounded for uint8).

    Args:
        image: uint8 or float32.
        size: new height and width.
        interpolation: "nearest", "box" (the mean of an area), "bilinear", "bicubic" or "lanczos".
        box: the part of the image to take, (left, top, right, bottom) in its pixels; by default all of it.
    """
    if interpolation not in _RESAMPLING:
        raise unknown("interpolation", interpolation, _RESAMPLING)
    return _with_pillow(image, lambda part: part.resize((size[1], size[0]), _RESAMPLING[interpolation], box))


def affine(
    image: npt.NDArray[Any], *, degrees: float = 0.0, translate: tuple[int, int] = (0, 0), scale: float = 1.0
) -> npt.NDArray[Any]:
    """Rotate, scale and shift an image (H, W, C) about its centre, with bilinear interpolation and zeros outside.

    Args:
        image: uint8 or float32.
        degrees: angle, counter-clockwise.
        translate: shift (down, right) in pixels.
        scale: enlargement.
    """
    height, width = image.shape[:2]
    cosine, sine = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    x, y = width / 2 + translate[1], height / 2 + translate[0]
    # Pillow wants the map from the new coordinates to the old ones.
    matrix = (
        *(cosine, -sine, width / 2 - cosine * x + sine * y),
        *(sine, cosine, height / 2 - sine * x - cosine * y),
    )
    kind, filter_ = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return _with_pillow(image, lambda part: part.transform((width, height), kind, matrix, filter_))


def _with_pillow(image: npt.NDArray[Any], change: Callable[[Image.Image], Image.Image]) -> npt.NDArray[Any]:
    channels = image.shape[2]
    if image.dtype == np.uint8 and channels in (1, 3):
        changed = np.asarray(change(Image.fromarray(image[..., 0] if channels == 1 else image)))
        return changed.reshape(*changed.shape[:2], channels)
    planes = [
        np.asarray(change(Image.fromarray(np.ascontiguousarray(image[..., c], np.float32)))) for c in range(channels)
    ]
    return _as_type(np.stack(planes, axis=2), image.dtype)


def _as_type(values: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8) if dtype == np.uint8 else values.astype(dtype)


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform: resize, crop the centre, normalise. Gives a float32 tensor (C, H, W).

    The image is resized, keeping its proportions, until it covers floor(size / crop), and the central ``size`` is cut
    out; with ``stretch`` it is resized to ``size`` as a whole, whatever its proportions. uint8 becomes [0, 1], float
    values stay as they are; then the mean is taken off and the rest divided by std.

    Attributes:
        size: height and width of the result, or one value for both.
        mean: per channel; one value serves any number of channels, three are averaged for a single channel.
        std: per channel, in the same way.
        interpolation: "nearest", "box" (the mean of an area), "bilinear", "bicubic" or "lanczos".
        crop: share of the resized image's side that is kept, in (0, 1].
        stretch: resize the whole image, without a crop.
    """

    size: int | tuple[int, int] = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Interpolation = "bicubic"
    crop: float = 0.875
    stretch: bool = False

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"size must be positive, got {self.size}")
        if not self.mean or not self.std or min(self.std) <= 0:
            raise ValueError(f"mean and std need a value for each channel, std above 0, got {self.mean} and {self.std}")
        if self.interpolation not in _RESAMPLING:
            raise unknown("interpolation", self.interpolation, _RESAMPLING)
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must be above 0 and at most 1, got {self.crop}")
        if self.stretch and self.crop != 1:
            raise ValueError(f"crop must be 1 where images are stretched, got {self.crop}")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return height, width

    def __call__(self, image: npt.NDArray[Any], generator: torch.Generator | None = None) -> Tensor:
        """Prepare an image (H, W, C); the generator is there so that this can stand where an augmentation stands."""
        return self.normalise(self.view(image))

    def view(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The part of an image that a network sees, (height, width, C), in the image's own type."""
        if self.stretch:
            return resize(image, self.shape, self.interpolation)
        (height, width), (old_height, old_width) = self.shape, image.shape[:2]
        cover_height, cover_width = math.floor(height / self.crop), math.floor(width / self.crop)
        if old_height * cover_width <= old_width * cover_height:
            new_height, new_width = cover_height, cover_height * old_width // old_height
        else:
            new_height, new_width = cover_width * old_height // old_width, cover_width
        top, left = round((new_height - height) / 2), round((new_width - width) / 2)
        if new_height * new_width > _LARGEST_MARGIN * cover_height * cover_width:
            across, down = old_width / new_width, old_height / new_height
            box = (left * across, top * down, (left + width) * across, (top + height) * down)
            return resize(image, self.shape, self.interpolation, box)
        resized = resize(image, (new_height, new_width), self.interpolation)
        return resized[top : top + height, left : left + width]

    def normalise(self, image: npt.NDArray[Any]) -> Tensor:
        """An image (H, W, C) of any size as a normalised tensor (C, H, W), float32."""
        tensor = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32, order="C"))
        if image.dtype == np.uint8:
            tensor.div_(255)
        return tensor.sub_(self._channels("mean", len(tensor))).div_(self._channels("std", len(tensor)))

    def denormalise(self, tensor: Tensor) -> npt.NDArray[np.uint8]:
        """A normalised tensor (C, H, W) as a picture to show: uint8 (H, W), or (H, W, 3) for 3 or more channels.

        Of 2 channels the first is shown, of more than 3 the first three.
        """
        tensor = tensor.detach().to("cpu", torch.float32)
        values = tensor * self._channels("std", len(tensor)) + self._channels("mean", len(tensor))
        pixels = values.mul(255).round().clamp(0, 255).to(torch.uint8)
        return pixels[:3].permute(1, 2, 0).contiguous().numpy() if len(pixels) >= 3 else pixels[0].numpy()

    def _channels(self, name: Literal["mean", "std"], channels: int) -> Tensor:
        values = self.mean if name == "mean" else self.std
        if len(values) not in (1, channels) and channels != 1:
            raise ValueError(f"{name} has {len(values)} values for images of {channels} channels")
        if channels == 1:
            values = (sum(values) / len(values),)
        return torch.tensor(values).reshape(-1, 1, 1)


@dataclass(frozen=True)
class Augment:
    """The training transform of one image. All randomness comes from the generator that it is called with.

    In order: random resized crop (or the evaluation view), affine, padding and random crop, flips, TrivialAugment,
    AutoAugment, RandAugment or colour jitter, normalisation, random erasing.

    Attributes:
        random_resized_crop: cut out a random part and resize it; False takes the evaluation view.
        scale: range of the part's share of the area.
        ratio: range of the part's width / height.
        pad_crop: pixels of zeros put on every side before cutting out the size again at a random place.
        degrees: largest angle of a random rotation, either way.
        translate: largest random shift, as a share of the sides.
        zoom: largest random enlargement or reduction, as a share.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        random_interpolation: resize by bilinear or bicubic interpolation, at random, instead of the evaluation's.
        trivial_augment: one random operation of random strength, with the wide ranges; for uint8 of 1 or 3 channels.
        auto_augment: a random pair of operations of AutoAugment's policy v0; for uint8 of 1 or 3 channels.
        rand_augment: RandAugment in timm's notation, e.g. "rand-m9-mstd0.5-inc1"; for uint8 of 1 or 3 channels.
        color_jitter: largest relative change of brightness, contrast and saturation; not beside Auto- or RandAugment.
        random_erasing: probability that a box is replaced by normal noise.
    """

    random_resized_crop: bool = True
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad_crop: int = 0
    degrees: float = 0.0
    translate: float = 0.0
    zoom: float = 0.0
    hflip: float = 0.5
    vflip: float = 0.0
    random_interpolation: bool = False
    trivial_augment: bool = False
    auto_augment: bool = False
    rand_augment: str | None = None
    color_jitter: float = 0.0
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability between 0 and 1, got {getattr(self, name)}")
        for name in ("pad_crop", "degrees", "color_jitter"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("translate", "zoom"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be a range within 0 and 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be a range above 0, got {self.ratio}")
        if self.rand_augment is not None:
            _parse_rand_augment(self.rand_augment)
            if self.auto_augment:
                raise ValueError(f"auto_augment and rand_augment must not be on at once, got {self.rand_augment!r}")

    def __call__(self, image: npt.NDArray[Any], preprocess: Preprocess, generator: torch.Generator) -> Tensor:
        """Augment an image (H, W, C) into a normalised tensor (C, height, width) of the size of ``preprocess``."""
        if self.random_interpolation:
            choice: Interpolation = "bilinear" if _uniform(0, 1, generator) < 0.5 else "bicubic"
            preprocess = dataclasses.replace(preprocess, interpolation=choice)
        if self.random_resized_crop:
            top, left, height, width = _random_part(image.shape[:2], self.scale, self.ratio, generator)
            part = image[top : top + height, left : left + width]
            image = resize(part, preprocess.shape, preprocess.interpolation)
        else:
            image = preprocess.view(image)
        if self.degrees or self.translate or self.zoom:
            image = self._move(image, generator)
        if self.pad_crop:
            image = _pad_and_crop(image, self.pad_crop, generator)
        if _uniform(0, 1, generator) < self.hflip:
            image = image[:, ::-1]
        if _uniform(0, 1, generator) < self.vflip:
            image = image[::-1]
        if self.trivial_augment:
            image = trivial_augment(np.ascontiguousarray(image), generator)
        if self.rand_augment is not None or self.auto_augment:
            fill = (preprocess.denormalise(torch.zeros(image.shape[2], 1, 1))).reshape(-1).tolist()
            change = auto_augment if self.rand_augment is None else _parse_rand_augment(self.rand_augment)
            image = change(np.ascontiguousarray(image), generator, fill)
        elif self.color_jitter:
            image = _jitter(image, self.color_jitter, generator)
        tensor = preprocess.normalise(image)
        if _uniform(0, 1, generator) < self.random_erasing:
            random_erase(tensor, generator)
        return tensor

    def _move(self, image: npt.NDArray[Any], generator: torch.Generator) -> npt.NDArray[Any]:
        down, right = (round(_uniform(-self.translate, self.translate, generator) * side) for side in image.shape[:2])
        return affine(
            image,
            degrees=_uniform(-self.degrees, self.degrees, generator),
            translate=(down, right),
            scale=1 + _uniform(-self.zoom, self.zoom, generator),
        )


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _integer(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(high, (), generator=generator).item())


def _random_part(
    shape: tuple[int, ...], scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """A random part of an image: top, left, height, width. Where ten tries do not fit, the largest central part."""
    old_height, old_width = shape
    for _ in range(10):
        area = old_height * old_width * _uniform(*scale, generator)
        aspect = math.exp(_uniform(math.log(ratio[0]), math.log(ratio[1]), generator))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height <= old_height and 0 < width <= old_width:
            return (
                _integer(old_height - height + 1, generator),
                _integer(old_width - width + 1, generator),
                height,
                width,
            )
    aspect = min(max(old_width / old_height, ratio[0]), ratio[1])
    height = max(1, min(old_height, round(old_width / aspect)))
    width = max(1, min(old_width, round(old_height * aspect)))
    return (old_height - height) // 2, (old_width - width) // 2, height, width


def _pad_and_crop(image: npt.NDArray[Any], pad: int, generator: torch.Generator) -> npt.NDArray[Any]:
    height, width = image.shape[:2]
    top, left = _integer(2 * pad + 1, generator), _integer(2 * pad + 1, generator)
    return np.pad(image, ((pad, pad), (pad, pad), (0, 0)))[top : top + height, left : left + width]


def _jitter(image: npt.NDArray[Any], strength: float, generator: torch.Generator) -> npt.NDArray[Any]:
    """Change brightness, contrast and (of RGB) saturation, in random order, each by a factor near 1."""
    values = image.astype(np.float32)
    for change in torch.randperm(3, generator=generator).tolist():
        factor = _uniform(max(0.0, 1 - strength), 1 + strength, generator)
        rgb = image.shape[2] == 3
        grey = values @ _LUMINANCE[:, None] if rgb else values
        if change == 0:
            values = values * factor
        elif change == 1:
            values = grey.mean() + factor * (values - grey.mean())
        elif rgb:
            values = grey + factor * (values - grey)
        if image.dtype == np.uint8:
            values = np.clip(values, 0, 255)
    return _as_type(values, image.dtype)


def random_erase(tensor: Tensor, generator: torch.Generator) -> None:
    """Replace a random box of (..., H, W) by normal noise, of every pixel: 2 % to a third of the area.

    Zhong et al.: "Random Erasing Data Augmentation", AAAI 2020, arXiv 1708.04896. A clip loses the same box in every
    frame.
    """
    *front, height, width = tensor.shape
    for _ in range(10):
        area = height * width * _uniform(0.02, 1 / 3, generator)
        aspect = math.exp(_uniform(math.log(0.3), math.log(1 / 0.3), generator))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < rows < height and 0 < columns < width:
            top, left = _integer(height - rows + 1, generator), _integer(width - columns + 1, generator)
            noise = torch.randn(*front, rows, columns, generator=generator)
            tensor[..., top : top + rows, left : left + columns] = noise
            return
