"""Several views of one video, whose class scores are averaged: clips along time, crops across the frames.

As in the tests of action recognition: on Kinetics some clips of a fixed frame distance, spread over the video, on
Something-Something one frame from the middle of each equal part and three crops (Wang et al., TSN, ECCV 2016,
arXiv 1608.00859).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["clip_views", "dense_frames", "segment_frames"]


def dense_frames(count: int, frames: int, distance: int, clips: int = 1) -> list[list[int]]:
    """Frames of ``clips`` clips of a video, each of ``frames`` frames at the same distance.

    A single clip lies in the middle; several start at equal distances, the first at the beginning, the last at the end.
    The last frame is repeated where a video is too short.

    Args:
        count: frames of the video.
        frames: frames of a clip.
        distance: from one frame of a clip to the next.
        clips: how many.

    Raises:
        ValueError: an argument is smaller than 1.
    """
    if min(count, frames, distance, clips) < 1:
        raise ValueError(f"all arguments must be at least 1, got {count}, {frames}, {distance} and {clips}")
    room = max(0, count - frames * distance)
    starts = [room / 2] if clips == 1 else np.linspace(0, room, clips).tolist()
    return [[min(int(start) + distance * index, count - 1) for index in range(frames)] for start in starts]


def segment_frames(count: int, frames: int) -> list[int]:
    """The middle frame of each of ``frames`` equal parts of a video.

    Raises:
        ValueError: an argument is smaller than 1.
    """
    if min(count, frames) < 1:
        raise ValueError(f"count and frames must be at least 1, got {count} and {frames}")
    return [min(int((index + 0.5) * count / frames), count - 1) for index in range(frames)]


def clip_views(video: Tensor, frames: Sequence[Sequence[int]], side: int, crops: int = 1) -> Tensor:
    """The views of a video, ready for a network: mean(softmax(scores)) over them is the prediction.

    Args:
        video: (C, T, H, W), the shorter side of its frames at least ``side``.
        frames: of each clip, from `dense_frames`, or one list of `segment_frames`.
        side: of the square crops.
        crops: 1 for the central one, or 3 along the longer side of the frames: both ends and the middle.

    Returns:
        (clips * crops, C, frames, side, side), the crops of a clip one after the other.

    Raises:
        ValueError: there are other crops than 1 or 3, or the frames are too small.
    """
    if video.dim() != 4 or min(video.shape[2:]) < side or side < 1:
        raise ValueError(f"video must be (C, T, H, W) of at least {side} pixels, got {tuple(video.shape)}")
    if crops not in (1, 3):
        raise ValueError(f"crops must be 1 or 3, got {crops}")
    rooms = torch.tensor([size - side for size in video.shape[2:]], dtype=torch.float64)
    longer = int(rooms.argmax())
    views = []
    for chosen in frames:
        clip = video[:, list(chosen)]
        for share in (0.5,) if crops == 1 else (0.0, 0.5, 1.0):
            shares = torch.full((2,), 0.5, dtype=torch.float64)
            shares[longer] = share
            top, left = (rooms * shares).ceil().long().tolist()
            views.append(clip[:, :, top : top + side, left : left + side])
    return torch.stack(views)
