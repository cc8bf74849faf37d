"""Losses of separators: three forms of one loss, order, lengths, learning and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convatlas.errors import UnknownName
from convatlas.nn.separation_losses import PITLoss, SignalRatioLoss
from convatlas.ops.signal_ratios import si_snr


def _signals(count: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    references = torch.randn(batch, count, 90, generator=generator, dtype=torch.float64)
    estimates = references + 0.4 * torch.randn(batch, count, 90, generator=generator, dtype=torch.float64)
    return estimates.roll(1, dims=1), references


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_all_forms_of_a_loss_agree(count: int):
    estimates, references = _signals(count)
    whole = PITLoss().match(estimates, references)
    pair = PITLoss(lambda e, s: -si_snr(e, s), form="pair").match(estimates, references)
    sources = PITLoss(lambda e, s: -si_snr(e, s).mean(1), form="sources").match(estimates, references)
    for found in (pair, sources):
        torch.testing.assert_close(found.loss, whole.loss)
        assert found.order.equal(whole.order)
    assert whole.order.equal(((torch.arange(count) + 1) % count).expand(3, -1))
    torch.testing.assert_close(whole.estimates, estimates.roll(-1, dims=1))
    torch.testing.assert_close(whole.losses, SignalRatioLoss().in_order(whole.estimates, references))
    torch.testing.assert_close(PITLoss()(estimates, references), whole.losses.mean())


def test_lengths_reach_the_loss():
    estimates, references = _signals(2)
    lengths = torch.tensor([90, 60, 30])
    found = PITLoss()(estimates, references, lengths)
    alone = [
        PITLoss()(estimates[at : at + 1, :, :length], references[at : at + 1, :, :length])
        for at, length in enumerate(lengths)
    ]
    torch.testing.assert_close(found, torch.stack(alone).mean())
    in_order = SignalRatioLoss().in_order(estimates, references, lengths)
    torch.testing.assert_close(
        in_order[2], SignalRatioLoss().in_order(estimates[2:, :, :30], references[2:, :, :30])[0]
    )


def test_descent_finds_the_sources_in_any_order():
    _, references = _signals(2)
    estimates = torch.randn(references.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    estimates.requires_grad_()
    loss, optimizer = PITLoss(), torch.optim.Adam([estimates], 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(estimates, references)
        value.backward()
        optimizer.step()
    assert value < -15


def test_errors_name_the_argument():
    estimates, references = _signals(2)
    with pytest.raises(
        ValueError, match=r"of shape \(B, C, T\) = \[batch, n_src, time\], got \(3, 2, 90\) and \(2, 90\)"
    ):
        PITLoss()(estimates, references[0])
    with pytest.raises(UnknownName, match="unknown form 'pairs'"):
        PITLoss(form="pairs")
    with pytest.raises(UnknownName, match="unknown ratio 'sisnr': did you mean si_snr"):
        SignalRatioLoss("sisnr")
    with pytest.raises(ValueError, match=r"the loss must give \(3, 2, 2\), got \(\)"):
        PITLoss(torch.nn.functional.mse_loss)(estimates, references)
