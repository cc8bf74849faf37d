"""The run folder: made once, opened again, its settings and metrics read back as they were written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from convatlas.errors import DataError
from convatlas.training.run import Run, check_same_settings, from_mapping, to_mapping
from convatlas.training.settings import SettingsError, Training


@dataclass(frozen=True)
class Inner:
    size: int | tuple[int, int] = 3
    scale: tuple[float, float] = (0.1, 1.0)


@dataclass(frozen=True, kw_only=True)
class Outer:
    data: str = "x"
    colour: Literal["red", "blue"] = "red"
    inner: Inner = field(default_factory=Inner)
    options: dict[str, Any] = field(default_factory=dict)
    limit: float | None = None
    derived: int = field(init=False, default=7)


SETTINGS = Outer(
    data="photos: ünï #1",
    colour="blue",
    inner=Inner(size=(4, 5), scale=(0.25, 0.5)),
    options={"depths": [1, 2], "deep": {"a": None}},
    limit=1e-7,
)


def test_settings_survive_the_file(tmp_path: Path):
    run = Run.create(tmp_path / "run", "toy", to_mapping(SETTINGS))
    values = Run.open(tmp_path / "run").settings()
    assert values.pop("task") == "toy"
    assert from_mapping(Outer, values) == SETTINGS
    assert "derived" not in values
    assert run.config.read_text().startswith("# convatlas train toy --config config.yaml\n")


def test_training_settings_survive_the_file(tmp_path: Path):
    training = Training(epochs=3, lr=3e-5, ema=0.999, clip=None, precision="bf16", devices=2, warmup_epochs=0.5)
    run = Run.create(tmp_path, "toy", to_mapping(training))
    values = {key: value for key, value in run.settings().items() if key != "task"}
    assert from_mapping(Training, values) == training


def test_a_used_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note").write_text("mine")
    for used in ("file", "folder"):
        with pytest.raises(FileExistsError, match=f"{used} already exists: choose another folder, or .* --resume"):
            Run.create(tmp_path / used, "toy", {})
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["note"]


def test_an_empty_folder_and_one_with_half_a_file_can_be_used(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert Run.create(tmp_path / "empty", "toy", {}).settings() == {"task": "toy"}
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".config.yaml.x1.part").write_text("task")
    assert Run.create(tmp_path / "killed", "toy", {}).settings() == {"task": "toy"}


def test_what_is_no_run_is_not_opened(tmp_path: Path):
    with pytest.raises(DataError, match="nothing is not a run: it does not exist"):
        Run.open(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"is not a run: it has no config\.yaml"):
        Run.open(tmp_path)


def test_opening_clears_half_written_files_and_nothing_else(tmp_path: Path):
    run = Run.create(tmp_path, "toy", {})
    half = tmp_path / "checkpoints" / ".last.ckpt.abc.part"
    half.parent.mkdir()
    half.write_bytes(b"half")
    run.last.write_bytes(b"whole")
    Run.open(tmp_path)
    assert not half.exists()
    assert run.last.read_bytes() == b"whole"
    assert run.config.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [\n", "config.yaml is not valid YAML: .*line 2"),
        ("epochs: 3\n", "config.yaml names no task"),
        ("- 1\n", "config.yaml names no task"),
        ("", "config.yaml names no task"),
    ],
)
def test_damaged_settings_are_told(tmp_path: Path, text: str, message: str):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        Run.open(tmp_path).settings()


def test_settings_that_are_no_text_are_told(tmp_path: Path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"config\.yaml is not valid YAML"):
        Run.open(tmp_path).settings()


def test_settings_run_no_code(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(f"task: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(DataError, match="not valid YAML"):
        Run.open(tmp_path).settings()
    assert not (tmp_path / "made").exists()


def test_metrics_are_read_as_they_were_written(tmp_path: Path):
    run = Run(tmp_path)
    assert run.read_metrics() == []
    rows = [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1e-30, "extra": 5}]
    run.write_metrics(rows)
    assert run.metrics.read_text().splitlines()[0] == "epoch,loss,extra"
    assert run.read_metrics() == rows


def test_withdrawing_frees_a_folder_that_has_only_settings(tmp_path: Path):
    run = Run.create(tmp_path / "run", "toy", {})
    run.last.parent.mkdir()
    run.withdraw()
    assert not run.folder.exists()
    run = Run.create(tmp_path / "run", "toy", {})
    run.write_metrics([{"epoch": 1}])
    run.withdraw()
    assert run.config.exists()
    assert run.metrics.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dat": "x"}, "unknown setting 'dat': did you mean data?"),
        ({"inner": {"sice": 3}}, "unknown setting 'inner.sice': did you mean inner.size"),
        ({"colour": "green"}, "colour must be one of red, blue, got green"),
        ({"limit": "high"}, "limit must be a number or null, got high"),
        ({"inner": {"scale": [1]}}, "inner.scale must be a list of 2, got"),
        ({"options": 3}, "options must be a mapping, got 3"),
        ({"data": 3}, "data must be text, got 3"),
        ({"derived": 3}, "unknown setting 'derived'"),
    ],
)
def test_wrong_settings_are_named(values: dict, message: str):
    with pytest.raises(SettingsError, match=message):
        from_mapping(Outer, values)


def test_lists_become_tuples_and_numbers_floats():
    built = from_mapping(Outer, {"inner": {"scale": [1, 2], "size": 6}, "limit": 3})
    assert built == Outer(inner=Inner(size=6, scale=(1.0, 2.0)), limit=3.0)
    assert isinstance(built.limit, float)


def test_other_settings_than_before_are_refused():
    check_same_settings({"lr": 1, "augment": {"hflip": 0.5}}, {"lr": 1.0, "augment": {"hflip": 0.5}, "task": "toy"})
    with pytest.raises(SettingsError, match=r"settings it began with: lr was 0\.1, now it is 0\.2"):
        check_same_settings({"epochs": 1, "lr": 0.2}, {"epochs": 1, "lr": 0.1})
    with pytest.raises(SettingsError, match="new was None, now it is 3"):
        check_same_settings({"new": 3}, {})
