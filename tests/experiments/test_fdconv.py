"""The experiment of FDConv: its verdicts follow from its numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convatlas.experiments import fdconv
from convatlas.report import Images, Table

UNKNOWN = "cannot be told at this scale"


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(fdconv, "SEEDS", (0, 1))
    monkeypatch.setattr(fdconv, "STEPS", 3)
    monkeypatch.setattr(fdconv, "BATCH", 2)
    monkeypatch.setattr(fdconv, "TEST_IMAGES", 4)
    monkeypatch.setattr(fdconv, "WIDTH", 8)
    report = fdconv.run("quick")
    assert [claim.verdict for claim in report.claims] == [UNKNOWN, UNKNOWN, "holds", "holds", "holds"]
    assert report.claims[4].values == (3_647_120,)
    [table] = [part for part in report.sections[0].parts if isinstance(part, Table)]
    plain, dynamic, frequency = (int(row[1] or 0) for row in table.rows)
    assert dynamic > frequency > plain
    [images] = [part for part in report.sections[0].parts if isinstance(part, Images)]
    assert len(images.images) == 9
    assert all(len(np.unique(pixels)) > 1 for pixels, caption in images.images if caption != "FDConv")
    assert "DY-Conv" in report.to_html()


def test_textures_have_the_frequencies_of_their_class() -> None:
    pictures, labels = fdconv._textures(40, np.random.default_rng(0))
    assert set(labels.unique().tolist()) == {0, 1, 2}
    change = (pictures[..., 1:] - pictures[..., :-1])[:, 0].square()
    rough = [float(change[(labels[..., 1:] == kind) & (labels[..., :-1] == kind)].mean()) for kind in range(3)]
    assert rough[1] > rough[2] > rough[0]


def test_similarity_is_that_of_the_spectra() -> None:
    kernels = torch.randn(2, 4, 4, 3, 3)
    matrix = fdconv._similarity(torch.stack([kernels[0], 2 * kernels[0], kernels[1]]))
    torch.testing.assert_close(matrix.diagonal(), torch.ones(3))
    assert matrix[0, 1] == pytest.approx(1)
    assert matrix[0, 2] < 0.95


def test_only_quick_is_possible() -> None:
    with pytest.raises(ValueError, match="budget must be 'quick', got 'full': the paper's setting is detection"):
        fdconv.run("full")
