"""Which part of a checkpoint, under which key prefix and in which layout, belongs to a model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convatlas.errors import CheckpointError, unknown

__all__ = ["OWN_LAYOUT", "Candidate", "Layout", "Target", "best_candidate", "clean_key"]

#: Name of the layout of a model's own state dict.
OWN_LAYOUT = "convatlas"

_PREFIX_DEPTH = 4
# What torch.compile, FSDP and activation checkpointing put into keys.
_INSERTED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGE = re.compile(r"(.*[._])?ema([._].*)?")
_LIGHTNING_UNAVERAGED = "current_model_state"  # beside it, the state_dict of the file holds the average


@dataclass(frozen=True)
class Layout:
    """How the keys of a foreign checkpoint map to ours.

    Attributes:
        renames: pairs of a regular expression and its replacement, text or a function of the match, applied in order by
            `re.sub` to every key. A key that becomes empty is dropped.
        function: called with the renamed state dict and the model; returns the state dict in our layout. For what
            names cannot say: splitting, joining, permuting. It raises any error on keys of another layout; the text of
            a `CheckpointError` reaches the user.
    """

    renames: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = ()
    function: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None

    def apply(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The state dict in our layout.

        Raises:
            ValueError: two keys get the same name.
        """
        renamed: dict[str, Tensor] = {}
        for key, tensor in state.items():
            name = key
            for pattern, replacement in self.renames:
                name = re.sub(pattern, replacement, name)
            if name in renamed:
                raise ValueError(f"two tensors of the checkpoint map to {name}, one of them is {key}")
            if name:
                renamed[name] = tensor
        return renamed if self.function is None else self.function(renamed, model)


@dataclass(frozen=True)
class Target:
    """The tensors of a model.

    Attributes:
        values: parameters and persistent buffers by key, without what wrappers put into keys.
        names: the keys that the model itself uses for them.
    """

    values: dict[str, Tensor]
    names: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Target:
        """Collect them.

        Raises:
            ValueError: the model has no memory yet (meta device or lazy layers).
        """
        values, names = {}, {}
        for name, value in model.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                continue  # extra state of a module, which is no weight
            if nn.parameter.is_lazy(value):
                raise ValueError(f"model must be complete, but {name} has no shape yet: run one batch through it first")
            if value.is_meta:
                raise ValueError(f"model must have memory, but {name} is on the meta device: build it on a real device")
            values[clean_key(name)], names[clean_key(name)] = value, name
        return cls(values, names)


@dataclass(frozen=True)
class Candidate:
    """One way to read a checkpoint.

    Attributes:
        part: name of the part; ``""`` is the whole file.
        prefix: what is cut off from its keys.
        layout: name of the layout.
        state: its tensors in the model's layout.
        ignored: keys of the part outside the prefix.
        score: keys that fit by name and shape, keys that fit by name, and minus the keys left over.
    """

    part: str
    prefix: str
    layout: str
    state: dict[str, Tensor]
    ignored: tuple[str, ...]
    score: tuple[int, int, int]

    @property
    def place(self) -> str:
        """Part and prefix in one name."""
        return ".".join(name for name in (self.part, self.prefix.rstrip(".")) if name) or "the top level"


def clean_key(key: str) -> str:
    """A key without what torch.compile, FSDP and activation checkpointing put into it."""
    return _INSERTED.sub("", key)


def best_candidate(
    model: nn.Module, target: Target, source: str, parts: Mapping[str, dict[str, Tensor]], part: str | None = None
) -> tuple[Candidate, tuple[str, ...]]:
    """The way of reading a checkpoint in which most keys fit by name and shape.

    Our own layout goes before the model's foreign ones, and an averaged copy (EMA) before a plain one.

    Args:
        model: what is to be filled; its ``layouts`` are tried.
        target: its tensors.
        source: what to call the checkpoint in errors.
        parts: state dicts by name.
        part: consider only this part, or only keys with this prefix.

    Returns:
        The candidate, and remarks about what else would fit or why a layout did not.

    Raises:
        CheckpointError: there is nothing to load, or the model fits in several places equally well.
        UnknownName: there is no such part.
    """
    problems: list[str] = []
    candidates = list(_candidates(model, target, parts, part, problems))
    if not candidates and part is not None:
        known = {name for name in parts if name} | {key.partition(".")[0] for key in parts.get("", {})}
        raise unknown(f"part of {source}", part, known)
    if not candidates:
        raise CheckpointError(f"{source} holds no weights")
    best = max(candidate.score for candidate in candidates)
    equal = [candidate for candidate in candidates if candidate.score == best]
    equal = [candidate for candidate in equal if candidate.layout == equal[0].layout]
    averaged = [candidate for candidate in equal if _AVERAGE.fullmatch(candidate.place)]
    if not averaged and any(candidate.part == _LIGHTNING_UNAVERAGED for candidate in equal):
        averaged = [candidate for candidate in equal if candidate.part != _LIGHTNING_UNAVERAGED]
    first, *rest = averaged or equal
    rivals = [other.place for other in rest if not _same(other.state, first.state)]
    if rivals and 2 * best[0] >= len(target.values):
        raise CheckpointError(f"{source} fits in several places: {', '.join([first.place, *rivals])}; choose by part=")
    plain = [other.place for other in equal if other not in averaged] if averaged else []
    remarks = [f"{', '.join(plain)} would fit as well (part=)"] if plain else []
    return first, (*remarks, *dict.fromkeys(problems))


def _candidates(
    model: nn.Module, target: Target, parts: Mapping[str, dict[str, Tensor]], part: str | None, problems: list[str]
) -> Iterator[Candidate]:
    foreign: Mapping[str, Layout] = getattr(model, "layouts", {})
    for layout_name, layout in ((OWN_LAYOUT, Layout()), *foreign.items()):
        complete = False
        for part_name, prefix, state in _places(target, parts, part):
            inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            try:
                mapped = _weight_norm_names(layout.apply(inner, model), target)
            except CheckpointError as error:
                problems.append(f"layout {layout_name}: {error}")
                continue
            except Exception:
                continue  # a layout's function need not make sense of keys that are not in it
            named = [key for key in mapped if key in target.values]
            exact = sum(mapped[key].shape == target.values[key].shape for key in named)
            ignored = tuple(key for key in state if not key.startswith(prefix))
            complete = complete or (exact == len(mapped) == len(target.values) and not ignored)
            score = (exact, len(named), len(named) - len(mapped) - len(ignored))
            yield Candidate(part_name, prefix, layout_name, mapped, ignored, score)
        if complete:
            return


def _places(
    target: Target, parts: Mapping[str, dict[str, Tensor]], part: str | None
) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Every part with every key prefix under which enough tensors lie; then parts that lie side by side, as one."""
    clean = {name: {clean_key(key): value for key, value in state.items()} for name, state in parts.items()}
    for name, state in clean.items():
        for prefix in ("", *_prefixes(state, target)):
            place = f"{name}.{prefix}" if name else prefix
            if part is None or part == name or f"{place.rstrip('.')}.".startswith(f"{part}."):
                yield name, prefix, state
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in parts):
        start = f"{parent}." if parent else ""
        inner = {name.removeprefix(start): state for name, state in clean.items() if name.startswith(start) and name}
        if len(inner) > 1 and part in (None, parent):
            yield parent, "", {f"{name}.{key}": value for name, state in inner.items() for key, value in state.items()}


def _prefixes(state: Mapping[str, Tensor], target: Target) -> list[str]:
    counts: Counter[str] = Counter()
    for key in state:
        words = key.split(".")[:-1]
        counts.update(".".join(words[:depth]) + "." for depth in range(1, min(len(words), _PREFIX_DEPTH) + 1))
    enough = min(len(state), math.ceil(len(target.values) / 4))
    return [prefix for prefix, count in counts.items() if count >= enough]


def _weight_norm_names(state: dict[str, Tensor], target: Target) -> dict[str, Tensor]:
    """Old and new names of weight normalisation: ``weight_g`` and ``parametrizations.weight.original0``."""
    renamed = {}
    for key, value in state.items():
        name = key
        if key not in target.values:
            for old, new in (("_g", "original0"), ("_v", "original1")):
                newer = re.sub(rf"(?<![^.])(\w+){old}$", rf"parametrizations.\1.{new}", key)
                older = re.sub(rf"(?<![^.])parametrizations\.(\w+)\.{new}$", rf"\1{old}", key)
                name = next((other for other in (newer, older) if other in target.values), name)
        renamed[name] = value
    return renamed


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        value.dtype == second[key].dtype and torch.equal(value, second[key]) for key, value in first.items()
    )
