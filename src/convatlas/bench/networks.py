"""Whole networks beside their composition in plain torch, merged, in both layouts, and beside timm where it imports."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from convatlas.bench.ratio import Bar, Call, Case, compare, report
from convatlas.catalog import model_module
from convatlas.errors import CheckpointError, Unsupported
from convatlas.networks.registry import create_model
from convatlas.ops.backend import plainly
from convatlas.report import Report
from convatlas.surgery import merge
from convatlas.weights import load_weights

__all__ = ["run"]

MODELS = ("inceptionnext_atto", "resnet18", "eca_resnet18")
#: Names under which timm has a network, where they are not ours.
TIMM = {
    "inceptionnext_atto": "inception_next_atto",
    "inceptionnext_tiny": "inception_next_tiny",
    "inceptionnext_small": "inception_next_small",
    "inceptionnext_base": "inception_next_base",
    "mobilenet_v2": "mobilenetv2_100",
}
BUILT, MERGED, LAST, BOTH, THEIRS = "as built", "merged", "channels last", "merged, channels last", "timm"
PLAIN = "plain torch"
#: What is compared with what: (ours, theirs).
PAIRS = ((BUILT, PLAIN), (MERGED, BUILT), (LAST, BUILT), (BOTH, BUILT), (BUILT, THEIRS), (BOTH, THEIRS))
#: Float32 through dozens of layers, along another way; in the backward pass rectifiers near zero also turn.
TOLERANCES = {"forward": 1e-3, "forward and backward": 3e-2}
BARS = [
    Bar(
        statement=f"No network is slower than its composition in plain torch, {what}",
        published="nothing is published; a fast form has to pay",
        theirs=PLAIN,
        at_least=0.95,
        what=what,
    )
    for what in TOLERANCES
] + [
    Bar(
        statement="No network is slower merged than as it is built",
        published="what is merged computes less",
        theirs=BUILT,
        ours=MERGED,
        at_least=0.95,
        what="forward",
    )
]


def run(
    *, threads: Sequence[int] | None = None, quick: bool = False, models: Sequence[str] = MODELS, batch: int = 4
) -> Report:
    """Ratios of time and memory of whole networks, forward, and forward and backward.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one sample, and fewer rounds.
        models: names as `create_model` takes them.
        batch: samples of one pass.

    Raises:
        UnknownName: there is no such model.
        ValueError: no model is named.
    """
    for name in models:
        model_module(name)
    if not models:
        raise ValueError("models must be one name or several, got none")
    samples = 1 if quick else batch
    cases = [
        Case(f"{name}, batch {samples}", what, partial(_sides, name, samples, what), PAIRS, tolerance=tolerance)
        for what, tolerance in TOLERANCES.items()
        for name in models
    ]
    notes = [
        "All networks are in evaluation mode with random weights, on inputs of the published size. Plain torch: the "
        "same network, each operator in the form of torch's own calls or its literal definition. The backward pass "
        "goes to the input and to all weights, of which merging leaves fewer; the gradient of the input is compared."
    ]
    if importlib.util.find_spec("timm") is None:
        notes.append("timm is not installed here, so it is not compared with.")
    return report("networks", compare(cases, threads=threads, quick=quick), BARS, *notes, quick=quick)


def _sides(name: str, batch: int, what: str, device: torch.device) -> dict[str, Call]:
    built = create_model(name).to(device).eval()
    inputs: tuple[Any, ...] = tree_map_only(Tensor, lambda x: x.to(device), built.example_inputs(batch))  # type: ignore[operator]
    theirs = _of_timm(name, built)
    networks = {BUILT: built, PLAIN: built}
    with contextlib.suppress(Unsupported):
        networks[MERGED] = merge(built, inputs).model
    for key, source in ((LAST, BUILT), (BOTH, MERGED)):
        # Torch has channels last for the weights of images only.
        if source in networks and not any(weight.dim() == 5 for weight in networks[source].parameters()):
            moved = copy.deepcopy(networks[source]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            networks[key] = moved
    if theirs is not None:
        networks[THEIRS] = theirs.to(device).eval()
    calls = {
        key: _call(network, _laid_out(inputs, "channels last" in key), backward=what != "forward")
        for key, network in networks.items()
    }
    return {**calls, PLAIN: _plain(calls[PLAIN])}


def _laid_out(inputs: tuple[Any, ...], last: bool) -> tuple[Any, ...]:
    def laid_out(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if last and x.dim() == 4 else x

    moved: tuple[Any, ...] = tree_map_only(Tensor, laid_out, inputs)
    return moved


def _call(network: nn.Module, inputs: tuple[Any, ...], *, backward: bool) -> Call:
    if not backward:

        def forward() -> Any:
            with torch.inference_mode():
                return network(*inputs)

        return forward
    leaves = [x.requires_grad_() for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    wanted = [*leaves, *network.parameters()]

    def both() -> list[Tensor]:
        result = sum(x.float().square().sum() for x in tree_leaves(network(*inputs)) if isinstance(x, Tensor))
        # A published layout may hold parameters that its forward pass does not use.
        gradients = torch.autograd.grad(result, wanted, allow_unused=True)  # type: ignore[arg-type]
        return [gradient for gradient in gradients[: len(leaves)] if gradient is not None]

    return both


def _plain(call: Call) -> Call:
    def plain() -> Any:
        with plainly():
            return call()

    return plain


def _of_timm(name: str, ours: nn.Module) -> nn.Module | None:
    """Timm's network of that name, whose weights ours gets; None where there is none or the weights do not fit."""
    if importlib.util.find_spec("timm") is None:
        return None
    timm: Any = importlib.import_module("timm")
    other = TIMM.get(name, name)
    if not timm.is_model(other):
        return None
    theirs: nn.Module = timm.create_model(other)
    try:
        load_weights(ours, theirs.state_dict())
    except CheckpointError:
        return None
    return theirs
