"""The report of a linear interpretation: votes, rows, columns and singular vectors as pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from convatlas.analysis.linear_interpreter.interpreter import (
    CANCELLATION,
    Index,
    Interpretation,
    LinearInterpreter,
    Singular,
)
from convatlas.analysis.linear_interpreter.rules import Mode
from convatlas.report import Cell, Files, Images, Lines, Note, Part, Report, Section, Table
from convatlas.training.measure import provenance

__all__ = ["signed_picture", "study"]

#: Outputs, or inputs, that are shown where none are named.
_SHOWN = 3
_FILE = "linear_system.npz"
_COLOURS = "Red is positive, blue negative; each picture has its own scale."


def study(
    model: nn.Module,
    x0: Tensor,
    *args: Any,
    mode: Mode = "mask",
    output: Callable[[Any], Any] | None = None,
    outputs: Sequence[Index] | None = None,
    inputs: Sequence[Index] | None = None,
    singular: int = 4,
    names: Sequence[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Report:
    """Interpret a model at one input and show what the linear system consists of.

    Args:
        model: any network, in evaluation mode.
        x0: one sample, (1, C, ...).
        args: further arguments of the model.
        mode, output: as for `LinearInterpreter`.
        outputs: which outputs to explain; by default the largest of a vector, or the middle of each channel of a map.
        inputs: which inputs to send impulses from; by default the middle of each channel.
        singular: number of singular triplets; 0 leaves them out.
        names: what the outputs are called, for a vector of classes.
        folder: where to write the arrays, ``linear_system.npz``; by default they are not written.

    Raises:
        ValueError: x0 is not one sample, an index is out of range, or there is not one name for each output.
        NotImplementedError, Unsupported: as `LinearInterpreter`.
    """
    if len(x0) != 1:
        raise ValueError(f"x0 must be one sample, got a batch of {len(x0)}")
    li = LinearInterpreter(model, mode, output=output)(x0, *args)
    count = li.output[0].numel()
    if names is not None and len(names) != count:
        raise ValueError(f"names must name the {count} outputs, got {len(names)}")
    outputs = _default_outputs(li.output) if outputs is None else outputs
    inputs = _middles(x0) if inputs is None else inputs
    singular = min(singular, *li.shape)
    with warnings.catch_warnings():
        # The report says so itself.
        warnings.filterwarnings("ignore", message="A x0 and r nearly cancel")
        sections = [
            Section("The linear system", _system(li)),
            Section("Votes", _votes(li, outputs, names)),
            Section("Rows and columns", _rows_and_columns(li, outputs, inputs, names)),
        ]
        triplets = li.svd(singular, generator=torch.Generator().manual_seed(0)) if singular else None
        if triplets is not None:
            sections.append(Section("Singular vectors", _singular(triplets)))
        if folder is not None:
            li.export(Path(folder) / _FILE, rows=outputs, columns=inputs, singular=triplets)
            sections.append(Section("Files", [Files("Arrays of the linear system", {"arrays": _FILE})]))
    kind = type(model).__name__
    summary = (
        f"y = A x + r with the decisions of {kind} at this input: the biases make {li.bias_share:.1%} of the output "
        f"(|r| / |y|), A x + r differs from y by {li.error:.1e} at most."
    )
    return Report(f"Linear interpretation of {kind}", summary, sections, provenance(mode=mode))


def _default_outputs(y: Tensor) -> Sequence[Index]:
    if y.dim() > 2:
        return _middles(y)
    return [int(k) for k in y[0].flatten().topk(min(_SHOWN, y[0].numel())).indices]


def _middles(batch: Tensor) -> list[Index]:
    places = [size // 2 for size in batch.shape[2:]]
    return [(channel, *places) for channel in range(min(_SHOWN, batch.shape[1]))]


def _name(k: Index, names: Sequence[str] | None) -> str:
    if names is not None and isinstance(k, int):
        return names[k]
    return str(k if isinstance(k, int) else tuple(k))


def _at(batch: Tensor, k: Index) -> float:
    return float(batch[0].flatten()[k] if isinstance(k, int) else batch[0][tuple(k)])


def _system(li: Interpretation) -> list[Part]:
    rows, columns = li.shape
    table = Table(
        "Sizes",
        ["outputs", "inputs", "|y|", "|A x0|", "|r|", "bias share |r| / |y|", "largest error of A x0 + r"],
        [[rows, columns, *(float(v.norm()) for v in (li.output, li.linear, li.residual)), li.bias_share, li.error]],
        "Norms are 2-norms.",
    )
    parts: list[Part] = [table]
    if li.cancellation > CANCELLATION:
        parts.append(
            Note(
                f"A x0 and r nearly cancel: (|A x0| + |r|) / |y| is {li.cancellation:.3g}. Neither of them says much "
                "about the output by itself."
            )
        )
    return parts


def _votes(li: Interpretation, outputs: Sequence[Index], names: Sequence[str] | None) -> list[Part]:
    pictures, rows = [(_natural(li.x0[0]), "the input")], []
    for k in outputs:
        contribution, y, r = li.contribution(k)[0], _at(li.output, k), _at(li.residual, k)
        votes = float(contribution.sum())
        # A share of an output that is nearly zero says nothing.
        shares: list[Cell] = [votes / y, r / y] if y else [None, None]
        rows.append([_name(k, names), y, votes, r, *shares])
        pictures.append((signed_picture(contribution), f"{_name(k, names)}: {votes:.4g} of {y:.4g}"))
    columns = ["output", "y", "votes", "bias", "votes / y", "bias / y"]
    caption = "The output is the sum of what all input elements contribute (row times input), and its bias."
    return [
        Images("Contributions, summed over the channels", pictures, _COLOURS),
        Table("Where each output comes from", columns, rows, caption),
    ]


def _rows_and_columns(
    li: Interpretation, outputs: Sequence[Index], inputs: Sequence[Index], names: Sequence[str] | None
) -> list[Part]:
    rows = [(signed_picture(li.row(k)[0]), f"output {_name(k, names)}") for k in outputs]
    parts: list[Part] = [Images("Rows: the filter through which an output sees the input", rows, _COLOURS)]
    if li.output.dim() > 2:
        columns = [(signed_picture(li.column(i)[0]), f"input {_name(i, None)}") for i in inputs]
        parts.append(Images("Columns: the response to an impulse", columns, _COLOURS))
    return parts


def _singular(triplets: Singular) -> list[Part]:
    u, sigma, v = triplets
    numbers = range(1, 1 + len(sigma))
    pictures = [(signed_picture(vector), f"v{number}") for number, vector in zip(numbers, v, strict=True)]
    parts: list[Part] = [
        Lines("Singular values", "number", "singular value", {"A": (numbers, sigma.tolist())}),
        Images("Right singular vectors: what the system passes on most", pictures, _COLOURS),
    ]
    if u.dim() > 2:
        pictures = [(signed_picture(vector), f"u{number}") for number, vector in zip(numbers, u, strict=True)]
        parts.append(Images("Left singular vectors: what becomes of it", pictures, _COLOURS))
    return parts


def signed_picture(values: Tensor) -> npt.NDArray[np.uint8]:
    """Signed values as a picture (H, W, 3): white is zero, red positive, blue negative, full at the largest.

    Args:
        values: (C, H, W), summed over the channels; (C, L) and (N) are shown as they lie, of a volume (C, D, H, W) the
            middle slice.
    """
    flat = _flat(values).double().cpu().numpy()
    scaled = flat / max(float(np.abs(flat).max()), 1e-300)
    fading = 1 - np.abs(scaled)
    picture = np.stack([np.where(scaled > 0, 1, fading), fading, np.where(scaled < 0, 1, fading)], axis=-1)
    return np.rint(255 * picture).astype(np.uint8)


def _natural(values: Tensor) -> npt.NDArray[np.uint8]:
    """The input itself, from black at its smallest to white at its largest value."""
    flat = values.movedim(0, -1) if values.dim() == 3 and len(values) == 3 else _flat(values)
    spread = float(flat.max() - flat.min())
    return ((flat - flat.min()) / (spread or 1.0) * 255).round().to(torch.uint8).cpu().numpy()


def _flat(values: Tensor) -> Tensor:
    """Two axes to look at: channels are summed, of a volume the middle slice is left."""
    if values.dim() > 2:
        values = values.sum(0)
    while values.dim() > 2:
        values = values[len(values) // 2]
    return values.reshape(-1, values.shape[-1]) if values.dim() else values.reshape(1, 1)
