"""Long and short convolutions as layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.nn.conv.short_conv import ShortConv1d
from convatlas.nn.long_conv import FFTConv1d, FrequencySparseFFTConv, PartialFFTConv
from convatlas.nn.mixers.long_conv import LongConv, squash
from convatlas.ops.fft_conv import fft_conv
from convatlas.surgery import swap


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_layers_that_get_their_kernel_hold_nothing():
    u, k = random(2, 3, 8), random(3, 8)
    gates, step, state = (u.cos(), u.sin()), PartialFFTConv(3), None
    layers = [FFTConv1d(16), PartialFFTConv(8), FrequencySparseFFTConv(9), FrequencySparseFFTConv((4, 4), (4, 4))]
    for layer in layers:
        assert not layer.state_dict()
        torch.testing.assert_close(layer(u, k, *gates), fft_conv(u, k, None, *gates))
    torch.testing.assert_close(layers[0](u, k[None], skip=k[:, 0]), fft_conv(u, k, skip=k[:, 0]))
    sparse = FrequencySparseFFTConv(3)
    torch.testing.assert_close(fft_conv(u, sparse.sparse_kernel(k, 8), 16), sparse(u, k))
    found = []
    for sample in u.split(1, dim=-1):
        y, state = step.step(sample, k, state)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, -1), step(u, k))
    with pytest.raises(ValueError, match="keep must be at least 1, and a block for factors, got 3 and"):
        FrequencySparseFFTConv(3, (4, 4))
    with pytest.raises(ValueError, match=r"keep must be from 1 to each of the factors \(4, 4\), got \(5, 1\)"):
        FrequencySparseFFTConv((5, 1), (4, 4))
    for wrong in (FFTConv1d, PartialFFTConv):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            wrong(0)


@pytest.mark.parametrize(("length", "reach"), [(7, 7), (5, 7), (7, 3), (1, 1)])
def test_a_long_convolution_is_its_equation(length: int, reach: int):
    layer = LongConv(2, length=reach, heads=2, lam=0.05, dropout=0.0).double()
    with torch.no_grad():
        layer.kernel.copy_(0.2 * random(2, 2, 2 * reach))
    x = random(3, 2, length)
    taps = layer.kernel.sign() * (layer.kernel.abs() - 0.05).clamp(min=0)
    y = x.new_zeros(3, 2, 2, length)
    for t in range(length):
        for s in range(length):
            if -reach <= t - s < reach:
                y[..., t] += taps[..., (t - s) % (2 * reach)] * x[:, None, :, s]
    y = F.gelu((y + layer.skip[..., None] * x[:, None]).flatten(1, 2))
    expected = F.glu(layer.output_linear(y.mT), dim=-1).mT
    torch.testing.assert_close(layer(x), expected)


def test_taps_below_the_threshold_get_no_gradient():
    # The authors' kernels start at 0.002 with a threshold of 0.1.
    x = random(2, 3, 9).float()
    for lam, trained in ((0.1, False), (1e-4, True)):
        layer = LongConv(3, length=9, lam=lam)
        layer(x).sum().backward()
        assert bool(layer.kernel.grad.any()) is trained
    torch.testing.assert_close(squash(torch.tensor([-0.3, 0.05, 0.3]), 0.1), torch.tensor([-0.2, 0.0, 0.2]))


def test_wrong_sequences_and_sizes_are_named():
    layer = LongConv(3, length=4)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, L\), got \(2, 4, 3\)"):
        layer(torch.empty(2, 4, 3))
    with pytest.raises(ValueError, match="length and heads must be at least 1, and lam not negative, got 3, 0"):
        LongConv(3, length=0)


def test_short_convolutions_of_tokens():
    plain = nn.Conv1d(4, 4, 3, padding=2, groups=4)
    tokens = ShortConv1d.from_conv(plain, channels_last=True)
    x = torch.randn(2, 7, 4)
    torch.testing.assert_close(tokens(x), plain(x.mT).mT)
    assert tokens.to_conv() is None
    with pytest.raises(ValueError, match=r"x must be \(B, L, 4\), got \(2, 4, 7\)"):
        tokens(x.mT)
    model = nn.Sequential(plain, nn.ReLU())
    result = swap(model, nn.Conv1d, ShortConv1d)
    torch.testing.assert_close(result.model(x.mT), model(x.mT))
    with pytest.raises(Unsupported, match=r"padding must be a number of zeros, got 'same' \(zeros\)"):
        ShortConv1d.from_conv(nn.Conv1d(4, 4, 3, padding="same", groups=4))
    with pytest.raises(ValueError, match="stride must be 1, got 2"):
        ShortConv1d(4, 4, 3, stride=2, groups=4)
