"""One maintained, exact and fast home for the convolution literature, on PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convatlas.catalog import card, cards
    from convatlas.networks.registry import create_model, list_models
    from convatlas.report import Report
    from convatlas.training.settings import Training
    from convatlas.weights import load_weights, save_weights

__version__ = "0.1.0"

__all__ = [
    "Report",
    "Training",
    "card",
    "cards",
    "create_model",
    "list_models",
    "load_weights",
    "save_weights",
]

# Imported at first use: `import convatlas` takes no torch.
_HOMES = {
    "Report": "convatlas.report",
    "Training": "convatlas.training.settings",
    "card": "convatlas.catalog",
    "cards": "convatlas.catalog",
    "create_model": "convatlas.networks.registry",
    "list_models": "convatlas.networks.registry",
    "load_weights": "convatlas.weights",
    "save_weights": "convatlas.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convatlas' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
