"""Collects one test for each reference case and names the cases that have no adapter yet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from golden.cases import find

ADAPTERS = Path(__file__).parent / "adapters"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_path" not in metafunc.fixturenames:
        return
    parameters = []
    for path in find(metafunc.config.getoption("golden")):
        description = json.loads(path.read_text())
        system, name = description["system"], description["case"]
        if must_run(system):
            parameters.append(pytest.param(path, id=f"{system}/{name}"))
    metafunc.parametrize("case_path", parameters)


def must_run(system: str) -> bool:
    """A case runs if it has an adapter, and must have one if its system is available."""
    from convatlas.catalog import cards

    return (ADAPTERS / f"{system}.py").is_file() or (system in cards() and cards()[system].available)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    systems: dict[str, int] = {}
    for path in find(config.getoption("golden")):
        system = json.loads(path.read_text())["system"]
        if not must_run(system):
            systems[system] = systems.get(system, 0) + 1
    if systems:
        waiting = ", ".join(f"{system} ({count})" for system, count in sorted(systems.items()))
        terminalreporter.write_line(f"reference cases of systems that are not built yet: {waiting}")
