"""The experiment of NiNformer: it runs, and its verdicts follow from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convatlas.experiments import ninformer
from convatlas.experiments.small_training import Trained
from convatlas.report import Images, Report, Table
from convatlas.training.measure import count_parameters
from convatlas.training.settings import Training

UNKNOWN = "cannot be told at this scale"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The verdicts of given accuracies; ``noise`` is added to every other one of NiNformer."""

    def verdicts(*accuracies: float, noise: float = 0.0) -> list[str]:
        def compare(networks: dict[str, Any], *_: object, seeds: tuple[int, ...], **__: object) -> dict[str, Any]:
            networks["NiNformer"]()
            return {
                name: [Trained(1, accuracy + (noise * (-1) ** seed if not index else 0), [1.0]) for seed in seeds]
                for index, (name, accuracy) in enumerate(zip(networks, accuracies, strict=True))
            }

        monkeypatch.setattr(ninformer, "compare", compare)
        monkeypatch.setattr(ninformer, "_cost_section", lambda: ninformer.Section("Cost", []))
        return [claim.verdict for claim in ninformer.run("quick").claims]

    return verdicts


def test_verdicts_follow_from_the_accuracies(measured: Callable[..., list[str]]) -> None:
    assert measured(95.0, 94.0, 93.0, 92.0) == ["holds"] * 3
    assert measured(95.0, 96.0, 93.0, 97.0) == ["does not hold", "holds", "does not hold"]
    assert measured(95.0, 94.0, 85.0, 94.0, noise=2.0) == [UNKNOWN, "holds", UNKNOWN]
    assert measured(70.0, 60.0, 60.0, 60.0) == [UNKNOWN] * 3


def test_networks_are_of_about_equal_size() -> None:
    wanted = count_parameters(ninformer.NETWORK.build())
    mixer = ninformer.MIXER.override(depth=ninformer.MIXER_DEPTH).build()
    vit = ninformer._ViT(ninformer.NETWORK, ninformer.VIT_DEPTH)
    for other in (mixer, vit):
        assert wanted < count_parameters(other) < 1.15 * wanted
    assert ninformer.MIXER.depth == ninformer.NETWORK.depth


def test_quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(ninformer, "SEEDS", (0, 1))
    monkeypatch.setattr(ninformer, "TRAIN_FRACTION", 0.1)
    monkeypatch.setattr(ninformer, "TRAINING", Training(epochs=2, batch_size=32, lr=1e-3, warmup_epochs=0))
    report = ninformer.run("quick")
    assert [claim.verdict for claim in report.claims] == [UNKNOWN] * 3 + ["holds"]
    assert report.claims[3].values == (4.0,)
    (shown,) = (part for section in report.sections for part in section.parts if isinstance(part, Images))
    assert [pixels.shape for pixels, _ in shown.images] == [(8, 8), (4, 4)] * 4
    assert all(pixels.max() > 200 > pixels.min() for pixels, _ in shown.images)
    assert "Where the gate opens" in report.to_html()


def test_full_trains_both_by_recipe(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    options = {"depth": 1, "dim": 8, "ffn_dim": 8}
    report: Report = ninformer.full(pictures, tmp_path, epochs=1, batch_size=8, options=options, accelerator="cpu")
    assert report.claims[0].verdict == UNKNOWN
    (table,) = (part for section in report.sections for part in section.parts if isinstance(part, Table))
    assert [row[0] for row in table.rows] == ["ninformer_cifar10", "mixer_cifar10"]
    assert (tmp_path / "mixer_cifar10" / "report.html").is_file()


def test_budget_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        ninformer.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs data and folder, got .* and None"):
        ninformer.run("full", data=tmp_path)
