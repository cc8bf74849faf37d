"""Integer spikes, their surrogate gradient and their binary form."""

from __future__ import annotations

import pytest
import torch

from convatlas.ops.sparse import sparse_conv, submanifold_rulebook
from convatlas.ops.spiking import binary_spikes, integer_lif, integer_spikes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_halves_are_rounded_up_and_the_gradient_is_that_of_a_ramp(dtype: torch.dtype):
    u = torch.tensor([-1.0, 0.0, 0.25, 0.5, 1.5, 2.25, 2.5, 3.5, 4.0, 9.0], dtype=dtype, requires_grad=True)
    spikes = integer_spikes(u)
    assert spikes.tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 4, 4]
    spikes.sum().backward()
    assert u.grad is not None
    assert u.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="max_spikes must be at least 1, got 0"):
        integer_spikes(u, 0)


def test_what_is_left_is_kept_for_the_next_step():
    current = torch.tensor([[1.25], [1.125], [-3.0], [8.0]])
    # U = 1.25, 0.125 + 1.125, 0.125 - 3, -1.4375 + 8; S = 1, 1, 0, 4; H = (U - S) / 2
    assert integer_lif(current, 4, 0.5).flatten().tolist() == [1, 1, 0, 4]
    assert integer_lif(current[:1], 4).tolist() == integer_spikes(current[:1]).tolist()
    assert integer_lif(torch.full((4, 1), 0.375), 4, 1.0).flatten().tolist() == [0, 1, 0, 1]


def test_convolution_of_integers_is_the_sum_over_binary_steps():
    places = (torch.rand(1, 5, 4) < 0.5).nonzero().int()
    found = submanifold_rulebook(places, (5, 4), 1, (3, 3), (1, 1))
    spikes = integer_spikes(4 * torch.rand(len(places), 3, dtype=torch.float64))
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    steps = binary_spikes(spikes)
    assert set(steps.unique().tolist()) <= {0, 1}
    assert torch.equal(steps.sum(0), spikes)
    torch.testing.assert_close(
        sum(sparse_conv(step, found, weight) for step in steps), sparse_conv(spikes, found, weight)
    )
