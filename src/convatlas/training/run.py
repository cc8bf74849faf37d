"""A run is a folder: what was asked, how far it got, what came out."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from convatlas.errors import DataError
from convatlas.files import write_text
from convatlas.training.settings import SettingsError

__all__ = ["Run", "check_same_settings", "from_mapping", "to_mapping"]

T = TypeVar("T")

#: What a process leaves that is killed while it writes a file.
_PARTS = ".*.part"


class Run:
    """The files of one run.

    Attributes:
        folder: where they lie.
        config: ``config.yaml``, the settings; ``convatlas train TASK --config config.yaml`` runs them again.
        last: ``checkpoints/last.ckpt``, everything that ``--resume`` needs.
        best: ``checkpoints/best.safetensors``, the weights of the best epoch with what is needed to use them.
        metrics: ``metrics.csv``, one row an epoch.
        samples: folder of pictures.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = self.folder / "config.yaml"
        self.last = self.folder / "checkpoints" / "last.ckpt"
        self.best = self.folder / "checkpoints" / "best.safetensors"
        self.metrics = self.folder / "metrics.csv"
        self.samples = self.folder / "samples"

    @classmethod
    def create(cls, folder: str | Path, task: str, settings: Mapping[str, Any]) -> Run:
        """Make a new run folder and write its settings.

        Raises:
            FileExistsError: the folder already holds something.
            OSError: the folder cannot be written.
        """
        run = cls(folder)
        run.check_unused()
        run.write_settings(task, settings)
        return run

    def write_settings(self, task: str, settings: Mapping[str, Any]) -> None:
        """Write ``config.yaml``."""
        header = f"# convatlas train {task} --config {self.config.name}\n"
        text = yaml.safe_dump({"task": task, **settings}, sort_keys=False, allow_unicode=True)
        write_text(self.config, header + text)

    def check_unused(self) -> None:
        """Refuse a folder that holds something.

        Raises:
            FileExistsError: it does.
        """
        held = list(self.folder.iterdir()) if self.folder.is_dir() else []
        if (self.folder.exists() and not self.folder.is_dir()) or set(held) - set(self.folder.glob(_PARTS)):
            raise FileExistsError(f"{self.folder} already exists: choose another folder, or go on with it by --resume")

    def withdraw(self) -> None:
        """Take away a run that has nothing but its settings, so that its folder can be used again."""
        if [path for path in self.folder.rglob("*") if not path.is_dir()] == [self.config]:
            with suppress(OSError):
                self.config.unlink()
                for folder in (self.last.parent, self.folder):
                    if folder.is_dir():
                        folder.rmdir()

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Find an existing run.

        Raises:
            DataError: the folder is not a run.
        """
        run = cls(folder)
        if not run.config.is_file():
            what = "has no config.yaml" if run.folder.is_dir() else "does not exist"
            raise DataError(f"{run.folder} is not a run: it {what}")
        for part in run.folder.glob(f"**/{_PARTS}"):
            part.unlink(missing_ok=True)
        return run

    def settings(self) -> dict[str, Any]:
        """The settings in ``config.yaml``, the task's name under ``task``.

        Raises:
            DataError: the file is not valid.
        """
        try:
            values = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{self.config} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict) or "task" not in values:
            raise DataError(f"{self.config} names no task")
        return values

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one row an epoch; columns are the union of the rows' keys in order of appearance."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.metrics, text.getvalue())

    def read_metrics(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv``; empty cells are left out."""
        if not self.metrics.is_file():
            return []
        with self.metrics.open(newline="", encoding="utf-8") as file:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def to_mapping(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass instance as plain data that YAML can hold."""
    return {entry.name: _plain(getattr(settings, entry.name)) for entry in dataclasses.fields(settings) if entry.init}


def check_same_settings(settings: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than a run began with.

    Raises:
        SettingsError: a setting differs.
    """
    for name, value in settings.items():
        if name not in earlier or earlier[name] != value:
            raise SettingsError(
                f"a run goes on with the settings it began with: {name} was {earlier.get(name)}, now it is {value}"
            )


def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass from plain data, checking names and types against its signature.

    Raises:
        SettingsError: a name is unknown (the message offers the nearest ones) or a value has a wrong type.
    """
    from convatlas.training.arguments import SettingsParser

    parser = SettingsParser()
    parser.add_class_arguments(cls)
    parsed = parser.instantiate(parser.parse_object(dict(values)))
    return cls(**vars(parsed))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
