"""BSS-eval: against dense least squares, what filters may do, order, improvement, and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convatlas.ops.separation_quality import bss_eval_sources, sdr_improvement


def _delays(sources: Tensor, taps: int) -> Tensor:
    """All delays as columns (T + taps - 1, C taps)."""
    columns = [torch.nn.functional.pad(s, (d, taps - 1 - d)) for s in sources for d in range(taps)]
    return torch.stack(columns, 1)


def _dense(signal: Tensor, sources: Tensor, taps: int) -> Tensor:
    basis = _delays(sources, taps)
    padded = torch.nn.functional.pad(signal, (0, taps - 1))
    return basis @ torch.linalg.lstsq(basis, padded[:, None], driver="gelsd").solution[:, 0]


def _db(a: Tensor, b: Tensor) -> float:
    return (10 * torch.log10(a.square().sum() / b.square().sum())).item()


def _mixed(count: int, length: int = 120) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    references = torch.randn(count, length, generator=generator, dtype=torch.float64)
    leak = torch.eye(count, dtype=torch.float64) + 0.2 * torch.rand(count, count, generator=generator).double()
    return leak @ references + 0.1 * torch.randn(count, length, generator=generator).double(), references


@pytest.mark.parametrize("taps", [1, 7])
def test_projections_are_those_of_dense_least_squares(taps: int):
    estimates, references = _mixed(3)
    quality = bss_eval_sources(estimates, references, filter_length=taps)
    assert quality.order.tolist() == [0, 1, 2]
    for at in range(3):
        target = _dense(estimates[at], references[at : at + 1], taps)
        everything = _dense(estimates[at], references, taps)
        padded = torch.nn.functional.pad(estimates[at], (0, taps - 1))
        assert quality.sdr[at].item() == pytest.approx(_db(target, padded - target), abs=1e-7)
        assert quality.sir[at].item() == pytest.approx(_db(target, everything - target), abs=1e-7)
        assert quality.sar[at].item() == pytest.approx(_db(everything, padded - everything), abs=1e-7)


def test_estimates_are_assigned_by_interference():
    estimates, references = _mixed(3)
    shuffle = torch.tensor([2, 0, 1])
    plain = bss_eval_sources(estimates, references, filter_length=5)
    shuffled = bss_eval_sources(estimates[shuffle], references, filter_length=5)
    assert shuffled.order.tolist() == [1, 2, 0]
    torch.testing.assert_close(shuffled.sdr, plain.sdr)
    kept = bss_eval_sources(estimates[shuffle], references, filter_length=5, permute=False)
    assert (kept.sdr < plain.sdr).all()


def test_short_filters_of_the_source_cost_nothing():
    _, references = _mixed(2, 300)
    filtered = torch.nn.functional.conv1d(
        torch.nn.functional.pad(references[:, None], (3, 0)), torch.tensor([[[0.1, 0.0, -0.5, 1.0]]]).double()
    )[:, 0]
    filtered[:, -3:] = 0  # nearly a whole filtered signal
    quality = bss_eval_sources(filtered, references, filter_length=8)
    assert (quality.sdr > 15).all()
    assert (bss_eval_sources(filtered, references, filter_length=1).sdr < 10).all()


def test_batches_and_improvement():
    estimates, references = _mixed(2)
    both = bss_eval_sources(
        torch.stack([estimates, estimates.flip(0)]), torch.stack([references, references]), filter_length=6
    )
    torch.testing.assert_close(both.sdr[0], both.sdr[1])
    assert both.order.tolist() == [[0, 1], [1, 0]]
    mixture = references.sum(0)
    gain = sdr_improvement(estimates, references, mixture, filter_length=6)
    before = bss_eval_sources(torch.stack([mixture, mixture]), references, filter_length=6, permute=False).sdr
    torch.testing.assert_close(gain, both.sdr[0] - before)
    nothing = sdr_improvement(torch.stack([mixture, mixture]), references, mixture, filter_length=6, permute=False)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing))


def test_sources_that_depend_on_each_other_are_no_failure():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(60, generator=generator, dtype=torch.float64)
    references = torch.stack([one, 2 * one])
    estimates = references + 0.1 * torch.randn(2, 60, generator=generator).double()
    quality = bss_eval_sources(estimates, references, filter_length=20)
    assert quality.sdr.isfinite().all()


def test_errors_name_the_argument():
    x = torch.randn(2, 40)
    with pytest.raises(ValueError, match=r"must be \(C, T\) or \(B, C, T\) alike, got \(2, 40\) and \(2, 39\)"):
        bss_eval_sources(x, x[:, :39])
    with pytest.raises(ValueError, match="filter_length must be at least 1, got 0"):
        bss_eval_sources(x, x, filter_length=0)
    with pytest.raises(ValueError, match=r"references must not be silent.*references\[\(1,\)\] is zero"):
        bss_eval_sources(x, x * torch.tensor([[1.0], [0.0]]))
    with pytest.raises(ValueError, match="estimates must be finite"):
        bss_eval_sources(x * torch.nan, x)
    with pytest.raises(ValueError, match=r"mixture must fit the references \(2, 40\), got \(39,\)"):
        sdr_improvement(x, x, x[0, :39])
