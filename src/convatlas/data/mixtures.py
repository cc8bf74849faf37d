"""Material for learning to separate sounds, in the forms that people have it.

Folders of recordings by speaker, folders of mixtures and their sources (WSJ0-2mix, WHAM), and tables of LibriMix.
"""

from __future__ import annotations

import csv
import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from convatlas.data.audio import find_audio, is_audio_name, read_audio
from convatlas.data.images import Skipped
from convatlas.data.mixing_voices import Given, Mixtures, Recording, Scenario, Sound, Voices
from convatlas.errors import DataError

__all__ = ["Reading", "divide_mixtures", "divide_voices", "mixtures_digest", "read_mixtures"]

T = TypeVar("T")

_SPLITS = {
    "train": re.compile(r"(train|tr)([-_.].*)?", re.IGNORECASE),
    "val": re.compile(r"(val|valid|validation|dev|cv)([-_.].*)?", re.IGNORECASE),
    "test": re.compile(r"(test|tt)([-_.].*)?", re.IGNORECASE),
}
#: Folders of what is heard, by scenario; the first that exists is taken.
_HEARD: dict[str, tuple[str, ...]] = {
    "sep_clean": ("mix_clean", "mix", "mixture"),
    "sep_noisy": ("mix_both", "mix", "mixture", "noisy"),
    "enh_single": ("mix_single", "mix", "mixture", "noisy"),
    "enh_both": ("mix_both", "mix", "mixture", "noisy"),
}
_TABLE = re.compile(r"mixture_(?P<part>.+)_(?P<heard>mix_clean|mix_both|mix_single)\.csv")
_NUMBERED = re.compile(r"(?:s|source_?)(\d)", re.IGNORECASE)
_EXPECTED = (
    "expected a folder with a folder of recordings for each speaker, folders mix, s1, s2, ... or train, val and test "
    "of one of these; or the tables of LibriMix (mixture_*.csv)"
)


@dataclass(kw_only=True)
class Reading:
    """How files are read.

    Attributes:
        sample_rate: that everything is brought to, in Hz.
        scenario: what is heard and to be found.
        resample: whether files of another rate are resampled; they are an error otherwise.
        sources: names of the folders of the sources, where they are not s1, s2, ...
        part: which folder or table to train on, where there are several, e.g. ``train-360``.
        to_train: whether parts to train on are wanted; otherwise they are left out where there are others.

    Raises:
        ValueError: there is no such scenario, or the rate is not positive.
    """

    sample_rate: int = 8000
    scenario: Scenario = "sep_clean"
    resample: bool = True
    sources: tuple[str, ...] = ()
    part: str | None = None
    to_train: bool = True
    _rates: Counter[int] = field(default_factory=Counter, init=False, repr=False)
    _mixed_down: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.scenario not in _HEARD:
            raise ValueError(f"scenario must be one of {', '.join(_HEARD)}, got {self.scenario!r}")
        if self.sample_rate < 1:
            raise ValueError(f"sample_rate must be positive, got {self.sample_rate}")

    def recording(self, path: Path, name: str) -> Recording:
        """One file, whose header is looked at.

        Raises:
            DataError: it cannot be read, or has another sample rate and must not.
        """
        audio = read_audio(path, sample_rate=self.sample_rate)
        if audio.file_rate != self.sample_rate and not self.resample:
            raise _WrongRate(
                f"{path} is {audio.file_rate} Hz, the model expects {self.sample_rate} Hz; resample it, or allow it by "
                "the setting resample"
            )
        self._rates[audio.file_rate] += 1
        self._mixed_down += audio.channels > 1
        return Recording(name, audio)

    def recordings(self, paths: Iterable[Path], root: Path) -> tuple[tuple[Recording, ...], list[Skipped]]:
        """Those files that can be read, and the others with the reasons."""
        found, skipped = [], []
        for path in paths:
            name = path.relative_to(root).as_posix()
            try:
                found.append(self.recording(path, name))
            except _WrongRate:
                raise
            except DataError as error:
                skipped.append(Skipped(name, _reason(error, path)))
        return tuple(found), skipped

    def notes(self) -> tuple[str, ...]:
        """What is done to the files, in sentences."""
        told = []
        count = sum(self._rates.values())
        for rate, files in sorted(self._rates.items()):
            if rate != self.sample_rate:
                told.append(
                    f"{files} of {count} files are {rate} Hz, the model expects {self.sample_rate} Hz: resampled"
                )
        if self._mixed_down:
            told.append(f"{self._mixed_down} of {count} files have several channels: their mean is taken")
        return tuple(told)


class _WrongRate(DataError):
    """Not to be left out in silence."""


def read_mixtures(source: str | Path, reading: Reading) -> dict[str, Voices | Mixtures]:
    """Find the sounds of a source, as sets by split: {"all": ...} or e.g. {"train": ..., "val": ..., "test": ...}.

    Sources:
        a folder with one folder a speaker, whose recordings lie at any depth in it;
        a folder with ``mix`` (``mix_clean``, ``mix_both``, ``mix_single`` for WHAM's scenarios) and ``s1``, ``s2``,
        ... (or ``reading.sources``), with files of the same names in each;
        a folder with ``train``, ``val`` and ``test`` (``tr``, ``cv`` and ``tt``; ``dev``) of one of these, or with
        ``wav8k/min`` around them;
        a table ``mixture_*.csv`` of LibriMix or a folder of them: mixture_ID, mixture_path, source_1_path, ...,
        noise_path. Paths that do not exist are looked for beside the table.

    Files that are no audio, damaged or empty are left out. Samples are not read yet.

    Args:
        source: folder or table.
        reading: rate and scenario; it remembers what was done for `Reading.notes`.

    Raises:
        DataError: there is nothing at ``source``, or nothing that can be used.
    """
    root = Path(source)
    try:
        if not root.exists():
            raise DataError(f"{source} does not exist; {_EXPECTED}")
        if root.is_file():
            if root.suffix.lower() != ".csv":
                raise DataError(f"{source} is a single file; {_EXPECTED}")
            return {"all": _of_table(root, reading)}
        root = _inside(root, reading.sample_rate)
        tables = sorted(path for depth in ("", "*/", "*/*/") for path in root.glob(f"{depth}mixture_*.csv"))
        if tables:
            return _of_tables(tables, root, reading)
        folders = _subfolders(root)
        parts = _chosen({folder.name: folder for folder in folders}, reading)
        splits = {_split_of(folder.name) for folder in folders}
        if parts and ("train" in splits or None not in splits):
            return {split: _of_folder(folder, reading) for split, folder in parts.items()}
        return {"all": _of_folder(root, reading)}
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read: {error.strerror or error}") from None


# -- folders -----------------------------------------------------------------------------------------------------------


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _inside(root: Path, rate: int) -> Path:
    """Within the folders of rates and lengths that WSJ0-mix, WHAM and LibriMix have."""
    for name in (f"wav{rate // 1000}k", "min"):
        root = root / name if (root / name).is_dir() else root
    return root


def _split_of(name: str) -> str | None:
    return next((split for split, pattern in _SPLITS.items() if pattern.fullmatch(name)), None)


def _chosen(named: Mapping[str, Path], reading: Reading) -> dict[str, Path]:
    """Folders or tables by split; of several for training, the one that was asked for."""
    found: dict[str, Path] = {}
    for split in _SPLITS:
        fitting = {name: path for name, path in named.items() if _split_of(name) == split}
        if split == "train" and not reading.to_train and len(named) > len(fitting):
            continue
        if split == "train" and reading.part is not None and fitting:
            if reading.part not in fitting:
                raise DataError(f"part must be one of {', '.join(fitting)}, got {reading.part}")
            fitting = {reading.part: fitting[reading.part]}
        if len(fitting) > 1 and split == "train":
            raise DataError(
                f"there are several parts to train on, {', '.join(fitting)}: choose one by the setting part"
            )
        if fitting:
            found[split] = next(iter(fitting.values()))
    return found


def _of_folder(folder: Path, reading: Reading) -> Voices | Mixtures:
    names = {path.name: path for path in _subfolders(folder)}
    heard = next((names[name] for name in _HEARD[reading.scenario] if name in names), None)
    if heard is not None:
        return _given(folder, heard, names, reading)
    for others in _HEARD.values():
        for name in others:
            if name in names and any(_NUMBERED.fullmatch(other) for other in names):
                raise DataError(
                    f"{folder} has {name}, but the scenario {reading.scenario} needs {_HEARD[reading.scenario][0]}"
                )
    return _voices(folder, names, reading)


def _given(folder: Path, heard: Path, names: Mapping[str, Path], reading: Reading) -> Mixtures:
    if reading.sources:
        missing = [name for name in reading.sources if name not in names]
        if missing:
            raise DataError(f"{folder} has no folder {missing[0]}; it has {', '.join(names)}")
        folders = [names[name] for name in reading.sources]
    elif reading.scenario == "enh_both" and "mix_clean" in names:
        folders = [names["mix_clean"]]
    else:
        folders = [path for name, path in names.items() if _NUMBERED.fullmatch(name)]
        folders = folders[:1] if reading.scenario == "enh_single" else folders
        if not folders and "clean" in names:
            folders = [names["clean"]]
    if not folders:
        raise DataError(f"{folder} has {heard.name} but no s1, s2, ...; name the folders by the setting sources")
    entries, skipped = [], []
    for path in find_audio(heard):
        inner = path.relative_to(heard)
        name = inner.with_suffix("").as_posix()
        try:
            parts = tuple(reading.recording(other / inner, f"{other.name}/{inner.as_posix()}") for other in folders)
            entry = Given(name, parts, reading.recording(path, f"{heard.name}/{inner.as_posix()}"))
            entries.append(_checked(entry))
        except _WrongRate:
            raise
        except DataError as error:
            skipped.append(Skipped(f"{heard.name}/{inner.as_posix()}", _reason(error, path)))
    return _usable(Mixtures(tuple(entries), tuple(skipped)), heard)


def _checked(entry: Given) -> Given:
    """The entry, if all of its files are of one length."""
    others = (*entry.parts[1:], *(each for each in (entry.mixture, entry.noise) if each is not None))
    for other in others:
        if other.samples != entry.samples:
            raise DataError(
                f"lengths differ: {entry.parts[0].name} has {entry.samples} samples, {other.name} has {other.samples}"
            )
    return entry


def _usable(mixtures: Mixtures, where: Path) -> Mixtures:
    if not mixtures.entries:
        first = mixtures.skipped[0] if mixtures.skipped else Skipped(str(where), "it is empty")
        raise DataError(f"none of the mixtures of {where} can be used; first: {first.path}: {first.reason}")
    return mixtures


def _voices(folder: Path, names: Mapping[str, Path], reading: Reading) -> Voices:
    speakers: dict[str, Sequence[Sound]] = {}
    skipped: list[Skipped] = []
    for name, path in names.items():
        files = sorted(each for each in path.rglob("*") if is_audio_name(each) and each.is_file())
        recordings, left_out = reading.recordings(files, folder)
        skipped += left_out
        if recordings:
            speakers[name] = recordings
    if not speakers:
        loose = any(is_audio_name(path) for path in folder.iterdir())
        what = "has recordings, but no folder for each speaker" if loose else "has no recordings"
        first = f"; first: {skipped[0].path}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"{folder} {what}{first}; {_EXPECTED}")
    return Voices(speakers, tuple(skipped))


# -- tables ------------------------------------------------------------------------------------------------------------


def _of_tables(tables: Sequence[Path], root: Path, reading: Reading) -> dict[str, Voices | Mixtures]:
    wanted = {"sep_clean": "mix_clean", "enh_single": "mix_single"}.get(reading.scenario, "mix_both")
    by_part: dict[str, Path] = {}
    for table in tables:
        match = _TABLE.fullmatch(table.name)
        if match is not None and match["heard"] == wanted:
            by_part.setdefault(match["part"], table)
    if not by_part:
        raise DataError(f"{root} has no table mixture_*_{wanted}.csv, which the scenario {reading.scenario} needs")
    found = _chosen(by_part, reading)
    if "train" in found or (found and not reading.to_train):
        return {split: _of_table(table, reading) for split, table in found.items()}
    if len(by_part) > 1:
        raise DataError(f"{root} has no table of a training part, only {', '.join(by_part)}")
    return {"all": _of_table(next(iter(by_part.values())), reading)}


def _of_table(table: Path, reading: Reading) -> Mixtures:
    rows = _rows(table)
    columns = sorted(name for name in rows[0] if re.fullmatch(r"source_\d+_path", name))
    clean: dict[str, str] = {}
    if reading.scenario == "enh_both":
        match = _TABLE.fullmatch(table.name)
        beside = table.with_name(f"mixture_{match['part']}_mix_clean.csv") if match else table
        if not match or not beside.is_file():
            raise DataError(f"{table}: the scenario enh_both needs the table {beside.name} beside it")
        clean = {row["mixture_ID"]: row["mixture_path"] for row in _rows(beside)}
    elif not columns:
        raise DataError(f"{table} must have columns mixture_path and source_1_path, ..., got {', '.join(rows[0])}")
    columns = columns[:1] if reading.scenario == "enh_single" else columns
    finder = _Finder(table)
    entries, skipped = [], []
    for number, row in enumerate(rows, 2):
        name = row.get("mixture_ID") or f"line {number}"
        try:

            def opened(text: str | None, label: str) -> Recording:
                if not text:
                    raise DataError(f"{label} is empty")
                return reading.recording(finder.find(text), Path(text).name)

            if clean:
                parts: tuple[Recording, ...] = (opened(clean.get(name), "the mixture without noise"),)
            else:
                parts = tuple(opened(row[column], column) for column in columns)
            heard = row.get("mixture_path")
            noise = opened(row["noise_path"], "noise_path") if not heard and row.get("noise_path") else None
            entries.append(_checked(Given(name, parts, opened(heard, "mixture_path") if heard else None, noise)))
        except _WrongRate:
            raise
        except DataError as error:
            skipped.append(Skipped(f"{table.name}: {name}", str(error)))
    return _usable(Mixtures(tuple(entries), tuple(skipped)), table)


def _rows(table: Path) -> list[dict[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.DictReader(file) if any(row.values())]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} is no table of text: {error}") from None
    if not rows:
        raise DataError(f"{table} has no rows")
    return rows


class _Finder:
    """Finds files that a table names by paths of another machine."""

    def __init__(self, table: Path) -> None:
        self.bases = [table.parent, *list(table.parent.parents)[:4]]
        self.known: tuple[Path, int] | None = None

    def find(self, text: str) -> Path:
        path = Path(text)
        if path.is_absolute() and path.is_file():
            return path
        parts = path.parts[1:] if path.is_absolute() else path.parts
        if self.known is not None:
            base, drop = self.known
            if (base.joinpath(*parts[drop:])).is_file():
                return base.joinpath(*parts[drop:])
        for drop in range(len(parts)):
            for base in self.bases:
                if base.joinpath(*parts[drop:]).is_file():
                    self.known = (base, drop)
                    return base.joinpath(*parts[drop:])
        raise DataError(f"{text} does not exist, nor is it found beside the table")


def _reason(error: DataError, path: Path) -> str:
    return str(error).removeprefix(f"{path} cannot be read: ").removeprefix(f"{path} ")


# -- splits ------------------------------------------------------------------------------------------------------------


def divide_mixtures(mixtures: Mixtures, fractions: Mapping[str, float], seed: int) -> dict[str, Mixtures]:
    """Split at random; what is not held out is "train".

    Raises:
        DataError: there are fewer mixtures than parts.
    """
    parts = _divided(list(range(len(mixtures))), fractions, seed, "mixtures")
    return {name: mixtures.subset(sorted(rows)) for name, rows in parts.items()}


def divide_voices(
    voices: Voices, fractions: Mapping[str, float], seed: int, *, by: Literal["recordings", "speakers"]
) -> dict[str, Voices]:
    """Split at random: the recordings of every speaker, or the speakers.

    A speaker with fewer recordings than there are parts is only trained on.

    Raises:
        DataError: there are fewer speakers than parts.
        ValueError: ``by`` is something else.
    """
    if by == "speakers":
        parts = _divided(sorted(voices.speakers), fractions, seed, "speakers")
        split = {name: {speaker: voices.speakers[speaker] for speaker in sorted(part)} for name, part in parts.items()}
    elif by == "recordings":
        split = {name: {} for name in ("train", *fractions) if name == "train" or name in fractions}
        for speaker, sounds in sorted(voices.speakers.items()):
            if len(sounds) <= len(fractions):
                split["train"][speaker] = sounds
                continue
            rows = _divided(list(range(len(sounds))), fractions, seed, "recordings")
            for name, part in rows.items():
                split[name][speaker] = [sounds[row] for row in sorted(part)]
    else:
        raise ValueError(f"by must be recordings or speakers, got {by!r}")
    return {name: Voices(speakers, voices.skipped) for name, speakers in split.items()}


def _divided(items: list[T], fractions: Mapping[str, float], seed: int, what: str) -> dict[str, list[T]]:
    held_out = {name: share for name, share in fractions.items() if name != "train"}
    if len(items) <= len(held_out):
        raise DataError(f"there must be at least {len(held_out) + 1} {what} to split, got {len(items)}")
    random.Random(seed).shuffle(items)
    parts: dict[str, list[T]] = {}
    for left, (name, share) in zip(range(len(held_out), 0, -1), held_out.items(), strict=True):
        total = sum(map(len, parts.values())) + len(items)
        count = min(max(1, round(share * total)), len(items) - left)
        parts[name], items = items[:count], items[count:]
    return {"train": items, **parts}


def mixtures_digest(splits: Mapping[str, Voices | Mixtures]) -> str:
    """A short text that tells whether sounds were split in the same way."""
    digest = hashlib.sha256()
    for split, sounds in splits.items():
        digest.update(f"{split} {len(sounds)}\n".encode())
        digest.update("".join(f"{name}\n" for name in sounds.names).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
