"""Models between the time that their operations take at the peak and the time that they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from convatlas.analysis.waterline.layers import layer_costs
from convatlas.analysis.waterline.machines import Machine
from convatlas.analysis.waterline.roofline import waterline
from convatlas.report import Cell, Lines, Table
from convatlas.training.measure import latency

__all__ = ["EfficiencyGap", "GapRow", "efficiency_gap"]


@dataclass(frozen=True)
class GapRow:
    """A model on a machine: operations; ideal, attainable and measured seconds of a pass; accuracy in %, if known."""

    name: str
    ops: float
    ideal: float
    attainable: float
    measured: float | None
    accuracy: float | None

    @property
    def efficiency(self) -> float:
        """Computational efficiency: ideal over measured time, or over attainable time where none was measured."""
        return self.ideal / (self.measured or self.attainable)


@dataclass(frozen=True)
class EfficiencyGap:
    """Models between the time that their operations take at the peak and the time that they take."""

    rows: tuple[GapRow, ...]
    machine: Machine

    def table(self) -> Table:
        """One row a model."""
        columns = [
            "model",
            "operations",
            "ideal [ms]",
            "attainable [ms]",
            "measured [ms]",
            "efficiency",
            "accuracy [%]",
        ]
        rows: list[list[Cell]] = [
            [
                *(row.name, round(row.ops), 1000 * row.ideal, 1000 * row.attainable),
                *(None if row.measured is None else 1000 * row.measured, row.efficiency, row.accuracy),
            ]
            for row in self.rows
        ]
        caption = f"On {self.machine.name}. An operation is half a multiply-add."
        return Table("Efficiency gap", columns, rows, caption, {"efficiency": "max"})

    def figure(self) -> Lines:
        """A line for each model, from its ideal to its measured (or attainable) time; its length is the gap.

        The height is the accuracy, or the place in the table where not all accuracies are known.
        """
        known = all(row.accuracy is not None for row in self.rows)
        series = {}
        for place, row in enumerate(self.rows, start=1):
            height = float(row.accuracy or 0) if known else float(place)
            series[row.name] = ((1000 * row.ideal, 1000 * (row.measured or row.attainable)), (height, height))
        label = "accuracy [%]" if known else "model, in the order of the table"
        caption = "From the time of the operations at the peak to that of the model."
        return Lines("Efficiency gap", "latency [ms]", label, series, caption=caption, log_x=True)


def efficiency_gap(
    models: Mapping[str, nn.Module],
    machine: Machine,
    *,
    inputs: Tensor | tuple[Any, ...] | None = None,
    accuracies: Mapping[str, float] | None = None,
    measure: bool = True,
    repeats: int = 5,
) -> EfficiencyGap:
    """Compare models by their ideal and their measured latency.

    Args:
        models: by name.
        machine: that they run on.
        inputs: of an example call of each; by default ``model.example_inputs()``.
        accuracies: by the names of the models, in %.
        measure: whether to run the models; else attainable times stand for measured ones.
        repeats: passes that the median time is of.

    Raises:
        ValueError: there is no model, or none of its inputs.
    """
    if not models:
        raise ValueError("models must be one or several, got none")
    rows = []
    for name, model in models.items():
        if inputs is None and not callable(getattr(model, "example_inputs", None)):
            raise ValueError(f"inputs must be given: {name} has no example_inputs()")
        given = model.example_inputs() if inputs is None else inputs  # type: ignore[operator]
        args = given if isinstance(given, tuple) else (given,)
        line = waterline(layer_costs(model, *args, bytes_per_element=machine.bytes_per_element), machine)
        measured = latency(model, *args, repeats=repeats, warm_up=1) / 1000 if measure else None
        rows.append(GapRow(name, line.ops, line.ideal, line.attainable, measured, (accuracies or {}).get(name)))
    return EfficiencyGap(tuple(rows), machine)
