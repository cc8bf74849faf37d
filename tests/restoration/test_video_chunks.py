"""Patches of frames, how hard they are, their division into chunks, and which of them a joint training visits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from convatlas.networks.espcn import ESPCNConfig
from convatlas.restoration.video_chunks import (
    JointSampling,
    PatchGrid,
    chunk_by_psnr,
    chunk_by_time,
    chunk_randomly,
    complexity,
    patch_errors,
    patch_psnr,
    score_patches,
    whole_psnr,
)

GRID = PatchGrid(2, 3)


def frames(count: int = 2, seed: int = 0, size: tuple[int, int] = (16, 24)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)


# -- patches -----------------------------------------------------------------------------------------------------------


def test_patches_are_numbered_row_by_row_and_give_the_frame_back():
    given = frames()
    patches = GRID.cut(given)
    assert patches.shape == (2, 6, 3, 8, 8)
    assert torch.equal(patches[1, 4], given[1, :, 8:16, 8:16])
    assert torch.equal(GRID.join(patches), given)


def test_a_halo_is_what_lies_around_a_patch_and_zero_beyond_the_frame():
    given = frames()
    patches = GRID.cut(given, halo=3)
    assert patches.shape == (2, 6, 3, 14, 14)
    assert torch.equal(patches[..., 3:11, 3:11], GRID.cut(given))
    assert torch.equal(patches[0, 4][:, :11, :], given[0, :, 5:16, 5:19])
    assert not patches[0, 0, :, :3].any()


def test_the_filled_size_is_the_least_that_the_grid_divides():
    assert GRID.filled(16, 24) == (16, 24)
    assert GRID.filled(17, 24, scale=2) == (20, 24)
    assert PatchGrid(10, 20).patch_size(1080, 1920) == (108, 96)
    for length in range(1, 40):
        height, _ = GRID.filled(length, 6, scale=3)
        assert height % 6 == 0
        assert 0 <= height - length < 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PatchGrid(0, 3), "rows and columns must be at least 1, got 0 and 3"),
        (lambda: GRID.cut(frames(size=(15, 24))), "a grid of 2 x 3 patches must divide the frame, got 15 x 24 pixels"),
        (lambda: GRID.cut(frames(), halo=-1), "halo must not be negative, got -1"),
        (lambda: GRID.join(torch.zeros(5, 3, 8, 8)), r"patches must be \(..., 6, C, h, w\), got \(5, 3, 8, 8\)"),
        (lambda: patch_errors(torch.zeros(1, 3, 4, 6), torch.zeros(1, 3, 4, 9), GRID), "must have one shape"),
        (
            lambda: patch_errors(frames() / 255, frames(), GRID, shave=4),
            "shave must leave some of the patches of 8 x 8",
        ),
        (lambda: chunk_by_psnr(np.zeros(3), 4), "k must be from 1 to the number of patches, 3, got 4"),
        (lambda: chunk_by_psnr(np.zeros((3, 2)), 2), r"labels must be \(n\), got \(3, 2\)"),
        (lambda: chunk_by_time(4, 6, 5), "k must be from 1 to the 4 frames, got 5"),
        (lambda: complexity(frames()[0], GRID, "entropy"), "unknown kind 'entropy'"),  # type: ignore[arg-type]
        (lambda: JointSampling(np.zeros(3, int), "some"), "unknown scheme 'some'"),  # type: ignore[arg-type]
        (lambda: JointSampling(np.zeros(3, int), fraction=0.0), r"fraction must be in \(0, 1\], got 0.0"),
        (lambda: JointSampling(np.zeros(3, int), "curriculum", drops=(4, 2)), "drops must be epochs from 1 in rising"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()


# -- labels ------------------------------------------------------------------------------------------------------------


def test_errors_are_those_of_files_and_their_mean_is_that_of_whole_frames():
    truth, other = frames(seed=1), frames(seed=2)
    noisy = other / 255 + 0.3 / 255  # rounds to the same file
    errors = patch_errors(noisy, truth, GRID)
    whole = ((other.double() - truth) / 255).square()
    assert errors.mean().item() == pytest.approx(whole.mean().item(), rel=1e-12)
    assert whole_psnr(errors) == pytest.approx(-10 * np.log10(whole.mean().item()))
    inner = patch_errors(noisy, truth, GRID, shave=3)
    assert inner[7].item() == pytest.approx(whole[1, :, 3:5, 11:13].mean().item())
    assert patch_psnr(torch.tensor([0.0, 0.01])).tolist() == [np.inf, pytest.approx(20)]


def test_scores_are_those_of_each_patch_alone_and_later_frames_do_not_change_them():
    model = ESPCNConfig(scale=2, in_channels=3, channels=4, init="icnr").build().eval()
    low, high = frames(3), frames(3, seed=5, size=(32, 48))
    labels = score_patches(model, low, high, GRID, shave=2, batch_size=4)
    assert torch.equal(labels[:6], score_patches(model, low[:1], high[:1], GRID, shave=2))
    with torch.no_grad():
        patch = model(low[1:2, :, 8:16, 16:24] / 255)
    alone = patch_errors(patch, high[1:2, :, 16:32, 32:48], PatchGrid(1, 1), shave=2)
    assert labels[11].item() == pytest.approx(patch_psnr(alone).item(), abs=1e-3)
    assert torch.equal(score_patches(model, low, high, GRID), score_patches(model, low, high, GRID, shave=6))
    with pytest.raises(ValueError, match="the network enlarges 2 times, but the frames are of scale 3"):
        score_patches(model, low, frames(3, size=(48, 72)), GRID)
    with pytest.raises(ValueError, match=r"high must be a multiple of low, got \(17, 24\) and \(16, 24\)"):
        score_patches(model, low, frames(3, size=(17, 24)), GRID)


@pytest.mark.parametrize("kind", ["variance", "dct"])
def test_plain_patches_are_easier_than_detailed_ones(kind: Any):
    frame = frames(1)[0]
    frame[:, :8, :8] = 90
    frame[:, :8, 8:16] = 90 + frame[:, :8, 8:16] // 16
    values = complexity(frame, GRID, kind)
    assert values[0] > 100
    assert values[0] > values[1] > values[2:].max()
    if kind == "variance":
        grey = (frame[:, 8:, :8].double() / 255 * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
        assert values[3].item() == pytest.approx(-10 * np.log10(grey.numpy().var()), rel=1e-6)


# -- chunks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_chunks_are_complete_equal_and_rise(k: int):
    labels = np.random.default_rng(0).uniform(20, 50, 101)
    chunks = chunk_by_psnr(labels, k)
    index, thresholds = chunks.index, chunks.thresholds
    sizes = np.bincount(index, minlength=k)
    assert sizes.sum() == 101
    assert sizes.max() - sizes.min() <= 1
    for chunk in range(k - 1):
        assert labels[index == chunk].max() < labels[index == chunk + 1].min()
    assert thresholds[0] == 0
    assert thresholds[-1] == labels.max()
    assert np.array_equal(index, chunk_by_psnr(torch.from_numpy(labels), k).index)


def test_equal_labels_stay_together_and_strange_ones_find_a_chunk():
    index = chunk_by_psnr([30.0, 30.0, 30.0, 30.0, 40.0, 50.0], 3).index
    assert index.tolist() == [0, 0, 0, 0, 2, 2]
    index = chunk_by_psnr([np.inf, 31.0, -2.0, np.nan, 32.0, 40.0], 2).index
    assert index.tolist() == [1, 0, 0, 0, 1, 1]
    assert chunk_by_psnr([np.inf] * 4, 2).index.tolist() == [0] * 4


def test_other_divisions():
    by_time = chunk_by_time(5, 4, 2).index.reshape(5, 4)
    assert (by_time == by_time[:, :1]).all()
    assert by_time[:, 0].tolist() == [0, 0, 0, 1, 1]
    index = chunk_randomly(20, 3, seed=1).index
    assert sorted(np.bincount(index)) == [6, 7, 7]
    assert np.array_equal(index, chunk_randomly(20, 3, seed=1).index)
    assert not np.array_equal(index, np.sort(index))


# -- joint training ----------------------------------------------------------------------------------------------------

INDEX = np.repeat([0, 1, 2], [10, 11, 9])


def epoch(sampling: JointSampling, number: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return sampling.order(number, torch.Generator().manual_seed(seed)).numpy()


def test_easy_patches_are_visited_less_and_others_each_time():
    sampling = JointSampling(INDEX, "fraction", 0.5)
    assert len(sampling) == 10 + 6 + 3
    orders = [epoch(sampling, 0, seed) for seed in range(30)]
    for order in orders:
        assert len(order) == len(set(order)) == 19
        assert np.bincount(INDEX[order]).tolist() == [10, 6, 3]
    assert len({tuple(np.sort(order)) for order in orders}) > 20
    visited = np.bincount(np.concatenate(orders), minlength=30)
    assert (visited[:10] == 30).all()
    assert visited.min() >= 2
    assert np.array_equal(orders[3], epoch(sampling, 0, 3))


def test_the_curriculum_drops_the_easiest_and_keeps_the_length():
    sampling = JointSampling(INDEX, "curriculum", drops=(2, 4))
    counts = [np.bincount(INDEX[epoch(sampling, number)], minlength=3).tolist() for number in range(6)]
    assert counts[0] == counts[1] == [10, 11, 9]
    assert [sum(each) for each in counts] == [30] * 6
    assert all(each[2] == 0 and min(each[:2]) > 0 for each in counts[2:4])
    assert counts[4] == counts[5] == [30, 0, 0]
    assert sorted(epoch(sampling, 0)) == list(range(30))


def test_uniform_visits_all_once():
    sampling = JointSampling(INDEX, "uniform", 0.5)
    assert len(sampling) == 30
    assert sorted(epoch(sampling, 7)) == list(range(30))
    assert epoch(sampling, 7).tolist() != sorted(epoch(sampling, 7))
