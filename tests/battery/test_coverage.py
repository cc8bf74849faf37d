"""Nothing in the source escapes the battery, and no exemption points nowhere."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

import convatlas.nn.conv
import convatlas.nn.mixers
import convatlas.ops
from battery.entries import CONVS, LAYERS, NETWORKS, OPERATORS
from battery.subjects import Conv, Layer, Network, Operator
from convatlas import catalog
from convatlas.ops.backend import OPERATORS as REGISTERED


def missing_networks(entries: Sequence[Network]) -> list[str]:
    """Lines to add for the families of networks that have no entry."""
    known = {catalog.models().get(entry.model) for entry in entries}
    families = {module: model for model, module in reversed(catalog.models().items())}
    return [f'Network("{families[module]}", {{...}}),' for module in sorted(families) if module not in known]


def missing_layers(entries: Sequence[Layer]) -> list[str]:
    """Lines to add for the public layers of `convatlas.nn.mixers` that have no entry."""
    known = {entry.kind for entry in entries}
    return [
        f"Layer({kind.__name__}, channels),  # {kind.__module__}"
        for kind in public_modules(convatlas.nn.mixers)
        if kind not in known
    ]


def missing_convs(entries: Sequence[Conv]) -> list[str]:
    """Lines to add for the conv-like layers of `convatlas.nn.conv` that have no entry."""
    known = {entry.kind for entry in entries}
    return [
        f"Conv({kind.__name__}, dims),  # {kind.__module__}"
        for kind in public_modules(convatlas.nn.conv)
        if hasattr(kind, "from_conv") and kind not in known
    ]


def public_modules(package: ModuleType) -> Iterator[type[nn.Module]]:
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for name in catalog.public_names(info.name.removeprefix("convatlas.")):
            kind = getattr(module, name)
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                yield kind


def missing_operators(entries: Sequence[Operator]) -> list[str]:
    """Lines to add for the operators with backends that have no entry."""
    for info in pkgutil.walk_packages(convatlas.ops.__path__, "convatlas.ops."):
        importlib.import_module(info.name)
    known = {entry.name for entry in entries}
    return [
        f"Operator({name}, examples={{...}}, reaching={{...}})," for name in sorted(REGISTERED) if name not in known
    ]


@pytest.mark.parametrize(
    ("missing", "entries"),
    [(missing_networks, NETWORKS), (missing_layers, LAYERS), (missing_convs, CONVS), (missing_operators, OPERATORS)],
    ids=["networks", "layers", "convs", "operators"],
)
def test_everything_is_registered(missing, entries):
    lines = missing(entries)
    assert not lines, "add to a file of tests/battery/entries:\n    " + "\n    ".join(lines)


def test_what_is_not_registered_is_named_with_the_line_to_add():
    assert 'Network("inceptionnext_atto", {...}),' in missing_networks([])
    assert "Layer(ECA, channels),  # convatlas.nn.mixers.eca" in missing_layers([])
    assert "Operator(eca, examples={...}, reaching={...})," in missing_operators([])


def test_fast_backends_have_an_example_that_reaches_them():
    for entry in OPERATORS:
        names = REGISTERED[entry.name].names
        assert names[0] == "naive", f"{entry.name}: the literal definition must be registered first, as 'naive'"
        reached = {*entry.reaching, *entry.reaching_on_gpu}
        assert reached == set(names[1:]), f"{entry.name}: reaching needs an example for each fast backend"


def test_exemptions_name_a_test_and_a_reason():
    tests = {
        node.name.removeprefix("test_")
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for entry in [*NETWORKS, *LAYERS, *CONVS, *OPERATORS]:
        for name, reason in entry.exempt.items():
            assert name in tests, f"{entry.name} is exempt from {name!r}, which is no test of the battery"
            assert len(reason.split()) > 2, f"{entry.name}: say why {name!r} does not apply"
