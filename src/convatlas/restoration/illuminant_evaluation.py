"""Measuring estimates of the light: scenes that are read, errors of a network and of baselines, pictures of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convatlas.data.exposure_pairs import ExposureSet
from convatlas.data.image_files import Unreadable
from convatlas.data.images import Skipped
from convatlas.files import write_text
from convatlas.networks.colour_constancy.description import IlluminantNetwork
from convatlas.networks.colour_constancy.ensembles import Committee, DualExposureEnsemble
from convatlas.networks.colour_constancy.histograms import CCC, ECCC, CCCConfig, ECCCConfig
from convatlas.ops.colour import linear_to_srgb
from convatlas.ops.heat_maps import Gaussian
from convatlas.ops.illuminant import STATISTICAL, angular_error, reproduction_error
from convatlas.report import printable
from convatlas.restoration.illuminant_training import Scene, ready
from convatlas.training.progress import progress

__all__ = [
    "CONSTANT",
    "Estimate",
    "MeasuredScene",
    "errors_of",
    "estimate",
    "measure_scenes",
    "read_scenes",
    "view",
    "write_errors",
]

Array = npt.NDArray[Any]

#: Name of the estimate that is the same for every scene.
CONSTANT = "mean of the training"
#: Longest side of a picture in a report.
_SHOWN = 192


@dataclass(frozen=True, eq=False)
class Estimate:
    """The light of one scene as a network sees it.

    Attributes:
        rgb: colour (3,), of unit length.
        seen: log-chroma and covariance, (2,) and (2, 2); the covariance is None where the network did not learn one:
            only the form ffcc is trained to tell how sure it is.
        confidence: from 0 to 1, or None as the covariance.
        heat: probabilities (n, n), or None.
        config: of the network that gave them.
    """

    rgb: Tensor
    seen: tuple[Tensor, Tensor | None]
    confidence: float | None = None
    heat: Tensor | None = None
    config: CCCConfig | ECCCConfig | None = None

    def gaussian(self, spread: float) -> Gaussian:
        """Log-chroma with its covariance, or with a variance of ``spread`` on both axes where there is none."""
        mean, covariance = self.seen
        return Gaussian(mean, spread * torch.eye(2, dtype=mean.dtype) if covariance is None else covariance)


@dataclass(frozen=True, eq=False)
class MeasuredScene:
    """A scene of which the light is known, and what was taken for it.

    Attributes:
        name: of the scene.
        truth: colour of the light (3,).
        rgb: estimates by name, (3,) each.
        found: all that the network tells.
        picture: the long exposure at a size to be shown, linear, (3, H, W).
    """

    name: str
    truth: Tensor
    rgb: Mapping[str, Tensor]
    found: Estimate
    picture: Tensor


def read_scenes(found: ExposureSet, longest: int, *, known: bool = True) -> tuple[list[Scene], list[Skipped]]:
    """Read scenes at the size that networks see, and tell what was left out.

    Args:
        found: the scenes.
        longest: longest side in pixels.
        known: whether scenes are left out of which the light is not known.
    """
    scenes, skipped = [], list(found.skipped)
    with progress("reading scenes", len(found)) as advance:
        for entry in found.entries:
            try:
                scene = ready(entry.read(), longest)
                if known and not bool(scene.rgb.isfinite().all()):
                    raise Unreadable(entry.name, "the colour of its light is not told")
                scenes.append(scene)
            except (Unreadable, ValueError) as error:
                reason = error.reason if isinstance(error, Unreadable) else str(error)
                skipped.append(Skipped(entry.name, reason))
            advance()
    return scenes, skipped


@torch.inference_mode()
def estimate(network: IlluminantNetwork, scene: Scene) -> Estimate:
    """The light of a scene.

    Raises:
        ValueError: the scene has no valid pixel.
    """
    inputs = scene.described(network)
    rgb = network(*inputs)[0].float().cpu()
    heated = _histogram_member(network, inputs)
    uv = (rgb[1].log() - rgb[::2].log()).double()
    if heated is None:
        return Estimate(rgb, (uv, None))
    member, parts = heated
    feature = parts[1] if isinstance(member, ECCC) else None
    rest = parts[1 + isinstance(member, ECCC) :]
    found = member.heat_map(parts[0], feature, rest[0] if rest else None)
    if member.config.form == "c5" or member is not network:
        return Estimate(rgb, (uv, None), None, found.heat[0].cpu(), member.config)
    seen = uv, found.covariance[0].double().cpu()
    return Estimate(rgb, seen, float(found.confidence[0]), found.heat[0].cpu(), member.config)


def _histogram_member(
    network: IlluminantNetwork, inputs: Sequence[Tensor]
) -> tuple[CCC | ECCC, Sequence[Tensor]] | None:
    """The first network with a heat map, and its inputs."""
    if isinstance(network, CCC | ECCC):
        return network, inputs
    if isinstance(network, DualExposureEnsemble | Committee):
        for member, parts in zip(network.members, network.parted(inputs), strict=True):
            if (found := _histogram_member(member, parts)) is not None:
                return found
    return None


def measure_scenes(
    network: IlluminantNetwork, name: str, scenes: Iterable[Scene], constant: Tensor | None = None
) -> tuple[list[MeasuredScene], list[Skipped]]:
    """Estimates of a network and of all baselines.

    Args:
        network: to measure.
        name: what to call it.
        scenes: of which the light is known.
        constant: what a predictor gives that sees no image, (3,).
    """
    measured, skipped = [], []
    for scene in scenes:
        try:
            found = estimate(network, scene)
            rgb = {name: found.rgb}
            if constant is not None:
                rgb[CONSTANT] = constant
            rgb |= {each: function(scene.long, mask=scene.mask)[0].float() for each, function in STATISTICAL.items()}
        except ValueError as error:
            skipped.append(Skipped(scene.name, str(error)))
            continue
        step = max(1, -(-max(scene.long.shape[2:]) // _SHOWN))
        measured.append(MeasuredScene(scene.name, scene.rgb, rgb, found, scene.long[0, :, ::step, ::step]))
    return measured, skipped


def errors_of(measured: Sequence[MeasuredScene], name: str) -> tuple[Tensor, Tensor]:
    """Angular and reproduction errors of one estimate in degrees, (N) each."""
    predicted = torch.stack([each.rgb[name] for each in measured]).double()
    truth = torch.stack([each.truth for each in measured]).double()
    # An estimate of nothing in a channel, as of a black picture, would divide by zero.
    return angular_error(predicted, truth), reproduction_error(predicted.clamp(min=1e-6), truth)


def write_errors(path: str | Path, measured: Sequence[MeasuredScene]) -> None:
    """One row a scene: true and estimated light, and the angular error of each estimate in degrees."""
    names = list(measured[0].rgb)
    errors = {name: errors_of(measured, name)[0].tolist() for name in names}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["scene", "r", "g", "b", *(f"{c}, {names[0]}" for c in "rgb"), *(f"error, {n}" for n in names)])
    for row, each in enumerate(measured):
        lights = [f"{value:.6f}" for value in (*each.truth.tolist(), *each.rgb[names[0]].tolist())]
        writer.writerow([printable(each.name), *lights, *(f"{errors[name][row]:.4f}" for name in names)])
    write_text(path, text.getvalue())


def view(picture: Tensor, light: Tensor | None) -> Array:
    """A linear picture (3, H, W) as it is shown, (H, W, 3) uint8: white-balanced by a light, or as it is.

    The weakest gain is 1, so that what is full in all channels stays white.
    """
    if light is not None:
        gains = light.max() / light.clamp(min=1e-6)
        picture = picture * gains.to(picture).view(3, 1, 1)
    shown = linear_to_srgb(picture.clamp(0, 1)) * 255
    return np.ascontiguousarray(shown.round().to(torch.uint8).permute(1, 2, 0).numpy())
