"""What one fit of a delivery learns from: patches by number, with what lies around them, in the order of a sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convatlas.errors import Unsupported
from convatlas.restoration.chunk_fitting import ChunkFit, FramePairs, PatchPairs, PatchPSNR, without_halo
from convatlas.restoration.protocol import Protocol
from convatlas.restoration.video_chunks import JointSampling, PatchGrid, patch_errors, whole_psnr
from convatlas.training.sampling import EpochSampler
from restoration.scenes import scene

GRID = PatchGrid(2, 3)


def pairs(halo: int = 0, count: int = 2) -> FramePairs:
    high = [scene(number, (32, 48)) for number in range(count)]
    return FramePairs(GRID, 2, halo, [Protocol().shrink(frame, 2) for frame in high], high)


@pytest.mark.parametrize("halo", [0, 3, 12])
def test_patches_by_number_are_those_of_the_grid(halo: int):
    given = pairs(halo)
    assert len(given) == 12
    for what, frames, around in (("low", given.low, halo), ("high", given.high, 0)):
        cut = GRID.cut(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255, around).flatten(0, 1)
        for number in range(12):
            assert torch.equal(given.patch(number)[what], cut[number]), (what, number)


def test_a_set_of_patches_is_read_by_position_and_visited_in_the_order_of_its_sampling():
    given = pairs()
    chunk = PatchPairs(given, [3, 7, 8])
    assert len(chunk) == 3
    assert chunk.order is None
    assert torch.equal(chunk[(1, 99)]["low"], given.patch(7)["low"])
    sampling = JointSampling(np.repeat([0, 1], 6), "fraction", 0.5)
    joint = PatchPairs(given, np.arange(12), sampling)
    assert len(joint) == 9
    sampler = EpochSampler(len(joint), 4, seed=0, order=joint.order)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([index for batch in sampler for index, _ in batch])
    assert orders[0] == orders[2] != orders[1]
    assert set(range(6)) < set(orders[0])


def test_the_metric_is_the_psnr_of_the_mean_error():
    given = pairs()
    truth = torch.stack([given.patch(number)["high"] for number in range(5)])
    other = (truth + 0.2 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))).clamp(-0.2, 1.2)
    metric = PatchPSNR(shave=2)
    metric.update(other[:2], truth[:2])
    metric.update(other[2:], truth[2:])
    errors = patch_errors(other, truth, PatchGrid(1, 1), shave=2)
    assert metric.compute().item() == pytest.approx(whole_psnr(errors), abs=1e-4)
    exact = PatchPSNR(shave=0)
    exact.update(truth, truth)
    assert exact.compute() == 100


def test_the_loss_looks_at_the_patch_alone():
    x = torch.arange(36.0).view(1, 1, 6, 6)
    assert torch.equal(without_halo(x, 2), x[:, :, 2:4, 2:4])
    assert torch.equal(without_halo(x, 0), x)
    task = ChunkFit(label="a", model="espcn_x2", options={"channels": 4, "in_channels": 3})
    task.begin(PatchPairs(pairs(2), [0, 1]), None)
    task.prepare()
    batch = {name: value[None] for name, value in task.train_set[1].items()}
    with torch.no_grad():
        wanted = (task.network(batch["low"])[..., 4:-4, 4:-4] - batch["high"]).abs().mean()
    assert task.losses(batch)["loss"].item() == pytest.approx(wanted.item())
    for call in (task.evaluate, lambda: task.predict([], "")):
        with pytest.raises(Unsupported, match="one fit of a delivery"):
            call()
