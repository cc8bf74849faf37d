"""Write any model as an ONNX file or as a torch program, and compare the file with the model before it is kept.

The model is first merged into the form that is deployed. The file is read back and run, ONNX by onnxruntime, on inputs
of several sizes; it replaces an older one only if its results are those of the model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from convatlas import files
from convatlas.errors import Unsupported, require, unknown
from convatlas.report import Cell, Report, Section, Table
from convatlas.surgery import merge

__all__ = ["Check", "Exported", "Format", "export"]

Format = Literal["onnx", "torch"]

#: Names of the position axes, by their number.
_POSITIONS = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
#: Largest difference, over the largest value, with which a file is kept: float32 along another way through the layers.
_TOLERANCE = 1e-3
#: One ONNX file is a message that cannot be larger.
_LARGEST_ONNX = 2**31 - 2**20

Shapes = tuple[tuple[int, ...], ...]
Call = Callable[[tuple[Tensor, ...]], list[Tensor]]


@dataclass(frozen=True)
class Check:
    """The file against the model on one input: shapes of the inputs, largest difference and largest value."""

    shapes: Shapes
    error: float
    largest: float


@dataclass(frozen=True)
class Exported:
    """A file that was written and compared with the model.

    Attributes:
        path: the file.
        description: the JSON file beside it, with everything below and the metadata.
        merged: names of the layers that were folded or made plain.
        dynamic: names of the axes that may have any size.
        checks: on which inputs it was compared.
        metadata: what the file holds besides the model.
    """

    path: Path
    description: Path
    merged: tuple[str, ...]
    dynamic: tuple[str, ...]
    checks: tuple[Check, ...]
    metadata: Mapping[str, Any]

    def report(self, name: str) -> Report:
        """How exact the file is, on which sizes it was tried, and what it holds."""
        rows: list[list[Cell]] = [[_shown(check.shapes), check.error, check.largest] for check in self.checks]
        worst = max(check.error for check in self.checks)
        caption = "Largest difference of the file's results from those of the model, on random inputs."
        table = Table("The file against the model", ["input", "error", "largest value"], rows, caption)
        held: list[list[Cell]] = [[key, _cut(_text(value))] for key, value in self.metadata.items()]
        about: list[list[Cell]] = [
            ["size of the file [MiB]", f"{self.path.stat().st_size / 2**20:.2f}"],
            ["layers merged", str(len(self.merged))],
            ["axes of any size", ", ".join(self.dynamic) or "none"],
        ]
        sections = [
            Section("Check", [table]),
            Section("File", [Table("The file", ["what", "value"], [*about, *held])]),
        ]
        summary = f"{self.path.name} gives the results of {name} to {worst:.1e}, on {len(rows)} sizes."
        return Report(f"Export of {name}", summary, sections)


def export(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    path: str | os.PathLike[str],
    *,
    form: Format = "onnx",
    dynamic: Sequence[str] = ("batch",),
    merged: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model in evaluation mode as a file that runs without its code; the model stays as it is.

    Args:
        model: any model of tensors.
        inputs: of an example call; what is not dynamic is fixed at their sizes.
        path: the file to write; a JSON file of its name describes it.
        form: ``onnx``, or ``torch`` for a program of `torch.export` (``.pt2``).
        dynamic: axes that may have any size: ``batch`` and, of inputs (B, C, *positions), ``length``; ``height`` and
            ``width``; ``depth``, ``height`` and ``width``.
        merged: whether to merge the model first.
        metadata: anything that JSON can hold, e.g. classes and preprocessing. It is written into the file and
            beside it.

    Raises:
        ValueError: an argument is out of range.
        Unsupported: the model cannot be traced, merged or written in this format, an axis cannot be dynamic, or the
            file computes something else.
        MissingExtra: a package of the extra ``export`` is not installed.
        OSError: the file cannot be written.
    """
    if form not in ("onnx", "torch"):
        raise unknown("form", form, ("onnx", "torch"))
    path = Path(path)
    if path.suffix == ".json":
        raise ValueError(f"path must not end in .json, which is the suffix of its description, got {path.name}")
    if form == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, extra="export", purpose="export as ONNX")
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if not given or not all(isinstance(x, Tensor) for x in given):
        raise ValueError(f"inputs must be tensors, got {', '.join(type(x).__name__ for x in given) or 'none'}")
    given = tuple(x.detach().cpu() for x in given)
    axes = [_axes(x, dynamic) for x in given]
    for name in dynamic:
        if not any(name in each for each in axes):
            raise unknown("axis of the inputs", name, {known for x in given for known in _names(x)})
    original = copy.deepcopy(model).cpu().eval()
    changed: tuple[str, ...] = ()
    deployed = original
    if merged:
        surgery = merge(original, given)
        deployed, changed = surgery.model, surgery.changed
    program = _traced(deployed, given, axes)
    told = {"library": f"convatlas {version('convatlas')}", "format": form, **(metadata or {})}
    with files.atomic_path(path) as part:
        run = _write_onnx(program, axes, told, part, given) if form == "onnx" else _write_torch(program, told, part)
        checks = tuple(_checked(original, run, given, axes))
    description = path.with_suffix(".json")
    about = {
        **told,
        "file": path.name,
        "inputs": [
            {"name": name, "shape": list(x.shape), "type": str(x.dtype).removeprefix("torch."), "dynamic": each}
            for name, x, each in zip(_arguments(deployed, len(given)), given, axes, strict=True)
        ],
        "merged layers": list(changed),
        "checks": [
            {"shapes": [list(shape) for shape in check.shapes], "error": check.error, "largest": check.largest}
            for check in checks
        ],
    }
    files.write_text(description, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return Exported(path, description, changed, tuple(dynamic), checks, told)


# -- axes --------------------------------------------------------------------------------------------------------------


def _names(x: Tensor) -> dict[str, int]:
    """Names of the axes of an input that can be dynamic, and which axis they name."""
    positions = _POSITIONS.get(x.dim() - 2, ())
    named = {"batch": 0} if x.dim() else {}
    return named | {name: axis for axis, name in enumerate(positions, start=2)}


def _axes(x: Tensor, dynamic: Sequence[str]) -> dict[str, int]:
    return {name: axis for name, axis in _names(x).items() if name in dynamic}


def _arguments(model: nn.Module, count: int) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    names = [entry.name for entry in parameters if entry.kind is not entry.VAR_POSITIONAL][:count]
    return names + [f"input_{number}" for number in range(len(names), count)]


# -- tracing and writing -----------------------------------------------------------------------------------------------


def _traced(model: nn.Module, inputs: tuple[Tensor, ...], axes: list[dict[str, int]]) -> torch.export.ExportedProgram:
    shapes = tuple(dict.fromkeys(each.values(), Dim.DYNAMIC) for each in axes)
    # Sizes 0 and 1 are traced as constants.
    example = tuple(
        _resized(x, {axis: max(2, x.shape[axis]) for axis in each.values()})
        for x, each in zip(inputs, axes, strict=True)
    )
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        names = ", ".join(dict.fromkeys(name for each in axes for name in each))
        hint = f"; of its axes, {names} were to be dynamic" if names else ""
        raise Unsupported(f"this {type(model).__name__} cannot be traced: {_reason(error)}{hint}") from error


def _write_torch(program: torch.export.ExportedProgram, metadata: Mapping[str, Any], path: Path) -> Call:
    extra = {"convatlas.json": json.dumps(metadata, ensure_ascii=False)}
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files=extra)
    with open(path, "rb") as written:
        read = torch.export.load(written).module()

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return _tensors(read(*inputs))

    return run


def _write_onnx(
    program: torch.export.ExportedProgram,
    axes: list[dict[str, int]],
    metadata: Mapping[str, Any],
    path: Path,
    inputs: tuple[Tensor, ...],
) -> Call:
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > _LARGEST_ONNX:
        raise Unsupported(
            f"the weights take {size / 2**30:.1f} GiB, and one ONNX file holds 2: choose the form 'torch'"
        )
    names = tuple({axis: name for name, axis in each.items()} for each in axes)
    try:
        with torch.no_grad(), _quiet():
            written = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=names)
    except Exception as error:
        raise Unsupported(f"the model cannot be written as ONNX: {_reason(error)}") from error
    if written is None:
        raise Unsupported("this version of torch does not write ONNX by torch.export; 2.7 does")
    for key, value in metadata.items():
        written.model.metadata_props[key] = _text(value)
    written.save(path)
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # An input that has no effect on the result is not in the graph.
    wanted = [entry.name for entry in session.get_inputs()]
    order = [entry.name for entry in written.model.graph.inputs]

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        arrays = {name: x.numpy() for name, x in zip(order, inputs, strict=True) if name in wanted}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of optional packages and of its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# -- checking ----------------------------------------------------------------------------------------------------------


def _checked(model: nn.Module, run: Call, inputs: tuple[Tensor, ...], axes: list[dict[str, int]]) -> Iterator[Check]:
    for sizes in _sizes(inputs, axes):
        example = tuple(
            _fresh(_resized(x, {axis: sizes[name] for name, axis in each.items()}))
            for x, each in zip(inputs, axes, strict=True)
        )
        shapes = tuple(tuple(x.shape) for x in example)
        shown = _shown(shapes)
        with torch.no_grad():
            try:
                expected = _tensors(model(*example))
            except ValueError:  # a size that the model itself refuses
                continue
            try:
                actual = run(example)
            except Exception as failure:
                what = f"the file does not run on {shown}, which the model takes: {_reason(failure)}"
                raise Unsupported(what) from failure
        error, largest = _difference(actual, expected)
        if not error <= _TOLERANCE * largest:
            raise Unsupported(
                f"the file computes something else on {shown}: off by {error:.1e}, values up to {largest:.1e}"
            )
        yield Check(shapes, error, largest)


def _sizes(inputs: tuple[Tensor, ...], axes: list[dict[str, int]]) -> list[dict[str, int]]:
    """Sizes of the dynamic axes to try: as given, and each axis in turn smaller or larger, the last time odd."""
    given = {name: x.shape[axis] for x, each in zip(inputs, axes, strict=True) for name, axis in each.items()}
    found = [given]
    if "batch" in given:
        found += [{**given, "batch": count} for count in (1, 3) if count != given["batch"]]
    positions = {name: size for name, size in given.items() if name != "batch"}
    for name, size in positions.items():
        found.append({**given, name: size + size // 2})
    if positions:
        found.append({**given, **{name: size + 1 - size % 2 for name, size in positions.items()}})
    return [sizes for number, sizes in enumerate(found) if sizes not in found[:number]]


def _resized(x: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """Cut to the sizes, or repeated up to them."""
    for axis, size in sizes.items():
        times = -(-size // max(x.shape[axis], 1))
        x = torch.cat([x] * times, axis).narrow(axis, 0, size)
    return x.contiguous()


def _fresh(x: Tensor) -> Tensor:
    """Other values of the same kind: random ones where any value goes, the same where they are indices."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x) if x.is_floating_point() else x


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _shown(shapes: Shapes) -> str:
    return " and ".join(" x ".join(map(str, shape)) for shape in shapes)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def _difference(actual: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Largest difference and largest value of all results."""
    if [x.shape for x in actual] != [x.shape for x in expected]:
        raise Unsupported(
            f"the file gives {len(actual)} results of shapes {[tuple(x.shape) for x in actual]}, "
            f"the model {[tuple(x.shape) for x in expected]}"
        )
    error = largest = 0.0
    for ours, theirs in zip(actual, expected, strict=True):
        if theirs.numel():
            error = max(error, float((ours.double() - theirs.double()).abs().max()))
            largest = max(largest, float(theirs.double().abs().max()))
    return error, largest
