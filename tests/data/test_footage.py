"""Frames to deliver: clips, numbered pictures, and the clip that is made of photographs."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convatlas.data.footage import moving_photographs, read_footage
from convatlas.errors import DataError
from data.clips import frames_of, write_clip


def test_a_clip_is_read_as_often_as_wanted_and_has_its_sound(tmp_path: Path):
    path = write_clip(tmp_path / "clip.mp4", frames_of(5))
    footage = read_footage(path)
    assert (footage.count, footage.size, footage.fps, footage.name) == (5, (48, 64), Fraction(25), "clip.mp4")
    assert footage.sound_from == path
    first, second = list(footage.frames()), list(footage.frames())
    assert len(first) == 5
    assert np.array_equal(first, second)
    assert read_footage(write_clip(tmp_path / "mute.mp4", frames_of(3), sound=None)).sound_from is None


def test_pictures_come_in_the_order_of_their_numbers(tmp_path: Path):
    for number in (1, 2, 10):
        Image.fromarray(np.full((6, 8), number, np.uint8)).save(tmp_path / f"frame_{number}.png")
    footage = read_footage(tmp_path)
    assert [int(frame[0, 0, 0]) for frame in footage.frames()] == [1, 2, 10]
    assert all(frame.shape == (6, 8, 3) for frame in footage.frames())
    assert (footage.count, footage.fps, footage.sound_from) == (3, 30, None)


def test_photographs_move_in_two_shots_and_are_the_same_each_time():
    frames = np.stack(list(moving_photographs(40, (24, 40), seed=3)))
    assert frames.shape == (40, 24, 40, 3)
    assert np.array_equal(frames, np.stack(list(moving_photographs(40, (24, 40), seed=3))))
    steps = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))
    assert steps.min() > 1  # everything moves
    assert steps.argmax() == 19  # the cut between the shots
    assert not np.array_equal(frames, np.stack(list(moving_photographs(40, (24, 40), seed=4))))
    built_in = read_footage("photographs")
    assert next(built_in.frames()).shape[:2] == built_in.size
    assert sum(1 for _ in built_in.frames()) == built_in.count


def test_what_cannot_be_read_is_told(tmp_path: Path):
    with pytest.raises(DataError, match="missing does not exist; expected a clip, a folder of pictures, or"):
        read_footage(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no pictures"):
        read_footage(tmp_path / "empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_text("x")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        read_footage(tmp_path / "bad")
    with pytest.raises(ValueError, match="count and size must be at least 1, got 0"):
        moving_photographs(0)
