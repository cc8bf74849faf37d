"""Simulated actions: a stick figure of 15 joints that waves, squats, kicks, walks and claps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ACTIONS", "stick_figures"]

Array = npt.NDArray[Any]

ACTIONS = ("clap", "kick", "squat", "walk", "wave left", "wave right")


def stick_figures(
    count: int, *, frames: tuple[int, int] = (32, 72), noise: float = 0.02, hidden: float = 0.02, seed: int = 0
) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
    """Clips (T, 15, 3) in metres with z up, and their action as an index of `ACTIONS`; as many of each as can be.

    Speed, amplitude, body size and the direction of the camera are random.

    Args:
        count: clips.
        frames: least and most frames of a clip.
        noise: standard deviation of the positions, in metres.
        hidden: probability that a joint is not seen in a frame; it is NaN then.
        seed: of everything.

    Raises:
        ValueError: count is smaller than 1 or frames are not rising from 2.
    """
    if count < 1 or not 2 <= frames[0] <= frames[1]:
        raise ValueError(f"count must be at least 1 and frames rise from 2, got {count} and {frames}")
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % len(ACTIONS))
    clips = []
    for label in labels:
        length = int(random.integers(frames[0], frames[1] + 1))
        phase = random.uniform(0, 2 * math.pi) + 2 * math.pi * random.uniform(1.0, 3.0) * np.linspace(0, 1, length)
        clip = _body(ACTIONS[label], phase, random.uniform(0.6, 1.2)) * random.uniform(0.85, 1.15)
        yaw = random.uniform(-math.pi, math.pi)
        turn = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
        clip = clip @ turn.T + random.uniform(-1, 1, 3) + random.normal(0, noise, clip.shape)
        clip[random.random(clip.shape[:2]) < hidden] = np.nan
        clips.append(clip.astype(np.float32))
    return clips, labels.astype(np.int64)


def _body(action: str, phase: Array, amplitude: float) -> Array:
    """Joints (T, 15, 3) from angles of the limbs over time; x to the right, y forwards, z up."""
    swing, up = amplitude * np.sin(phase), amplitude * (1 - np.cos(phase)) / 2
    still = np.zeros_like(phase)
    # Angles of the upper segment forwards and sideways, and what the lower one adds to them.
    arms = {"left": (still, still, still, still), "right": (still, still, still, still)}
    legs = dict(arms)
    height = still
    if action.startswith("wave"):
        arms[action.removeprefix("wave ")] = (still, still + 2.2, still, 0.7 * swing)
    elif action == "clap":
        arms = dict.fromkeys(arms, (still + 1.4, 0.3 - 0.6 * up, still + 0.1, still))
    elif action == "kick":
        legs["right"] = (1.3 * up, still, -0.4 * up, still)
    elif action == "squat":
        height = -0.35 * up
        legs = dict.fromkeys(legs, (1.1 * up, still, -2.0 * up, still))
        arms = dict.fromkeys(arms, (1.2 * up, still, still, still))
    else:
        for sign, side in ((1, "left"), (-1, "right")):
            legs[side] = (0.5 * sign * swing, still, -0.5 * np.maximum(-sign * swing, 0), still)
            arms[side] = (-0.5 * sign * swing, still, still + 0.3, still)
    joints = np.zeros((len(phase), 15, 3))
    joints[:, 0, 2] = 1.0 + height
    joints[:, 1] = joints[:, 0] + [0, 0, 0.45]
    joints[:, 2] = joints[:, 1] + [0, 0, 0.3]
    for sign, side, shoulder, hip in ((-1, "left", 3, 9), (1, "right", 6, 12)):
        joints[:, shoulder] = joints[:, 1] + [0.2 * sign, 0, 0]
        joints[:, hip] = joints[:, 0] + [0.12 * sign, 0, 0]
        _limb(joints, shoulder, arms[side], (0.3, 0.28), sign)
        _limb(joints, hip, legs[side], (0.45, 0.45), sign)
    return joints


def _limb(joints: Array, first: int, angles: tuple[Array, ...], lengths: tuple[float, float], sign: int) -> None:
    """Two segments that hang down from a joint where all angles are 0."""
    forwards, sideways, more_forwards, more_sideways = angles
    for segment, length in enumerate(lengths):
        y, x = forwards + segment * more_forwards, sideways + segment * more_sideways
        along = np.stack([sign * np.sin(x), np.sin(y) * np.cos(x), -np.cos(y) * np.cos(x)], axis=1)
        joints[:, first + segment + 1] = joints[:, first + segment] + length * along
