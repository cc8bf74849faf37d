"""``convatlas show``: one system."""

from __future__ import annotations

import json
from collections.abc import Sequence

from convatlas import catalog
from convatlas.cli.parser import Parser

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Print the card of a system, or JSON."""
    parser = Parser("convatlas show", description="One system: its papers, what it offers, its models.")
    parser.add_argument("system", help="slug of the system, as 'convatlas list' shows it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    card = catalog.card(arguments.system)
    if arguments.json:
        print(json.dumps({**card.as_dict(), "public": card.public()}, indent=1, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.padding import Padding

    console = Console(highlight=False)
    for paper in card.papers:
        console.print(f"[bold]{paper.title}[/bold]")
        arxiv = f"arXiv {paper.arxiv} ({paper.year})" if paper.arxiv else None
        where = ", ".join(part for part in (paper.venue, arxiv) if part) or str(paper.year)
        console.print(Padding(where, (0, 0, 0, 2)))
    console.print(f"\n{card.purpose}\n")
    state = "available" if card.available else "planned, not part of this version"
    console.print(f"[bold]{', '.join(card.kinds)}[/bold]; {state}; home: convatlas.{card.home}\n")
    console.print("[bold]Offers[/bold]")
    for offer in card.offers:
        console.print(Padding(offer, (0, 0, 0, 2)))
    if card.available:
        if card.models:
            console.print("\n[bold]Models[/bold]")
            console.print(Padding(", ".join(card.models), (0, 0, 0, 2)))
        console.print("\n[bold]In Python[/bold]")
        for module, names in card.public().items():
            console.print(Padding(f"from {module} import {', '.join(names)}", (0, 0, 0, 2)))
        for name, target in catalog.METHODS.items():
            if target.partition(":")[0] in card.modules:
                console.print(f"\nconvatlas train TASK --methods '{{{name}: {{}}}}'", markup=False)
        console.print(f"\nconvatlas reproduce {card.slug}")
        for name in card.benchmarks:
            console.print(f"convatlas bench {name}")
    return 0
