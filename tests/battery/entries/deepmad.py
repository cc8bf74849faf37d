"""DeepMAD: one network of each kind of block."""

from __future__ import annotations

from typing import Any

from battery.subjects import Network
from convatlas.networks.deepmad import make_structure

_ROWS = ((12, 3, 2, 2, 8), (12, 5, 1, 1, 8), (16, 3, 2, 2, 8))


def _options(kind: str, last: int | None = None) -> dict[str, Any]:
    return {"structure": make_structure(kind, 8, _ROWS, last), "num_classes": 7}


NETWORKS = [
    Network("deepmad_r18", _options("SuperResK1KXK1")),
    Network("deepmad", _options("SuperResK1DWK1")),
    Network("deepmad_29m", _options("SuperResK1DWSEK1", 24)),
]
