"""Does a network that works at low resolution enlarge images well, and an order of magnitude faster than before?

Shi et al.: "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural
Network", CVPR 2016, arXiv 1609.05158. Its abstract claims 0.15 dB more on images and 0.39 dB more on videos than
networks that work at high resolution, and an order of magnitude less time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from convatlas.data.image_pairs import Sample, read_pairs
from convatlas.experiments.small_training import device, finished, progress
from convatlas.networks.base import Upscaler
from convatlas.networks.espcn import ESPCNConfig
from convatlas.networks.registry import create_model
from convatlas.report import Cell, Claim, Files, Images, Lines, Note, Part, Report, Section, Table
from convatlas.restoration.evaluation import (
    ClipQuality,
    Measured,
    macs_per_pixel,
    mean_quality,
    measure_clip,
    measure_image,
)
from convatlas.restoration.patches import PatchSet, learning_pair
from convatlas.restoration.protocol import Protocol
from convatlas.restoration.super_resolution import SuperResolution
from convatlas.restoration.super_resolution_reports import panel
from convatlas.training.measure import count_parameters
from convatlas.training.run import Run
from convatlas.training.task import seed_everything, split_settings

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Gain over bicubic interpolation in dB, mean of the photographs that are learned from. A trial with another seed gave
#: 0.4 to 0.8 dB.
TRAINED_GAIN = 0.3
#: The same on photographs, and on frames of a clip, that were never seen: more than nothing.
UNSEEN_GAIN = 0.0
#: Times that a frame takes longer with SRCNN 9-1-5, and with 9-5-5 ("an order of magnitude", abstract).
SPEEDUPS = {"srcnn_915_x3": 5.0, "srcnn_955_x3": 10.0}

SEEDS = (0, 1, 2)
STEPS = 1200
NETWORK = ESPCNConfig(scale=3)
LEARNING_RATE = 4e-3
BATCH = 16
PATCH, STRIDE = 17, 13
PROTOCOL = Protocol(downscale="pillow")
TRAINED = ("astronaut", "camera", "coffee", "motorcycle")
UNSEEN = ("chelsea", "rocket")
#: The clip slides over this photograph: frames, and height and width of one.
CLIP, CLIP_FRAMES, CLIP_SIZE = "rocket", 16, (216, 288)
#: Height and width at low resolution of the frames that are timed, and how often.
TIMED_SIZE, TIMED_PAIRS = (120, 160), 7

# Full: trained by recipe on the user's images.

RECIPE = "espcn_yjn870"
FULL_MODELS = ("espcn_x3", "srcnn_915_x3")
#: PSNR of Set5 in dB: of the paper trained on 91 images, less what two trainings differ by; of bicubic interpolation.
SET5, SET5_NOISE, SET5_BICUBIC = 32.55, 0.05, 30.39
#: Gain over SRCNN in dB (abstract).
SRCNN_GAIN = 0.15


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains ESPCN on four photographs and times it beside SRCNN; "full" trains both by recipe.
        data: for "full": a folder with ``train`` (the 91 images, or others) and ``test`` (Set5).
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


class _Trained(NamedTuple):
    """A short training: the loss of each step, and the quality on photographs and on the clip."""

    losses: list[float]
    measured: dict[str, Measured]
    clip: ClipQuality

    def gain(self, names: tuple[str, ...]) -> float:
        """Mean gain over bicubic interpolation in dB."""
        return statistics.fmean(self.measured[name].network.psnr - self.measured[name].bicubic.psnr for name in names)

    @property
    def clip_gain(self) -> float:
        """The same of the clip's frames."""
        return statistics.fmean(self.clip.network) - statistics.fmean(self.clip.bicubic)


def quick() -> Report:
    """Short trainings on photographs, and the time of a frame beside SRCNN."""
    entries = [entry for found in read_pairs("photographs", scale=3).values() for entry in found.entries]
    samples = {entry.name: entry.read() for entry in entries if entry.name in (*TRAINED, *UNSEEN)}
    pairs = [learning_pair(samples[name], PROTOCOL, scale=3, channels=1) for name in TRAINED]
    patches = PatchSet(pairs, 3, PATCH, STRIDE)
    items = [patches[index] for index in range(len(patches))]
    low, high = (torch.stack([item[name] for item in items]).to(device()) for name in ("low", "high"))
    reports = STEPS // 50
    with progress(len(SEEDS) * (reports + 1) + TIMED_PAIRS) as advance:
        trained = [_train(seed, low, high, samples, advance) for seed in SEEDS]
        times = _times(advance)
    return finished("ESPCN: quick test of its claims", [_quality_section(trained, len(patches)), _speed_section(times)])


def _train(
    seed: int, low: Tensor, high: Tensor, samples: dict[str, Sample], advance: Callable[[str], None]
) -> _Trained:
    seed_everything(seed)
    model = NETWORK.build().to(low.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        rows = torch.randint(len(low), (BATCH,)).to(low.device)
        loss = F.mse_loss(model(low[rows]), high[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 50 == 49:
            advance(f"training with seed {seed}")
    model.eval()
    measured = {name: measure_image(model, name, samples[name], PROTOCOL) for name in (*TRAINED, *UNSEEN)}
    clip = measure_clip(model, _sliding(samples[CLIP].high[0]), PROTOCOL)
    advance("measuring")
    return _Trained([float(loss) for loss in losses], measured, clip)


def _sliding(photograph: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """A clip: a window that moves over a photograph from one corner to the other."""
    height, width = CLIP_SIZE
    for number in range(CLIP_FRAMES):
        y, x = (
            (length - size) * number // max(1, CLIP_FRAMES - 1)
            for length, size in zip(photograph.shape[:2], CLIP_SIZE, strict=True)
        )
        yield photograph[y : y + height, x : x + width]


def _times(advance: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds of the process for one frame, the networks in turn, on one thread of the CPU."""
    models: dict[str, nn.Module] = {name: create_model(name).eval() for name in ("espcn_x3", *SPEEDUPS)}
    x = torch.rand(1, 1, *TIMED_SIZE)
    taken: dict[str, list[float]] = {name: [] for name in models}
    with _one_thread(), torch.inference_mode():
        for model in models.values():
            model(x)
        for _ in range(TIMED_PAIRS):
            for name, model in models.items():
                started = time.process_time()
                model(x)
                taken[name].append(time.process_time() - started)
            advance("timing")
    return taken


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _quality_section(trained: list[_Trained], patches: int) -> Section:
    published = "32.55 dB on Set5 from 91 images, where bicubic interpolation has 30.39 dB"
    claims = [
        Claim.judge(
            "ESPCN enlarges the photographs it learned from better than bicubic interpolation",
            published=published,
            statistic=f"PSNR of luma less that of bicubic interpolation, mean of {len(TRAINED)} photographs",
            value=[each.gain(TRAINED) for each in trained],
            at_least=TRAINED_GAIN,
            seeds=len(SEEDS),
            unit="dB",
        ),
        Claim.judge(
            "ESPCN enlarges photographs that it has never seen better than bicubic interpolation",
            published=published,
            statistic=f"PSNR of luma less that of bicubic interpolation, mean of {len(UNSEEN)} photographs",
            value=[each.gain(UNSEEN) for each in trained],
            at_least=UNSEEN_GAIN,
            seeds=len(SEEDS),
            unit="dB",
        ),
        Claim.judge(
            "ESPCN enlarges a clip that it has never seen better than bicubic interpolation",
            published="on videos 0.39 dB more than networks that work at high resolution",
            statistic=f"PSNR of luma less that of bicubic interpolation, mean of {CLIP_FRAMES} frames that slide over "
            "an unseen photograph",
            value=[each.clip_gain for each in trained],
            at_least=UNSEEN_GAIN,
            seeds=len(SEEDS),
            unit="dB",
        ),
    ]
    rows: list[list[Cell]] = []
    for name in (*TRAINED, *UNSEEN):
        network = [each.measured[name].network.psnr for each in trained]
        bicubic = trained[0].measured[name].bicubic.psnr
        seen = "learned from" if name in TRAINED else "never seen"
        rows.append([name, seen, bicubic, statistics.fmean(network), min(network) - bicubic, max(network) - bicubic])
    columns = ["photograph", "", "bicubic [dB]", "ESPCN [dB]", "least gain [dB]", "largest gain [dB]"]
    table = Table("PSNR of luma", columns, rows, PROTOCOL.describe(3))
    pictures = [(panel(*trained[0].measured[name].shown), name) for name in UNSEEN]
    images = Images("Never seen: bicubic, ESPCN, truth, error of ESPCN", pictures, f"Seed {SEEDS[0]}.")
    window = max(1, STEPS // 40)
    curves = {}
    for seed, each in zip(SEEDS, trained, strict=True):
        means = [statistics.fmean(each.losses[i : i + window]) for i in range(0, STEPS - window + 1, window)]
        curves[f"seed {seed}"] = ([window * (number + 1) for number in range(len(means))], means)
    lines = Lines("Training", "step", "mean squared error", curves, log_y=True)
    note = Note(
        f"{STEPS} steps of Adam with batches of {BATCH} of {patches} patches of {PATCH} x {PATCH} pixels; learning "
        f"rate {LEARNING_RATE:g}, cosine decay. Half a minute on four photographs tests the mechanism, not the "
        "figures of the paper."
    )
    return Section("Quality", [*claims, table, images, lines, note])


def _speed_section(times: dict[str, list[float]]) -> Section:
    claims: list[Part] = []
    rows: list[list[Cell]] = []
    for name, taken in times.items():
        ratios = [theirs / ours for ours, theirs in zip(times["espcn_x3"], taken, strict=True)]
        model = cast(Upscaler, create_model(name))
        rows.append(
            [
                name,
                count_parameters(model),
                round(macs_per_pixel(model)),
                1000 * statistics.median(taken),
                statistics.median(ratios),
            ]
        )
        if name in SPEEDUPS:
            kernels = "-".join(name.split("_")[1])
            claims.append(
                Claim.judge(
                    f"ESPCN enlarges a frame several times faster than SRCNN {kernels}",
                    published="an order of magnitude faster",
                    statistic="time of SRCNN with its interpolation over that of ESPCN, a scale of 3, median of pairs",
                    value=statistics.median(ratios),
                    at_least=SPEEDUPS[name],
                    seeds=0,
                    unit="times",
                )
            )
    height, width = TIMED_SIZE
    columns = ["network", "parameters", "multiply-adds a pixel", "time of a frame [ms]", "over ESPCN"]
    caption = (
        f"From {width} x {height} to {3 * width} x {3 * height} pixels of luma, on one thread of the CPU, the networks "
        "in turn; pixels are those of the large image. The multiply-adds are those of convolutions."
    )
    return Section("Speed", [*claims, Table("Cost", columns, rows, caption)])


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train ESPCN and SRCNN 9-1-5 by the same recipe and compare them on the test images.

    Args:
        data: a folder with ``train`` and ``test``.
        folder: where the runs lie, each below the name of its model.
        changes: settings that differ from the recipe, e.g. ``epochs=30``. With any, or where the test images are not
            Set5, the figures cannot be held against the published ones, and the verdicts say so.
    """
    measured: dict[str, list[Measured]] = {}
    for model in FULL_MODELS:
        recipe = yaml.safe_load(SuperResolution.recipe(RECIPE).read_text(encoding="utf-8"))
        own: dict[str, Any] = {"data": str(data), "model": model, "protocol": {}}
        if not model.startswith("espcn"):
            own["options"] = {}
        task, training = split_settings(SuperResolution, {**recipe, **own, **changes})
        place = Path(folder) / model
        task.fit(place, training, resume=Run(place).config.is_file())
        measured[model] = task.measure(task.splits["test"])[0]
    network = {model: mean_quality(each.network for each in images).psnr for model, images in measured.items()}
    espcn, srcnn = (network[model] for model in FULL_MODELS)
    bicubic = mean_quality(each.bicubic for each in measured[FULL_MODELS[0]]).psnr
    is_set5 = len(measured[FULL_MODELS[0]]) == 5 and abs(bicubic - SET5_BICUBIC) < 0.05
    claims: list[Part] = [
        Claim.judge(
            "ESPCN trained by recipe reaches its published PSNR",
            published=f"{SET5} dB on Set5 for a scale of 3, from 91 images",
            statistic="mean PSNR of luma of the test images",
            value=espcn,
            at_least=SET5 - SET5_NOISE,
            seeds=1,
            scale_ok=is_set5 and not changes,
            unit="dB",
        ),
        Claim.judge(
            "ESPCN enlarges better than SRCNN",
            published="0.15 dB on images",
            statistic="mean PSNR of luma of the test images less that of SRCNN 9-1-5 trained by the same recipe",
            value=espcn - srcnn,
            at_least=SRCNN_GAIN,
            seeds=1,
            scale_ok=is_set5 and not changes,
            unit="dB",
        ),
    ]
    rows: list[list[Cell]] = [["bicubic", bicubic]]
    rows += [[model, value] for model, value in network.items()]
    table = Table("PSNR of luma", ["", "test images [dB]"], rows, Protocol().describe(3))
    pictures = [(panel(*each.shown), each.name) for each in measured[FULL_MODELS[0]][:5]]
    images = Images("Bicubic, ESPCN, truth, error of ESPCN", pictures)
    links = Files("Runs", {f"report of {model}": f"{model}/report.html" for model in FULL_MODELS})
    return finished(
        "ESPCN: full test of its claims", [Section("Quality", [*claims, table, images, links])], data=str(data)
    )
