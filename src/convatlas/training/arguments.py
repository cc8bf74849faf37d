"""Settings as arguments: one parser for the command line, configuration files and the settings stored in a run."""

from __future__ import annotations

import re
import types
import typing
from argparse import Action
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from convatlas.errors import unknown
from convatlas.training.settings import SettingsError

__all__ = ["SettingsParser"]

_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a mapping",
    type(None): "null",
}
_UNKNOWN = re.compile(r"(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'(?: is not accepted)?")


class SettingsParser(ArgumentParser):
    """A jsonargparse parser whose errors are exceptions of one sentence that offer the nearest names."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # A shortened name would be taken for another setting when one more is added.
        fixed: Any = {"exit_on_error": False, "allow_abbrev": False, "formatter_class": _HelpFormatter}
        super().__init__(*args, **fixed, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as a `SettingsError`."""
        raise SettingsError(self._explained(" ".join(str(message).split()))) from None

    def _explained(self, text: str) -> str:
        known = [action.dest for action in self._actions]
        if match := re.fullmatch(r'Parser key "([\w.]+)": .*?(?:Got|Given) value: (.*)', text):
            name, value = match.groups()
            hint = next((getattr(action, "_typehint", None) for action in self._actions if action.dest == name), None)
            return f"{name} must be {_in_words(hint)}, got {value}" if hint is not None else text
        if match := _UNKNOWN.fullmatch(text):
            return str(unknown("setting", ".".join(filter(None, match.groups())), known))
        if match := re.fullmatch(r"unrecognized arguments: (--([\w.-]+)|\S+).*", text):
            word, name = match.groups()
            return str(unknown("setting", name, known)) if name else f"{word!r} is not expected here"
        return re.sub(r'^(argument |Parser key "[\w.]+": )| - Parser key .*', "", text)


class _HelpFormatter(DefaultHelpFormatter):
    def _get_type_str(self, action: Action) -> str | None:
        hint = getattr(action, "_typehint", None)
        return super()._get_type_str(action) if hint is None else _in_words(hint)

    def _expand_help(self, action: Action) -> str:
        # What docstrings mark as code needs no marks here, and the type says itself what it is.
        text = super()._expand_help(action).replace("``", "'").replace(". (type: ", " (")
        return text.replace("(type: ", "(").replace("(required, type: ", "(required, ")


def _in_words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_in_words, parts))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if origin is tuple:
        return "a list" if Ellipsis in parts else f"a list of {len(parts)}"
    return _WORDS.get(origin or hint) or str(getattr(hint, "__name__", hint))
