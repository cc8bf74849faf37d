"""Writes the pages of the systems before the documentation is built: from cards, docstrings and what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from convatlas.catalog import Card, cards

HERE = Path(__file__).parent
#: What ``convatlas reproduce SYSTEM`` and ``convatlas bench NAME`` found.
VERDICTS, RATIOS = HERE / "verdicts", HERE.parent / "benchmarks" / "results"


def on_pre_build(config: Any) -> None:
    """Called by mkdocs: write one page a system and their index."""
    folder = HERE / "systems"
    folder.mkdir(exist_ok=True)
    described = set(re.findall(r"^::: (\S+)", (HERE / "reference.md").read_text(encoding="utf-8"), re.MULTILINE))
    for card in cards().values():
        _write(folder / f"{card.slug}.md", _page(card, described))
    _write(folder / "index.md", _index())


def _write(path: Path, text: str) -> None:
    # An unchanged file is left alone, or `mkdocs serve` would rebuild for ever.
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _index() -> str:
    lines = ["# Systems", "", "| system | year | kind | what it is for | |", "|---|---|---|---|---|"]
    for card in cards().values():
        state = "available" if card.available else "planned"
        kinds = ", ".join(card.kinds)
        lines.append(f"| [{card.slug}]({card.slug}.md) | {card.year} | {kinds} | {card.purpose} | {state} |")
    return "\n".join(lines) + "\n"


def _page(card: Card, described: set[str]) -> str:
    """The page of a system; what other pages have ``described`` already is linked to, and what it describes added."""
    lines = [f"# {card.slug}", "", card.purpose, ""]
    for paper in card.papers:
        link = f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}) ({paper.year})" if paper.arxiv else None
        where = ", ".join(part for part in (paper.venue, link) if part) or str(paper.year)
        lines.append(f"- *{paper.title}*, {where}")
    lines += ["", "## What it offers", "", *(f"- {offer}" for offer in card.offers), ""]
    if not card.available:
        return "\n".join([*lines, "!!! note", "    This system is planned and not part of this version.", ""])
    if card.models:
        lines += [
            "## Models",
            "",
            "```python",
            *(f'convatlas.create_model("{name}")' for name in card.models),
            "```",
            "",
        ]
    lines += ["## Test its claim", "", "```bash", f"convatlas reproduce {card.slug}"]
    lines += [*(f"convatlas bench {name}" for name in card.benchmarks), "```", ""]
    lines += _measured(VERDICTS / f"{card.slug}.json")
    for name in card.benchmarks:
        lines += _measured(RATIOS / f"{name}.json")
    lines += ["## Reference", ""]
    for module, names in card.public().items():
        for name in names:
            full = f"{module}.{name}"
            if described & {module, full}:
                lines += [f"[`{full}`][{full}]", ""]
            else:
                described.add(full)
                lines += [f"::: {full}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines)


def _measured(path: Path) -> list[str]:
    """A table of the claims of a report, held against their bounds; nothing where there is none."""
    if not path.is_file():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    where = report["provenance"]
    lines = [f"**{report['title']}**, measured on {where['date'][:10]} ({where['device']}, torch {where['torch']})", ""]
    lines += ["| claim | measured | bound | verdict |", "|---|---|---|---|"]
    for claim in report["claims"]:
        cells = (claim[key].replace("|", "\\|") for key in ("statement", "measured", "threshold", "verdict"))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
