"""Reference cases: what the authors' code returned for given weights and inputs, and how adapters use them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from convatlas.weights import load_weights


@dataclass(frozen=True)
class Case:
    """One case: the reference's configuration and its named tensors, all floating ones in ``dtype``.

    Attributes:
        system: slug of the system.
        name: name of the case.
        config: settings in the reference's own terms.
        weights: state dict of the reference.
        inputs: tensors given to the reference.
        outputs: tensors it returned; gradients included.
        dtype: floating type to compute in.
    """

    system: str
    name: str
    config: dict[str, Any]
    notes: str
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    dtype: torch.dtype

    def load(self, model: nn.Module) -> nn.Module:
        """Put the reference's weights into ``model``, in evaluation mode and the dtype of the case."""
        model = model.to(self.dtype)
        load_weights(model, self.weights)
        return model.eval()

    def only(self, *keys: str) -> None:
        """Refuse a configuration with a key that the adapter does not handle."""
        left = set(self.config) - set(keys)
        if left:
            raise KeyError(f"{self.system}/{self.name}: the adapter does not handle {sorted(left)}")

    def gradients(self, model: nn.Module, output: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of sum(output * cotangent) by ``inputs``, and by each weight under its reference name."""
        (output * self.inputs["cotangent"]).sum().backward()
        found = {name: tensor.grad for name, tensor in inputs.items()}
        parameters = dict(model.named_parameters())
        for key in self.weights:
            ours = renamed(model, key)
            if ours in parameters:
                found[f"grad_weight_{key}"] = parameters[ours].grad
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def renamed(model: nn.Module, key: str) -> str:
    """Our name of a parameter that the authors' layout calls ``key``."""
    for pattern, replacement in (
        rename for layout in getattr(model, "layouts", {}).values() for rename in layout.renames
    ):
        if key in model.state_dict():
            break
        key = re.sub(pattern, replacement, key)
    return key


def find(folder: Path) -> Iterator[Path]:
    """The description files of all cases below ``folder``, in alphabetical order."""
    return (path for path in sorted(folder.rglob("*.json")) if path.with_suffix(".safetensors").is_file())


def read(path: Path, dtype: torch.dtype = torch.float64) -> Case:
    """Read one case; tensors whose name ends in ``#complex`` hold real and imaginary parts on their last axis."""
    description = json.loads(path.read_text())
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "input": {}, "output": {}}
    for name, stored in load_file(path.with_suffix(".safetensors")).items():
        tensor = stored.to(dtype) if stored.is_floating_point() else stored
        if name.endswith("#complex"):
            name, tensor = name.removesuffix("#complex"), torch.view_as_complex(tensor.contiguous())
        group, _, key = name.partition(".")
        groups[group][key] = tensor
    return Case(
        system=description["system"],
        name=description["case"],
        config=description["config"],
        notes=description.get("notes", ""),
        weights=groups["weights"],
        inputs=groups["input"],
        outputs=groups["output"],
        dtype=dtype,
    )
