"""Gives each test of the battery its subjects, one test an entry; where exempt it is skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from battery.entries import CONVS, LAYERS, NETWORKS, OPERATORS
from convatlas.catalog import model_module
from convatlas.networks.base import BackboneConfig
from convatlas.networks.registry import model_config


def _first_of_families(entries: Iterable[Any]) -> list[Any]:
    """The first entry of each file of networks, for tests that take seconds."""
    families: dict[str, Any] = {}
    for entry in entries:
        families.setdefault(model_module(entry.model), entry)
    return list(families.values())


_BACKBONES = [entry for entry in NETWORKS if isinstance(model_config(entry.model), BackboneConfig)]

SUBJECTS: dict[str, Iterable[Any]] = {
    "network": NETWORKS,
    "backbone": _BACKBONES,
    "family": _first_of_families(NETWORKS),
    "backbone_family": _first_of_families(_BACKBONES),
    "layer": LAYERS,
    "conv": CONVS,
    "operator": OPERATORS,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    test = metafunc.function.__name__.removeprefix("test_")
    for fixture in SUBJECTS.keys() & set(metafunc.fixturenames):
        parameters = []
        for subject in SUBJECTS[fixture]:
            marks = [pytest.mark.skip(reason=subject.exempt[test])] if test in subject.exempt else []
            parameters.append(pytest.param(subject, id=subject.name, marks=marks))
        metafunc.parametrize(fixture, parameters)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
