"""The experiment on E-3DSNN, at a scale that only shows that it runs."""

from __future__ import annotations

import pytest

from convatlas.experiments import e3dsnn


@pytest.mark.slow
def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(e3dsnn, "SEEDS", (3, 4))
    for name, value in {"TRAIN": 12, "TEST": 6, "POINTS": 80, "GRID": 0.3, "EPOCHS": 1, "BATCH": 6}.items():
        monkeypatch.setattr(e3dsnn, name, value)
    monkeypatch.setattr(e3dsnn, "NETWORK", e3dsnn.NETWORK.override(embed_dim=4, dims=(4, 4), depths=(0, 0)))
    report = e3dsnn.run("quick")
    assert len(report.claims) == 6
    verdicts = [claim.verdict for claim in report.claims]
    assert verdicts[0] == "does not hold"  # after two steps
    assert verdicts[2] == "cannot be told at this scale"
    assert verdicts[-2:] == ["holds", "holds"]
    assert len(report.to_html()) > 10_000


def test_the_relu_twin_has_no_neuron_left_and_the_same_weights():
    spiking, plain = e3dsnn.NETWORK.build(), e3dsnn.NETWORK.build()
    e3dsnn._with_relu(plain)
    assert not any(isinstance(module, e3dsnn.IntegerLIF) for module in plain.modules())
    assert plain.state_dict().keys() == spiking.state_dict().keys()


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget 'full' needs data and folder"):
        e3dsnn.run("full")
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        e3dsnn.run("slow")  # type: ignore[arg-type]
