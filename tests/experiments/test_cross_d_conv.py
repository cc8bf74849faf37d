"""The experiment on Cross-D Conv, at a scale that only shows that it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convatlas.data.transforms import Preprocess
from convatlas.experiments import cross_d_conv


def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"SEEDS": (4,), "SLICES": 12, "EPOCHS": 1, "VOLUMES": (6, 9), "SIDE": 8, "PAIRS": 1}.items():
        monkeypatch.setattr(cross_d_conv, name, value)
    preprocess = Preprocess(size=8, mean=(0.0,), std=(1.0,))
    monkeypatch.setattr(cross_d_conv, "SIZES", {**cross_d_conv.SIZES, "widths": (4, 4), "preprocess": preprocess})
    report = cross_d_conv.run("quick")
    assert len(report.claims) == 3
    assert "torus" in report.to_html()


def test_solids_have_their_shapes():
    points, size = np.array([[0.0, 0, 0], [0.4, 0, 0], [0.39, 0.39, 0.39]]), np.full(3, 0.5)
    assert list(cross_d_conv._inside("ellipsoid", points, size)) == [True, True, False]
    assert list(cross_d_conv._inside("box", points, size)) == [True, False, True]
    assert list(cross_d_conv._inside("torus", points, size)) == [False, True, False]


def test_full_test_runs(monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(pictures, target_is_directory=True)
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("left", "right"):
            (data / "volumes" / split / name).mkdir(parents=True)
            for number in range(3):
                volume = random.normal(size=(9, 16, 16)).astype(np.float32)
                np.save(data / "volumes" / split / name / f"{number}.npy", volume)
    monkeypatch.setattr(cross_d_conv, "NEIGHBOURS", 1)
    options = {"depths": [1], "widths": [4], "stem_width": 4}
    changes = {"epochs": 1, "batch_size": 8, "image_size": 32, "options": options, "accelerator": "cpu"}
    report = cross_d_conv.full(data, tmp_path / "runs", **changes)
    assert {claim.verdict for claim in report.claims} == {"cannot be told at this scale"}


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        cross_d_conv.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        cross_d_conv.run("slow")  # type: ignore[arg-type]
