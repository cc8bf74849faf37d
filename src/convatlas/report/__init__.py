"""Reports: data that are shown in the terminal, as JSON or as one page."""

from convatlas.report.document import Report
from convatlas.report.parts import (
    Bars,
    Cell,
    Claim,
    Column,
    Files,
    Heatmap,
    Images,
    Lines,
    Note,
    Part,
    Scatter,
    Section,
    Sounds,
    Table,
    Verdict,
    column_text,
    printable,
)

__all__ = [
    "Bars",
    "Cell",
    "Claim",
    "Column",
    "Files",
    "Heatmap",
    "Images",
    "Lines",
    "Note",
    "Part",
    "Report",
    "Scatter",
    "Section",
    "Sounds",
    "Table",
    "Verdict",
    "column_text",
    "printable",
]
