"""A progress bar on standard error for what takes longer than two seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show how far a job of ``total`` steps is; the function that it yields says what is under way and advances by one.

    Nothing is shown where CONVATLAS_PROGRESS is 0 or standard error is no terminal.
    """
    from rich.console import Console
    from rich.progress import Progress

    hidden = os.environ.get("CONVATLAS_PROGRESS", "1") == "0"
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("preparing", total=total)
        yield lambda doing: bar.update(task, advance=1, description=doing)
