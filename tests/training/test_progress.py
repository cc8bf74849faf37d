"""A bar counts the steps, and stays away where it is not wanted."""

from __future__ import annotations

import pytest

from convatlas.training.progress import progress


@pytest.mark.parametrize("total", [3, 0, None])
def test_it_is_silent_where_nobody_looks(total: int | None, capfd: pytest.CaptureFixture[str]):
    with progress("working", total) as advance:
        for _ in range(3):
            advance()
    assert capfd.readouterr() == ("", "")


def test_it_shows_what_is_done(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("CONVATLAS_PROGRESS", raising=False)
    with progress("working", 2) as advance:
        advance()
        advance("resting")
    out, err = capfd.readouterr()
    assert out == ""
    assert "working" in err
    assert "resting" in err
    assert "2/2" in err
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    with progress("working", 2) as advance:
        advance()
    assert capfd.readouterr().err == ""
