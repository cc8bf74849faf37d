"""The experiment on Conv-TasNet, at a scale that only shows that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from convatlas.data.voices import simulated_mixtures
from convatlas.experiments import conv_tasnet


def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    small = {"num_filters": 12, "bottleneck_channels": 6, "hidden_channels": 8, "skip_channels": 4}
    for name, value in {
        "SEEDS": (5,),
        "TRAINED": 8,
        "TESTED": 4,
        "SECONDS": 0.1,
        "STEPS": 20,
        "BATCH": 2,
        "PIECE": 500,
    }.items():
        monkeypatch.setattr(conv_tasnet, name, value)
    networks = {name: config.override(**small) for name, config in conv_tasnet.NETWORKS.items()}
    monkeypatch.setattr(conv_tasnet, "NETWORKS", networks)
    report = conv_tasnet.run("quick")
    verdicts = [claim.verdict for claim in report.claims]
    # Twenty steps separate nothing and refute nothing; a stream is exact from the first.
    assert verdicts[:2] == ["does not hold", "cannot be told at this scale"]
    assert verdicts[-1] == "holds"
    document = json.loads(report.to_json())
    kinds = [part["kind"] for section in document["sections"] for part in section["parts"]]
    assert {"images", "sounds", "lines", "table"} <= set(kinds)
    assert "ideal binary mask" in report.to_html()


def test_networks_differ_in_what_is_compared_only():
    models = [config.build() for config in conv_tasnet.NETWORKS.values()]
    sizes = {sum(parameter.numel() for parameter in model.parameters()) for model in models}
    assert sizes == {62_769}
    dilations = [[block.depthwise.dilation[0] for block in model.separator.blocks] for model in models]
    assert dilations == [[1, 2, 4, 8] * 2, [1] * 8, [1, 2, 4, 8] * 2]


def test_ideal_masks_are_far_above_the_mixture():
    test = simulated_mixtures(4, seed=2)
    assert all(conv_tasnet._ideal(test, kind) > 5 for kind in conv_tasnet.MASKS.values())


@pytest.mark.slow
def test_full_test_trains_by_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("soundfile")
    from convatlas.data.audio import write_audio

    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(conv_tasnet, "FULL", {"wsj0_2mix_paper": 15.3})
    for split, seed in (("tr", 1), ("cv", 2), ("tt", 3)):
        made = simulated_mixtures(3, seconds=0.3, seed=seed)
        for row in range(3):
            for name, samples in (
                ("mix", made.mixture[row]),
                ("s1", made.sources[row, 0]),
                ("s2", made.sources[row, 1]),
            ):
                write_audio(tmp_path / "data" / split / name / f"{row}.wav", samples / 20, 8000, subtype="FLOAT")
    options = {
        "num_filters": 12, "bottleneck_channels": 6, "hidden_channels": 8, "skip_channels": 4, "num_blocks": 2,
        "num_repeats": 1,
    }  # fmt: skip
    report = conv_tasnet.full(
        tmp_path / "data", tmp_path / "runs", options=options, segment=0.2, epochs=1, batch_size=2
    )
    assert {claim.verdict for claim in report.claims} == {"cannot be told at this scale"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == set(conv_tasnet.FULL)
    assert torch.tensor([claim.values[0] for claim in report.claims]).isfinite().all()


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        conv_tasnet.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        conv_tasnet.run("slow")  # type: ignore[arg-type]
