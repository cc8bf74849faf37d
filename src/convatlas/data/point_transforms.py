"""What happens to a point cloud before a network sees it: normalising, random changes, one point a voxel."""

# No postponed annotations here: the command line is built from the real types of the fields.

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from convatlas.data.points import Cloud

__all__ = ["CloudAugment", "CloudPreprocess", "turned"]


@dataclass(frozen=True, kw_only=True)
class CloudPreprocess:
    """How every cloud is prepared.

    Attributes:
        grid_size: side of a voxel, in the unit of the coordinates after they are normalised.
        normalize: whether the centre of the points comes to the origin and the farthest to a distance of 1.
        clip: least x, y, z and greatest x, y, z; points outside are left out. All stay when left out.

    Raises:
        ValueError: grid_size is not positive, or clip is no box.
    """

    grid_size: float = 0.06
    normalize: bool = False
    clip: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.grid_size < math.inf:
            raise ValueError(f"grid_size must be positive, got {self.grid_size}")
        if self.clip is not None and (
            len(self.clip) != 6 or not all(low < high for low, high in zip(self.clip[:3], self.clip[3:], strict=True))
        ):
            raise ValueError(f"clip must be least and then greatest x, y, z, got {self.clip}")

    def __call__(self, cloud: Cloud) -> Cloud:
        """Cut and normalise a cloud."""
        if self.clip is not None:
            low, high = np.array(self.clip[:3], np.float32), np.array(self.clip[3:], np.float32)
            cloud = cloud.rows(np.asarray(((cloud.coordinates >= low) & (cloud.coordinates <= high)).all(1)))
        if self.normalize and len(cloud):
            places = cloud.coordinates - cloud.coordinates.mean(0)
            farthest = float(np.linalg.norm(places, axis=1).max())
            cloud = Cloud(places / max(farthest, 1e-12), cloud.features, cloud.labels)
        return cloud


@dataclass(frozen=True, kw_only=True)
class CloudAugment:
    """Random changes of a training cloud, in this order.

    Attributes:
        rotate_z: probability of a turn about z by any angle; the first three features turn too if they are normals.
        scale: range of the factor of all coordinates.
        flip: probability of a mirror at x = 0, and of one at y = 0.
        shift: largest distance that the cloud is moved on each axis.
        jitter: standard deviation of what is added to every coordinate.
        jitter_clip: largest amount of it.

    Raises:
        ValueError: a setting is out of range.
    """

    rotate_z: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    shift: float = 0.0
    jitter: float = 0.0
    jitter_clip: float = 0.02

    def __post_init__(self) -> None:
        for name in ("rotate_z", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"scale must be a range of positive factors, got {self.scale}")
        for name in ("shift", "jitter", "jitter_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def __call__(self, cloud: Cloud, generator: torch.Generator) -> Cloud:
        """Change a cloud; what is drawn depends on the generator only."""
        draw = torch.rand(8, generator=generator).tolist()
        if draw[0] < self.rotate_z:
            cloud = turned(cloud, 2 * math.pi * draw[1])
        places, features = cloud.coordinates, cloud.features
        places = places * np.float32(self.scale[0] + (self.scale[1] - self.scale[0]) * draw[2])
        for axis in (0, 1):
            if draw[3 + axis] < self.flip:
                places = _mirrored(places, axis)
                features = _mirrored(features, axis) if cloud.has_normals else features
        if self.shift:
            places = places + np.array([self.shift * (2 * part - 1) for part in draw[5:8]], np.float32)
        if self.jitter:
            noise = self.jitter * torch.randn(places.shape, generator=generator).numpy()
            places = places + noise.clip(-self.jitter_clip, self.jitter_clip)
        return Cloud(places.astype(np.float32), features, cloud.labels)


def turned(cloud: Cloud, angle: float) -> Cloud:
    """A cloud turned about z by an angle in radians, with its normals if it has some."""
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], np.float32)
    features = cloud.features
    if cloud.has_normals:
        features = np.concatenate([features[:, :3] @ matrix.T, features[:, 3:]], 1)
    return Cloud(cloud.coordinates @ matrix.T, features, cloud.labels)


def _mirrored(values: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    values = values.copy()
    values[:, axis] = -values[:, axis]
    return values
