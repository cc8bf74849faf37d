"""Networks, one file a family, and how to make them by name."""

from convatlas.networks.base import (
    Backbone,
    BackboneConfig,
    Feature,
    FeatureExtractor,
    NetworkConfig,
    PublishedFile,
    Upscaler,
    UpscalerConfig,
)
from convatlas.networks.registry import create_model, list_models, model_config, published_files

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Feature",
    "FeatureExtractor",
    "NetworkConfig",
    "PublishedFile",
    "Upscaler",
    "UpscalerConfig",
    "create_model",
    "list_models",
    "model_config",
    "published_files",
]
