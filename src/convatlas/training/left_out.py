"""Files that a task left out, told as a warning and in its report."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from convatlas.data.images import Skipped
from convatlas.report import Section, Table, printable

__all__ = ["skipped_sections", "tell_skipped"]


def tell_skipped(skipped: Iterable[Skipped], shown: int = 3) -> None:
    """Say which files are left out: a warning of the logger, on standard error unless the program does otherwise."""
    skipped = list(skipped)
    if skipped:
        some = "; ".join(printable(f"{each.path}: {each.reason}") for each in skipped[:shown])
        more = f"; and {len(skipped) - shown} more, listed in the report" if len(skipped) > shown else ""
        noun = "file is" if len(skipped) == 1 else "files are"
        logging.getLogger(__name__).warning("%d %s left out: %s%s", len(skipped), noun, some, more)


def skipped_sections(reasons: Mapping[str, str], most: int = 1000) -> list[Section]:
    """A section with the files and the reasons, or none.

    Args:
        reasons: by file.
        most: how many are listed.
    """
    if not reasons:
        return []
    rows = [[name, reason] for name, reason in sorted(reasons.items())[:most]]
    title = "1 file was left out" if len(reasons) == 1 else f"{len(reasons)} files were left out"
    caption = f"The first {most} are listed." if len(reasons) > most else ""
    return [Section("Skipped files", [Table(title, ["file", "reason"], rows, caption)])]
