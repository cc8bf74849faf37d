"""Kernels against the ceilings of a machine: one by one, in a row, and as a section of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convatlas.analysis.waterline.layers import LayerCost, LayerCosts, layer_costs
from convatlas.analysis.waterline.machines import Machine, measure_machine
from convatlas.report import Bars, Cell, Lines, Note, Part, Section, Table

__all__ = ["Bar", "Waterline", "roofline", "waterline", "waterline_section"]

#: Most rows of the tables.
_MOST_STAGES, _MOST_DROWNING, _MOST_KERNELS = 40, 20, 500


@dataclass(frozen=True)
class Bar:
    """A kernel on a machine.

    Attributes:
        layer: what it takes.
        ideal: seconds that its operations take at the peak.
        traffic: seconds that its bytes take at the full bandwidth.
    """

    layer: LayerCost
    ideal: float
    traffic: float

    @property
    def attainable(self) -> float:
        """Seconds that it takes at least."""
        return max(self.ideal, self.traffic)

    @property
    def height(self) -> float:
        """Operational intensity over the machine's balance; below 1 the kernel is under water, bound by memory."""
        return self.ideal / self.traffic if self.traffic else math.inf

    @property
    def efficiency(self) -> float:
        """Attainable share of the peak: min(1, height)."""
        return self.ideal / self.attainable if self.attainable else 1.0


def roofline(costs: LayerCosts | Sequence[LayerCost], machine: Machine) -> tuple[Bar, ...]:
    """Ideal and attainable time of each kernel on its own: t = max(ops / peak, bytes / bandwidth)."""
    layers = costs.layers if isinstance(costs, LayerCosts) else costs
    return tuple(Bar(layer, layer.ops / machine.peak_ops, layer.bytes / machine.bandwidth) for layer in layers)


@dataclass(frozen=True)
class Waterline:
    """The roofline of kernels that run one after the other.

    In the picture each kernel is a bar, as wide as its ideal time and as high as its operational intensity over the
    machine's balance. A bar above the line at 1 takes its width in time, one below width / height.

    Attributes:
        bars: in the order in which they run.
        machine: whose ceilings they are held against.
    """

    bars: tuple[Bar, ...]
    machine: Machine

    @property
    def ops(self) -> float:
        """Operations of all kernels."""
        return math.fsum(bar.layer.ops for bar in self.bars)

    @property
    def bytes(self) -> float:
        """Memory traffic of all kernels."""
        return math.fsum(bar.layer.bytes for bar in self.bars)

    @property
    def ideal(self) -> float:
        """Seconds of all operations at the peak."""
        return math.fsum(bar.ideal for bar in self.bars)

    @property
    def attainable(self) -> float:
        """Seconds that the kernels take at least, one after the other."""
        return math.fsum(bar.attainable for bar in self.bars)

    @property
    def efficiency(self) -> float:
        """Attainable efficiency E: ideal over attainable time."""
        return self.ideal / self.attainable if self.attainable else 1.0

    @property
    def measured(self) -> float | None:
        """Seconds measured, where every kernel was."""
        times = [bar.layer.seconds for bar in self.bars]
        return math.fsum(t for t in times if t is not None) if times and None not in times else None

    @property
    def measured_efficiency(self) -> float | None:
        """Ideal over measured time; above 1 where caches keep what the model of traffic sends to memory."""
        return self.ideal / self.measured if self.measured else None

    @property
    def quality(self) -> float | None:
        """Measured over attainable efficiency: a low one blames the kernels, a low `efficiency` the model."""
        return None if self.measured_efficiency is None else self.measured_efficiency / self.efficiency

    def drowning(self) -> list[tuple[Bar, float]]:
        """The kernels under water, each with its share of the time lost there, largest first."""
        lost = {index: bar.attainable - bar.ideal for index, bar in enumerate(self.bars) if bar.height < 1}
        total = math.fsum(lost.values())
        return [(self.bars[index], lost[index] / total) for index in sorted(lost, key=lambda index: -lost[index])]

    def stages(self) -> dict[str, Waterline]:
        """The waterline of each stage: of the modules whose names begin alike, up to a first number."""
        found: dict[str, list[Bar]] = {}
        for bar in self.bars:
            found.setdefault(_stage(bar.layer.name), []).append(bar)
        return {name: Waterline(tuple(bars), self.machine) for name, bars in found.items()}

    def table(self) -> Table:
        """One row a kernel."""
        columns = ["kernel", "kind", "operations", "bytes", "ops a byte", "over balance", "ideal [us]"]
        rows: list[list[Cell]] = [
            [
                *(bar.layer.name, bar.layer.kind, round(bar.layer.ops), round(bar.layer.bytes)),
                *(bar.layer.intensity, bar.height, 1e6 * bar.ideal, 1e6 * bar.attainable, _micro(bar.layer.seconds)),
            ]
            for bar in self.bars
        ]
        caption = (
            f"On {self.machine.name}. An operation is half a multiply-add; below 1 over the balance memory bounds."
        )
        return Table("Kernels", [*columns, "attainable [us]", "measured [us]"], rows, caption)

    def parts(self, fused: Waterline | None = None) -> list[Part]:
        """The picture and the tables of a report; with the same pass in fused units as a second curve."""
        series = {"layer by layer": self._outline()}
        if fused is not None:
            series["fused"] = fused._outline()
        series["waterline"] = [0.0, 100.0], [1.0, 1.0]
        caption = "In the order in which they run. Above the line the operations bound a kernel, below it the memory."
        picture = Lines("Waterline", "share of the operations [%]", "intensity over balance", series, True, caption)
        drowning = self.drowning()
        parts: list[Part] = [picture]
        if drowning:
            shown = {_unique(bar, index): 100 * share for index, (bar, share) in enumerate(drowning[:10])}
            parts.append(Bars("Kernels that lose most time to memory", "share of the time lost [%]", shown))
        totals = {"layer by layer": self} if fused is None else {"layer by layer": self, "fused": fused}
        columns = ["kernels", "number", "operations", "bytes", "ops a byte"]
        columns += ["ideal [ms]", "attainable [ms]", "measured [ms]"]
        whole: list[list[Cell]] = [[name, len(line.bars), *line._numbers()] for name, line in totals.items()]
        caption = (
            f"On {self.machine.name}: {self.machine.peak_ops:.3g} operations a second, {self.machine.bandwidth:.3g} "
            f"bytes a second, balance {self.machine.balance:.3g}. E: ideal over attainable time; kernel quality: "
            "attainable over measured time."
        )
        shares = ["E attainable", "E measured", "kernel quality"]
        parts.append(Table("Efficiency", [*columns, *shares], whole, caption))
        stages = list(self.stages().items())[:_MOST_STAGES]
        rows: list[list[Cell]] = [[name, len(line.bars), *line._numbers()] for name, line in stages]
        parts.append(Table("Efficiency of the stages", ["stage", *columns[1:], *shares], rows))
        if len(stages) > 1:
            parts.insert(1, _gap([line for _, line in stages]))
        if drowning:
            below: list[list[Cell]] = [
                [bar.layer.name, bar.layer.kind, bar.layer.intensity, bar.height, 100 * share]
                for bar, share in drowning[:_MOST_DROWNING]
            ]
            names = ["kernel", "kind", "ops a byte", "over balance", "share of the time lost [%]"]
            text = f"{len(drowning)} of {len(self.bars)} kernels are under water; the worst are shown."
            parts.append(Table("Drowning kernels", names, below, text))
        return [*parts, self.table()]

    def _numbers(self) -> list[Cell]:
        times = [1000 * self.ideal, 1000 * self.attainable, None if self.measured is None else 1000 * self.measured]
        intensity = self.ops / self.bytes if self.bytes else math.inf
        shares = [self.efficiency, self.measured_efficiency, self.quality]
        return [round(self.ops), round(self.bytes), intensity, *times, *shares]

    def _outline(self) -> tuple[list[float], list[float]]:
        x, y, at = [], [], 0.0
        for bar in self.bars:
            if bar.ideal:
                x += [at, at := at + 100 * bar.ideal / self.ideal]
                y += [bar.height] * 2
        return x, y


def _gap(stages: Sequence[Waterline]) -> Lines:
    """How far the times of the stages are from those of their operations."""
    numbers = range(1, 1 + len(stages))
    times = {"ideal": [line.ideal for line in stages], "attainable": [line.attainable for line in stages]}
    measured = [line.measured for line in stages if line.measured is not None]
    if len(measured) == len(stages):
        times["measured"] = measured
    series = {name: (numbers, [1000 * second for second in seconds]) for name, seconds in times.items()}
    caption = "The distance from the ideal time is the gap; numbers are rows of the table of stages."
    return Lines("Efficiency gap of the stages", "stage", "time [ms]", series, True, caption)


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else 1e6 * seconds


def _unique(bar: Bar, index: int) -> str:
    return f"{index + 1}. {bar.layer.name}"


def _stage(name: str) -> str:
    words = name.split(" ")[0].split(".")
    return ".".join(words[: 2 if len(words) > 1 and words[1].isdecimal() else 1])


def waterline(
    costs: LayerCosts,
    machine: Machine,
    *,
    fused: Sequence[type[nn.Module] | str] = (),
    halo: tuple[int, int] | None = None,
) -> Waterline:
    """Hold the kernels of a forward pass against the ceilings of a machine.

    Args:
        costs: what `layer_costs` found; with measured times also the measured efficiency is told.
        machine: one of `MACHINES`, a measured one or your own.
        fused: classes of modules, their names or names of modules, each call of which is one kernel.
        halo: see `LayerCosts.fused`.

    Raises:
        UnknownName: see `LayerCosts.fused`.
    """
    layers = costs.fused(fused, halo) if fused else costs.layers
    return Waterline(roofline(layers, machine), machine)


def waterline_section(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    machine: Machine | None = None,
    fused: Sequence[type[nn.Module] | str] = (),
) -> Section | None:
    """The waterline of a model as a section of a report; None where it has no kernel with multiply-adds.

    Args:
        model: any module.
        inputs: of an example call.
        machine: whose ceilings count; by default those of this machine, and the kernels are timed on it.
        fused: what a second curve takes as one kernel each; see `waterline`.

    Raises:
        UnknownName: see `LayerCosts.fused`.
    """
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    here = machine is None and not tensor.is_meta
    if machine is None:
        machine = measure_machine(tensor.dtype, "cpu" if tensor.is_meta else tensor.device)
    costs = layer_costs(model, *inputs, bytes_per_element=machine.bytes_per_element, measure=here)
    if not costs.layers:
        return None
    line = waterline(costs, machine)
    note = Note(
        f"With every kernel as fast as its operations and its memory traffic allow, the model would run at "
        f"{line.efficiency:.0%} of the peak of {machine.name}."
    )
    return Section("Efficiency", [note, *line.parts(waterline(costs, machine, fused=fused) if fused else None)])
