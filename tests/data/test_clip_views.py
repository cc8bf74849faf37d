"""Views of a video: which frames, which crops."""

from __future__ import annotations

import pytest
import torch

from convatlas.data.clip_views import clip_views, dense_frames, segment_frames


def test_dense_clips_are_spread_over_the_video() -> None:
    assert dense_frames(100, 4, 5) == [[40, 45, 50, 55]]
    assert dense_frames(100, 4, 5, clips=3) == [[0, 5, 10, 15], [40, 45, 50, 55], [80, 85, 90, 95]]
    assert dense_frames(9, 4, 4, clips=2) == [[0, 4, 8, 8]] * 2


def test_segments_give_their_middle_frame() -> None:
    assert segment_frames(40, 4) == [5, 15, 25, 35]
    assert segment_frames(3, 6) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("axis", [2, 3])
def test_crops_along_the_longer_side(axis: int) -> None:
    shape = [1, 6, 8, 8]
    shape[axis] = 14
    places = torch.arange(14).reshape([-1 if each == axis else 1 for each in range(4)]).expand(shape)
    views = clip_views(places, [[0, 2], [3, 5]], 8, crops=3)
    assert views.shape == (6, 1, 2, 8, 8)
    assert views.amin((1, 2, 3, 4)).tolist() == [0, 3, 6] * 2
    assert torch.equal(clip_views(places, [[0, 2]], 8)[0], views[1])
    times = torch.arange(6).reshape(1, 6, 1, 1).expand(1, 6, 8, 8)
    assert clip_views(times, [[1, 4]], 4)[0, 0, :, 0, 0].tolist() == [1, 4]


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="crops must be 1 or 3, got 2"):
        clip_views(torch.ones(1, 2, 8, 8), [[0]], 8, crops=2)
    with pytest.raises(ValueError, match=r"at least 9 pixels, got \(1, 2, 8, 8\)"):
        clip_views(torch.ones(1, 2, 8, 8), [[0]], 9)
    with pytest.raises(ValueError, match="got 0, 4, 5 and 1"):
        dense_frames(0, 4, 5)
    with pytest.raises(ValueError, match="got 4 and 0"):
        segment_frames(4, 0)
