"""Loading, converting and saving weights: our own layout and those of the authors."""

from convatlas.weights.checkpoint import Checkpoint, read_checkpoint
from convatlas.weights.layouts import Layout
from convatlas.weights.loading import LoadReport, PositionTable, convert, load_weights, save_weights

__all__ = [
    "Checkpoint",
    "Layout",
    "LoadReport",
    "PositionTable",
    "convert",
    "load_weights",
    "read_checkpoint",
    "save_weights",
]
