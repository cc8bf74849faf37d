"""A network ready to use, found by whatever a user has: a name, the folder of a run, or a checkpoint."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from convatlas import catalog
from convatlas.errors import CheckpointError, Unsupported, unknown
from convatlas.networks.base import NetworkConfig
from convatlas.networks.registry import create_model
from convatlas.training.run import to_mapping
from convatlas.training.task import Task, open_task
from convatlas.weights import load_weights, read_checkpoint

__all__ = ["Opened", "open_network", "sized"]


@dataclass(frozen=True)
class Opened:
    """A network in evaluation mode and what is known of it.

    Attributes:
        name: of the model as `create_model` takes it; of its class where it is none of those.
        network: with its weights.
        inputs: of an example call.
        weights: where they come from, in words.
        classes: names of the classes, where it was trained to tell some.
        preprocess: how an input has to be prepared, where that is known.
    """

    name: str
    network: nn.Module
    inputs: tuple[Any, ...]
    weights: str
    classes: tuple[str, ...] = ()
    preprocess: Mapping[str, Any] | None = None

    def description(self) -> dict[str, Any]:
        """What a user of the network has to know, as plain data."""
        told: dict[str, Any] = {"model": self.name, "weights": self.weights}
        if self.classes:
            told["classes"] = list(self.classes)
        if self.preprocess is not None:
            told["preprocess"] = dict(self.preprocess)
        return told


def open_network(
    source: str, *, model: str | None = None, num_classes: int | None = None, size: Sequence[int] | None = None
) -> Opened:
    """Build a network and load its weights.

    Args:
        source: name of a model (random weights), folder of a run, or checkpoint: a path, ``hf://owner/name`` or
            ``https://...``.
        model: name of the model that a checkpoint belongs to, where the file does not tell.
        num_classes: size of its classifier, where it is not the published one.
        size: of the position axes of the example input, e.g. height and width.

    Raises:
        UnknownName: there is no such model.
        DataError: the folder is no run, or one without a finished epoch.
        CheckpointError: the checkpoint cannot be read, does not tell its model, or does not fit.
        Unsupported: the run holds no network, or the network tells no example input.
        ValueError: the size does not fit the input.
    """
    changes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if Path(source).is_dir():
        if model is not None:
            raise ValueError(f"a run tells its model itself, so model must not be given, got {model}")
        opened = _of_task(open_task(source), f"best epoch of {source}")
    elif model is not None:
        network = create_model(model, **changes)
        opened = _of_network(model, network, f"{source}: {load_weights(network, source).summary()}")
    elif source in catalog.models():
        opened = _of_network(source, create_model(source, **changes), "random")
    elif "://" not in source and "/" not in source and not Path(source).suffix and not Path(source).exists():
        raise unknown("model", source, catalog.models())
    else:
        opened = _of_checkpoint(source)
    opened.network.eval()
    if size is None:
        return opened
    told = opened.preprocess
    if told is not None and "size" in told:
        told = {**told, "size": list(size)}
    return dataclasses.replace(opened, inputs=sized(opened.inputs, size), preprocess=told)


def sized(inputs: tuple[Any, ...], size: Sequence[int]) -> tuple[Any, ...]:
    """Random inputs like the given ones (B, C, *positions), of another size.

    Raises:
        ValueError: no input has so many position axes.
    """
    fits = [isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 2 + len(size) for x in inputs]
    if not any(fits):
        shapes = [tuple(x.shape) for x in inputs if isinstance(x, Tensor)]
        raise ValueError(f"size must have a number for each position axis of the input {shapes}, got {tuple(size)}")
    return tuple(
        torch.randn(*x.shape[:2], *size, dtype=x.dtype, device=x.device) if fit else x
        for x, fit in zip(inputs, fits, strict=True)
    )


def _of_network(name: str, network: nn.Module, weights: str) -> Opened:
    example = getattr(network, "example_inputs", None)
    if not callable(example):
        raise Unsupported(f"{name} tells no example input")
    config = getattr(network, "config", None)
    preprocess = getattr(config, "preprocess", None)
    told = to_mapping(preprocess) if dataclasses.is_dataclass(preprocess) else None
    return Opened(name, network, tuple(example(1)), weights, preprocess=told)


def _of_task(task: Task, weights: str) -> Opened:
    network = getattr(task, "network", None)
    example = getattr(task, "example_inputs", None)
    if not isinstance(network, nn.Module) or not callable(example):
        raise Unsupported(f"a run of the task {task.name} holds no network with an example input")
    preprocess = getattr(task, "preprocess", None)
    inputs = tree_map_only(Tensor, Tensor.cpu, example())
    return Opened(
        name=str(getattr(task, "model", type(network).__name__)),
        network=network.cpu(),
        inputs=inputs,
        weights=weights,
        classes=tuple(getattr(task, "classes", ())),
        preprocess=to_mapping(preprocess) if dataclasses.is_dataclass(preprocess) else None,
    )


def _of_checkpoint(source: str) -> Opened:
    metadata = read_checkpoint(source).metadata
    try:
        task = json.loads(metadata["convatlas"])["task"]
    except (KeyError, TypeError, json.JSONDecodeError):
        pass
    else:
        if task not in catalog.TASKS:
            raise unknown("task", str(task), catalog.TASKS)
        return _of_task(catalog.resolve(catalog.TASKS[task]).load(source), source)
    name, config = _configured(metadata)
    if config is None:
        raise CheckpointError(f"{source} does not tell which model it belongs to: give its name as model")
    network = config.build()
    return _of_network(name, network, f"{source}: {load_weights(network, source).summary()}")


def _configured(metadata: Mapping[str, str]) -> tuple[str, NetworkConfig | None]:
    """The name and the config of the network whose class and config stand in a file of ours."""
    try:
        kind, told = metadata["model"], json.loads(metadata["config"])
    except (KeyError, json.JSONDecodeError):
        return "", None
    for module in sorted(set(catalog.models().values())):
        if kind not in catalog.public_names(module):
            continue
        variants: Mapping[str, NetworkConfig] = importlib.import_module(f"convatlas.{module}").VARIANTS
        fitting = {
            name: config
            for name, config in variants.items()
            if {entry.name for entry in dataclasses.fields(config)} == set(told)
        }
        for config in fitting.values():
            rebuilt = config.override(**told)
            names = [name for name, variant in fitting.items() if variant == rebuilt]
            return (names[0] if names else kind), rebuilt
    return "", None
