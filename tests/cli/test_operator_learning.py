"""Operator learning from the words of a user to the files they get."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cli.conftest import Run
from convatlas.data.simulators import burgers

WORDS = ["--data", "burgers", "--samples=30", "--resolution=16", "--epochs=2", "--batch_size=8", "--lr=0.01"]
TINY = {"n_modes": 6, "dim": 8, "depth": 2}


def test_train_evaluate_and_predict(run: Run, tmp_path: Path):
    ended = run("train", "operator-learning", *WORDS, "--options", json.dumps(TINY), "--run", "run")
    assert (ended.code, ended.err) == (0, "")
    evaluated = json.loads(run("evaluate", "run", "--json").out)
    (table,) = (part for part in evaluated["sections"][0]["parts"] if part["kind"] == "table")
    assert [row[0] for row in table["rows"]] == ["16", "8", "32"]
    assert all(0 < row[3] < 2 for row in table["rows"])
    fields = burgers(3, 24, 5)
    np.savez("new.npz", x=fields.x)
    assert run("predict", "run", "new.npz", "--out", "out").code == 0
    with np.load(tmp_path / "out" / "new_output.npz") as written:
        assert written["y"].shape == fields.y.shape
        assert np.isfinite(written["y"]).all()


def test_mistakes_are_told_in_one_line(run: Run):
    for words, code, message in (
        ("--model dncnn", 1, "dncnn is not a network that maps fields to fields"),
        ("--data nowhere.npz", 1, "nowhere.npz does not exist"),
        ("--normalise all", 2, "normalise must be one of none, inputs, both"),
    ):
        ended = run("train", "operator-learning", *words.split())
        assert ended.code == code
        assert message in ended.err.replace("\n", " ")
