"""Learning the colour of the light: scenes ready for a network, augmentation, losses, and FFCC's fit by L-BFGS.

Losses: Afifi et al., "Cross-Camera Convolutional Color Constancy", ICCV 2021, arXiv 2011.11890 (angular error, smooth
filters and biases); Barron, Tsai: "Fast Fourier Color Constancy", CVPR 2017, arXiv 1611.07596 (the others).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import Dataset

from convatlas.data.exposure_pairs import ExposurePair
from convatlas.networks.colour_constancy.description import IlluminantNetwork
from convatlas.networks.colour_constancy.ensembles import DualExposureEnsemble
from convatlas.networks.colour_constancy.histograms import CCC, ECCC
from convatlas.ops.heat_maps import bilinear_target, dealias, gaussian_loss, precondition, smoothness
from convatlas.ops.illuminant import angular_error
from convatlas.ops.log_chroma import rgb_to_log_chroma

__all__ = [
    "DescribedScenes",
    "LossSettings",
    "Scene",
    "collate_described",
    "fit_lbfgs",
    "illuminant_losses",
    "ready",
    "relight",
]

Array = npt.NDArray[Any]

#: A pixel that is at least so bright in the long exposure is known from the short one.
_FULL = 0.98
#: Steps of L-BFGS by cross-entropy, then by likelihood.
_STEPS = (16, 64)
#: Parameters that are searched for in the preconditioned domain.
_MAPS = ("filters", "biases")


@dataclass(frozen=True, eq=False)
class Scene:
    """A scene at the size that networks see.

    Attributes:
        name: of the scene.
        long, short: (1, 3, H, W); one frame where there is no second.
        rgb: colour of the light (3,), of unit length; NaN where it is not known.
        ratio: exposure of the long frame over that of the short one, or None.
        mask: (1, 1, H, W) bool, or None.
    """

    name: str
    long: Tensor
    short: Tensor
    rgb: Tensor
    ratio: float | None
    mask: Tensor | None

    def described(self, network: IlluminantNetwork) -> tuple[Tensor, ...]:
        """What a network takes of the scene, a batch of one.

        Raises:
            ValueError: it has no valid pixel.
        """
        device = next(network.parameters()).device
        mask = None if self.mask is None else self.mask.to(device)
        with torch.no_grad():
            return network.describe(self.long.to(device), self.short.to(device), mask, self.ratio)


def ready(pair: ExposurePair, longest: int) -> Scene:
    """A pair as networks see it, at most ``longest`` pixels long."""
    long, short, mask = pair.reduced(longest)
    frames = [_tensor(frame) for frame in (long, long if short is None else short)]
    light = torch.full((3,), math.nan) if pair.illuminant is None else torch.as_tensor(pair.illuminant).float()
    counted = None if mask is None else torch.from_numpy(mask)[None, None]
    return Scene(pair.name, frames[0], frames[1], light, pair.ratio, counted)


def _tensor(frame: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))[None]


# -- augmentation ------------------------------------------------------------------------------------------------------


def relight(scene: Scene, light: Tensor, brighter: float) -> Scene:
    """A scene as another light would show it.

    Where the long exposure is full, what it would hold is taken from the short one. Each channel is multiplied, and
    only then clipped, so that which channels clip follows the new light.

    Args:
        scene: with a known ratio, or no clipped pixel is reconstructed.
        light: colour of the new light, (3,).
        brighter: factor of both exposures.
    """
    long = scene.long
    if scene.ratio is not None:
        long = torch.where(long >= _FULL, torch.maximum(long, scene.short * scene.ratio), long)
    gain = (light / light[1]) / (scene.rgb / scene.rgb[1])
    gain = brighter * gain.to(long).view(1, 3, 1, 1)
    frames = [(frame * gain).clamp(0, 1) for frame in (long, scene.short)]
    return Scene(scene.name, frames[0], frames[1], light, scene.ratio, scene.mask)


class DescribedScenes(Dataset[dict[str, Any]]):
    """Scenes as a network takes them, indexed by position or by (position, seed).

    A sample is ``{"inputs": tuple of tensors, "rgb": (3)}``.

    Args:
        scenes: with known light.
        network: describes them.
        lights: colours (N, 3) of which new light is drawn for each scene in each epoch; the scenes stay as they are
            when left out.
        jitter: with lights: largest factor by which the exposure changes, drawn evenly in its logarithm.

    Attributes:
        failed: by name of a scene why it is left out, such as one without a valid pixel.
    """

    def __init__(
        self, scenes: Sequence[Scene], network: IlluminantNetwork, lights: Tensor | None = None, jitter: float = 1.4
    ) -> None:
        # A copy on the CPU, which processes that read data can have; what is described does not depend on weights.
        self.network, self.lights, self.jitter = copy.deepcopy(network).cpu(), lights, jitter
        self.scenes: list[Scene] = []
        self.failed: dict[str, str] = {}
        self._kept: list[dict[str, Any]] = []
        for scene in scenes:
            try:
                self._kept.append(self._sample(scene))
                self.scenes.append(scene)
            except ValueError as error:
                self.failed[scene.name] = str(error)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple | list) else (key, key)
        if self.lights is None:
            return self._kept[index]
        generator = torch.Generator().manual_seed(int(seed))
        light = self.lights[int(torch.randint(len(self.lights), (), generator=generator))]
        brighter = self.jitter ** (2 * float(torch.rand((), generator=generator)) - 1)
        try:
            return self._sample(relight(self.scenes[index], light, brighter))
        except ValueError:  # too dark under that light: as it was taken
            return self._kept[index]

    def _sample(self, scene: Scene) -> dict[str, Any]:
        return {"inputs": tuple(part[0].cpu() for part in scene.described(self.network)), "rgb": scene.rgb}


def collate_described(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples of `DescribedScenes`."""
    columns = zip(*(sample["inputs"] for sample in samples), strict=True)
    return {
        "inputs": tuple(torch.stack(column) for column in columns),
        "rgb": torch.stack([sample["rgb"] for sample in samples]),
    }


# -- losses ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimised.

    Attributes:
        form: of the angular error: ``shrunk``, or ``c5`` as C5's code computes it, with 22 / 7 for pi.
        smooth_filters: weight of the roughness of the filters.
        smooth_biases: weight of the roughness of the bias of each sample.
        rough, large: of networks of the form ffcc: weights of the squares of differences and values of filters and
            biases.

    Raises:
        ValueError: a weight is negative, or large is 0.
    """

    form: Literal["shrunk", "c5"] = "shrunk"
    smooth_filters: float = 0.15
    smooth_biases: float = 0.02
    rough: float = 1e-3
    large: float = 1e-5

    def __post_init__(self) -> None:
        if self.form not in ("shrunk", "c5"):
            raise ValueError(f"form must be 'shrunk' or 'c5', got {self.form!r}")
        for name in ("smooth_filters", "smooth_biases", "rough"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.large <= 0:
            raise ValueError(f"large must be positive, got {self.large}")


def illuminant_losses(
    network: IlluminantNetwork, inputs: Sequence[Tensor], rgb: Tensor, settings: LossSettings
) -> dict[str, Tensor]:
    """Losses of a batch: ``"loss"``, which is minimised, and ``"error"``, the mean angular error in degrees.

    The members of an ensemble learn side by side, each from its own loss.

    Args:
        network: any of `convatlas.networks.colour_constancy`.
        inputs: as `describe` of the network gives them.
        rgb: true colours of the light (B, 3).
        settings: what is minimised.
    """
    if isinstance(network, DualExposureEnsemble):
        parts = zip(network.members, network.parted(inputs), strict=True)
        each = [illuminant_losses(member, part, rgb, settings) for member, part in parts]
        return {name: torch.stack([losses[name] for losses in each]).sum() for name in ("loss", "error")}
    if not isinstance(network, CCC | ECCC):
        error = angular_error(network(*inputs), rgb, settings.form).mean()
        return {"loss": error, "error": error}
    feature, gray = _parts(network, inputs)
    found = network.heat_map(inputs[0], feature, gray)
    error = angular_error(found.rgb, rgb, settings.form).mean()
    if network.config.form == "ffcc":
        cost = sum(_quadratic(maps, settings) for maps in (network.filters, network.biases))
        return {"loss": _likelihood(network, found.uv, found.covariance, rgb) + cost, "error": error}
    rough = settings.smooth_filters * smoothness(network.filters).sum()
    rough = rough + settings.smooth_biases * smoothness(found.bias).mean()
    return {"loss": error + rough, "error": error}


def _parts(network: CCC | ECCC, inputs: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    rest = list(inputs[1:])
    feature = rest.pop(0) if isinstance(network, ECCC) else None
    return feature, rest[0] if rest else None


def _likelihood(network: CCC | ECCC, uv: Tensor, covariance: Tensor, rgb: Tensor) -> Tensor:
    config = network.config
    away = dealias(rgb_to_log_chroma(rgb) - uv, config.bins, config.bin_size)
    least = config.epsilon * config.bin_size**2
    return gaussian_loss(away, torch.zeros_like(away), covariance, least).mean()


def _quadratic(maps: Tensor, settings: LossSettings) -> Tensor:
    """Half the cost that `precondition` makes a plain square of."""
    steps = sum((maps - maps.roll(1, axis)).square().sum() for axis in (-2, -1))
    return 0.5 * (settings.rough * steps + settings.large * maps.square().sum())


# -- L-BFGS ------------------------------------------------------------------------------------------------------------


def fit_lbfgs(
    network: CCC | ECCC,
    samples: Iterable[dict[str, Any]],
    settings: LossSettings,
    steps: tuple[int, int] = _STEPS,
    *,
    told: Callable[[dict[str, float]], None] = lambda row: None,
) -> None:
    """Fit a network of the form ffcc to all samples at once, as FFCC is trained: convex first, then by what counts.

    Filters and biases are searched for in the preconditioned Fourier domain, where their cost is a plain square: first
    by the cross-entropy of the heat map and a bilinear target, then by the likelihood of the von Mises distribution.

    Args:
        network: to fit in place, from the weights that it has.
        samples: of `DescribedScenes`.
        settings: ``rough`` and ``large`` weigh the squares.
        steps: of both searches.
        told: called with ``train_loss`` and ``seconds`` after each step.

    Raises:
        ValueError: the network has another form, or there is no sample.
    """
    config = network.config
    if config.form != "ffcc":
        raise ValueError(f"network must be of the form ffcc, got {config.form}")
    listed = list(samples)
    if not listed:
        raise ValueError("samples must hold at least one, got none")
    # The line search compares losses that differ by little, hence double precision.
    like = torch.zeros((), dtype=torch.float64, device=network.filters.device)
    batch = collate_described(listed)
    inputs = [part.to(like) for part in batch["inputs"]]
    rgb = batch["rgb"].to(like)
    feature, gray = _parts(network, inputs)
    target = bilinear_target(rgb_to_log_chroma(rgb), config.bins, config.bin_size, config.start)
    free = {name: torch.zeros_like(each, dtype=like.dtype) for name, each in network.named_parameters()}
    for name, each in network.named_parameters():
        if name not in _MAPS:
            free[name] = each.detach().to(like).clone()
    scored, shapes = _Scored(network), [each.shape for each in free.values()]

    def weights(values: Sequence[Tensor]) -> dict[str, Tensor]:
        named = zip(free, values, strict=True)
        return {
            name: precondition(each, settings.rough, settings.large) if name in _MAPS else each for name, each in named
        }

    def loss(values: Sequence[Tensor], likelihood: bool) -> Tensor:
        at = {f"network.{name}": each for name, each in weights(values).items()}
        scores, uv, covariance = functional_call(scored, at, (inputs[0], feature, gray))
        cost = [
            (0.5 if name in _MAPS else 0.5 * settings.large) * each.square().sum()
            for name, each in zip(free, values, strict=True)
        ]
        if likelihood:
            return _likelihood(network, uv, covariance, rgb) + torch.stack(cost).sum()
        chosen = target * scores.flatten(1).log_softmax(1).view_as(target)
        return torch.stack(cost).sum() - chosen.sum((1, 2)).mean()

    def parted(flat: Array) -> list[Tensor]:
        pieces = torch.from_numpy(flat).to(like).split([shape.numel() for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def measured(flat: Array, likelihood: bool) -> tuple[float, Array]:
        values = [each.clone().requires_grad_() for each in parted(flat)]
        value = loss(values, likelihood)
        gradients = torch.autograd.grad(value, values)
        return float(value.detach()), torch.cat([each.flatten() for each in gradients]).cpu().numpy()

    place = torch.cat([each.flatten() for each in free.values()]).cpu().numpy()
    for likelihood, count in zip((False, True), steps, strict=True):
        if not count:
            continue
        start = time.perf_counter()

        def step(intermediate_result: Any) -> None:
            nonlocal start
            now = time.perf_counter()
            told({"train_loss": float(intermediate_result.fun), "seconds": now - start})
            start = now

        options = {"maxiter": count, "maxcor": count}
        place = minimize(measured, place, (likelihood,), "L-BFGS-B", jac=True, callback=step, options=options).x
    with torch.no_grad():
        found = weights(parted(place))
        for name, parameter in network.named_parameters():
            parameter.copy_(found[name])


class _Scored(torch.nn.Module):
    """Scores, estimate and covariance of a network, for weights that are given from outside."""

    def __init__(self, network: CCC | ECCC) -> None:
        super().__init__()
        self.network = network

    def forward(self, histograms: Tensor, feature: Tensor | None, gray: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Heat maps before the softmax (B, n, n), log-chroma (B, 2), covariance (B, 2, 2)."""
        found = self.network.heat_map(histograms, feature, gray)
        return found.response + found.bias, found.uv, found.covariance
