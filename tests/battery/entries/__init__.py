"""The subjects of the battery. A file here may define NETWORKS, LAYERS, CONVS and OPERATORS; it need not be listed."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from battery.subjects import Conv, Layer, Network, Operator

_FILES = [importlib.import_module(info.name) for info in pkgutil.iter_modules(__path__, f"{__name__}.")]


def _all(name: str) -> list[Any]:
    return [entry for file in _FILES for entry in getattr(file, name, [])]


NETWORKS: list[Network] = _all("NETWORKS")
LAYERS: list[Layer] = _all("LAYERS")
CONVS: list[Conv] = _all("CONVS")
OPERATORS: list[Operator] = _all("OPERATORS")
