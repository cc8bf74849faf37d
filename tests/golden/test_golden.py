"""Every system returns what the authors' code returned."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.cases import read

HERE = Path(__file__).parent
TOLERANCES = tomllib.loads((HERE / "tolerances.toml").read_text())


def tolerances(system: str, name: str) -> dict[str, dict[str, Any]]:
    """By dtype: those of the longest "system/beginning of the case's name", or of the system, or the usual ones."""
    special = [key for key in TOLERANCES if "/" in key and f"{system}/{name}".startswith(key)]
    return TOLERANCES[max(special, key=len)] if special else TOLERANCES.get(system, TOLERANCES["default"])


@pytest.mark.golden
def test_golden(case_path: Path) -> None:
    described = read(case_path)
    system = described.system
    adapter = importlib.import_module(f"golden.adapters.{system}")
    for dtype, tolerance in tolerances(system, described.name).items():
        outputs = {"outputs": {}, **tolerance}["outputs"]  # those with a tolerance of their own
        common = {key: value for key, value in tolerance.items() if key != "outputs"}
        case = read(case_path, getattr(torch, dtype))
        results = adapter.run(case)
        assert set(results) == set(case.outputs), "the adapter must return every output of the reference"
        for name, expected in case.outputs.items():
            torch.testing.assert_close(
                results[name].detach().to(expected.dtype),
                expected,
                **outputs.get(name, common),
                msg=lambda text, name=name, dtype=dtype: f"{name} in {dtype}: {text}",
            )
