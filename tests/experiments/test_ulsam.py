"""The experiment of ULSAM: its verdicts follow from its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from convatlas.experiments import ulsam
from convatlas.experiments.small_training import Trained
from convatlas.report import Images, Section, Table
from convatlas.training.settings import Training

UNKNOWN = "cannot be told at this scale"


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(ulsam, "SEEDS", (0, 1))
    monkeypatch.setattr(ulsam, "NETWORK", ulsam.NETWORK.override(head_width=16))
    monkeypatch.setattr(ulsam, "TRAINING", Training(epochs=1, batch_size=32, lr=3e-3))
    monkeypatch.setattr(ulsam, "TRAIN_FRACTION", 0.05)
    monkeypatch.setattr(ulsam, "ALSO_COUNTED", ())
    report = ulsam.run("quick")
    verdicts = [claim.verdict for claim in report.claims]
    assert verdicts == [UNKNOWN] * 3 + ["holds"] * 3
    networks = next(part for part in report.sections[1].parts if isinstance(part, Table))
    shares = {str(row[0]): (float(row[2] or 0), float(row[4] or 0)) for row in networks.rows}
    assert shares["mobilenet_v2_ulsam"] == pytest.approx((12.47, 12.35), abs=0.1)
    assert shares["mobilenet_v2_ulsam_13_14_16_17"] == pytest.approx((24.93, 24.7), abs=0.1)
    [images] = [part for part in report.sections[0].parts if isinstance(part, Images)]
    assert [caption for _, caption in images.images][:5] == ["digit", "group 1", "group 2", "group 3", "group 4"]
    assert len(images.images) == 4 * 5
    assert "ULSAM, g = 4" in report.to_html()


@pytest.mark.parametrize(
    ("accuracies", "verdicts"),
    [
        ((95.0, 95.0, 96.0, 93.0), ["holds", "holds", "holds"]),
        ((95.0, 93.9, 94.1, 96.0), ["does not hold", "holds", "does not hold"]),
        ((89.0, 89.0, 89.0, 80.0), [UNKNOWN] * 3),
    ],
)
def test_verdicts_follow_the_accuracies(
    accuracies: tuple[float, ...], verdicts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(networks: dict[str, Any], *_: object, seeds: tuple[int, ...], change: Any, **__: object) -> Any:
        networks["ULSAM, g = 4"]()
        for seed in (0, 1):
            change(torch.rand(5, 1, 32, 32), seed)
        parameters = (100, 70, 70, 60)
        return {
            name: [Trained(count, accuracy + 0.01 * seed, [1.0]) for seed in seeds]
            for name, count, accuracy in zip(networks, parameters, accuracies, strict=True)
        }

    monkeypatch.setattr(ulsam, "compare", compare)
    monkeypatch.setattr(ulsam, "_cost_section", lambda: Section("Cost", []))
    report = ulsam.run("quick")
    assert [claim.verdict for claim in report.claims][:3] == verdicts
    assert report.claims[3].values == pytest.approx([70])


def test_full_trains_by_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    report = ulsam.full(
        pictures, tmp_path, epochs=1, batch_size=8, image_size=32, options={"width_mult": 0.1}, accelerator="cpu"
    )
    assert [claim.verdict for claim in report.claims] == [UNKNOWN]
    [table] = [part for part in report.sections[0].parts if isinstance(part, Table) and part.title == "Trained here"]
    assert [(row[0], row[3]) for row in table.rows] == [("mobilenet_v2_ulsam", None), ("mobilenet_v2", None)]
    for model in ulsam.TOP1:
        assert (tmp_path / model / "config.yaml").is_file()


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        ulsam.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        ulsam.run("full", data=tmp_path)
