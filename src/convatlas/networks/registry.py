"""Networks by name."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from convatlas import catalog
from convatlas.errors import Unsupported
from convatlas.networks.base import Backbone, FeatureExtractor, NetworkConfig, PublishedFile
from convatlas.weights import load_weights

__all__ = ["create_model", "list_models", "model_config", "published_files", "published_source"]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that `create_model` builds, e.g. ``list_models("inceptionnext*")``."""
    return sorted(fnmatch.filter(catalog.models(), pattern))


def model_config(name: str, **overrides: Any) -> NetworkConfig:
    """The config of a model, with some fields replaced.

    Raises:
        UnknownName: there is no such model or no such option; the message offers the nearest names.
    """
    config: NetworkConfig = importlib.import_module(catalog.model_module(name)).VARIANTS[name]
    return config.override(**overrides)


def create_model(
    name: str,
    *,
    weights: str | None = None,
    out_indices: Sequence[int] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a network by name, e.g. ``create_model("inceptionnext_tiny", num_classes=10, in_channels=1)``.

    Args:
        name: one of `list_models`.
        weights: ``"published"`` for the authors' checkpoint, or anything that `convatlas.load_weights` reads: a path,
            ``hf://owner/name`` or ``https://...``. Without it the weights are random.
        out_indices: return these maps of the feature pyramid instead of class scores.
        overrides: fields of the model's config.

    Raises:
        UnknownName: there is no such model or no such option; the message offers the nearest names.
        Unsupported: ``weights="published"`` for a model without a published file, or ``out_indices`` for a network that
            has no feature pyramid.
        CheckpointError: the weights cannot be read or do not fit.
    """
    model = model_config(name, **overrides).build()
    if weights == "published":
        weights = published_source(name)
    if weights is not None:
        load_weights(model, weights)
    if out_indices is None:
        return model
    if not isinstance(model, Backbone):
        raise Unsupported(f"{name} has no feature pyramid, so out_indices cannot be used")
    return FeatureExtractor(model, out_indices)


def published_files(name: str) -> tuple[PublishedFile, ...]:
    """The checkpoints that the authors of a model published; empty when there is none."""
    module = importlib.import_module(catalog.model_module(name))
    files: dict[str, tuple[PublishedFile, ...]] = getattr(module, "PUBLISHED", {})
    return files.get(name, ())


def published_source(name: str) -> str:
    """Where `convatlas.load_weights` finds the first published checkpoint of a model.

    Raises:
        Unsupported: none is known, or none can be fetched by a program.
    """
    files = published_files(name)
    if not files:
        raise Unsupported(f"no published weights are known for {name}")
    file = next((file for file in files if not file.by_hand), None)
    if file is None:
        raise Unsupported(f"the weights of {name} must be downloaded by hand from {files[0].url}; give the file's path")
    return f"{file.url}#sha256={file.sha256}" if file.sha256 else file.url
