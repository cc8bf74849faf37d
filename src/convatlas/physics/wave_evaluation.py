"""Windows of wave sequences to learn from, and how far forecasts of whole sequences are from the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from convatlas.data.wave_fem import WaveSequences, field_energy
from convatlas.networks.wave_surrogate import WaveFieldDecoder, WaveSurrogate
from convatlas.ops.field_spectrum import spectrum_error

__all__ = ["ForecastErrors", "Windows", "bounded_error", "errors_of", "forecast", "one_step_errors", "shuffled"]

#: Fields smaller than this share of the scale of the training count as so large in relative errors.
_FLOOR = 0.01
#: Errors of forecasts that have gone out of all bounds count as so large.
_MOST = 100.0
_TOGETHER = 32


class Windows(Dataset[dict[str, Tensor]]):
    """Successive fields of each scene, from every time on: ``{"fields": (length, H, W), "speed": (H, W)}``.

    Of scenes with parameters also ``{"parameters": (P + 1)}``, with the time of the first field behind them as a share
    of ``duration``.

    Args:
        sequences: the scenes.
        length: fields of a window.
        duration: fields that last as long as the time 1; the windows tell no parameters when left out.
    """

    def __init__(self, sequences: WaveSequences, length: int, duration: int | None = None) -> None:
        self.sequences, self.length, self.duration = sequences, length, duration
        self.places = sequences.fields.shape[1] - length + 1

    def __len__(self) -> int:
        return max(0, self.places) * len(self.sequences)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        index = key[0] if isinstance(key, tuple | list) else key
        scene, start = divmod(index, self.places)
        fields = self.sequences.fields[scene, start : start + self.length]
        item = {"fields": fields, "speed": self.sequences.speed[scene]}
        if self.duration is not None and self.sequences.parameters is not None:
            time = torch.tensor([start / self.duration])
            item["parameters"] = torch.cat([self.sequences.parameters[scene], time])
        return item


def bounded_error(prediction: Tensor, truth: Tensor, scale: float) -> Tensor:
    """||prediction - truth|| / ||truth|| of each sample (B, ...): (B).

    Fields that are nearly zero, as before a source begins and behind waves that have left, count as ``scale`` / 100.
    """
    size = truth.flatten(1).norm(dim=1)
    least = _FLOOR * scale * truth[0].numel() ** 0.5
    return (prediction - truth).flatten(1).norm(dim=1) / size.clamp_min(least)


@torch.inference_mode()
def forecast(
    network: WaveSurrogate | WaveFieldDecoder, sequences: WaveSequences, steps: int, scale: float, duration: int
) -> Tensor:
    """Fields (S, steps, H, W): stepped on from the first ones, or made of parameters from time 0 on.

    Args:
        network: in evaluation mode; the fields that it sees are divided by ``scale``.
        sequences: the scenes.
        steps: how many fields.
        scale: of the training.
        duration: of the training, in fields.
    """
    device = next(network.parameters()).device
    parts = []
    for start in range(0, len(sequences), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        if isinstance(network, WaveSurrogate):
            fields = sequences.fields[some, : network.config.frames].to(device) / scale
            parts.append(network.rollout(fields, sequences.speed[some].to(device), steps).cpu() * scale)
            continue
        given = torch.empty(0) if sequences.parameters is None else sequences.parameters[some].to(device)
        blocks = []
        for first in range(0, steps, network.config.frames):
            time = given.new_full((len(given), 1), first / duration)
            blocks.append(network(torch.cat([given, time], dim=1)))
        parts.append(torch.cat(blocks, dim=1)[:, :steps].cpu() * scale)
    return torch.cat(parts)


@torch.inference_mode()
def one_step_errors(network: WaveSurrogate, sequences: WaveSequences, scale: float) -> Tensor:
    """Relative L2 error of one step from true fields, (windows)."""
    device, seen = next(network.parameters()).device, network.config.frames
    windows = Windows(sequences, seen + 1)
    errors = []
    for start in range(0, len(windows), _TOGETHER):
        items = [windows[index] for index in range(start, min(start + _TOGETHER, len(windows)))]
        fields, speed = (torch.stack([item[name] for item in items]).to(device) for name in ("fields", "speed"))
        step = network.rollout(fields[:, :seen] / scale, speed, 1) * scale
        errors.append(bounded_error(step, fields[:, seen:], scale).cpu())
    return torch.cat(errors).nan_to_num(nan=_MOST).clamp(max=_MOST)


@dataclass(frozen=True, eq=False)
class ForecastErrors:
    """How far forecasts of scenes are from the truth.

    Attributes:
        prediction, truth: (S, T, H, W).
        first: place of the first forecast field in its sequence.
        each: relative L2 error of each field (S, T).
        whole: of all fields of a scene together (S).
        energy: difference of the energies at the end, over the true energy at the beginning (S).
        spectrum: relative L2 error of the radial spectra, mean over the fields (S).
        one_step: relative L2 error of single steps from true fields, or None for a network that makes none.
    """

    prediction: Tensor
    truth: Tensor
    first: int
    each: Tensor
    whole: Tensor
    energy: Tensor
    spectrum: Tensor
    one_step: Tensor | None

    def means(self) -> dict[str, float]:
        """Mean of each error over the scenes, as shares; the rollout first."""
        found = {
            "relative L2 of the rollout": float(self.whole.mean()),
            "relative L2 of the last field": float(self.each[:, -1].mean()),
            "energy drift": float(self.energy.mean()),
            "spectrum error": float(self.spectrum.mean()),
        }
        one_step = {} if self.one_step is None else {"relative L2 of a step": float(self.one_step.mean())}
        return {**found, **one_step}


def errors_of(
    network: WaveSurrogate | WaveFieldDecoder, sequences: WaveSequences, steps: int, scale: float, duration: int
) -> ForecastErrors:
    """Forecast and compare; see `forecast` for the arguments. As many steps are made as the sequences have fields."""
    first = network.config.frames if isinstance(network, WaveSurrogate) else 0
    steps = min(steps, sequences.fields.shape[1] - first)
    prediction = forecast(network, sequences, steps, scale, duration)
    truth = sequences.fields[:, first : first + steps]
    with_start = [
        torch.cat([sequences.fields[:, max(0, first - 1) : first], part], dim=1) for part in (prediction, truth)
    ]
    place = (sequences.speed, sequences.interval, sequences.spacing)
    if with_start[0].shape[1] > 1:
        energy, true = (field_energy(part, *place) for part in with_start)
        drift = (energy[:, -1] - true[:, -1]).abs() / true[:, 0].clamp_min(torch.finfo(true.dtype).tiny)
    else:
        drift = torch.full((len(sequences),), torch.nan)
    each = bounded_error(prediction.flatten(0, 1), truth.flatten(0, 1), scale).view(len(sequences), steps)
    whole = bounded_error(prediction, truth, scale)

    def bounded(errors: Tensor) -> Tensor:
        return errors.nan_to_num(nan=_MOST).clamp(max=_MOST)

    single = one_step_errors(network, sequences, scale) if isinstance(network, WaveSurrogate) else None
    spectrum = bounded(spectrum_error(prediction, truth)).mean(1)
    return ForecastErrors(prediction, truth, first, bounded(each), bounded(whole), bounded(drift), spectrum, single)


def shuffled(count: int, shares: Sequence[float], seed: int) -> list[list[int]]:
    """Rows of ``count`` scenes dealt out at random: one list a share, at least one scene each, and the rest."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    parts, start = [], 0
    for share in shares:
        size = max(1, round(share * count))
        parts.append(sorted(order[start : start + size]))
        start += size
    return [*parts, sorted(order[start:])]
