"""Progress bars of what takes long besides training: on standard error, and gone when done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]


@contextmanager
def progress(doing: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Show a bar while the block runs; the function that it yields moves it on by one.

    That function may be told what is done from then on. ``CONVATLAS_PROGRESS=0`` in the environment turns all bars off.

    Args:
        doing: what is done.
        total: how many steps there are; unknown when None or 0.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    hidden = os.environ.get("CONVATLAS_PROGRESS", "1") == "0" or not console.is_terminal
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(doing, total=total or None)

        def advance(doing: str | None = None) -> None:
            bar.update(task, advance=1, description=doing)

        yield advance
