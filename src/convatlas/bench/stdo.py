"""Playing a frame by small networks for its patches, beside one large network for the whole frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from convatlas.bench.ratio import Bar, Call, Case, compare, forward, report
from convatlas.networks.registry import create_model
from convatlas.report import Report
from convatlas.restoration.delivery import Playback
from convatlas.restoration.video_chunks import PatchGrid
from convatlas.surgery import merge

__all__ = ["run"]

DELIVERED = "delivered networks"

# The smallest ratio that counts, fixed before anything was measured.
BARS = [
    Bar(
        statement="Two small networks for the patches of a frame are at least 14 times as fast as WDSR-16 on the frame",
        published="STDO (arXiv 2303.08331): 14 times faster than the state of the art in live upscaling",
        theirs="WDSR-16 on the whole frame",
        at_least=14.0,
        what="play",
        group=DELIVERED,
    )
]

#: Patches of a frame and their height and width at low resolution, in a quick run and else.
GRIDS = {True: (PatchGrid(2, 2), (54, 48)), False: (PatchGrid(4, 5), (54, 48))}
CHUNKS = 2
#: Patches that go through WDSR with its weights folded and not.
FOLDED = (4, 3, 54, 48)


def run(*, threads: Sequence[int] | None = None, quick: bool = False) -> Report:
    """Ratios of time and memory of what a client does with a frame.

    Args:
        threads: numbers of threads to measure with; by default 1 and 2.
        quick: a small frame only.
    """
    grid, (height, width) = GRIDS[quick]
    size = (grid.rows * height, grid.columns * width)
    label = f"{size[0]} x {size[1]} x 3, scale 2, {len(grid)} patches"
    cases = [
        # Other networks give other frames.
        Case(label, "play", partial(_networks, grid, size), group=DELIVERED, tolerance=math.inf),
        Case(label, "batch patches", partial(_batches, grid, size), tolerance=1 / 255),
        Case(" x ".join(map(str, FOLDED)), "fold weight norm", _folding, tolerance=1e-4),
    ]
    note = (
        "Playing: ESPCN, two networks by patches, beside WDSR-16 with folded weights and beside one ESPCN on the whole "
        "frame; results differ as the networks do. Batching: each network once a frame, or once a patch."
    )
    return report("STDO", compare(cases, threads=threads, quick=quick), BARS, note, quick=quick)


def _playback(grid: PatchGrid, size: tuple[int, int], device: torch.device) -> Playback:
    networks = [create_model("espcn_x2", in_channels=3).to(device).eval() for _ in range(CHUNKS)]
    index = (np.arange(len(grid)) % CHUNKS).astype(np.uint8)[None]
    return Playback(networks, index, grid, (2 * size[0], 2 * size[1]))


def _frame(size: tuple[int, int]) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    return np.asarray(pixels.numpy()).reshape(*size, 3)


def _networks(grid: PatchGrid, size: tuple[int, int], device: torch.device) -> dict[str, Call]:
    playback, frame = _playback(grid, size, device), _frame(size)
    x = torch.from_numpy(frame).permute(2, 0, 1)[None].to(device)

    def whole(model: nn.Module) -> Tensor:
        return (model(x / 255).clamp(0, 1) * 255).round().to(torch.uint8)[0].permute(1, 2, 0).contiguous().cpu()

    large = merge(create_model("wdsr_x2")).model.to(device).eval()
    return {
        "networks by patch": lambda: torch.from_numpy(playback.filled(frame, 0)),
        "WDSR-16 on the whole frame": forward(whole, large),
        "one of them on the whole frame": forward(whole, playback.networks[0]),
    }


def _batches(grid: PatchGrid, size: tuple[int, int], device: torch.device) -> dict[str, Call]:
    playback, frame = _playback(grid, size, device), _frame(size)

    def one_by_one() -> Tensor:
        x = torch.from_numpy(frame).permute(2, 0, 1).to(device) / 255
        patches = [
            playback.networks[int(chunk)](patch[None])
            for patch, chunk in zip(grid.cut(x), playback.index[0], strict=True)
        ]
        joined = grid.join(torch.cat(patches))
        return (joined.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu() / 255

    return {
        "a batch for each network": lambda: torch.from_numpy(playback.filled(frame, 0)) / 255,
        "patch by patch": forward(one_by_one),
    }


def _folding(device: torch.device) -> dict[str, Call]:
    model = create_model("wdsr_x2").to(device).eval()
    x = torch.rand(FOLDED, device=device)
    return {"folded": forward(merge(model).model, x), "with weight norm": forward(model, x)}
