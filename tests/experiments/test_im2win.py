"""The experiment on im2win, at a scale that only shows that it runs."""

from __future__ import annotations

import pytest

from convatlas.experiments import im2win


def test_quick_test_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(im2win, "QUICK", ("Conv9", "Conv12"))
    monkeypatch.setattr(im2win, "PAIRS", 1)
    report = im2win.run("quick")
    memory, scratch, _, same = report.claims
    assert (memory.verdict, scratch.verdict, same.verdict) == ("holds",) * 3
    assert memory.values[0] == pytest.approx((2.89 / 8.37 + 2.14 / 4.59) / 2, rel=1e-2)
    assert "Conv12" in report.to_html()


def test_budgets_are_checked():
    with pytest.raises(ValueError, match="budget must be 'quick' or 'full', got 'slow'"):
        im2win.run("slow")  # type: ignore[arg-type]
