"""Loading, converting and saving weights: our own layout and those of the authors.

A network class says how foreign keys map to ours in its attribute ``layouts``, and may name its ``classifier_modules``,
``stem_modules`` and ``position_embeddings``, which are adapted when their sizes differ. The last map keys to a number
of prefix tokens or a `PositionTable`. Everything else must fit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from convatlas.errors import CheckpointError, unknown
from convatlas.files import atomic_path
from convatlas.ops.position import resize_position_embedding
from convatlas.weights.checkpoint import find_parts, read_checkpoint
from convatlas.weights.layouts import Candidate, Target, best_candidate, clean_key

__all__ = ["LoadReport", "PositionTable", "convert", "load_weights", "save_weights"]

_WRAPPERS = ("module.", "model.", "backbone.", "network.", "encoder.", "net.")


@dataclass(frozen=True)
class PositionTable:
    """How a learnt position embedding of a model is adapted to another grid.

    Attributes:
        num_prefix_tokens: tokens in front that stand for no patch.
        grid: rows and columns of the model's own patches; a square when left out.
        mode: kind of interpolation.
    """

    num_prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    mode: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did.

    Attributes:
        layout: ``convatlas``, or the name in the model's ``layouts`` that fitted.
        part: part of the checkpoint that was read; ``""`` is the whole file.
        loaded: number of tensors of the model that were set.
        missing: keys of the model that the checkpoint lacks; they keep their values.
        unexpected: keys of the checkpoint that the model lacks.
        mismatched: key, shape in the checkpoint and shape in the model, of tensors left out for their shape.
        adapted: key and what was done to make it fit.
        prefix: what was cut off from the keys.
        ignored: keys of the checkpoint that do not begin with the prefix, e.g. of a loss or of a second network.
        notes: what else is worth knowing.
    """

    layout: str
    part: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    adapted: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """A few lines to read: what was loaded, adapted and left."""
        where = [f"layout {self.layout}"]
        where += [f"part {self.part}"] if self.part else []
        where += [f"keys under {self.prefix}"] if self.prefix else []
        lines = [f"loaded {self.loaded} tensors ({', '.join(where)})"]
        lines += [f"adapted {key}: {done}" for key, done in self.adapted]
        lines += [*self.differences(), *self.notes]
        return "\n".join(lines)

    def differences(self) -> list[str]:
        """One line for each kind of difference between checkpoint and model."""
        lines = []
        shapes = [f"{key} {theirs} for {ours}" for key, theirs, ours in self.mismatched]
        for label, names in (
            ("missing in the checkpoint", self.missing),
            ("unknown to the model", self.unexpected),
            ("of another shape", shapes),
            ("left aside", self.ignored),
        ):
            if names:
                lines.append(f"{len(names)} {label}: {_some(names)}")
        return lines


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    part: str | None = None,
    strict: bool = True,
    optional: Collection[str] = (),
) -> LoadReport:
    """Load a checkpoint into a model, recognising its layout, part and key prefix by what fits best.

    Where the model declares them, a classifier of another size keeps its initialisation, a stem is adapted to other
    input channels and position embeddings are resized. An averaged copy (EMA) goes before the plain one if both fit.
    The model is changed only if everything is in order.

    Args:
        model: any module; one of ours also brings its layouts.
        source: a path, ``hf://owner/name[@revision][/file]``, ``https://...``, or a state dict already in memory.
        part: which part of a checkpoint with several, or which key prefix.
        strict: accept no missing, unexpected or differently shaped tensor; otherwise load what fits.
        optional: keys of the model that the checkpoint may lack, such as those of a classifier that a
            pre-training does without; they keep their values.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit (not at all, with ``strict=False``).
        UnsafeCheckpoint: it asks to run code.
        UnknownName: it has no such part.
        ValueError: the model has no memory yet (meta device or lazy layers).
    """
    model = _unwrapped(model)
    target = Target.of(model)
    if isinstance(source, Mapping):
        name, parts = "the state dict", find_parts(source)
    else:
        name, parts = os.fspath(source), read_checkpoint(source).parts
    choice, remarks = best_candidate(model, target, name, parts, part)
    values, report = _fit(model, target, choice, optional)
    report = dataclasses.replace(report, notes=(*report.notes, *remarks))
    complete = not (report.missing or report.unexpected or report.mismatched)
    if (strict and not complete) or not values:
        raise CheckpointError(_refusal(name, target, report, choice))
    model.load_state_dict({target.names[key]: value for key, value in values.items()}, strict=False)
    return report


def save_weights(model: nn.Module, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write the state dict of a model as safetensors, atomically, under keys free of wrappers.

    The metadata always hold ``format`` and ``library``, the class name as ``model``, and its ``config`` as JSON where
    that is a dataclass of plain values.

    Raises:
        ValueError: the path does not end in ``.safetensors``, metadata are not text, or a tensor is complex128.
        OSError: the file cannot be written; a file that was there is left whole.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path.name!r}; convert() writes .pth and .npz")
    model = _unwrapped(model)
    described = {**_description(model), **(metadata or {}), "format": "pt", "library": "convatlas"}
    if not all(isinstance(text, str) for pair in described.items() for text in pair):
        raise ValueError("metadata must map text to text")
    _write(Target.of(model).values, path, described)
    return path


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    part: str | None = None,
) -> LoadReport | int:
    """Rewrite a checkpoint as ``.safetensors``, ``.pth``, ``.pt`` or ``.npz``, by the suffix of the destination.

    With a model, it is loaded into it (strictly) and written in our layout. Without, the tensors of one part are
    written under their own keys, free of wrappers such as ``module.``. npz has no bfloat16 and gets float32 instead.

    Returns:
        What `load_weights` reports, or the number of tensors written where there is no model.

    Raises:
        CheckpointError: the source cannot be read, does not fit, or has several parts and none is named.
        ValueError: the destination has another suffix.
        OSError: the destination cannot be written.
    """
    destination = Path(destination)
    if destination.suffix not in (".safetensors", ".pth", ".pt", ".npz"):
        raise ValueError(f"destination must end in .safetensors, .pth, .pt or .npz, got {destination.name!r}")
    if model is not None:
        report = load_weights(model, source, part=part)
        inner = _unwrapped(model)
        _write(Target.of(inner).values, destination, _description(inner))
        return report
    parts = read_checkpoint(source).parts
    if part is None and len(parts) > 1:
        held = ", ".join(f"{name or 'top level'} ({len(state)} tensors)" for name, state in parts.items())
        raise CheckpointError(f"{os.fspath(source)} has several parts: {held}; choose one by part=")
    name = next(iter(parts)) if part is None else part
    if name not in parts:
        raise unknown("part", name, parts)
    state = {clean_key(key): tensor for key, tensor in parts[name].items()}
    while wrapper := next((prefix for prefix in _WRAPPERS if all(key.startswith(prefix) for key in state)), None):
        state = {key.removeprefix(wrapper): tensor for key, tensor in state.items()}
    _write(state, destination, {"format": "pt", "library": "convatlas"})
    return len(state)


# Fitting one into the other


def _fit(
    model: nn.Module, target: Target, choice: Candidate, optional: Collection[str] = ()
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors to set, and what has to be said about it."""
    classifier = _tensors_of(getattr(model, "classifier_modules", ()))
    stem = _tensors_of(getattr(model, "stem_modules", ()))
    positions: Mapping[str, int | PositionTable] = getattr(model, "position_embeddings", {})
    headless = _headless(classifier, target)
    values: dict[str, Tensor] = {}
    adapted: dict[str, str] = {}
    kept: set[str] = set()
    unexpected, mismatched = [], []
    for key, value in choice.state.items():
        own = target.values.get(key)
        if own is None:
            if key.startswith(headless):
                adapted[key] = "the model has no classifier, left out"
            else:
                unexpected.append(key)
        elif value.shape == own.shape and (own.is_complex() or not value.is_complex()):
            values[key] = value
        elif key in classifier and value.shape[1:] == own.shape[1:]:
            adapted[key] = f"{len(value)} classes in the checkpoint, {len(own)} in the model, which keeps its own"
            kept |= {name for name in target.values if name.rpartition(".")[0] == key.rpartition(".")[0]}
        elif key in stem and _only_channels_differ(value, own):
            values[key] = _adapt_channels(value, own.shape[1])
            adapted[key] = f"from {value.shape[1]} to {own.shape[1]} input channels"
        elif (resized := _resized(value, own, positions.get(key))) is not None:
            values[key] = resized
            adapted[key] = f"resized from {tuple(value.shape)} to {tuple(own.shape)}"
        else:
            mismatched.append((key, tuple(value.shape), tuple(own.shape)))
    values = {key: value for key, value in values.items() if key not in kept}
    if absent_head := [key for key in target.values if key in optional and key not in choice.state]:
        names = sorted({key.rpartition(".")[0] for key in absent_head})
        adapted |= dict.fromkeys(names, "not in the checkpoint, keeps its own values")
        kept.update(absent_head)
    tied = {id(target.values[key]) for key in values}
    absent = (key for key in target.values if key not in choice.state and id(target.values[key]) not in tied)
    spoilt = [key for key, value in values.items() if not _is_finite(value)]
    complex_keys = [key for key, theirs, ours in mismatched if theirs == ours]
    notes = [f"{len(complex_keys)} complex for real parameters: {_some(complex_keys)}"] if complex_keys else []
    notes += [f"{len(spoilt)} with NaN or infinity: {_some(spoilt)}"] if spoilt else []
    report = LoadReport(
        layout=choice.layout,
        part=choice.part,
        loaded=len(values),
        missing=tuple(key for key in absent if key not in kept and not key.endswith("num_batches_tracked")),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched),
        adapted=tuple(adapted.items()),
        prefix=choice.prefix,
        ignored=choice.ignored,
        notes=tuple(notes),
    )
    return values, report


def _tensors_of(modules: Iterable[str]) -> set[str]:
    return {f"{module}.{name}" for module in modules for name in ("weight", "bias")}


def _headless(classifier: set[str], target: Target) -> tuple[str, ...]:
    """Beginnings of keys that a model without its classifier has no use for: the classifier and the head around it."""
    if classifier & target.values.keys():
        return ()
    present = {key.partition(".")[0] for key in target.values}
    heads = {key.partition(".")[0] for key in classifier} - present
    return (*classifier, *(f"{head}." for head in heads))


def _only_channels_differ(value: Tensor, own: Tensor) -> bool:
    return value.dim() == own.dim() >= 3 and value.shape[0] == own.shape[0] and value.shape[2:] == own.shape[2:]


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A convolution weight (O, C, ...) for another number of input channels, such that activations keep their scale."""
    given = weight.shape[1]
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if channels == 1:
        return exact.sum(1, keepdim=True).to(weight.dtype)
    repeated = exact[:, torch.arange(channels) % given]
    return (repeated * (given / channels)).to(weight.dtype)


def _resized(value: Tensor, own: Tensor, table: int | PositionTable | None) -> Tensor | None:
    if table is None or value.dim() != own.dim():
        return None
    if isinstance(table, int):
        table = PositionTable(table)
    side = math.isqrt(max(own.shape[1] - table.num_prefix_tokens, 0))
    grid = (own.shape[2], own.shape[3]) if own.dim() == 4 else table.grid or (side, side)
    try:
        resized = resize_position_embedding(value, grid, num_prefix_tokens=table.num_prefix_tokens, mode=table.mode)
    except ValueError:
        return None
    return resized if resized.shape == own.shape else None


def _is_finite(value: Tensor) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return True
    return bool((value.float() if value.itemsize == 1 else value).isfinite().all())


def _refusal(source: str, target: Target, report: LoadReport, choice: Candidate) -> str:
    fits = sum(key in target.values for key in choice.state) - len(report.mismatched)
    text = f"{source} does not fit: {fits} of {len(target.values)} tensors of the model do"
    if 2 * fits < max(len(target.values), len(choice.state)):
        text += ", so this looks like a checkpoint of another model"
    return "; ".join([text, *report.differences(), *report.notes])


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


# Writing


def _description(model: nn.Module) -> dict[str, str]:
    config = getattr(model, "config", None)
    described = {"model": type(model).__name__, "format": "pt", "library": "convatlas"}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        with suppress(TypeError, ValueError):  # a config of callables or modules has no JSON form
            described["config"] = json.dumps(dataclasses.asdict(config))
    return described


def _write(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Every tensor gets memory of its own: tied ones are written twice, so that any reader finds all keys.
    plain = {
        key: value.detach().cpu().resolve_conj().clone(memory_format=torch.contiguous_format)
        for key, value in state.items()
    }
    wide = [key for key, value in plain.items() if value.dtype == torch.complex128]
    if wide and path.suffix == ".safetensors":
        raise ValueError(f"safetensors cannot hold complex128 ({_some(wide)}); convert() writes .pth and .npz")
    with atomic_path(path) as part:
        if path.suffix == ".safetensors":
            try:
                save_file(plain, part, metadata=dict(metadata))
            except SafetensorError as error:
                raise OSError(f"{path} cannot be written: {error}") from error
            return
        with open(part, "wb") as file:
            if path.suffix == ".npz":
                np.savez(file, **{key: _numpy(value) for key, value in plain.items()})  # type: ignore[arg-type]
            else:
                torch.save(plain, file)


def _numpy(value: Tensor) -> np.ndarray[Any, Any]:
    low_precision = value.is_floating_point() and value.dtype not in (torch.float16, torch.float32, torch.float64)
    return (value.float() if low_precision else value).numpy()
