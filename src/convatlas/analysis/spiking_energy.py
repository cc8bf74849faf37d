"""The energy of a spiking network in the usual model: an addition where a neuron has fired, else a multiply-add.

Horowitz, "Computing's energy problem", ISSCC 2014, gives 4.6 pJ for a multiply-add and 0.9 pJ for an addition of 32-bit
numbers in 45 nm; E-3DSNN (arXiv 2412.07360) counts with them. A layer whose inputs are whole numbers from 0 up, such as
spikes, adds its weights once for each spike; every other layer multiplies. Memory traffic, which costs more than either
on real chips, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convatlas.hooks import record
from convatlas.nn.conv.sparse import SparseConvolution
from convatlas.ops.sparse import SparseTensor
from convatlas.report import Bars, Cell, Note, Report, Section, Table
from convatlas.training.measure import provenance

__all__ = ["ADDITION", "MULTIPLY_ADD", "LayerEnergy", "energy_report", "layer_energies"]

#: Energy of one operation in picojoules.
MULTIPLY_ADD = 4.6
#: Of an addition.
ADDITION = 0.9
_LAYERS = (SparseConvolution, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerEnergy:
    """One layer in one forward pass.

    Attributes:
        name: of the layer.
        macs: multiply-adds; of a sparse convolution C_in C_out for each pair of places.
        spikes: mean of the inputs where they are whole numbers from 0 up, else None.
    """

    name: str
    macs: int
    spikes: float | None

    @property
    def additions(self) -> float:
        """Additions that spikes leave of the multiply-adds; none where the inputs are no spikes."""
        return 0.0 if self.spikes is None else self.spikes * self.macs

    @property
    def picojoules(self) -> float:
        """Energy of the layer as it is."""
        return MULTIPLY_ADD * self.macs if self.spikes is None else ADDITION * self.additions

    @property
    def dense_picojoules(self) -> float:
        """Energy of the layer if its inputs were no spikes."""
        return MULTIPLY_ADD * self.macs


@torch.no_grad()
def layer_energies(model: nn.Module, *inputs: Any) -> list[LayerEnergy]:
    """Convolutions and linear layers of one forward pass in evaluation mode, in the order in which they run.

    Args:
        model: any network.
        inputs: what its forward takes.

    Raises:
        ValueError: the model has no such layer.
    """
    modules, training = dict(model.named_modules()), model.training
    try:
        with record(model.eval(), _LAYERS) as calls:
            model(*inputs)
    finally:
        model.train(training)
    found = []
    for call in calls:
        layer, given = modules[call.name], call.args[0]
        values = given.features if isinstance(given, SparseTensor) else given
        found.append(LayerEnergy(call.name, _macs(layer, given, call.output), _spikes(values)))
    return found


def _macs(layer: nn.Module, given: Any, output: Any) -> int:
    if isinstance(layer, SparseConvolution):
        return layer.rulebook(given).num_pairs * layer.in_channels * layer.out_channels
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return int(output.numel()) * int(weight[0].numel())


def _spikes(values: Tensor) -> float | None:
    whole = bool((values >= 0).all() and (values == values.round()).all())
    return float(values.double().mean()) if whole and values.numel() else None


def energy_report(model: nn.Module, *inputs: Any, name: str = "") -> Report:
    """Operations, firing and energy of each layer of a network in one forward pass.

    Args:
        model: any network; one without spikes costs multiply-adds everywhere.
        inputs: what its forward takes.
        name: of the model.

    Raises:
        ValueError: the model has no convolution or linear layer.
    """
    layers = layer_energies(model, *inputs)
    rows: list[list[Cell]] = [
        [each.name, each.macs, each.spikes, each.additions or None, each.picojoules / 1e6] for each in layers
    ]
    total, dense = sum(each.picojoules for each in layers), sum(each.dense_picojoules for each in layers)
    sums: list[Cell] = [sum(each.macs for each in layers), sum(each.additions for each in layers)]
    name = name or type(model).__name__
    less = dense / max(total, 1e-12)
    summary = f"{name} takes {total / 1e6:.4g} microjoules, {less:.3g} times less than without spikes."
    whole = Table(
        "In all",
        ["multiply-adds", "additions of spikes", "energy [uJ]", "energy without spikes [uJ]"],
        [[*sums, total / 1e6, dense / 1e6]],
    )
    columns = ["layer", "multiply-adds", "mean spikes", "additions", "energy [uJ]"]
    bars = Bars("Energy of each layer", "uJ", {each.name: each.picojoules / 1e6 for each in layers})
    note = Note(
        f"{MULTIPLY_ADD} pJ for a multiply-add, {ADDITION} pJ for an addition (32 bit, 45 nm; published). Memory "
        "traffic is not counted."
    )
    sections = [Section("Energy", [whole, bars, note]), Section("Layers", [Table("Layers", columns, rows)])]
    return Report(f"Energy of {name}", summary, sections, provenance())
