"""A user's scenes: the light of each, smoothed over frames if asked for, and the pictures without its colour."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from convatlas.data.exposure_pairs import ExposurePair, exposure_files
from convatlas.data.image_files import Unreadable
from convatlas.data.images import Skipped
from convatlas.data.linear_images import LinearImage
from convatlas.data.png16 import write_png16
from convatlas.errors import DataError
from convatlas.files import atomic_path, free_name, write_bytes, write_text
from convatlas.networks.colour_constancy.description import IlluminantNetwork
from convatlas.networks.colour_constancy.ensembles import Committee
from convatlas.networks.colour_constancy.histograms import CCC
from convatlas.ops.colour import linear_to_srgb
from convatlas.ops.heat_maps import Gaussian, kalman_step
from convatlas.ops.log_chroma import log_chroma_to_rgb
from convatlas.report import printable
from convatlas.restoration.illuminant_evaluation import Estimate, estimate, view
from convatlas.restoration.illuminant_training import ready
from convatlas.training.progress import progress

if TYPE_CHECKING:
    from convatlas.restoration.illuminant_estimation import IlluminantEstimation

__all__ = ["BalancedScene", "balance_files", "balanced", "takes_one_frame"]

Array = npt.NDArray[Any]

_QUALITY = 92
#: Longest side of a picture in a report.
_SHOWN = 320


@dataclass(frozen=True, eq=False)
class BalancedScene:
    """A scene whose light was found.

    Attributes:
        name: of the scene.
        rgb: colour of the light (3,), smoothed if asked for.
        found: what the network tells of this frame alone.
        deviation: standard deviations of u and v: the network's own, or those of its errors on validation scenes.
        paths: of the pictures, relative to the output folder: linear, to be looked at.
        size: height and width.
        seconds: from reading to writing.
        shown: small pictures before and after, (H, W, 3) uint8.
    """

    name: str
    rgb: Tensor
    found: Estimate
    deviation: tuple[float, float]
    paths: tuple[str, str]
    size: tuple[int, int]
    seconds: float
    shown: tuple[Array, Array]


def balance_files(
    task: IlluminantEstimation, inputs: Sequence[str | Path], folder: Path
) -> tuple[list[BalancedScene], list[Skipped]]:
    """Find the light of scenes and write their long exposures without its colour, and ``illuminants.csv``.

    With ``task.drift`` the scenes of one folder, in the order of their names, are consecutive frames.

    Returns:
        What was written, and what was left out with the reasons.

    Raises:
        DataError: an input does not exist, or nothing can be read.
        OSError: a file cannot be written.
    """
    found = exposure_files(inputs, task.levels)
    done: list[BalancedScene] = []
    skipped, taken = list(found.skipped), set[str]()
    states: dict[str, Gaussian] = {}
    with progress("balancing", len(found)) as advance:
        for entry in found.entries:
            started = time.perf_counter()
            try:
                pair = entry.read()
                if pair.short is None and not takes_one_frame(task.network):
                    raise Unreadable(entry.name, f"{task.model} needs a long and a short exposure, got one frame")
                scene = ready(pair, task.longest)
                seen = estimate(task.network, scene)
            except (Unreadable, ValueError) as error:
                reason = error.reason if isinstance(error, Unreadable) else str(error)
                skipped.append(Skipped(entry.name, reason))
                advance()
                continue
            rgb, gaussian = seen.rgb, seen.gaussian(task.spread)
            if task.drift is not None:
                sequence = PurePosixPath(entry.name).parent.as_posix()
                gaussian = states[sequence] = kalman_step(states.get(sequence), gaussian, task.drift)
                rgb = log_chroma_to_rgb(gaussian.mean).float()
            deviation = gaussian.covariance.diagonal().sqrt().tolist()
            paths = _write(folder, entry.name, pair, rgb, taken)
            step = max(1, -(-max(pair.long.size) // _SHOWN))
            small = torch.from_numpy(pair.long.reduced(-(-max(pair.long.size) // step))).permute(2, 0, 1)
            shown, seconds = (view(small, None), view(small, rgb)), time.perf_counter() - started
            spread = deviation[0], deviation[1]
            done.append(BalancedScene(entry.name, rgb, seen, spread, paths, pair.long.size, seconds, shown))
            advance()
    if not done:
        raise DataError(f"{skipped[0].path} cannot be used: {skipped[0].reason}")
    _write_table(folder / "illuminants.csv", done)
    return done, skipped


def takes_one_frame(network: IlluminantNetwork) -> bool:
    """Whether a network looks at the long exposure only."""
    if isinstance(network, Committee):
        return all(map(takes_one_frame, network.members))
    return isinstance(network, CCC) and network.config.frames == "long"


def balanced(image: LinearImage, light: Tensor) -> tuple[Array, Array]:
    """A picture without the colour of the light: linear (H, W, 3) uint16, and encoded as sRGB, uint8.

    Each channel is divided by the light's; the weakest gain is 1, so that what is full in all channels stays white. The
    picture passes by strips of rows.
    """
    gains = (light.max() / light.clamp(min=1e-6)).numpy().astype(np.float32)
    linear, shown = np.empty((*image.size, 3), np.uint16), np.empty((*image.size, 3), np.uint8)
    for start, rows in image.strips():
        values = torch.from_numpy((rows * gains).clip(0, 1))
        stop = start + len(rows)
        linear[start:stop] = (values.numpy() * 65535 + 0.5).astype(np.uint16)
        shown[start:stop] = (linear_to_srgb(values) * 255).round().to(torch.uint8).numpy()
    return linear, shown


def _write(folder: Path, name: str, pair: ExposurePair, rgb: Tensor, taken: set[str]) -> tuple[str, str]:
    linear, shown = balanced(pair.long, rgb)
    paths = free_name(name, "white_balanced", ".png", taken), free_name(name, "view", ".jpg", taken)
    write_bytes(folder / paths[0], write_png16(linear))
    with atomic_path(folder / paths[1]) as part:
        Image.fromarray(shown).save(part, format="JPEG", quality=_QUALITY, subsampling=0)
    return paths


def _write_table(path: Path, done: Sequence[BalancedScene]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("scene", "r", "g", "b", "gain r", "gain g", "gain b", "deviation u", "deviation v", "confidence")
    writer.writerow([*names, "linear", "view"])
    for each in done:
        gains = (each.rgb[1] / each.rgb).tolist()
        numbers: list[float | None] = [*each.rgb.tolist(), *gains, *each.deviation]
        numbers.append(each.found.confidence)
        writer.writerow([printable(each.name), *("" if v is None else f"{v:.6f}" for v in numbers), *each.paths])
    write_text(path, text.getvalue())
