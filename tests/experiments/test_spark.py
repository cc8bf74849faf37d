"""The experiment of SparK: the mask's pattern is counted, the rest runs at a tiny scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from convatlas.experiments import spark
from convatlas.networks.registry import create_model
from convatlas.report import Images, Table
from convatlas.training.settings import Training


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    small = {"depths": (1, 1, 1, 1), "widths": (32, 32, 32, 32), "stem_width": 8}
    monkeypatch.setattr(spark, "create_model", lambda name, **options: create_model(name, **options, **small))
    monkeypatch.setattr(spark, "SEEDS", (0, 1))
    monkeypatch.setattr(spark, "UNLABELLED", 120)
    monkeypatch.setattr(spark, "LABELS", 20)
    monkeypatch.setattr(spark, "NETWORK", spark.NETWORK.override(widths=(8, 8, 8), stem_width=8))
    monkeypatch.setattr(spark, "DECODER_WIDTH", 8)
    monkeypatch.setattr(spark, "PRETRAINING", Training(epochs=2, batch_size=60, warmup_epochs=0))
    monkeypatch.setattr(spark, "TRAINING", Training(epochs=1, batch_size=20, warmup_epochs=0))
    report = spark.run("quick")
    keeps, vanishes, gains, told = report.claims
    assert (keeps.verdict, vanishes.verdict) == ("holds", "holds")
    assert gains.verdict == "cannot be told at this scale"
    assert len(gains.values) == 2
    assert told.verdict == "does not hold"
    parts = [part for section in report.sections for part in section.parts]
    pictures = next(part for part in parts if isinstance(part, Images))
    assert len(pictures.images) == 6
    assert all(pixels.std() > 0 for pixels, _ in pictures.images)
    assert any(isinstance(part, Table) and part.rows[1][1] == part.rows[1][-1] for part in parts)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget"):
        spark.run("half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs data and folder"):
        spark.run("full")


def test_full_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    options = {"depths": [1, 1, 1, 1], "widths": [4, 4, 4, 4], "stem_width": 4}
    short = {"options": options, "epochs": 1, "warmup_epochs": 0, "batch_size": 16, "accumulate": 1, "image_size": 64}
    methods = {"methods": {"spark": {"decoder_width": 32}}}
    split = spark.split_settings
    monkeypatch.setattr(
        spark, "split_settings", lambda cls, values: split(cls, {**values, **methods, "val_fraction": 0.98})
    )
    tuned = spark.train_by_recipe
    monkeypatch.setattr(
        spark, "train_by_recipe", lambda *words, **settings: tuned(*words, **settings, val_fraction=0.9)
    )
    report = spark.full("digits", tmp_path, **short)
    assert report.claims[0].verdict == "cannot be told at this scale"
    assert (tmp_path / "pretraining" / "report.html").is_file()
