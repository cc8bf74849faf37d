"""One small trained run that the tests of separation share."""

from __future__ import annotations

from pathlib import Path

import pytest

from convatlas.training.settings import Training


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a causal network that has learned to tell a hum from a whistle."""
    from audio.tones import task, write_speakers

    root = tmp_path_factory.mktemp("separation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVATLAS_PROGRESS", "0")
        own = task(write_speakers(root / "speakers"), model="conv_tasnet_causal")
        report = own.fit(root / "run", Training(**{**own.defaults, "epochs": 7, "lr": 0.015}))
    assert "raises the SI-SNR of 3 mixtures by" in report.summary
    return root / "run"
