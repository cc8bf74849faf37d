from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convatlas.networks.transform_once.t1 import T1Config
from convatlas.physics.rollout import rollout


def test_orders_are_the_next_frame_its_change_and_the_change_of_that():
    times = torch.arange(2.0).view(1, 2, 1, 1)  # y = 0, 1
    ones = torch.ones(1, 1, 1)
    assert rollout(lambda x: 5 * ones, times, 3, 0).flatten().tolist() == [5, 5, 5]
    assert rollout(lambda x: 2 * ones, times, 3, 1).flatten().tolist() == [3, 5, 7]
    # Acceleration 2 from speed 1: 1 + 3, + 5, + 7.
    assert rollout(lambda x: 2 * ones, times, 3, 2).flatten().tolist() == [4, 9, 16]


def test_the_model_sees_the_last_frames_oldest_first():
    seen: list[list[float]] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x[0, :, 0].tolist())
        return x[:, -1:] + 1

    frames = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    assert rollout(model, frames, 2).flatten().tolist() == [4, 5]
    assert seen == [[1, 2, 3], [2, 3, 4]]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_gradients_pass_through_all_steps_and_answers_in_modes_come_back(order: int):
    config = T1Config(in_channels=4, out_channels=2, resolution=6, modes=3, width=3, depth=1)
    network = config.build().double()
    torch.nn.init.normal_(network.fc1), torch.nn.init.normal_(network.fc2)
    grid = config.override(output_space="grid").build().double()
    grid.load_state_dict(network.state_dict())
    frames = torch.randn(2, 2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    forecast = rollout(network, frames, 3, order)
    torch.testing.assert_close(forecast, rollout(grid, frames, 3, order))
    (gradient,) = torch.autograd.grad(forecast[:, -1].square().sum(), frames)
    assert gradient[:, 0].abs().sum() > 0


def test_bad_input():
    frames = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match=r"x must be \(B, K, C, \*grid\), got \(1, 1, 4\)"):
        rollout(lambda x: x, frames[0], 1)
    with pytest.raises(ValueError, match="order must be 0, 1 or 2, got 3"):
        rollout(lambda x: x, frames, 1, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        rollout(lambda x: x, frames, 0)
    with pytest.raises(ValueError, match="order 2 needs 2 frames to start from, got 1"):
        rollout(lambda x: x, frames, 1, 2)
    with pytest.raises(ValueError, match=r"model must give one frame \(1, 1, 4\) of 1, got \(1, 2, 4\)"):
        rollout(lambda x: torch.cat([x, x], 1), frames, 1)
