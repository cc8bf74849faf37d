from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from convatlas.ops.mode_mixing import mix_modes, mode_major


@pytest.mark.parametrize("modes", [(5,), (3, 4), (2, 3, 2), (1,), (0, 3)])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_mixes_complex_spectra_mode_by_mode(modes: tuple[int, ...], batch: int):
    x = torch.randn(batch, 3, *modes, dtype=torch.complex128)
    weight = torch.randn(3, 2, *modes, dtype=torch.complex128)
    y = mix_modes(x, mode_major(weight))
    assert y.shape == (batch, 2, *modes)
    by_hand = (x.unsqueeze(2) * weight).sum(1)
    torch.testing.assert_close(y, by_hand)
    torch.testing.assert_close(mix_modes(x, weight, backend="naive"), by_hand)
    torch.testing.assert_close(mix_modes(x.real, weight), mix_modes(x.real + 0j, weight))


def test_complex_gradients():
    x = torch.randn(2, 2, 3, dtype=torch.complex128, requires_grad=True)
    weight = torch.randn(2, 3, 3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(mix_modes, (x, weight), fast_mode=True)


def test_the_order_of_memory_survives_training_and_copies():
    weight = nn.Parameter(mode_major(torch.randn(3, 2, 4, 5)))
    assert weight.permute(2, 3, 0, 1).is_contiguous()
    optimizer = torch.optim.AdamW([weight])
    mix_modes(torch.randn(2, 3, 4, 5), weight).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride()
    optimizer.step()
    copied = copy.deepcopy(weight).to(torch.float64)
    assert copied.stride() == weight.stride()
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"x must be \(B, I, \*modes\) and weight \(I, O, \*modes\), got \(2, 3, 4\)"):
        mix_modes(torch.randn(2, 3, 4), torch.randn(3, 2, 5))
