"""A search for an architecture: takes steps, keeps its state in a file, and ends in something that can be trained."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import yaml

from convatlas.errors import DataError, Interrupted
from convatlas.files import write_text
from convatlas.report import Report
from convatlas.training.run import Run, check_same_settings, from_mapping, to_mapping

__all__ = ["DesignStudy", "Progress", "ignore_signals"]

#: Seconds between two savings of the state.
_SAVE_EVERY = 1.0

State = dict[str, Any]


class Progress(NamedTuple):
    """How far a search is: steps done, steps in all, and the best so far in words."""

    done: float
    total: float
    best: str

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.done >= self.total


class DesignStudy(ABC):
    """A search whose fields are its settings; a concrete one is a dataclass.

    The state is plain data as JSON holds it, and a step depends on nothing else, so that a search that was stopped
    ends like one that was not.
    """

    #: The name on the command line.
    name: ClassVar[str]

    @abstractmethod
    def start(self) -> State:
        """The state before the first step.

        Raises:
            ValueError: the settings leave nothing to search.
        """

    @abstractmethod
    def step(self, state: State) -> State:
        """Go on for about a second, or as long as the smallest piece of work takes."""

    @abstractmethod
    def progress(self, state: State) -> Progress:
        """How far the search is."""

    @abstractmethod
    def report(self, state: State) -> Report:
        """What was found."""

    @abstractmethod
    def score(self, subject: str) -> Report:
        """The scores of one architecture, given as a file or in the method's own notation."""

    @abstractmethod
    def write(self, state: State, folder: Path) -> None:
        """Write what was found so that it can be trained: at least ``train.yaml`` for ``convatlas train``."""

    def workplace(self) -> AbstractContextManager[None]:
        """What the steps need around them, such as processes."""
        return nullcontext()

    def run(self, folder: str | Path | None = None, *, resume: bool = False) -> Report:
        """Search to the end.

        Args:
            folder: where to write ``config.yaml``, ``state.json``, the report and what was found; nothing is written
                if it is left out.
            resume: go on with the search that the folder holds. A finished one gets its report again.

        Raises:
            ValueError: the settings leave nothing to search.
            DataError: ``resume`` is asked of a folder that holds no such search.
            FileExistsError: the folder is not empty and ``resume`` is off.
            Interrupted: the user stopped the search; its state is saved.
            OSError: a file cannot be written; what was written before is whole.
        """
        place = None if folder is None else Path(folder)
        state = self._opened(place, resume)
        saved = time.monotonic()
        hint = f"; go on with 'convatlas design {self.name} --resume {place}'" if place is not None else ""
        with _signals(hint) as told, self.workplace(), _bar() as show:
            while not (progress := self.progress(state)).finished:
                show(progress)
                state = self.step(state)
                number = told()
                if place is not None and (number is not None or time.monotonic() - saved >= _SAVE_EVERY):
                    write_text(place / "state.json", json.dumps(state))
                    saved = time.monotonic()
                if number is not None:
                    raise _interruption(number, hint)
        if place is not None:
            write_text(place / "state.json", json.dumps(state))
            self.write(state, place)
        report = self.report(state)
        if place is not None:
            report.save(place)
        return report

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The search with the settings that a folder holds.

        Raises:
            DataError: the folder holds no such search.
        """
        return from_mapping(cls, cls._settings(Path(folder)))

    @classmethod
    def _settings(cls, folder: Path) -> dict[str, Any]:
        path = folder / "config.yaml"
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{folder} holds no search: it has no config.yaml") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict) or values.pop("design", None) != cls.name:
            raise DataError(f"{folder} holds no search of {cls.name}")
        return values

    def _opened(self, folder: Path | None, resume: bool) -> State:
        if folder is None:
            return self.start()
        if not resume:
            Run(folder).check_unused()
            state = self.start()
            header = f"# convatlas design {self.name} --config config.yaml\n"
            settings = yaml.safe_dump({"design": self.name, **to_mapping(self)}, sort_keys=False, allow_unicode=True)
            write_text(folder / "config.yaml", header + settings)
            write_text(folder / "state.json", json.dumps(state))
            return state
        check_same_settings(to_mapping(self), self._settings(folder))
        for part in folder.glob(".*.part"):  # of a process that was killed while it wrote
            part.unlink(missing_ok=True)
        path = folder / "state.json"
        if not path.is_file():  # stopped before there was anything to keep
            return self.start()
        try:
            kept: State = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        return kept


def ignore_signals() -> None:
    """Begin a process that helps a search: Ctrl-C reaches all of a terminal, and the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _interruption(number: int, hint: str) -> Interrupted:
    return Interrupted(f"stopped by {signal.Signals(number).name}{hint}", 128 + number)


@contextmanager
def _signals(hint: str) -> Iterator[Callable[[], int | None]]:
    """Keep the number of a signal that asks to stop, for the end of the step; a second one does not wait for it."""
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        if caught:
            raise _interruption(number, hint)
        caught.append(number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """A progress bar on standard error."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    hidden = os.environ.get("CONVATLAS_PROGRESS", "1") == "0"
    with Bar(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda progress: bar.update(
            task, completed=progress.done, total=progress.total, description=progress.best
        )
