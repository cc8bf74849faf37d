"""What a model costs, layer by layer and on this machine, and what can be changed in it.

A report has a section for each entry of `SECTIONS`; a further way of looking at a model is one more function there.
"""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import math
import pkgutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import convatlas.nn.conv
from convatlas import catalog
from convatlas.analysis.effective_receptive_field import erf_section
from convatlas.analysis.waterline import Machine, waterline_section
from convatlas.cost import Cost, ModuleCost, cost
from convatlas.hooks import record
from convatlas.networks.base import Backbone, PublishedFile
from convatlas.ops.sparse import SparseTensor
from convatlas.report import Bars, Cell, Lines, Note, Part, Report, Section, Table
from convatlas.surgery import merge
from convatlas.surgery.selection import undisturbed
from convatlas.training.measure import count_parameters, kept_bytes, latency, peak_bytes, provenance
from convatlas.training.progress import progress

__all__ = ["SECTIONS", "Maker", "Subject", "inspect"]

#: A module that takes more than this share of all parameters or multiply-adds is shown as its parts.
_OPENED = 0.8
#: Most rows of the table of layers, and of stages.
_MOST_LAYERS, _MOST_STAGES = 500, 40
#: Samples of a batch whose throughput is measured, and of a training step, which batch normalisation needs two for.
_BATCH, _TRAINED = 8, 2
#: Seconds that a time is measured for, within a number of passes.
_SECONDS, _PASSES = 1.5, (3, 20)
#: Pairs of passes, before and after merging, whose times are compared.
_PAIRS = 7
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Subject:
    """A model that is looked at.

    Attributes:
        name: what it is called.
        model: in evaluation mode.
        inputs: of an example call.
        files: checkpoints that its authors published.
        machine: whose ceilings it is held against; None is this machine, which is measured.
        samples: of a batch on another machine.
        fused: classes of modules that run as one kernel there.
    """

    name: str
    model: nn.Module
    inputs: tuple[Any, ...]
    files: Sequence[PublishedFile] = ()
    machine: Machine | None = None
    samples: int = 128
    fused: Sequence[str] = ()

    @functools.cached_property
    def cost(self) -> Cost:
        """What a forward pass takes."""
        return cost(self.model, *self.inputs)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))

    @property
    def shape(self) -> str:
        """Sizes of the inputs in words."""
        shapes = [tuple(x.shape) for x in tree_leaves(self.inputs) if isinstance(x, Tensor)]
        return " and ".join(" x ".join(map(str, shape)) for shape in shapes) or "no tensor"

    def batch(self, count: int) -> tuple[Any, ...]:
        """The inputs of the example call, repeated to a batch of so many samples."""

        def repeated(x: Tensor | SparseTensor) -> Tensor | SparseTensor:
            if isinstance(x, SparseTensor):
                return x.repeat(count)
            return torch.cat([x] * -(-count // max(len(x), 1)))[:count] if x.dim() else x

        batch: tuple[Any, ...] = tree_map_only(
            (Tensor, SparseTensor), repeated, self.inputs, is_leaf=lambda x: isinstance(x, SparseTensor)
        )
        return batch


#: Makes a section on a model, or None where there is nothing to say.
Maker = Callable[[Subject], Section | None]


def inspect(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    *,
    name: str | None = None,
    files: Sequence[PublishedFile] = (),
    sections: Sequence[Maker] | None = None,
    machine: Machine | None = None,
    samples: int = 128,
    fused: Sequence[str] = (),
    **origin: str,
) -> Report:
    """Look at any model and report on it; the model stays as it is.

    Args:
        model: any module.
        inputs: of an example call, one sample or a batch. Its sizes decide what the layers cost.
        name: what to call the model; its class by default.
        files: checkpoints that its authors published.
        sections: what to look at; by default all of `SECTIONS`.
        machine: whose ceilings the waterline is drawn for; by default those of this machine, which are measured.
        samples: of a batch on another machine.
        fused: classes of modules that the waterline shows as one kernel each, too.
        origin: where the model comes from, for the footer of the report.

    Raises:
        ValueError: model is no module.
        Unsupported: operations depend on values, and the model is on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    subject = Subject(name or type(model).__name__, model, given, files, machine, samples, fused)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    made: list[Section] = []
    makers = SECTIONS if sections is None else sections
    try:
        with progress("looking", len(makers)) as advance:
            for maker in makers:
                section = maker(subject)
                made += [] if section is None else [section]
                advance(f"looked at {maker.__name__.strip('_').replace('_', ' ')}")
    finally:
        for module, mode in modes:
            module.training = mode
    total = subject.cost.total
    summary = (
        f"{subject.name} has {total.parameters:,} parameters and takes {total.macs:,} multiply-adds for an input of "
        f"{subject.shape}."
    )
    return Report(f"Inspection of {subject.name}", summary, made, provenance(input=subject.shape, **origin))


# -- size --------------------------------------------------------------------------------------------------------------


def _size(subject: Subject) -> Section:
    total = subject.cost.total
    held = sum(tensor.nbytes for tensor in (*subject.model.parameters(), *subject.model.buffers()))
    rows: list[list[Cell]] = [
        ["parameters", total.parameters],
        ["of these, trained", sum(p.numel() for p in subject.model.parameters() if p.requires_grad)],
        ["numbers in buffers", sum(tensor.numel() for tensor in subject.model.buffers())],
        ["weights [MiB]", held / 2**20],
        ["multiply-adds", total.macs],
        ["FLOPs", total.flops],
        ["multiply-adds of norms", total.norm_macs],
        ["multiply-adds of means", total.mean_macs],
        ["elements written", total.activations],
        ["bytes read and written", total.bytes],
    ]
    caption = (
        f"One pass over {subject.shape}. A multiply-add is two FLOPs; those of norms and means stand apart. Bytes "
        "without fusion and cache."
    )
    operations = subject.cost.operations
    parts: list[Part] = [Table("Size", ["quantity", "value"], rows, caption)]
    if len(operations) > 1:
        parts.append(Bars("Multiply-adds by operation", "multiply-adds", operations))
    return Section("Size", parts)


# -- time and memory ---------------------------------------------------------------------------------------------------


def _time_and_memory(subject: Subject) -> Section:
    single = _latency(subject.model, subject.inputs)
    count = len(subject.inputs[0]) if isinstance(subject.inputs[0], Tensor) and subject.inputs[0].dim() else 1
    rows: list[list[Cell]] = [["as given", single, 1000 * count / single]]
    try:
        several = _latency(subject.model, subject.batch(_BATCH))
        rows.append([f"batch of {_BATCH}", several, 1000 * _BATCH / several])
    except (RuntimeError, ValueError) as error:
        note = f"a batch of {_BATCH} does not run: {_first_line(error)}"
    else:
        note = "evaluation mode, medians of repeated passes, on this machine"
    speed = Table(
        "Time of a forward pass", ["input", "latency [ms]", "samples a second"], rows, note.capitalize() + "."
    )
    return Section("Time and memory", [speed, *_memory(subject)])


def _latency(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    with torch.inference_mode():
        start = time.perf_counter()
        model(*inputs)
    least, most = _PASSES
    repeats = int(min(max(_SECONDS / max(time.perf_counter() - start, 1e-4), least), most))
    return latency(model, *inputs, repeats=repeats, warm_up=1)


def _memory(subject: Subject) -> Iterator[Part]:
    weights = sum(tensor.nbytes for tensor in (*subject.model.parameters(), *subject.model.buffers()))
    with torch.inference_mode():
        peak = peak_bytes(lambda: subject.model(*subject.inputs), subject.device)
    mebi = 2**20
    rows: list[list[Cell]] = [["inference, as given", weights / mebi, peak / mebi, None, None, (weights + peak) / mebi]]
    trained = copy.deepcopy(subject.model).train()
    batch = subject.batch(_TRAINED)

    def forward() -> Tensor:
        terms = [x.float().square().mean() for x in tree_leaves(trained(*batch)) if _trains(x)]
        return torch.stack(terms).sum()

    try:
        kept = kept_bytes(forward, without=[*trained.parameters(), *trained.buffers()])
        step = peak_bytes(lambda: forward().backward(), subject.device)
    except (RuntimeError, ValueError) as error:
        yield _memory_table(rows)
        yield Note(f"The memory of a training step could not be measured: {_first_line(error)}")
        return
    gradients = sum(p.grad.nbytes for p in trained.parameters() if p.grad is not None)
    total = (weights + step) / mebi
    label = f"training step, batch of {_TRAINED}"
    rows.append([label, weights / mebi, step / mebi, kept / mebi, gradients / mebi, total])
    state = 2 * gradients
    rows.append(
        [f"{label}, with AdamW", weights / mebi, step / mebi, kept / mebi, gradients / mebi, total + state / mebi]
    )
    yield _memory_table(rows)


def _trains(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad


def _memory_table(rows: list[list[Cell]]) -> Table:
    columns = ["what", "weights [MiB]", "peak [MiB]", "kept [MiB]", "gradients [MiB]", "all [MiB]"]
    caption = (
        "Peak: most that the pass takes beyond the weights, gradients included. Kept: what the forward pass keeps for "
        "the backward pass. All: weights and peak, and with AdamW its two moments."
    )
    return Table("Memory", columns, rows, caption)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _waterline(subject: Subject) -> Section | None:
    inputs = subject.inputs if subject.machine is None else subject.batch(subject.samples)
    return waterline_section(subject.model, inputs, machine=subject.machine, fused=subject.fused)


# -- stages and layers -------------------------------------------------------------------------------------------------


class _Stage:
    """A part of the model with what its calls took; parts that are not called themselves take what theirs took."""

    def __init__(self, subject: Subject, name: str) -> None:
        module = subject.model.get_submodule(name)
        self.name = name
        self.kind = type(module).__name__
        self.parameters = count_parameters(module)
        self.parts = [f"{name}.{key}".removeprefix(".") for key, _ in module.named_children()]
        called = {entry.name: entry for entry in subject.cost.modules}
        self.calls = [called[name]] if name in called else _outermost(called, name)
        self.macs = sum(entry.macs for entry in self.calls)
        self.activations = sum(entry.activations for entry in self.calls)
        self.opens = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or len(self.parts) == 1


def _outermost(called: dict[str, ModuleCost], name: str) -> list[ModuleCost]:
    inside = [entry for entry in called.values() if entry.name.startswith(f"{name}.")]
    names = {entry.name for entry in inside}
    return [entry for entry in inside if not any(outer in names for outer in _parents(entry.name))]


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _stages(subject: Subject) -> Section | None:
    """The parts of the model from input to output; one that holds most of it is shown as its own parts."""
    total = subject.cost.total

    def opened(stage: _Stage) -> list[_Stage]:
        much = stage.macs > _OPENED * total.macs or stage.parameters > _OPENED * total.parameters
        whole = stage.name == "" or stage.parameters == total.parameters > 0
        if not stage.parts or not (whole or (stage.opens and much)):
            return [stage]
        return [part for name in stage.parts for part in opened(_Stage(subject, name))]

    stages = [stage for stage in opened(_Stage(subject, "")) if stage.calls or stage.parameters]
    if len(stages) < 2:
        return None
    rows: list[list[Cell]] = []
    for stage in stages:
        share = stage.macs / total.macs if total.macs else 0.0
        numbers: list[Cell] = [stage.parameters, stage.macs, round(100 * share, 1), stage.activations]
        rows.append([stage.name, stage.kind, *numbers])
    columns = ["stage", "kind", "parameters", "multiply-adds", "share [%]", "elements written"]
    caption = f"The first {_MOST_STAGES} of {len(rows)} are shown." if len(rows) > _MOST_STAGES else ""
    rest = {
        name: max(0, getattr(total, name) - sum(getattr(stage, name) for stage in stages))
        for name in ("parameters", "macs", "activations")
    }
    if rest["parameters"] or rest["macs"] > 0.001 * total.macs:
        share = round(100 * rest["macs"] / max(total.macs, 1), 1)
        own = ["(between them)", total.kind, rest["parameters"], rest["macs"], share, rest["activations"]]
        rows = [*rows[:_MOST_STAGES], own]
    shown = [stage for stage in stages[:_MOST_STAGES] if stage.parameters or stage.macs]
    parts: list[Part] = [Table("Stages", columns, rows[: _MOST_STAGES + 1], caption)]
    parts += [
        Bars("Where the parameters lie", "parameters", {stage.name: stage.parameters for stage in shown}),
        Bars("Where the multiply-adds lie", "multiply-adds", {stage.name: stage.macs for stage in shown}),
    ]
    return Section("Stages", parts)


def _layers(subject: Subject) -> Section:
    names = {entry.name for entry in subject.cost.modules}
    outer = {parent for name in names for parent in (*_parents(name), "")} if len(names) > 1 else set()
    layers = [entry for entry in subject.cost.modules if entry.name not in outer and entry.activations]
    shapes = _output_shapes(subject)
    total = max(subject.cost.total.macs, 1)
    rows: list[list[Cell]] = []
    for entry in layers:
        share = round(100 * entry.macs / total, 1)
        numbers: list[Cell] = [entry.parameters, entry.macs, share, entry.activations, entry.bytes]
        rows.append([entry.name or "(all)", entry.kind, shapes.get(entry.name, "-"), *numbers])
    columns = ["layer", "kind", "output", "parameters", "MACs", "share [%]", "elements written", "bytes"]
    caption = (
        "Modules without parts that write something, in the order of their names; of several calls the first output. "
        "A MAC is a multiply-add."
    )
    if len(rows) > _MOST_LAYERS:
        caption += f" The first {_MOST_LAYERS} of {len(rows)} are shown."
    depth = list(range(1, len(layers) + 1))
    sums = {
        "parameters": _running_share([entry.parameters for entry in layers]),
        "multiply-adds": _running_share([entry.macs for entry in layers]),
        "elements written": _running_share([entry.activations for entry in layers]),
    }
    along = {name: (depth, shares) for name, shares in sums.items() if shares}
    written = {"layers": (depth, [entry.activations for entry in layers])}
    figures = [
        Lines("What the layers so far take", "layer", "share of all [%]", along),
        Lines("Elements written, layer by layer", "layer", "elements", written, log_y=True),
    ]
    return Section("Layers", [*figures, Table("Layers", columns, rows[:_MOST_LAYERS], caption)])


def _running_share(counts: list[int]) -> list[float]:
    total = sum(counts)
    return [100 * part / total for part in itertools.accumulate(counts)] if total else []


def _output_shapes(subject: Subject) -> dict[str, str]:
    with undisturbed(subject.model), record(subject.model, keep=lambda tensor: tuple(tensor.shape)) as calls:
        subject.model(*subject.inputs)
    shapes: dict[str, str] = {}
    for call in calls:
        if isinstance(call.output, tuple) and call.output and all(isinstance(size, int) for size in call.output):
            shapes.setdefault(call.name, " x ".join(map(str, call.output)))
    return shapes


# -- features, changes, files ------------------------------------------------------------------------------------------


def _features(subject: Subject) -> Section | None:
    model = subject.model
    if not isinstance(model, Backbone):
        return None
    with undisturbed(model):
        features = model.forward_features(*subject.inputs)
    rows: list[list[Cell]] = [
        [index, info.channels, info.stride, " x ".join(map(str, feature.shape[2:])), feature[0].numel()]
        for index, (info, feature) in enumerate(zip(model.feature_info, features, strict=True))
    ]
    columns = ["index", "channels", "stride", "size", "elements a sample"]
    caption = f"create_model(..., out_indices=...) gives these maps; sizes for an input of {subject.shape}."
    return Section("Feature pyramid", [Table("Feature maps", columns, rows, caption)])


def _receptive_field(subject: Subject) -> Section | None:
    return erf_section(subject.model, subject.inputs)


def _changes(subject: Subject) -> Section:
    return Section("What can be changed", [*_merging(subject), *_convolutions(subject)])


def _merging(subject: Subject) -> Iterator[Part]:
    try:
        surgery = merge(subject.model, subject.inputs)
    except ValueError as error:
        yield Note(f"merge refuses: {error}")
        return
    if not surgery.changed:
        yield Note("merge finds nothing to fold: the model has its deployed form already.")
        return
    merged = cost(surgery.model, *subject.inputs)
    before, after = subject.cost, merged
    models = (subject.model, surgery.model)
    latency(surgery.model, *subject.inputs, repeats=1, warm_up=0)  # plans of the convolutions
    pairs = [[latency(model, *subject.inputs, repeats=1, warm_up=0) for model in models] for _ in range(_PAIRS)]
    low, ratio, high = statistics.quantiles([one / two for one, two in pairs], n=4)
    rows: list[list[Cell]] = [
        ["layers that compute", _computing(before), _computing(after)],
        ["parameters", before.total.parameters, after.total.parameters],
        ["multiply-adds", before.total.macs, after.total.macs],
        ["multiply-adds of norms", before.total.norm_macs, after.total.norm_macs],
        ["elements written", before.total.activations, after.total.activations],
        ["latency [ms]", *(statistics.median(column) for column in zip(*pairs, strict=True))],
    ]
    caption = (
        f"surgery.merge folds {len(surgery.changed)} layers into others or makes them plain; the result computes the "
        f"same. It runs {ratio:.2f} times as fast ({low:.2f} to {high:.2f} in the middle half of {_PAIRS} pairs)."
    )
    yield Table("Merged for use", ["quantity", "as it is", "merged"], rows, caption)
    kinds = Counter(type(subject.model.get_submodule(name)).__name__ for name in surgery.changed)
    yield Table(
        "Layers that merge takes away or makes plain", ["kind", "layers"], [[*item] for item in kinds.most_common()]
    )
    if surgery.skipped:
        reasons: dict[str, list[str]] = {}
        for name, reason in surgery.skipped:
            reasons.setdefault(reason, []).append(name)
        left: list[list[Cell]] = [[names[0], len(names), reason] for reason, names in reasons.items()]
        yield Table("Layers that merge leaves", ["first", "layers", "reason"], left)


def _computing(counted: Cost) -> int:
    names = [entry.name for entry in counted.modules if entry.activations]
    outer = {parent for name in names for parent in _parents(name)} | {""}
    return len([name for name in names if name not in outer])


def _convolutions(subject: Subject) -> Iterator[Part]:
    called = {entry.name: entry for entry in subject.cost.modules}
    convs = [(name, module) for name, module in subject.model.named_modules() if type(module) in _CONVS]
    if not convs:
        yield Note("The model has no plain convolution that another could take the place of.")
        return
    kinds: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, conv in convs:
        kinds.setdefault(_conv_kind(conv), []).append((name, conv))
    total = max(subject.cost.total.macs, 1)
    rows: list[list[Cell]] = []
    for kind, some in sorted(kinds.items(), key=lambda item: -sum(count_parameters(conv) for _, conv in item[1])):
        macs = sum(called[name].macs for name, _ in some if name in called)
        rows.append(
            [kind, len(some), sum(count_parameters(conv) for _, conv in some), macs, round(100 * macs / total, 1)]
        )
    columns = ["convolution", "layers", "parameters", "multiply-adds", "share [%]"]
    caption = "What surgery.swap(model, torch.nn.Conv2d, ...) can select."
    yield Table("Convolutions", columns, rows, caption)
    present = {type(conv) for _, conv in convs}
    others = tuple(set(_CONVS) - present)
    if taken := [_takes(kind, convs) for kind in _conv_like() if not issubclass(kind, others)]:
        caption = "With default options, by their geometry; surgery.swap also tries each on an example call."
        yield Table(
            "Layers that can take their place", ["layer", "of convolutions", "reason for the others"], taken, caption
        )
    empty = [
        name for name, module in subject.model.named_modules() if type(module) is nn.Identity and "attention" in name
    ]
    if empty:
        yield Note(
            f"{len(empty)} slots for channel attention are empty (the first is {empty[0]}): "
            'surgery.insert(model, ECA, at="*.attention") fills them.'
        )


def _conv_kind(conv: Any) -> str:
    kernel = " x ".join(map(str, conv.kernel_size))
    points = math.prod(conv.kernel_size) == 1
    depthwise = conv.groups == conv.in_channels > 1
    how = (
        "depthwise" if depthwise else f"{conv.groups} groups" if conv.groups > 1 else "pointwise" if points else "dense"
    )
    return f"{kernel} {how}{', transposed' if conv.transposed else ''}"


def _conv_like() -> Iterator[type[Any]]:
    """The layers of `convatlas.nn.conv` that take an existing convolution's place."""
    for info in pkgutil.iter_modules(convatlas.nn.conv.__path__):
        module = importlib.import_module(f"convatlas.nn.conv.{info.name}")
        for name in catalog.public_names(f"nn.conv.{info.name}"):
            kind = getattr(module, name)
            if isinstance(kind, type) and issubclass(kind, nn.Module) and callable(getattr(kind, "from_conv", None)):
                yield kind


def _takes(kind: type[Any], convs: list[tuple[str, nn.Module]]) -> list[Cell]:
    options = [
        entry.name
        for entry in signature(kind).parameters.values()
        if entry.kind is entry.KEYWORD_ONLY and entry.default is entry.empty
    ]
    if options:
        return [kind.__name__, None, f"needs the option {', '.join(options)}"]
    fits, reasons = 0, Counter[str]()
    for _, conv in convs:
        try:
            kind.from_conv(conv)
            fits += 1
        except ValueError as error:  # as Unsupported
            reasons[str(error)] += 1
    reason = reasons.most_common(1)[0][0] if reasons else None
    return [kind.__name__, f"{fits} of {len(convs)}", reason]


def _published(subject: Subject) -> Section | None:
    if not subject.files:
        return None
    rows: list[list[Cell]] = []
    for file in subject.files:
        figures = ", ".join(f"{name}: {value:g}" for name, value in file.figures.items())
        rows.append([file.url, file.licence, figures, file.verified, "by hand" if file.by_hand else "by itself"])
    columns = ["file", "licence", "published figures", "verified", "fetched"]
    return Section("Published weights", [Table("Files of the authors", columns, rows)])


#: What a report says of a model, in this order.
SECTIONS: list[Maker] = [
    _size,
    _time_and_memory,
    _waterline,
    _stages,
    _features,
    _receptive_field,
    _changes,
    _published,
    _layers,
]
