"""Moving skeletons: where the joints are, files of NTU RGB+D, view normalisation, resampling, gaps and augmentation.

A clip is an array (T, J, dim): T frames of J joints with 2 or 3 coordinates; where two bodies may be seen, the joints
of the second come behind those of the first, and are zeros where there is none.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from convatlas.errors import DataError

__all__ = [
    "LAYOUTS",
    "NTU_SUBJECTS",
    "NTU_TRAIN_CAMERAS",
    "NTUName",
    "SkeletonAugment",
    "SkeletonLayout",
    "fill_missing",
    "normalise_view",
    "ntu_name",
    "read_ntu_skeleton",
    "resample_frames",
]

Array = npt.NDArray[Any]

#: Subjects that are trained on in the cross-subject protocol of NTU RGB+D 60; the others are the test.
NTU_SUBJECTS = frozenset((1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38))
#: Cameras that are trained on in its cross-view protocol; the other one is the test.
NTU_TRAIN_CAMERAS = frozenset((2, 3))
_NTU_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})")
_BODIES = 2
_NUMBERS = {"body": 10, "joint": 12}


@dataclass(frozen=True)
class SkeletonLayout:
    """What the joints of one body are.

    Attributes:
        joints: their names in order.
        view: root, spine, right hip and left hip, by which a view is normalised.
        parts: joints of the left arm, right arm, left leg, right leg, trunk and head.
        bones: pairs of child and parent, for pictures.
    """

    joints: tuple[str, ...]
    view: tuple[int, int, int, int]
    parts: tuple[tuple[int, ...], ...]
    bones: tuple[tuple[int, int], ...]


_NTU_JOINTS = (
    *("spine base", "spine mid", "neck", "head", "left shoulder", "left elbow", "left wrist", "left hand"),
    *("right shoulder", "right elbow", "right wrist", "right hand", "left hip", "left knee", "left ankle"),
    *("left foot", "right hip", "right knee", "right ankle", "right foot", "spine shoulder", "left hand tip"),
    *("left thumb", "right hand tip", "right thumb"),
)
_NTU_BONES = (
    *((1, 0), (20, 1), (2, 20), (3, 2), (4, 20), (5, 4), (6, 5), (7, 6), (21, 7), (22, 6), (8, 20), (9, 8)),
    *((10, 9), (11, 10), (23, 11), (24, 10), (12, 0), (13, 12), (14, 13), (15, 14), (16, 0), (17, 16), (18, 17)),
    (19, 18),
)
_STICK_JOINTS = (
    *("pelvis", "chest", "head", "left shoulder", "left elbow", "left hand", "right shoulder", "right elbow"),
    *("right hand", "left hip", "left knee", "left foot", "right hip", "right knee", "right foot"),
)
_STICK_BONES = (
    *((1, 0), (2, 1), (3, 1), (4, 3), (5, 4), (6, 1), (7, 6), (8, 7), (9, 0), (10, 9), (11, 10), (12, 0), (13, 12)),
    (14, 13),
)

#: Layouts by name; ``stick`` is that of the simulated figures.
LAYOUTS: dict[str, SkeletonLayout] = {
    "ntu": SkeletonLayout(
        _NTU_JOINTS,
        (0, 20, 16, 12),
        ((4, 5, 6, 7, 21, 22), (8, 9, 10, 11, 23, 24), (12, 13, 14, 15), (16, 17, 18, 19), (0, 1, 20, 2, 3)),
        _NTU_BONES,
    ),
    "stick": SkeletonLayout(
        _STICK_JOINTS,
        (0, 1, 12, 9),
        ((3, 4, 5), (6, 7, 8), (9, 10, 11), (12, 13, 14), (0, 1, 2)),
        _STICK_BONES,
    ),
}


# -- files of NTU RGB+D ------------------------------------------------------------------------------------------------


class NTUName(NamedTuple):
    """What the name of a file of NTU RGB+D tells, each from 1."""

    setup: int
    camera: int
    subject: int
    repetition: int
    action: int


def ntu_name(name: str) -> NTUName | None:
    """The numbers in a name such as ``S001C002P003R002A013.skeleton``; None if it is no such name."""
    found = _NTU_NAME.search(name)
    return None if found is None else NTUName(*(int(number) for number in found.groups()))


def read_ntu_skeleton(path: str | Path) -> npt.NDArray[np.float32]:
    """Read a ``.skeleton`` file: (T, 2 * 25, 3), positions in metres in the space of the camera.

    Of more than two bodies those two that move most are kept, in the order of how much they move: by the variance of
    their joints over time. Frames in which a body is not tracked are NaN; a second body that never is, is zeros.

    Raises:
        DataError: the file is not of this form, or no body is tracked in any frame.
    """
    try:
        lines = iter(Path(path).read_text(encoding="ascii").splitlines())
        frames = int(next(lines))
        bodies: dict[str, dict[int, Array]] = {}
        for frame in range(frames):
            for _ in range(int(next(lines))):
                described = next(lines).split()
                joints = int(next(lines))
                rows = [next(lines).split() for _ in range(joints)]
                if len(described) != _NUMBERS["body"] or any(len(row) != _NUMBERS["joint"] for row in rows):
                    raise ValueError(f"a body has 10 numbers and a joint 12, frame {frame} has others")
                bodies.setdefault(described[0], {})[frame] = np.array([row[:3] for row in rows], dtype=np.float64)
        if len({array.shape for seen in bodies.values() for array in seen.values()}) > 1:
            raise ValueError("the number of joints changes")
    except OSError:
        raise
    except (ValueError, StopIteration, UnicodeDecodeError) as error:
        what = "it ends too early" if isinstance(error, StopIteration) else str(error)
        raise DataError(f"{path} is not a .skeleton file of NTU RGB+D: {what}") from None
    if not bodies:
        raise DataError(f"{path} has no tracked body in any frame")
    joints = next(iter(next(iter(bodies.values())).values())).shape[0]
    moving = sorted(bodies.values(), key=_motion, reverse=True)[:_BODIES]
    clip = np.zeros((frames, _BODIES, joints, 3), np.float32)
    for place, seen in enumerate(moving):
        clip[:, place] = np.nan
        for frame, array in seen.items():
            clip[frame, place] = array
    return clip.reshape(frames, _BODIES * joints, 3)


def _motion(seen: dict[int, Array]) -> float:
    """Sum over the joints of the variance of their positions over time."""
    return float(np.stack(list(seen.values())).var(axis=0).sum())


# -- preparing a clip --------------------------------------------------------------------------------------------------


def fill_missing(clip: Array) -> Array:
    """Fill NaN by linear interpolation over time; before the first and behind the last value that one is held.

    A coordinate that is never there becomes 0.
    """
    filled = np.array(clip, dtype=np.result_type(clip, np.float32))
    flat = filled.reshape(len(filled), -1)
    times = np.arange(len(filled))
    for column in np.flatnonzero(np.isnan(flat).any(0)):
        there = ~np.isnan(flat[:, column])
        flat[:, column] = np.interp(times, times[there], flat[there, column]) if there.any() else 0
    return flat.reshape(filled.shape)


def normalise_view(clip: Array, root: int, spine: int, right_hip: int, left_hip: int) -> Array:
    """Move the root of the first frame to 0 and turn its spine to +z and its hips to x.

    R has the rows v, a x v, a, with a from root to spine and v from left to right hip, made orthogonal to a, in the
    first frame. Where that leaves no direction, the clip is moved only, with a warning; so are 2-D clips, without one.

    Args:
        clip: (T, J, dim).
        root, spine, right_hip, left_hip: joints.

    Returns:
        (T, J, dim).

    Raises:
        ValueError: the clip is not (T, J, 2 or 3), is empty, or a joint is out of range.
    """
    if clip.ndim != 3 or clip.shape[2] not in (2, 3) or not clip.size:
        raise ValueError(f"clip must be (T, J, 2 or 3) and not empty, got {clip.shape}")
    for name, joint in {"root": root, "spine": spine, "right_hip": right_hip, "left_hip": left_hip}.items():
        if not 0 <= joint < clip.shape[1]:
            raise ValueError(f"{name} must be a joint below {clip.shape[1]}, got {joint}")
    moved = clip - clip[0, root]
    if clip.shape[2] == 2:
        return moved
    up = moved[0, spine].astype(np.float64)
    across = (moved[0, right_hip] - moved[0, left_hip]).astype(np.float64)
    length = float(np.linalg.norm(up))
    up = up / length if length > 0 else up
    across = across - (across @ up) * up
    width = float(np.linalg.norm(across))
    if not (length > 1e-8 and width > 1e-8):
        warnings.warn("spine and hips of the first frame give no view: the clip is only moved", stacklevel=2)
        return moved
    across /= width
    turn = np.stack([across, np.cross(up, across), up])
    return (moved @ turn.T).astype(clip.dtype)


def resample_frames(clip: Array, frames: int) -> Array:
    """The clip at ``frames`` times from its first to its last, linearly interpolated: (frames, J, dim).

    Raises:
        ValueError: frames is smaller than 1, or the clip is empty.
    """
    if frames < 1 or not len(clip):
        raise ValueError(f"frames must be at least 1 and the clip not empty, got {frames} and {clip.shape}")
    times = np.linspace(0, len(clip) - 1, frames)
    before = np.floor(times).astype(int)
    after = np.minimum(before + 1, len(clip) - 1)
    share = (times - before).reshape(-1, *(1 for _ in clip.shape[1:]))
    mixed = clip[before] * (1 - share) + clip[after] * share
    return mixed.astype(np.result_type(clip, np.float32))


@dataclass(frozen=True, kw_only=True)
class SkeletonAugment:
    """Random changes of a clip in the training.

    Attributes:
        crop: least share of the frames that are kept, in one piece.
        rotation: largest angle about each axis, in degrees.
        scaling: largest relative change of the size.

    Raises:
        ValueError: a value is out of range.
    """

    crop: float = 0.5
    rotation: float = 17.0
    scaling: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must be in (0, 1], got {self.crop}")
        if self.rotation < 0 or not 0 <= self.scaling < 1:
            raise ValueError(
                f"rotation must not be negative and scaling in [0, 1), got {self.rotation} and {self.scaling}"
            )

    def cropped(self, clip: Array, random: np.random.Generator) -> Array:
        """A random piece of a clip (T, J, dim), before it is resampled."""
        kept = max(1, round(len(clip) * random.uniform(self.crop, 1)))
        start = int(random.integers(0, len(clip) - kept + 1))
        return clip[start : start + kept]

    def turned(self, clip: Array, random: np.random.Generator) -> Array:
        """A normalised clip (T, J, dim), turned about its root and scaled."""
        factor = 1 + random.uniform(-self.scaling, self.scaling)
        angles = np.radians(random.uniform(-self.rotation, self.rotation, 3))
        axes = [(1, 2), (0, 2), (0, 1)] if clip.shape[2] == 3 else [(0, 1)]
        turn = np.eye(clip.shape[2])
        for angle, (a, b) in zip(angles[::-1], axes[::-1], strict=False):
            one = np.eye(clip.shape[2])
            one[a, a] = one[b, b] = math.cos(angle)
            one[a, b], one[b, a] = -math.sin(angle), math.sin(angle)
            turn = one @ turn
        return (factor * (clip @ turn.T)).astype(clip.dtype)
