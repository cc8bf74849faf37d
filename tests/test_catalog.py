"""What the catalogue knows without importing anything that it describes."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from convatlas import catalog
from convatlas.errors import UnknownName, Unsupported

SYSTEMS = 76  # one card each; two papers share the card of UniRepLKNet


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package of another content, so that what is read can be told from what is there today."""
    (tmp_path / "networks" / "wide").mkdir(parents=True)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "networks" / "net.py").write_text(
        '__all__ = ["Net"]\nVARIANTS: dict[str, int] = {"net_a": 1, "net_b": 2}\n'
    )
    (tmp_path / "networks" / "wide" / "__init__.py").write_text('VARIANTS = {"wide_a": 1}\n')
    (tmp_path / "networks" / "plain.py").write_text("# no table of VARIANTS here\n")
    (tmp_path / "cards.toml").write_text(
        """
[done]
papers = [{title = "First", year = 2020, arxiv = "2001.00001"}, {title = "Second", year = 2021, venue = "V"}]
kinds = ["network"]
purpose = "For the test."
home = "networks.net"
modules = ["networks.net", "networks.wide"]
offers = ["net"]

[coming]
papers = [{title = "Third", year = 2022}]
kinds = ["layer"]
purpose = "Not yet."
home = "nn.absent"
modules = ["networks.net", "nn.absent"]
offers = ["nothing"]
"""
    )
    monkeypatch.setattr(catalog, "_PACKAGE", tmp_path)
    for cached in (catalog.cards, catalog.models, catalog._assigned):
        cached.cache_clear()
    yield tmp_path
    for cached in (catalog.cards, catalog.models, catalog._assigned):
        cached.cache_clear()


def test_benchmarks_are_found_by_their_files(package: Path):
    folder = package / "bench"
    folder.mkdir()
    (folder / "fast.py").write_text('"""Fast beside slow.\n\nMore."""\n\ndef run():\n    pass\n')
    (folder / "ratio.py").write_text('"""No benchmark."""\n\ndef compare():\n    pass\n')
    catalog.benchmarks.cache_clear()
    try:
        assert catalog.benchmarks() == {"fast": "Fast beside slow."}
        assert catalog.bench_module("fast") == "convatlas.bench.fast"
        with pytest.raises(UnknownName, match="unknown benchmark 'fas': did you mean fast"):
            catalog.bench_module("fas")
    finally:
        catalog.benchmarks.cache_clear()


def test_cards_name_benchmarks_that_exist():
    named = {name for card in catalog.cards().values() for name in card.benchmarks if card.available}
    assert named <= set(catalog.benchmarks())
    assert "eca" in catalog.card("eca").benchmarks
    assert not any("bench" in module for module in catalog.card("eca").public())


def test_every_system_has_a_complete_card():
    assert len(catalog.cards()) == SYSTEMS
    assert list(catalog.cards()) == sorted(catalog.cards())
    for slug, card in catalog.cards().items():
        assert slug == card.slug == slug.lower()
        assert card.home in card.modules, slug
        assert len(set(card.modules)) == len(card.modules), slug
        assert f"experiments.{slug}" in card.modules, slug
        assert card.kinds, slug
        assert card.offers, slug
        assert card.purpose.endswith("."), slug
        assert 2010 <= min(paper.year for paper in card.papers), slug


def test_slugs_and_arxiv_numbers_are_unique():
    table = (Path(catalog.__file__).parent / "cards.toml").read_text(encoding="utf-8")
    assert table.count("\npapers = ") == len(tomllib.loads(table)) == SYSTEMS
    numbers = [paper.arxiv for card in catalog.cards().values() for paper in card.papers if paper.arxiv]
    assert len(numbers) == len(set(numbers)) > SYSTEMS / 2
    assert len(catalog.card("unireplknet").papers) == 2


def test_a_card_answers_from_the_source(package: Path):
    done, coming = catalog.card("done"), catalog.card("coming")
    assert (done.title, done.year) == ("First", 2020)
    assert done.available
    assert done.models == ("net_a", "net_b", "wide_a")
    assert not coming.available
    (package / "nn").mkdir()
    (package / "nn" / "absent.py").write_text("")
    assert coming.available


def test_a_card_is_plain_data_for_json(package: Path):
    assert json.loads(json.dumps(catalog.card("done").as_dict())) == {
        "slug": "done",
        "papers": [
            {"title": "First", "year": 2020, "arxiv": "2001.00001"},
            {"title": "Second", "year": 2021, "venue": "V"},
        ],
        "kinds": ["network"],
        "purpose": "For the test.",
        "home": "convatlas.networks.net",
        "modules": ["convatlas.networks.net", "convatlas.networks.wide"],
        "offers": ["net"],
        "available": True,
        "models": ["net_a", "net_b", "wide_a"],
    }
    assert catalog.card("coming").as_dict()["models"] == []


def test_names_are_read_and_not_run(package: Path):
    (package / "networks" / "trap.py").write_text('VARIANTS = {"trap": 1}\n__all__ = ("Trap",)\nraise SystemExit(1)\n')
    assert catalog.models() == {
        "net_a": "networks.net",
        "net_b": "networks.net",
        "trap": "networks.trap",
        "wide_a": "networks.wide",
    }
    assert catalog.model_module("net_b") == "convatlas.networks.net"
    assert catalog.public_names("networks.trap") == ("Trap",)
    assert catalog.public_names("networks.net") == ("Net",)
    assert catalog.public_names("networks.plain") == catalog.public_names("networks.absent") == ()


def test_experiments_are_found_by_their_file(package: Path):
    with pytest.raises(Unsupported, match="done is not part of this version; 'convatlas list --available' shows"):
        catalog.experiment_module("done")
    (package / "experiments" / "done.py").write_text("")
    assert catalog.experiment_module("done") == "convatlas.experiments.done"


def test_unknown_names_answer_with_the_nearest():
    with pytest.raises(UnknownName, match="unknown system 'inceptionext': did you mean inceptionnext"):
        catalog.card("inceptionext")
    with pytest.raises(UnknownName, match="unknown system 'ec'"):
        catalog.experiment_module("ec")
    with pytest.raises(UnknownName, match="unknown model 'inceptionnext_tin': did you mean inceptionnext_tiny"):
        catalog.model_module("inceptionnext_tin")


def test_resolve_imports_a_named_object():
    from convatlas.errors import require

    assert catalog.resolve("errors:require") is require
