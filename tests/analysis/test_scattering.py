"""Studies of feature extractors: their verdicts follow from the theory, and fail where it does not apply."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from convatlas.analysis.scattering import (
    check_admissible,
    deform,
    deformation_report,
    energy_report,
    frame_report,
    relative_change,
    translation_bounds,
    translation_report,
)
from convatlas.nn.frame_scattering import ScatteringLayer, ScatteringNetwork
from convatlas.nn.scattering import Scattering2D
from convatlas.ops.frames import learned, meyer, polar
from convatlas.report import Report, Table

MEYER = partial(meyer, J=3)
LAYER = ScatteringLayer(MEYER, pooling="subsample", factor=2)
POOLED = ScatteringNetwork([LAYER] * 2, MEYER, 64)
LOUD = partial(learned, weight=torch.tensor([[1.0, 1.0], [2.0, -2.0]]))


def verdicts(report: Report) -> list[str]:
    assert "<html" in report.to_html()
    return [claim.verdict for claim in report.claims]


def smooth(*lead: int) -> Tensor:
    spectrum = torch.fft.fft(torch.randn(*lead, 64, dtype=torch.float64))
    return torch.fft.ifft(spectrum * (torch.fft.fftfreq(64).abs() < 0.1)).real


def table(report: Report, title: str) -> Table:
    return next(
        part for section in report.sections for part in section.parts if isinstance(part, Table) and part.title == title
    )


def test_bounds_of_frames():
    assert verdicts(frame_report(MEYER(32), "Meyer frame")) == ["holds"]
    assert verdicts(frame_report(polar((8, 12), 2, 4))) == ["holds"]
    report = frame_report(LOUD(16))
    assert verdicts(report) == ["does not hold"]
    assert table(report, "Bounds").rows[0][:3] == (1, pytest.approx(LOUD(16).bounds()[0]), pytest.approx(16))


def test_admissibility():
    assert verdicts(check_admissible(POOLED)) == ["holds"]
    relu = ScatteringNetwork([ScatteringLayer(MEYER, "relu")], MEYER, 16)
    assert verdicts(check_admissible(relu)) == ["holds"]
    paper = check_admissible(relu, lipschitz="paper")
    assert verdicts(paper) == ["does not hold"]
    rows = table(paper, "Constants of the layers").rows
    assert rows[0][3:] == (2.0, 1.0, pytest.approx(4), pytest.approx(0.5))
    assert rows[1][3:] == (None, None, pytest.approx(1), pytest.approx(1))
    scaled = ScatteringNetwork([LAYER], MEYER, 16, dilation_norm=True)
    assert "can undo" in check_admissible(scaled).to_json()


def test_energy():
    whole = ScatteringNetwork([ScatteringLayer(MEYER)] * 2, MEYER, 64)
    report = energy_report(whole, smooth(3))
    assert verdicts(report) == ["holds"]
    rows = table(report, "Shares of the energy").rows
    assert [row[3] for row in rows] == pytest.approx([1, 1, 1])
    assert rows[-1][4] < 1
    assert rows[1][1] > rows[2][1]
    assert verdicts(energy_report(POOLED, torch.randn(2, 64))) == ["holds"]
    assert verdicts(energy_report(ScatteringNetwork([ScatteringLayer(LOUD)], LOUD, 64), smooth(1))) == ["does not hold"]


def test_shifts():
    x = smooth(4)
    report = translation_report(POOLED, x, [1, 4, 8])
    assert verdicts(report) == ["holds", "holds"]
    changes = table(report, "Relative change of the features").rows[1][1:]
    assert list(changes) == pytest.approx(relative_change(POOLED, x, x.roll(4, -1)))
    assert verdicts(translation_report(POOLED, smooth(2), [1])) == ["holds"]  # no shift that the bound speaks of
    assert verdicts(translation_report(lambda x: POOLED(x)[::-1], smooth(2), [2])) == ["does not hold"]
    assert verdicts(translation_report(lambda x: x, smooth(2), [2])) == ["cannot be told at this scale"]
    k = MEYER(64).decay_constant()
    assert translation_bounds(POOLED, 4)[0] == pytest.approx(8 * math.pi * k)
    assert translation_bounds(POOLED, -4)[2] == pytest.approx(2 * math.pi * MEYER(16).decay_constant())


def test_deformations():
    positions = torch.arange(64, dtype=torch.float64)

    def waves(size: float) -> Tensor:
        return size * torch.sin(2 * math.pi * positions / 64)

    report = deformation_report(POOLED, smooth(3), waves, [0.5, 1.0])
    assert verdicts(report) == ["holds"]
    small, large = table(report, "Distances over the norm of the signals").rows
    assert small[1] < small[2] < large[2]
    assert large[1] == pytest.approx(2 * small[1], rel=0.1)
    assert verdicts(deformation_report(lambda x: 3 * x, smooth(3), waves, [0.5])) == ["does not hold"]
    images = torch.rand(2, 8, 8, dtype=torch.float64)
    shears = deformation_report(
        Scattering2D(1, (8, 8), 2), images, lambda size: torch.full((2, 8, 8), size, dtype=torch.float64), [0.1]
    )
    assert len(shears.claims) == 1


def test_deforming_interpolates_exactly():
    for size in (8, 9):
        positions = torch.arange(size, dtype=torch.float64)
        tau = torch.rand(size, dtype=torch.float64)
        wave = torch.cos(2 * math.pi * 3 * positions / size + 0.3)
        moved = torch.cos(2 * math.pi * 3 * (positions - tau) / size + 0.3)
        torch.testing.assert_close(deform(wave, tau), moved)
        torch.testing.assert_close(deform(wave, torch.full_like(tau, 2.0)), wave.roll(2))
        turned = deform(wave, tau, torch.full_like(tau, 0.25))
        torch.testing.assert_close(turned, 1j * moved)
    rows, columns = torch.arange(6.0), torch.arange(7.0)
    image = torch.cos(2 * math.pi * rows / 6)[:, None] * torch.sin(2 * math.pi * 2 * columns / 7)
    tau = torch.rand(2, 6, 7)
    y, x = rows[:, None] - tau[0], columns - tau[1]
    expected = torch.cos(2 * math.pi * y / 6) * torch.sin(2 * math.pi * 2 * x / 7)
    torch.testing.assert_close(deform(image[None], tau)[0], expected)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"tau must be \(N\) or \(2, H, W\) of the size of x, got \(5,\) and \(2, 6\)"):
        deform(torch.zeros(2, 6), torch.zeros(5))
