"""Do networks for patches of like difficulty enlarge a video better than networks for its parts in time, or than one?

Li, Ji, Qin et al.: "Towards High-Quality and Efficient Video Super-Resolution via Spatial-Temporal Data Overfitting",
CVPR 2023, arXiv 2303.08331. It claims 1.5 to 2.4 dB more than networks for segments in time (NAS) and than one network
(awDNN), and that one small network can be fitted to all chunks if the easy ones are visited less (JSTDO).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from convatlas.data.footage import moving_photographs
from convatlas.experiments.small_training import device, finished, one_thread, progress
from convatlas.networks.base import Upscaler
from convatlas.networks.wdsr import WDSRConfig
from convatlas.report import Bars, Cell, Claim, Files, Images, Lines, Note, Part, Report, Section, Table
from convatlas.restoration.chunk_fitting import without_halo
from convatlas.restoration.delivery import network_bytes
from convatlas.restoration.protocol import Protocol
from convatlas.restoration.stdo import VideoDelivery
from convatlas.restoration.super_resolution_reports import panel
from convatlas.restoration.video_chunks import (
    JointSampling,
    PatchGrid,
    chunk_by_psnr,
    chunk_by_time,
    patch_errors,
    patch_psnr,
    whole_psnr,
)
from convatlas.training.measure import count_parameters
from convatlas.training.run import Run
from convatlas.training.task import seed_everything, split_settings

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: dB that the networks of STDO are better than one network of as many bytes, and than networks for segments in time.
OVER_ONE, OVER_TIME = 0.1, 0.1
#: dB that fitting the chunks adds to the general network that the fits start from.
OVER_GENERAL = 0.3
#: dB that JSTDO may be worse than the same network fitted to all patches alike, with as many visits: none.
OVER_UNIFORM = 0.0

SEEDS = (0, 1, 2)
FRAMES, SIZE, SCALE = 24, (64, 96), 2
GRID, HALO = PatchGrid(4, 4), 4
CHUNKS = 3
#: A network for each chunk, and one that has as many parameters as three of them.
SMALL, LARGE = WDSRConfig(scale=SCALE, dim=6, depth=1), WDSRConfig(scale=SCALE, dim=12, depth=1)
GENERAL_EPOCHS, EPOCHS, BATCH, LEARNING_RATE = 8, 24, 8, 4e-3
FRACTION = 0.5

# Full: trained by recipe on the user's clip.

FULL = {
    "STDO": {"recipe": "stdo_wdsr_x2"},
    "JSTDO": {"recipe": "jstdo_wdsr_x2"},
    "NAS": {"recipe": "nas_wdsr_x2"},
    "awDNN": {"recipe": "awdnn_wdsr_x2"},
}
#: dB over NAS and over awDNN on three clips of 15 s at scale 2 (paper's table): the least of them.
FULL_OVER_NAS, FULL_OVER_ONE = 0.6, 1.3


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" fits small networks to a clip made of photographs; "full" trains by recipe on a clip.
        data: for "full": a clip, e.g. one of VSD4K.
        folder: for "full": where the runs lie. The same folder goes on with runs that were stopped.

    Raises:
        ValueError: the budget is unknown, or "full" lacks data or folder.
    """
    if budget == "quick":
        return quick()
    if budget != "full":
        raise ValueError(f"budget must be 'quick' or 'full', got {budget!r}")
    if data is None or folder is None:
        raise ValueError(f"budget 'full' needs data and folder, got {data} and {folder}")
    return full(data, folder)


# -- quick -------------------------------------------------------------------------------------------------------------


class _Clip(NamedTuple):
    """Patches of a clip in [0, 1], with halo where they are small, and the frames: (frames, 3, H, W) uint8."""

    low: Tensor
    high: Tensor
    small: Tensor
    large: Tensor

    @property
    def frames(self) -> int:
        return len(self.large)


class _Fitted(NamedTuple):
    """What one seed gave: PSNR in dB of the whole clip by way of fitting, and the middle frame of each way."""

    psnr: dict[str, float]
    shown: dict[str, np.ndarray[Any, Any]]
    labels: Tensor
    losses: dict[str, list[float]]


def quick() -> Report:
    """Fit small networks to the clip of each seed in every way, with equal bytes and as many visits of a patch."""
    fits = 1 + 1 + CHUNKS + CHUNKS + 1 + 1
    with one_thread(), progress(len(SEEDS) * fits) as advance:
        results = [_fit_all(seed, advance) for seed in SEEDS]
    return finished("STDO: quick test of its claims", [_section(results)])


def _clip(seed: int) -> _Clip:
    protocol = Protocol()
    frames = list(moving_photographs(FRAMES, SIZE, seed=seed))
    small = [protocol.shrink(frame, SCALE) for frame in frames]
    lows, highs = (torch.from_numpy(np.stack(each)).permute(0, 3, 1, 2).to(device()) for each in (small, frames))
    low = GRID.cut(lows.float() / 255, HALO).flatten(0, 1)
    return _Clip(low, GRID.cut(highs.float() / 255).flatten(0, 1), lows, highs)


def _fit_all(seed: int, advance: Callable[[str], None]) -> _Fitted:
    clip, losses = _clip(seed), {}
    count = len(clip.low)
    everything = torch.arange(count)

    def fit(label: str, config: WDSRConfig, sampling: JointSampling | Tensor, start: Upscaler | None) -> Upscaler:
        epochs = GENERAL_EPOCHS if label == "general" else EPOCHS
        model, losses[label] = _fit(config, clip, sampling, seed, epochs, start)
        advance(f"fitting with seed {seed}: {label}")
        return model

    general = fit("general", SMALL, everything, None)
    shown = {"general": _played(clip, [general], np.zeros(count, np.int64))}
    labels = patch_psnr(patch_errors(shown["general"], clip.large.cpu(), GRID))
    by_psnr, by_time = chunk_by_psnr(labels, CHUNKS), chunk_by_time(clip.frames, len(GRID), CHUNKS)
    # A network of another size cannot start from the general one; it gets the visits of that one on top.
    large, losses["one network"] = _fit(LARGE, clip, everything, seed, GENERAL_EPOCHS + EPOCHS, None)
    advance(f"fitting with seed {seed}: one network")
    shown["one network"] = _played(clip, [large], np.zeros(count, np.int64))
    for name, chunks in (("by time", by_time), ("STDO", by_psnr)):
        models = [
            fit(f"{name}, chunk {chunk}", SMALL, torch.from_numpy(np.flatnonzero(chunks.index == chunk)), general)
            for chunk in range(CHUNKS)
        ]
        shown[name] = _played(clip, models, chunks.index)
    sampling = JointSampling(by_psnr.index, "fraction", FRACTION)
    visits = len(sampling) * EPOCHS
    joint = fit("JSTDO", SMALL, sampling, general)
    shown["JSTDO"] = _played(clip, [joint], np.zeros(count, np.int64))
    alike, losses["uniform"] = _fit(SMALL, clip, everything, seed, visits / count, general)
    advance(f"fitting with seed {seed}: uniform")
    shown["uniform"] = _played(clip, [alike], np.zeros(count, np.int64))
    psnr = {name: whole_psnr(patch_errors(frames, clip.large.cpu(), GRID)) for name, frames in shown.items()}
    bicubic = np.stack([Protocol().bicubic(np.moveaxis(f, 0, -1), SCALE) for f in clip.small.cpu().numpy()])
    interpolated = torch.from_numpy(bicubic).permute(0, 3, 1, 2).double() / 255
    psnr["bicubic"] = whole_psnr(patch_errors(interpolated, clip.large.cpu(), GRID))
    middle = clip.frames // 4
    pictures = {name: _picture(frames[middle]) for name, frames in {**shown, "bicubic": interpolated}.items()}
    pictures["truth"] = _picture(clip.large[middle].double().cpu() / 255)
    return _Fitted(psnr, pictures, labels, losses)


def _fit(
    config: WDSRConfig,
    clip: _Clip,
    sampling: JointSampling | Tensor,
    seed: int,
    epochs: float,
    start: Upscaler | None,
) -> tuple[Upscaler, list[float]]:
    """A network fitted by the mean absolute error for as many steps as the epochs have, and the losses of these."""
    seed_everything(seed)
    model = config.build().to(clip.low.device)
    if start is not None:
        model.load_state_dict(start.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, math.ceil(epochs * -(-len(sampling) // BATCH)))
    losses: list[float] = []
    epoch = 0
    while len(losses) < steps:
        if isinstance(sampling, JointSampling):
            order = sampling.order(epoch, generator)
        else:
            order = sampling[torch.randperm(len(sampling), generator=generator)]
        epoch += 1
        for batch in order.split(BATCH)[: steps - len(losses)]:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * len(losses) / steps)) / 2
            rows = batch.to(clip.low.device)
            loss = F.l1_loss(without_halo(model(clip.low[rows]), SCALE * HALO), clip.high[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return model.eval(), losses


@torch.inference_mode()
def _played(clip: _Clip, models: Sequence[Upscaler], index: np.ndarray[Any, Any]) -> Tensor:
    """The frames (frames, 3, H, W) in [0, 1] with each patch enlarged by its network."""
    patches = torch.empty_like(clip.high)
    for chunk, model in enumerate(models):
        rows = torch.from_numpy(np.flatnonzero(index == chunk)).to(clip.low.device)
        for part in rows.split(256):
            patches[part] = without_halo(model(clip.low[part]), SCALE * HALO)
    return GRID.join(patches.unflatten(0, (clip.frames, len(GRID)))).cpu().double()


def _picture(frame: Tensor) -> np.ndarray[Any, Any]:
    return (frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _section(results: Sequence[_Fitted]) -> Section:
    def differences(first: str, second: str) -> list[float]:
        return [each.psnr[first] - each.psnr[second] for each in results]

    published = "at scale 2 on clips of 15 s: 45.75, 46.34 and 50.58 dB"
    claims: list[Part] = [
        Claim.judge(
            "Networks for patches of like difficulty are better than one network of as many bytes",
            published=f"{published}; one network (awDNN) 43.36, 44.83 and 49.24 dB",
            statistic="PSNR of the whole clip with three small networks by PSNR less that with one large network",
            value=differences("STDO", "one network"),
            at_least=OVER_ONE,
            seeds=len(SEEDS),
            unit="dB",
        ),
        Claim.judge(
            "Networks for patches of like difficulty are better than networks for segments in time",
            published=f"{published}; a network for each segment (NAS) 44.17, 45.43 and 49.98 dB",
            statistic="PSNR of the whole clip with three networks by PSNR less that with three by time",
            value=differences("STDO", "by time"),
            at_least=OVER_TIME,
            seeds=len(SEEDS),
            unit="dB",
        ),
        Claim.judge(
            "Networks that are fitted to the chunks are better than the general network that they start from",
            published="overfitting the networks to the video is what gives the quality",
            statistic="PSNR of the whole clip with three networks by PSNR less that with the general network",
            value=differences("STDO", "general"),
            at_least=OVER_GENERAL,
            seeds=len(SEEDS),
            unit="dB",
        ),
        Claim.judge(
            "One network that visits easy patches less (JSTDO) is as good as one that visits all alike",
            published="one small network by joint training; its schedule is not published, the shares are our reading",
            statistic="PSNR of the whole clip less that of the same network with as many visits spread evenly",
            value=differences("JSTDO", "uniform"),
            at_least=OVER_UNIFORM,
            seeds=len(SEEDS),
            unit="dB",
        ),
    ]
    small, large = count_parameters(SMALL.build()), count_parameters(LARGE.build())
    sizes = {
        "bicubic": (0, 0),
        "general": (1, small),
        "one network": (1, large),
        "by time": (CHUNKS, small),
        "STDO": (CHUNKS, small),
        "JSTDO": (1, small),
        "uniform": (1, small),
    }
    rows: list[list[Cell]] = []
    for name, (count, parameters) in sizes.items():
        values = [each.psnr[name] for each in results]
        size = network_bytes(parameters, "float16", count) / 1000
        rows.append([name, count, parameters, size, *values, statistics.fmean(values)])
    columns = ["", "networks", "parameters of one", "kB in float16", *(f"seed {s} [dB]" for s in SEEDS), "mean [dB]"]
    table = Table("PSNR of the whole clip", columns, rows, "RGB of 8 bits; the mean error of all frames.")
    bars = Bars("Gain over bicubic interpolation", "dB, mean of the seeds", _gains(results, sizes))
    first = results[0]
    side = min(SIZE)
    squares = [
        (panel(*(first.shown[which][:side, :side] for which in ("bicubic", name, "truth"))), name)
        for name in ("one network", "by time", "STDO", "JSTDO")
    ]
    images = Images("Bicubic, networks, truth, error of the networks times 4", squares, f"Seed {SEEDS[0]}.")
    counts, edges = np.histogram(first.labels[first.labels.isfinite()].numpy(), bins=20)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    curve = {"patches": (middles, counts.tolist())}
    labels = Lines("Labels of the patches", "PSNR of the general network [dB]", "patches", curve)
    note = Note(
        f"A clip of {FRAMES} frames of {SIZE[1]} x {SIZE[0]} pixels moves over two photographs, another way with each "
        f"seed; no loss by a codec. {EPOCHS} epochs of each fit after {GENERAL_EPOCHS} of the general network, batches "
        f"of {BATCH} of {FRAMES * len(GRID)} patches; JSTDO and the uniform fit have as many visits as each other. "
        "A patch is visited as often in every way, so the network of a chunk makes a third of the steps that one for "
        "all patches makes; in so short a training that weighs more than what the patches of a chunk have in common."
    )
    return Section("Quality", [*claims, table, bars, images, labels, note])


def _gains(results: Sequence[_Fitted], names: Mapping[str, object]) -> dict[str, float]:
    return {
        name: statistics.fmean(each.psnr[name] - each.psnr["bicubic"] for each in results)
        for name in names
        if name != "bicubic"
    }


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Deliver a clip by every recipe and compare the quality.

    Args:
        data: a clip.
        folder: where the runs lie, each below its name.
        changes: settings that differ from the recipes, e.g. ``epochs=5``. With any, the figures cannot be held against
            the published ones, and the verdicts say so.
    """
    psnr: dict[str, float] = {}
    for name, choice in FULL.items():
        recipe = yaml.safe_load(VideoDelivery.recipe(choice["recipe"]).read_text(encoding="utf-8"))
        task, training = split_settings(VideoDelivery, {**recipe, "data": str(data), **changes})
        place = Path(folder) / name
        task.fit(place, training, resume=Run(place).config.is_file())
        psnr[name] = task.quality()["PSNR [dB]"]
    claims: list[Part] = [
        Claim.judge(
            f"STDO is better than {other}",
            published="45.75, 46.34 and 50.58 dB on clips of 15 s at scale 2, against "
            + ("44.17, 45.43 and 49.98 dB" if other == "NAS" else "43.36, 44.83 and 49.24 dB"),
            statistic="PSNR of the whole clip less that of the other way, WDSR-16",
            value=psnr["STDO"] - psnr[other],
            at_least=bar,
            seeds=1,
            scale_ok=not changes,
            unit="dB",
        )
        for other, bar in (("NAS", FULL_OVER_NAS), ("awDNN", FULL_OVER_ONE))
    ]
    rows: list[list[Cell]] = [[name, value] for name, value in psnr.items()]
    table = Table("PSNR of the whole clip", ["", "PSNR [dB]"], rows)
    links = Files("Runs", {f"report of {name}": f"{name}/report.html" for name in FULL})
    return finished("STDO: full test of its claims", [Section("Quality", [*claims, table, links])], data=str(data))
