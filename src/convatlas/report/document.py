"""What train, compare, bench, reproduce and every study hand back, rendered in one place.

A `Report` holds data only. It is shown in the terminal, as JSON, or as one HTML page that needs nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import groupby
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import quote

import numpy as np

from convatlas import files
from convatlas.report.parts import (
    Bars,
    Claim,
    Heatmap,
    Images,
    Lines,
    Part,
    Scatter,
    Section,
    Sounds,
    Verdict,
    printable,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Report"]

_FIGURES = Lines | Scatter | Bars | Heatmap


def _plain(value: object) -> Any:
    """``value`` as JSON holds it: sequences as lists, numbers that are not finite as null."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    return value


def _fields(part: Part) -> dict[str, Any]:
    held = {item.name: getattr(part, item.name) for item in dataclasses.fields(part)}
    match part:
        case Lines():
            held["series"] = {name: {"x": x, "y": y} for name, (x, y) in part.series.items()}
            bands = {name: {"x": x, "low": low, "high": high} for name, (x, low, high) in held.pop("bands").items()}
            held |= {"bands": bands} if bands else {}
        case Scatter():
            held["points"] = {name: {"x": x, "y": y} for name, (x, y) in part.points.items()}
        case Images():
            held["images"] = [{"caption": caption, "shape": pixels.shape} for pixels, caption in part.images]
        case Sounds():
            held["sounds"] = [
                {"caption": caption, "sample_rate": rate, "seconds": len(samples) / rate}
                for samples, rate, caption in part.sounds
            ]
    plain: dict[str, Any] = _plain(held)
    return plain


def _on_page(text: str) -> str:
    """``text`` as a page shows it: no percent sign begins a line."""
    return printable(text).replace(" %", "\u00a0%")


def _kind(part: Part) -> str:
    return type(part).__name__.lower()


@dataclass(frozen=True)
class Report:
    """A title, a summary and sections; ``provenance`` (versions, command, date, device) goes into the footer."""

    title: str
    summary: str
    sections: Sequence[Section]
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.title:
            raise ValueError("title of a report must not be empty")
        object.__setattr__(self, "sections", tuple(self.sections))
        provenance = {str(name): str(text) for name, text in self.provenance.items()}
        object.__setattr__(self, "provenance", provenance)

    @property
    def claims(self) -> tuple[Claim, ...]:
        """All claims of all sections, in order."""
        return tuple(part for section in self.sections for part in section.parts if isinstance(part, Claim))

    def to_json(self) -> str:
        """The report as JSON: everything but pixels of images and samples of sounds; NaN and infinity are null."""
        sections = [
            {"title": section.title, "parts": [{"kind": _kind(part), **_fields(part)} for part in section.parts]}
            for section in self.sections
        ]
        return json.dumps(
            {
                "format": "convatlas report 1",
                "title": self.title,
                "summary": self.summary,
                "sections": sections,
                "claims": [_fields(claim) for claim in self.claims],
                "provenance": _plain(self.provenance),
            },
            allow_nan=False,
        )

    def to_html(self) -> str:
        """The report as one HTML page with its figures inside, which loads nothing and runs no script."""
        from jinja2 import Environment, StrictUndefined

        from convatlas.report.figures import draw, line_style, picture
        from convatlas.report.sound import data_uri

        environment = Environment(
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=lambda value: _on_page(value) if type(value) is str else value,
        )
        environment.filters["link"] = lambda path: quote(PurePath(path).as_posix().encode("utf-8", "surrogateescape"))
        numbers = iter(range(1, 1 + sum(len(section.parts) for section in self.sections)))
        template = resources.files("convatlas.report").joinpath("page.html.j2").read_text("utf-8")
        return environment.from_string(template).render(
            report=self,
            verdicts=[(name, sum(claim.verdict == name for claim in self.claims)) for name in get_args(Verdict)],
            # Figures that follow each other stand side by side where there is room.
            groups=lambda parts: [
                (drawn, list(run)) for drawn, run in groupby(parts, lambda p: isinstance(p, _FIGURES))
            ],
            kind=_kind,
            draw=lambda part: draw(part, f"f{next(numbers)}-"),
            line_style=line_style,
            picture=picture,
            sound=data_uri,
        )

    def to_terminal(self, console: Console | None = None) -> None:
        """Print the report; figures are named only. Plain text where the output is no terminal or NO_COLOR is set."""
        from convatlas.report.terminal import print_report

        print_report(self, console)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``report.json`` and ``report.html`` into ``folder``, each whole or not at all; return the page's path.

        Raises:
            OSError: the folder cannot be written or the disk is full.
        """
        page = Path(folder) / "report.html"
        html = self.to_html()
        files.write_text(page.with_name("report.json"), self.to_json())
        files.write_text(page, html)
        return page
