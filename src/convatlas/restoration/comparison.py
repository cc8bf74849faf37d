"""What the reports of every restoration task share: cost of a frame, curves, pictures side by side, a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from convatlas.report import Cell, Images, Lines, Part, Report, Scatter, Section, Table
from convatlas.restoration.evaluation import macs_per_pixel
from convatlas.training.comparison import files_section, listed, pareto_front
from convatlas.training.measure import count_parameters, latency, provenance
from convatlas.training.run import Run

__all__ = ["MOST_PICTURES", "compared", "cost_table", "curves", "row_of", "signed"]

Array = npt.NDArray[Any]

#: Pictures that a report shows.
MOST_PICTURES = 12
#: Height and width of the frame that is timed.
_FRAME = (180, 320)
#: Pixels between pictures side by side.
_GAP = 4


def compared(
    tasks: Mapping[str, Any],
    runs: Mapping[str, Run],
    folder: Path,
    *,
    means: Table,
    psnr: Mapping[str, float],
    before: tuple[str, str, float],
    rows: Sequence[tuple[str, Sequence[Array]]],
    images: int,
) -> Report:
    """Several networks that were trained on the same images under the same budget, side by side.

    Args:
        tasks, runs: by label.
        folder: that the runs lie in.
        means: table of the quality.
        psnr: of each network, in dB.
        before: what stands beside the networks, in a caption and in a sentence, and its PSNR.
        rows: name of an image, and squares of it: before, of each network, the truth.
        images: how many were measured.
    """
    short, long, start = before
    first = next(iter(tasks.values()))
    winner = max(psnr, key=lambda name: psnr[name])
    costs = cost_table(tasks, runs)
    times = {str(row[0]): float(row[4] or 0) for row in costs.rows}
    points = {name: (times[name], psnr[name]) for name in tasks}
    caption = f"Up and to the left is better. Joined: those that no other beats. {short.capitalize()}: {start:.2f} dB."
    front = pareto_front(points, "max")
    pareto = Scatter("Quality against speed", "time of one frame [ms]", "PSNR [dB]", points, True, caption, front)
    pictures = [
        (row_of(squares), f"{name}: {short}, {', '.join(tasks)}, truth") for name, squares in rows[:MOST_PICTURES]
    ]
    sections = [
        Section("Side by side", [means, costs, pareto]),
        Section("Pictures", [Images("The square with most detail", pictures)]),
        Section("Training", curves({name: run.read_metrics() for name, run in runs.items()})),
        files_section(runs, folder),
    ]
    summary = (
        f"{winner} is the best: {psnr[winner]:.2f} dB on {images} test images, {signed(psnr[winner] - start)} dB to "
        f"{long}. All were trained on the same images with the same budget."
    )
    return Report(f"{listed(tasks)} on {first.data}", summary, sections, provenance(data=first.data))


def cost_table(tasks: Mapping[str, Any], runs: Mapping[str, Run]) -> Table:
    """Parameters, operations and times of networks that enlarge images by one scale, which may be 1."""
    # In turn, so that whatever else the machine does meets all networks alike.
    rounds = [{name: _frame_time(task) for name, task in tasks.items()} for _ in range(3)]
    height, width = _FRAME
    rows: list[list[Cell]] = []
    for name, task in tasks.items():
        time = statistics.median(each[name] for each in rounds)
        seconds = sum(row["seconds"] for row in runs[name].read_metrics())
        per_pixel = macs_per_pixel(task.network)
        frame = per_pixel * height * width * task.scale**2 / 1e9
        rows.append([name, count_parameters(task.network), frame, round(per_pixel), time, seconds])
    columns = [
        *(
            "model",
            "parameters",
            "multiply-adds of a frame [G]",
            "of a pixel",
            "time of a frame [ms]",
            "training time [s]",
        ),
    ]
    big = f"{width * next(iter(tasks.values())).scale} x {height * next(iter(tasks.values())).scale}"
    enlarged = f", enlarged to {big}" if next(iter(tasks.values())).scale > 1 else ""
    caption = (
        f"A frame is {width} x {height}{enlarged}; the times are medians of repeated passes, the multiply-adds those "
        "of convolutions."
    )
    highlight: Any = dict.fromkeys(columns[1:5], "min") if len(rows) > 1 else {}
    return Table("Cost on this machine", columns, rows, caption, highlight)


def _frame_time(task: Any) -> float:
    x = torch.rand(1, task.network.frames * task.network.in_channels, *_FRAME)
    return latency(task.network, x.to(next(task.network.parameters()).device), repeats=1)


def curves(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Part]:
    """PSNR and loss by epoch of several runs."""

    def series(key: str) -> dict[str, tuple[list[float], list[float]]]:
        return {name: ([row["epoch"] for row in table], [row[key] for row in table]) for name, table in rows.items()}

    return [
        Lines("PSNR", "epoch", "validation PSNR, not rounded [dB]", series("val_psnr")),
        Lines("Loss", "epoch", "training loss", series("train_loss")),
    ]


def row_of(squares: Sequence[Array]) -> Array:
    """Pictures (H, W, 3) of one height side by side."""
    gap = np.full((squares[0].shape[0], _GAP, 3), 255, np.uint8)
    parts = [part for square in squares for part in (square, gap)]
    return np.concatenate(parts[:-1], 1)


def signed(value: float) -> str:
    """A number with two digits and its sign."""
    return f"{value:+.2f}".replace("-", "\u2212")
