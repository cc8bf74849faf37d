"""Subspace attention."""

from __future__ import annotations

from battery.subjects import Layer
from convatlas.nn.mixers.ulsam import ULSAM

LAYERS = [
    Layer(ULSAM, 8, dims=(1, 2, 3)),
    Layer(ULSAM, 9, {"num_splits": 3}, dims=(1, 2, 3)),
]
