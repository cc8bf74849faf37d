"""A report in the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from convatlas.report.parts import Bars, Claim, Files, Images, Note, Part, Sounds, Table, column_text, printable

if TYPE_CHECKING:
    from convatlas.report.document import Report

__all__ = ["print_report"]

_LONGEST_CELL = 32  # columns of a cell; longer ones are wrapped where the console is narrow
_COLOURS = {"holds": "green", "does not hold": "red", "cannot be told at this scale": "yellow"}


def print_report(report: Report, console: Console | None = None) -> None:
    """Print ``report`` on ``console`` (default: standard output), as plain text where that is no terminal."""
    _Printer(console or Console()).report(report)


class _Printer:
    def __init__(self, console: Console) -> None:
        self.console = console

    def text(self, text: str, style: str = "") -> Text:
        """Text as it is, brackets and all, with "?" for what the output's encoding lacks."""
        encoding = self.console.encoding
        return Text(printable(text).encode(encoding, "replace").decode(encoding), style)

    def line(self, text: str, style: str = "", *, wrap: bool = True) -> None:
        self.console.print(self.text(text, style), soft_wrap=not wrap)

    def report(self, report: Report) -> None:
        self.line(report.title, "bold")
        if report.summary:
            self.line(report.summary)
        for section in report.sections:
            self.line(f"\n{section.title}", "bold cyan")
            for part in section.parts:
                self.part(part)
        if report.provenance:
            self.line("")
            for name, text in report.provenance.items():
                self.line(f"{name}: {text}", "dim", wrap=False)

    def part(self, part: Part) -> None:
        match part:
            case Claim():
                self.claim(part)
            case Table():
                self.table(part)
            case Bars() if part.values:
                self.bars(part)
            case Images():
                self.line(f"figure: {part.title}, {_count(len(part.images), 'image')} (see report.html)", "dim")
            case Sounds():
                self.line(f"{_count(len(part.sounds), 'sound')}: {part.title} (see report.html)", "dim")
            case Files():
                self.line(part.title, "bold")
                for name, path in part.paths.items():
                    self.line(f"  {name}: {path}", wrap=False)
            case Note():
                self.line(part.text)
            case _:
                self.line(f"figure: {part.title} (see report.html)", "dim")

    def claim(self, claim: Claim) -> None:
        self.line(f"[{claim.verdict}] {claim.statement}", f"bold {_COLOURS[claim.verdict]}")
        self.line(f"  published: {claim.published}")
        self.line(f"  measured:  {claim.measured}")
        self.line(f"  threshold: {claim.threshold} ({claim.statistic}; {claim.seeds_text})")

    def table(self, table: Table) -> None:
        """Print a table; one too wide for the console is cut into several that begin with the same first column."""
        columns = table.formatted()
        heads = [f"{column.label}\n[{column.unit}]" if column.unit else column.label for column in columns]
        widths = [
            min(
                _LONGEST_CELL,
                max(self.text(line).cell_len for text in (head, *column.texts) for line in text.split("\n")),
            )
            for head, column in zip(heads, columns, strict=True)
        ]
        blocks: list[list[int]] = [[0]]
        for index in range(1, len(columns)):
            block = blocks[-1]
            if len(block) > 1 and sum(widths[i] + 2 for i in (*block, index)) > self.console.width:
                block = [0]
                blocks.append(block)
            block.append(index)

        self.line(table.title, "bold")
        for block in blocks:
            grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
            for index in block:
                justify: Literal["left", "right"] = "right" if columns[index].numeric else "left"
                grid.add_column(self.text(heads[index]), justify=justify, overflow="fold", vertical="top")
            for row in range(len(table.rows)):
                cells = (columns[index] for index in block)
                grid.add_row(*(self.text(cell.texts[row], "bold" if cell.best[row] else "") for cell in cells))
            self.console.print(grid)
            self.line("")
        if table.caption:
            self.line(table.caption, "dim")

    def bars(self, bars: Bars) -> None:
        names = [self.text(name) for name in bars.values]
        texts = column_text(list(bars.values.values()))
        widest = max(name.cell_len for name in names)
        room = max(8, self.console.width - widest - max(map(len, texts)) - 4)
        most = max((abs(value) for value in bars.values.values() if math.isfinite(value)), default=0.0)
        block = "#" if self.console.options.ascii_only else "\u2588"
        self.line(f"{bars.title} ({bars.y_label})", "bold")
        for name, shown, value in zip(names, texts, bars.values.values(), strict=True):
            length = round(room * abs(value) / most) if most and math.isfinite(value) else 0
            name.pad_right(widest - name.cell_len + 2)
            self.console.print(name.append(block * length, "cyan").append(f" {shown}" if length else shown))


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
