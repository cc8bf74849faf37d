"""What happens to a volume or a short video before a network sees it: evaluation preprocessing and augmentation.

A volume is a numpy array (D, H, W, C): uint8 frames of a video, or float32 with values of any range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.data.rand_augment import parse_rand_augment
from convatlas.data.transforms import random_erase
from convatlas.data.volumes import montage
from convatlas.errors import unknown

__all__ = ["KINETICS_MEAN", "KINETICS_STD", "VolumeAugment", "VolumePreprocess", "resize_volume"]

KINETICS_MEAN = (0.43216, 0.394666, 0.37645)
KINETICS_STD = (0.22803, 0.22145, 0.216989)

Depth = Literal["resize", "sample"]
Intensity = Literal["percentile", "standardise", "none"]
#: Values above this share of those of the body are cut off: bright vessels and artefacts say nothing of the rest.
_PERCENTILE = 99.5


def resize_volume(volume: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Resize a volume (C, D, H, W) to (C, *size) by linear interpolation, with antialiasing when it shrinks."""
    plane = F.interpolate(volume.transpose(0, 1), size[1:], mode="bilinear", antialias=True)  # (D, C, H, W)
    depth, channels = plane.shape[:2]
    column = plane.permute(1, 0, 2, 3).reshape(channels, 1, depth, -1)
    if size[0] != depth:
        column = F.interpolate(column, (size[0], column.shape[3]), mode="bilinear", antialias=True)
    return column.reshape(channels, *size)


@dataclass(frozen=True)
class VolumePreprocess:
    """The evaluation transform of volumes and videos. Gives a float32 tensor (C, D, H, W).

    uint8 becomes [0, 1] and floats are scaled as ``intensity`` says; slices are resized, keeping their proportions,
    until they cover floor(height, width / crop), and the central part is cut out; the depth is brought to its size;
    then the mean is taken off and the rest divided by std.

    Attributes:
        size: depth, height and width of the result.
        mean: per channel; one value serves any number of channels, three are averaged for a single channel.
        std: per channel, in the same way.
        crop: share of a resized slice's sides that is kept, in (0, 1].
        depth: ``resize`` interpolates between the slices of a volume; ``sample`` takes frames of a video, evenly
            spread, and repeats some where there are too few.
        intensity: what becomes of floats: ``percentile`` takes the smallest value to 0 and the 99.5th percentile of the
            larger ones to 1; ``standardise`` gives mean 0 and standard deviation 1 to the values above the smallest;
            ``none`` leaves them as they are, for Hounsfield units and the like.
    """

    size: tuple[int, int, int] = (16, 112, 112)
    mean: tuple[float, ...] = KINETICS_MEAN
    std: tuple[float, ...] = KINETICS_STD
    crop: float = 1.0
    depth: Depth = "resize"
    intensity: Intensity = "percentile"

    def __post_init__(self) -> None:
        if len(self.size) != 3 or min(self.size) < 1:
            raise ValueError(f"size must be depth, height and width, all positive, got {self.size}")
        if not self.mean or not self.std or min(self.std) <= 0:
            raise ValueError(f"mean and std need a value for each channel, std above 0, got {self.mean} and {self.std}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must be above 0 and at most 1, got {self.crop}")
        for name, value, known in (("depth", self.depth, Depth), ("intensity", self.intensity, Intensity)):
            if value not in get_args(known):
                raise unknown(name, value, get_args(known))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Depth, height and width of the result."""
        return self.size

    def __call__(self, volume: npt.NDArray[Any], generator: torch.Generator | None = None) -> Tensor:
        """Prepare a volume (D, H, W, C); the generator is there so that this can stand where an augmentation stands."""
        return self.normalise(self.view(self.scaled(volume)))

    def scaled(self, volume: npt.NDArray[Any]) -> Tensor:
        """A volume (D, H, W, C) as a tensor (C, D, H, W) with its intensities brought to their range."""
        tensor = torch.from_numpy(np.moveaxis(volume, -1, 0).astype(np.float32, order="C"))
        if volume.dtype == np.uint8:
            return tensor.div_(255)
        if self.intensity == "none":
            return tensor
        # Each channel on its own: they are different measurements of one body.
        for channel in tensor:
            low = channel.min()
            body = channel[channel > low]
            if not len(body):
                channel.zero_()
            elif self.intensity == "percentile":
                high = float(np.percentile(body.numpy(), _PERCENTILE))
                channel.sub_(low).div_(max(high - float(low), 1e-12)).clamp_(0, 1)
            else:
                channel.sub_(body.mean()).div_(body.std(correction=0).clamp_min(1e-12))
        return tensor

    def view(self, tensor: Tensor) -> Tensor:
        """The part of a scaled volume (C, D, H, W) that a network sees, (C, *size)."""
        depth, height, width = self.size
        if self.depth == "sample":
            tensor = tensor[:, torch.linspace(0, tensor.shape[1] - 1, depth).round().long()]
        cover = math.floor(height / self.crop), math.floor(width / self.crop)
        factor = max(cover[0] / tensor.shape[2], cover[1] / tensor.shape[3])
        rows, columns = (max(least, round(side * factor)) for side, least in zip(tensor.shape[2:], cover, strict=True))
        tensor = resize_volume(tensor, (depth, rows, columns))
        top, left = (rows - height) // 2, (columns - width) // 2
        return tensor[:, :, top : top + height, left : left + width]

    def normalise(self, tensor: Tensor) -> Tensor:
        """Take the mean off a volume (C, D, H, W) and divide by the standard deviation."""
        return (tensor - self._channels("mean", len(tensor))) / self._channels("std", len(tensor))

    def denormalise(self, tensor: Tensor) -> npt.NDArray[np.uint8]:
        """A normalised tensor (C, D, H, W) as a picture of its slices: uint8 (H', W'), or (H', W', 3) of 3 channels."""
        tensor = tensor.detach().to("cpu", torch.float32)
        values = tensor * self._channels("std", len(tensor)) + self._channels("mean", len(tensor))
        pixels = values.mul(255).round().clamp(0, 255).to(torch.uint8)
        tiles = montage(pixels[: 3 if len(pixels) >= 3 else 1].movedim(0, -1).numpy())
        return tiles if tiles.shape[2] == 3 else tiles[..., 0]

    def _channels(self, name: Literal["mean", "std"], channels: int) -> Tensor:
        values = self.mean if name == "mean" else self.std
        if len(values) not in (1, channels) and channels != 1:
            raise ValueError(f"{name} has {len(values)} values for volumes of {channels} channels")
        if channels == 1:
            values = (sum(values) / len(values),)
        return torch.tensor(values).reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class VolumeAugment:
    """The training transform of one volume or video. All randomness comes from the generator that it is called with.

    Attributes:
        scale: range of the share of a slice's area that a random part of it has, before it is resized.
        degrees: largest angle of a random rotation within the slices, either way.
        tilt: the same about the two other axes, for volumes.
        translate: largest random shift, as a share of the sides.
        zoom: largest random enlargement or reduction, as a share.
        hflip: probability that left and right are exchanged.
        vflip: probability that top and bottom are exchanged.
        dflip: probability that the order of the slices is reversed.
        jitter: of a video, largest share of its length by which the beginning and the end are cut at random.
        brightness: largest random change of the intensities, as a share of them.
        noise: standard deviation of normal noise, in units of the normalised result.
        rand_augment: of a video, RandAugment in timm's notation, the same operations for all frames.
        random_erasing: probability that a box, the same in all slices, is replaced by normal noise.
    """

    scale: tuple[float, float] = (0.6, 1.0)
    degrees: float = 10.0
    tilt: float = 0.0
    translate: float = 0.05
    zoom: float = 0.1
    hflip: float = 0.5
    vflip: float = 0.0
    dflip: float = 0.0
    jitter: float = 0.2
    brightness: float = 0.1
    noise: float = 0.0
    rand_augment: str | None = None
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        if self.rand_augment is not None:
            parse_rand_augment(self.rand_augment)
        for name in ("hflip", "vflip", "dflip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability between 0 and 1, got {getattr(self, name)}")
        for name in ("degrees", "tilt", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("translate", "zoom", "brightness"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.jitter < 0.5:
            raise ValueError(f"jitter must be at least 0 and below 0.5, got {self.jitter}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be a range within 0 and 1, got {self.scale}")

    def __call__(self, volume: npt.NDArray[Any], preprocess: VolumePreprocess, generator: torch.Generator) -> Tensor:
        """Augment a volume (D, H, W, C) into a normalised tensor (C, *size) of the size of ``preprocess``."""

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

        tensor = preprocess.scaled(volume)
        if preprocess.depth == "sample" and self.jitter:
            first, last = (round(uniform(0, self.jitter) * tensor.shape[1]) for _ in range(2))
            tensor = tensor[:, first : max(first + 1, tensor.shape[1] - last)]
        side = math.sqrt(uniform(*self.scale))
        height, width = (max(1, round(side * size)) for size in tensor.shape[2:])
        top, left = (
            round(uniform(0, whole - part)) for whole, part in zip(tensor.shape[2:], (height, width), strict=True)
        )
        tensor = preprocess.view(tensor[:, :, top : top + height, left : left + width])
        angles = [uniform(-most, most) for most in (self.tilt, self.tilt, self.degrees)]
        shifts = [2 * uniform(-self.translate, self.translate) for _ in range(3)]
        factor = 1 + uniform(-self.zoom, self.zoom)
        if preprocess.depth == "sample":  # frames keep their order and their number
            angles[:2], shifts[2] = [0.0, 0.0], 0.0
        if any(angles) or any(shifts) or factor != 1:
            tensor = _moved(tensor, angles, shifts, factor, plane_only=preprocess.depth == "sample")
        for axis, probability in ((1, self.dflip), (2, self.vflip), (3, self.hflip)):
            if uniform(0, 1) < probability:
                tensor = tensor.flip(axis)
        if self.rand_augment is not None:
            if volume.dtype != np.uint8:
                raise ValueError(f"rand_augment takes videos of uint8, got {volume.dtype}")
            tensor = _rand_augmented(tensor, self.rand_augment, preprocess, generator)
        if self.brightness:
            tensor = tensor * (1 + uniform(-self.brightness, self.brightness))
        tensor = preprocess.normalise(tensor)
        if self.noise:
            tensor = tensor + self.noise * torch.randn(tensor.shape, generator=generator)
        if uniform(0, 1) < self.random_erasing:
            random_erase(tensor, generator)
        return tensor


def _rand_augmented(tensor: Tensor, notation: str, preprocess: VolumePreprocess, generator: torch.Generator) -> Tensor:
    """The frames of a clip (C, T, H, W), from 0 to 1, all changed by the same operations."""
    augment = parse_rand_augment(notation)
    fill = preprocess.denormalise(torch.zeros(len(tensor), 1, 1, 1)).reshape(-1).tolist()
    frames = tensor.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()
    state = generator.get_state()
    changed = []
    for frame in frames:
        generator.set_state(state)
        changed.append(augment(frame, generator, fill))
    return torch.from_numpy(np.stack(changed)).permute(3, 0, 1, 2).float() / 255


def _moved(tensor: Tensor, degrees: list[float], shifts: list[float], factor: float, *, plane_only: bool) -> Tensor:
    """Rotate about the axes x, y and z, enlarge and shift a volume (C, D, H, W); beyond its edge it is zero.

    Shifts along x, y and z are in halves of the sides.
    """
    rotation = torch.eye(3)
    for axis, angle in enumerate(math.radians(each) for each in degrees):
        one, other = [index for index in range(3) if index != axis]
        turn = torch.eye(3)
        turn[one, one] = turn[other, other] = math.cos(angle)
        turn[one, other], turn[other, one] = -math.sin(angle), math.sin(angle)
        rotation = rotation @ turn
    # The grid counts in halves of the sides, which differ: turn in voxels.
    sides = torch.tensor([tensor.shape[3], tensor.shape[2], tensor.shape[1]], dtype=torch.float32)
    matrix = rotation / sides[:, None] * sides[None, :]
    matrix = matrix / torch.tensor([factor, factor, 1.0 if plane_only else factor])[:, None]
    theta = torch.cat([matrix, -torch.tensor(shifts)[:, None]], dim=1)
    grid = F.affine_grid(theta[None], [1, *tensor.shape], align_corners=False)
    return F.grid_sample(tensor[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]
