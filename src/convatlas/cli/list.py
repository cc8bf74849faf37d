"""``convatlas list``: what convatlas holds."""

from __future__ import annotations

import json
from collections.abc import Sequence

from convatlas import catalog
from convatlas.cli.parser import Parser
from convatlas.errors import unknown

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Print a table of the systems, or JSON."""
    parser = Parser("convatlas list", description="What convatlas holds, one line a system.")
    parser.add_argument("--kind", help="only systems of this kind: operator, layer, network, task, method or study")
    parser.add_argument("--available", action="store_true", help="only systems that are part of this version")
    parser.add_argument("--models", action="store_true", help="the names of models instead, as --model takes them")
    parser.add_argument(
        "--methods", action="store_true", help="training methods instead, as --methods of train takes them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    if arguments.models or arguments.methods:
        names = sorted(catalog.models() if arguments.models else catalog.METHODS)
        print(json.dumps(names, indent=1) if arguments.json else "\n".join(names))
        return 0
    cards = list(catalog.cards().values())
    kinds = {kind for card in cards for kind in card.kinds}
    if arguments.kind is not None and arguments.kind not in kinds:
        raise unknown("kind", arguments.kind, kinds)
    chosen = [
        card
        for card in cards
        if (arguments.kind is None or arguments.kind in card.kinds) and (card.available or not arguments.available)
    ]
    if arguments.json:
        print(json.dumps([card.as_dict() for card in chosen], indent=1, ensure_ascii=False))
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no width; lines are for grep
        console = Console(highlight=False, width=240)
    wide = console.width >= 110
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("system", "year", "kind", "state") if wide else ("system", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it is for", ratio=1)
    for card in chosen:
        state = "available" if card.available else "planned"
        detail = [card.slug, str(card.year), ", ".join(card.kinds), state] if wide else [card.slug, state]
        table.add_row(*detail, card.purpose, style=None if card.available else "dim")
    console.print(table)
    ready = sum(card.available for card in chosen)
    console.print(f"{len(chosen)} systems, {ready} available; 'convatlas show SYSTEM' tells more.")
    return 0
