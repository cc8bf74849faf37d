"""A search that is stopped, however and wherever, ends like one that was never stopped."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
import yaml

from convatlas.design import study as module
from convatlas.design.study import DesignStudy, Progress
from convatlas.errors import DataError, Interrupted
from convatlas.files import write_text
from convatlas.report import Note, Report, Section
from convatlas.training.settings import SettingsError


@dataclass(kw_only=True, eq=False)
class Walk(DesignStudy):
    """A random walk, whose place is what is searched.

    Attributes:
        steps: how long it is.
        seed: of the steps.
    """

    name: ClassVar[str] = "walk"

    steps: int = 12
    seed: int = 0

    stops: dict[int, list[int]] = field(init=False, default_factory=dict)
    taken: int = field(init=False, default=0)

    def start(self) -> dict[str, Any]:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        return {"places": [0.0]}

    def step(self, state: dict[str, Any]) -> dict[str, Any]:
        self.taken += 1
        for number in self.stops.get(self.taken, []):
            os.kill(os.getpid(), number)
        places = state["places"]
        return {"places": [*places, places[-1] + Random(self.seed + len(places)).random()]}

    def progress(self, state: dict[str, Any]) -> Progress:
        return Progress(len(state["places"]) - 1, self.steps, f"at {state['places'][-1]:.2f}")

    def report(self, state: dict[str, Any]) -> Report:
        return Report("A walk", f"It ends at {state['places'][-1]!r}.", [Section("Walk", [Note("It is over.")])])

    def score(self, subject: str) -> Report:
        return Report("A place", subject, [])

    def write(self, state: dict[str, Any], folder: Path) -> None:
        write_text(folder / "train.yaml", yaml.safe_dump({"image_size": len(state["places"])}))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    # Where the tests run in the background of a shell, Ctrl-C is ignored.
    monkeypatch.setattr(module, "_SAVE_EVERY", 0.0)


def test_a_search_writes_its_folder(tmp_path: Path):
    report = Walk(steps=3).run(tmp_path / "walk")
    files = {path.name for path in (tmp_path / "walk").iterdir()}
    assert files == {"config.yaml", "state.json", "train.yaml", "report.html", "report.json"}
    settings = yaml.safe_load((tmp_path / "walk" / "config.yaml").read_text())
    assert settings == {"design": "walk", "steps": 3, "seed": 0}
    assert json.loads((tmp_path / "walk" / "report.json").read_text())["summary"] == report.summary
    assert yaml.safe_load((tmp_path / "walk" / "train.yaml").read_text()) == {"image_size": 4}
    assert Walk(steps=3).run().summary == report.summary  # nothing is written without a folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_step(number: int, tmp_path: Path):
    whole = Walk().run()
    folder = tmp_path / "walk"
    walk = Walk()
    walk.stops = {4: [number]}
    how = f"stopped by {signal.Signals(number).name}; go on with 'convatlas design walk --resume {folder}'"
    with pytest.raises(Interrupted, match=how) as stopped:
        walk.run(folder)
    assert stopped.value.exit_code == 128 + number
    assert len(json.loads((folder / "state.json").read_text())["places"]) == 5
    assert Walk.open(folder).run(folder, resume=True).summary == whole.summary
    assert signal.getsignal(number) is not signal.SIG_IGN


def test_a_second_signal_does_not_wait(tmp_path: Path):
    walk = Walk()
    walk.stops = {4: [signal.SIGINT, signal.SIGINT]}
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        walk.run(tmp_path / "walk")
    assert len(json.loads((tmp_path / "walk" / "state.json").read_text())["places"]) == 4


@pytest.mark.slow
def test_a_kill_at_any_step(tmp_path: Path):
    whole, folder = Walk().run(), tmp_path / "walk"
    for first, at in ((True, 1), (False, 3), (False, 2), (False, 6)):
        child = os.fork()
        if child == 0:
            walk = Walk() if first else Walk.open(folder)
            walk.stops = {at: [signal.SIGKILL]}
            walk.run(folder, resume=not first)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (folder / ".state.json.x.part").write_text("half")
    assert Walk.open(folder).run(folder, resume=True).summary == whole.summary
    assert not list(folder.glob(".*.part"))


def test_a_search_that_is_over_reports_again(tmp_path: Path):
    first = Walk().run(tmp_path / "walk")
    again = Walk()
    assert again.run(tmp_path / "walk", resume=True).summary == first.summary
    assert again.taken == 0


def test_a_folder_that_holds_something_is_refused(tmp_path: Path):
    Walk(steps=1).run(tmp_path / "walk")
    with pytest.raises(FileExistsError, match="already exists"):
        Walk(steps=1).run(tmp_path / "walk")
    with pytest.raises(SettingsError, match="steps was 1, now it is 2"):
        Walk(steps=2).run(tmp_path / "walk", resume=True)


def test_settings_that_leave_nothing_to_search_leave_no_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Walk(steps=0).run(tmp_path / "walk")
    assert not (tmp_path / "walk").exists()


def test_other_folders_cannot_be_resumed(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no search: it has no config\.yaml"):
        Walk.open(tmp_path)
    (tmp_path / "config.yaml").write_text("task: recognition\n")
    with pytest.raises(DataError, match="holds no search of walk"):
        Walk.open(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(DataError, match="is not valid YAML"):
        Walk.open(tmp_path)
    Walk(steps=1).run(tmp_path / "walk")
    (tmp_path / "walk" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json cannot be read"):
        Walk(steps=1).run(tmp_path / "walk", resume=True)
    (tmp_path / "walk" / "state.json").unlink()
    assert Walk(steps=1).run(tmp_path / "walk", resume=True).summary == Walk(steps=1).run().summary
