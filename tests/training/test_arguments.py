"""The parser that the command line and configuration files share: clear errors, readable help."""

from __future__ import annotations

from pathlib import Path

import pytest

from convatlas.training.arguments import SettingsParser
from convatlas.training.settings import SettingsError, Training


@pytest.fixture
def parser() -> SettingsParser:
    parser = SettingsParser(prog="convatlas train toy")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Training, help="settings of the training")
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "ten"], "epochs must be an integer, got ten"),
        (["--lr=high"], "lr must be a number, got high"),
        (["--clip", "a b"], "clip must be a number or null, got a b"),
        (["--devices", "x"], "devices must be an integer or auto, got x"),
        (["--optimizer", "adam"], "optimizer must be one of adamw, sgd, lion, lamb, got adam"),
        (["--epoch", "3"], "unknown setting 'epoch': did you mean epochs or decay_epochs or warmup_epochs?"),
        (["--epochs", "3", "--warmup-epochs=3"], "unknown setting 'warmup-epochs': did you mean warmup_epochs"),
        (["photos"], "'photos' is not expected here"),
        (["--epochs"], "--epochs: expected one argument"),
        (["--config", "/does/not/exist.yaml"], "File does not exist: '/does/not/exist.yaml'"),
    ],
)
def test_wrong_words_are_told_in_one_line(parser: SettingsParser, words: list[str], message: str):
    with pytest.raises(SettingsError) as caught:
        parser.parse_args(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Parser key" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3\n", "unknown setting 'epoch': did you mean epochs"),
        ("epochs: ten\n", "epochs must be an integer, got ten"),
        ("epochs: [\n", "Problems parsing config"),
    ],
)
def test_wrong_files_are_told_in_one_line(parser: SettingsParser, tmp_path: Path, text: str, message: str):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        parser.parse_args(["--config", str(path)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_override_files_and_later_files_earlier_ones(parser: SettingsParser, tmp_path: Path):
    (tmp_path / "a.yaml").write_text("epochs: 3\nlr: 1e-2\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("epochs: 4\nseed: 2\n")
    given = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"), "--seed", "3"]
    arguments = parser.parse_args(given)
    assert (arguments.epochs, arguments.lr, arguments.seed) == (4, 0.01, 3)


def test_help_explains_every_setting_with_type_and_default(parser: SettingsParser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = parser.format_help()
    assert "settings of the training:" in text
    lines = " ".join(text.split())
    assert "passes over the training data (an integer, default: 20)" in lines
    assert "(a number or null, default: null)" in lines
    assert "(one of adamw, sgd, lion, lamb, default: adamw)" in lines
    assert "(an integer or auto, default: 1)" in lines
    for word in ("``", "Literal[", "Union[", "<class", " | "):
        assert word not in text
    for action in parser._actions:
        if action.dest in Training.__dataclass_fields__:
            assert action.help, action.dest
