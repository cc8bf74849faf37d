"""Whole residual blocks as one operator, beside their layers in turn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.networks.convfirst import ConvFirstBlock, MBConvBlock, fold_block
from convatlas.report import Report
from convatlas.surgery import merge

__all__ = ["run"]

FOLDED, BUILT = "layers, norms folded", "layers as built"
_PUBLISHED = (
    "ConvFirst (arXiv 2404.03617): about 4 times as fast as ConvNeXt as a whole network, on a GPU in half precision"
)

# The smallest ratios that count, fixed before anything was measured. Products of matrices fill a CPU's units either
# way; what the fused form saves is memory. "Not slower" leaves room for what choosing costs.
BARS = [
    Bar(
        statement="A fused ConvFirst block is not slower than its layers with folded norms",
        published=_PUBLISHED,
        theirs=FOLDED,
        at_least=0.95,
        what="ConvFirst",
    ),
    Bar(
        statement="A fused ConvFirst block is at least 1.2 times as fast as the block as built",
        published=_PUBLISHED,
        theirs=BUILT,
        at_least=1.2,
        what="ConvFirst",
    ),
]

BLOCKS: dict[str, type[ConvFirstBlock | MBConvBlock]] = {"ConvFirst": ConvFirstBlock, "MBConv": MBConvBlock}
#: Channels and side of the maps of three stages; samples on a CPU and on a GPU.
STAGES = ((64, 56), (128, 28), (256, 14))
#: Rows of the tiles of MBConv, which is cut to save memory, not time.
ROWS = 28
SAMPLES, GPU_SAMPLES = 8, 128


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory in evaluation with channels last; on a GPU in half precision.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: one stage only.
    """
    cases = [
        Case(
            f"{channels} channels, {side} x {side}",
            kind,
            partial(_sides, kind, channels, side),
            tolerance=2e-2 if torch.cuda.is_available() else 1e-5,
        )
        for kind in BLOCKS
        for channels, side in (STAGES[:1] if quick else STAGES)
    ]
    note = (
        f"Batches of {SAMPLES}, on a GPU of {GPU_SAMPLES}; 8 channels a group, expansion 4, kernel 3. MBConv runs in "
        f"tiles of {ROWS} rows, which computes the expansion at their borders again."
    )
    return report("block fusion", compare(cases, threads=threads, quick=quick), BARS, note, quick=quick)


def _sides(kind: str, channels: int, side: int, device: torch.device) -> dict[str, Call]:
    half = device.type == "cuda"
    samples = GPU_SAMPLES if half else SAMPLES
    x = torch.randn(samples, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
    built = BLOCKS[kind](channels, channels).eval()
    fused = fold_block(built, tile=(ROWS, side) if kind == "MBConv" else None)
    folded = merge(built.layers, torch.randn(1, channels, 8, 8)).model
    models = {"fused": fused, FOLDED: _Residual(folded), BUILT: built}
    if half:
        models["torch.compile"] = torch.compile(_Residual(folded))  # type: ignore[assignment]
        x = x.half()
    calls = {}
    for name, model in models.items():
        moved = model.to(device, x.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        calls[name] = forward(moved, x)
    return calls


class _Residual(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x plus what the layers make of it."""
        y: torch.Tensor = self.layers(x)
        return x + y
