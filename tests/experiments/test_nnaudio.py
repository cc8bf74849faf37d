"""The experiment of the spectrogram layers: its parts run in small, its verdicts follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from convatlas.data.audio import write_audio
from convatlas.experiments import nnaudio
from convatlas.report import Table


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    for name, value in {"SEEDS": (0, 1), "CLIPS": 1, "SECONDS": 1.5, "STEPS": 2, "TESTED": 20}.items():
        monkeypatch.setattr(nnaudio, name, value)


def test_quick_runs() -> None:
    report = nnaudio.run("quick")
    verdicts = [claim.verdict for claim in report.claims]
    # Two steps are too few to learn anything.
    assert verdicts[0] == verdicts[1] == "holds"
    assert verdicts[3] == "cannot be told at this scale"
    assert "Mel spectrogram of one clip" in report.to_html()


def test_music_has_sound_in_every_clip() -> None:
    clips = nnaudio._music(2, 0.5, 8000)
    assert clips.shape == (2, 4000)
    assert float(clips.abs().amax(1).min()) == pytest.approx(1)
    assert not clips[0].equal(clips[1])


def test_full_times_recordings(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    for index, clip in enumerate(nnaudio._music(2, 1.2, 8000)):
        write_audio(tmp_path / f"{index}.wav", clip.numpy(), 8000)
    report = nnaudio.run("full", data=tmp_path)
    tables = [part for section in report.sections for part in section.parts if isinstance(part, Table)]
    assert [row[0] for row in tables[-1].rows] == ["STFT", "Mel", "CQT1992v2", "CQT2010v2", "convolution"]
    assert report.claims[-1].statement.startswith("The STFT with fixed kernels")


def test_budget_is_checked() -> None:
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        nnaudio.run("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget 'full' needs data, got None"):
        nnaudio.run("full")
