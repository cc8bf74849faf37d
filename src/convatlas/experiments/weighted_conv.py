"""Does a density in the kernels help networks to learn, and is that more than a smaller start?

Cammarasana, Patane: "Optimal Weighted Convolution for Classification and Denosing", 2025, arXiv 2505.24558. It claims
22.63 dB against 20.17 dB for DnCNN on DIV2K and 66.94 % against 56.89 % for VGG on CIFAR-100, with no more parameters
and no more time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.image_pairs import read_pairs
from convatlas.experiments.small_training import (
    Trained,
    accuracy_differences,
    accuracy_parts,
    compare,
    device,
    finished,
    one_thread,
    progress,
    resolved,
)
from convatlas.networks.dncnn import DnCNNConfig
from convatlas.networks.vgg import VGGConfig
from convatlas.nn.conv.weighted_conv import BEST_DENSITIES, WeightedConv2d, density_param_groups, radial_energy
from convatlas.ops.image_quality import psnr
from convatlas.report import Bars, Cell, Claim, Images, Lines, Report, Section, Table
from convatlas.restoration.denoising import Denoising
from convatlas.restoration.denoising_evaluation import seen
from convatlas.training.run import Run
from convatlas.training.sampling import seed_everything
from convatlas.training.settings import Training
from convatlas.training.task import split_settings

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Gain in dB that counts; the paper has 2.46 dB.
GAIN = 0.1
#: Points of accuracy that count as no loss, of 900 test images and three runs.
TOLERANCE = 1.0
#: Time of a training step with the density over that without it that counts as equal.
OVERHEAD = 1.1

SEEDS = (0, 1, 2)
NETWORK = DnCNNConfig(depth=5, dim=12, kernel_size=7)
#: What is trained: density, whether it is trained, and whether the start has the variance of a plain network.
FORMS: dict[str, dict[str, Any]] = {
    "ones": {"density": (1.0, 1.0, 1.0)},
    "density": {"density": BEST_DENSITIES[7]},
    "trained density": {"density": (0.27, 0.17, 0.54), "trainable_density": True},
    "density, rescaled start": {"density": BEST_DENSITIES[7]},
}
SIGMA = 25 / 255
PATCH = 32
BATCH = 4
STEPS = 200
RATE = 1e-3
PAIRS = 9

#: Digits, by small VGGs with kernels of five taps.
DIGITS = VGGConfig(num_classes=10, in_channels=1, widths=((8, 8), (16,), (24,)), kernel_size=5)
TRAINING = Training(epochs=5, batch_size=32, lr=3e-3, warmup_epochs=1)
TRAIN_FRACTION = 0.2

RECIPE = "dncnn_weighted"
PUBLISHED = "DnCNN on DIV2K: 22.63 dB with the density, 20.17 dB without"


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small DnCNNs on photographs and small VGGs on digits; "full" trains DnCNN by the recipe.
        data: for "full": DIV2K or other clean images in any form that ``convatlas train denoising`` reads.
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


class _Cleaner(NamedTuple):
    """A short training: PSNR of the test images in dB, losses, a cleaned square, energy of the first kernels."""

    quality: float
    losses: list[float]
    square: Tensor
    energy: Tensor


def quick() -> Report:
    """Clean photographs, name digits, time a step."""
    networks = {
        name: DIGITS.override(density=density).build
        for name, density in (("plain", None), ("density", BEST_DENSITIES[5]))
    }
    steps = len(SEEDS) * (len(FORMS) + len(networks) * TRAINING.epochs) + 1
    with progress(steps) as advance:
        with one_thread():
            images = _photographs()
            cleaners = {name: [_cleaner(name, images, seed, advance) for seed in SEEDS] for name in FORMS}
            ratio = _step_ratio()
            advance("timing")
        trained = compare(networks, TRAINING, seeds=SEEDS, train_fraction=TRAIN_FRACTION, advance=advance)
    sections = [_denoising_section(cleaners, images), _digits_section(trained), _time_section(ratio)]
    return finished("Weighted convolution: quick test of its claims", sections)


def _photographs() -> dict[str, list[Tensor]]:
    """Grey photographs (1, H, W) in [0, 1], to learn from and to test on."""
    sets = read_pairs("photographs", scale=1)
    chosen = {"train": ("camera", "coffee", "astronaut", "motorcycle"), "test": ("coins", "chelsea")}
    entries = {entry.name: entry for pairs in sets.values() for entry in pairs.entries}
    return {
        part: [torch.from_numpy(seen(entries[name].read().high[0], 1)) for name in names]
        for part, names in chosen.items()
    }


def _network(name: str) -> nn.Module:
    network = NETWORK.override(**FORMS[name]).build()
    if "rescaled" in name:
        for layer in network.modules():
            if isinstance(layer, WeightedConv2d):
                layer.rescale_init = True
                layer.reset_parameters()
    return network


def _cleaner(name: str, images: Mapping[str, list[Tensor]], seed: int, advance: Callable[..., None]) -> _Cleaner:
    seed_everything(seed)
    network = _network(name)
    if FORMS[name].get("trainable_density"):
        optimizer = torch.optim.AdamW(density_param_groups(network, lr=RATE, density_lr=10 * RATE))
    else:
        optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(STEPS):
        clean = torch.stack([_patch(images["train"], generator) for _ in range(BATCH)])
        noisy = clean + SIGMA * torch.randn(clean.shape, generator=generator)
        loss = F.mse_loss(network(noisy), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    network.eval()
    values, square = [], torch.zeros(0)
    with torch.inference_mode():
        for number, image in enumerate(images["test"]):
            crop = _middle(image)
            noisy = crop + SIGMA * torch.randn(crop.shape, generator=torch.Generator().manual_seed(number))
            square = network(noisy[None])[0].clamp(0, 1)
            values.append(float(psnr(square, crop, data_range=1)))
    advance(f"cleaning, {name}")
    first = next(layer for layer in network.modules() if isinstance(layer, WeightedConv2d))
    return _Cleaner(statistics.mean(values), losses, square, radial_energy(first.weight))


def _patch(images: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    image = images[int(torch.randint(len(images), (), generator=generator))]
    y, x = (int(torch.randint(side - PATCH, (), generator=generator)) for side in image.shape[1:])
    return image[:, y : y + PATCH, x : x + PATCH]


def _middle(image: Tensor, side: int = 128) -> Tensor:
    y, x = ((length - side) // 2 for length in image.shape[1:])
    return image[:, y : y + side, x : x + side]


def _step_ratio() -> list[float]:
    """Time of a training step with the density over that of plain convolutions, of alternating pairs."""
    seed_everything(0)
    weighted, plain = _network("density"), NETWORK.build()
    x = torch.rand(BATCH, 1, PATCH, PATCH)

    def seconds(network: nn.Module) -> float:
        start = time.process_time()
        network(x).square().mean().backward()
        return time.process_time() - start

    return [seconds(weighted) / seconds(plain) for _ in range(PAIRS + 1)][1:]


def _denoising_section(cleaners: Mapping[str, Sequence[_Cleaner]], images: Mapping[str, list[Tensor]]) -> Section:
    def gain(one: str, other: str) -> list[float]:
        pairs = zip(cleaners[one], cleaners[other], strict=True)
        return [a.quality - b.quality for a, b in pairs]

    judged: dict[str, Any] = {"seeds": len(SEEDS), "unit": "dB", "published": PUBLISHED, "at_least": GAIN}
    statistic = f"PSNR of two photographs after {STEPS} steps of a network of 5 layers with 7 x 7 taps"
    claims = [
        Claim.judge(
            "A density makes a network clean better after a short training",
            statistic=f"{statistic}, with the density less with ones",
            value=gain("density", "ones"),
            **judged,
        ),
        Claim.judge(
            "So does a trained density",
            statistic=f"{statistic}, with a trained density less with ones",
            value=gain("trained density", "ones"),
            **judged,
        ),
        Claim.judge(
            "The gain is more than that of a smaller start",
            statistic=f"{statistic}, with the density and a start of the variance of a plain network, less with ones",
            value=gain("density, rescaled start", "ones"),
            **judged,
        ),
    ]
    rows: list[list[Cell]] = [
        [name, *(each.quality for each in found), statistics.mean(each.quality for each in found)]
        for name, found in cleaners.items()
    ]
    columns = ["kernels", *(f"seed {seed} [dB]" for seed in SEEDS), "mean [dB]"]
    curves = {}
    for name, found in cleaners.items():
        means = [statistics.mean(values) for values in zip(*(each.losses for each in found), strict=True)]
        smooth = [statistics.mean(means[max(0, i - 9) : i + 1]) for i in range(len(means))]
        curves[name] = (range(1, 1 + len(smooth)), smooth)
    energies: list[list[Cell]] = [[name, *found[0].energy.tolist()] for name, found in cleaners.items()]
    rings = ["kernels", *(f"{ring} taps away" for ring in range(NETWORK.kernel_size // 2 + 1))]
    truth = _middle(images["test"][-1])
    noisy = (truth + SIGMA * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    pictures = [(noisy, "noisy"), *((found[0].square, name) for name, found in cleaners.items()), (truth, "truth")]
    parts: list[Any] = [
        *claims,
        Table("PSNR", columns, rows, "Noise of standard deviation 25 of 255.", {"mean [dB]": "max"}),
        Lines("Training loss, mean of the seeds and of ten steps", "step", "mean squared error", curves, log_y=True),
        Table("Energy of the first kernels by distance from the centre, after training", rings, energies),
        Images("A test image", [((255 * each[0]).round().numpy().astype(np.uint8), name) for each, name in pictures]),
    ]
    return Section("Denoising", parts)


def _digits_section(trained: Mapping[str, Sequence[Trained]]) -> Section:
    differences = accuracy_differences(trained["density"], trained["plain"])
    claim = Claim.judge(
        "A density does not harm, and may help, the classification of small images",
        published="VGG on CIFAR-100: 66.94 % with the density, 56.89 % without",
        statistic="accuracy with the density less that without it, on held-out digits",
        value=differences,
        at_least=-TOLERANCE,
        seeds=len(differences),
        unit="points",
    )
    caption = "The difference is resolved." if resolved(differences) else "The difference is within its error."
    return Section("Digits", [claim, *accuracy_parts(trained, SEEDS, caption=caption)])


def _time_section(ratios: Sequence[float]) -> Section:
    claim = Claim.judge(
        "A density costs no time",
        published="the same speed",
        statistic="time of a training step with the density over that without it, median of alternating pairs",
        value=statistics.median(ratios),
        at_most=OVERHEAD,
        seeds=0,
        unit="times",
    )
    bars = Bars("Pairs", "ratio of times", {str(number): ratio for number, ratio in enumerate(ratios, 1)})
    return Section("Time of a step", [claim, bars])


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train DnCNN by the recipe, plain and with densities.

    Args:
        data: clean images, such as DIV2K.
        folder: where the runs lie, each in a folder of its own.
        changes: settings that differ from the recipe, e.g. ``batch_size=16``.
    """
    import yaml

    settings = yaml.safe_load(Denoising.recipe(RECIPE).read_text(encoding="utf-8"))
    models = {"plain": "dncnn", "plain, 7 x 7": "dncnn", "density, 7 x 7": "dncnn_weighted_k7"}
    quality: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        options = {**changes.get("options", {}), **({"kernel_size": 7} if name == "plain, 7 x 7" else {})}
        values = {**settings, **changes, "data": str(data), "model": model, "options": options}
        task, training = split_settings(Denoising, values)
        place = Path(folder) / name.replace(", ", "_").replace(" ", "")
        task.fit(place, training, resume=Run(place).config.is_file())
        task.network.to(device())
        quality[name] = task.quality()
    claim = Claim.judge(
        "A density makes DnCNN clean better",
        published=PUBLISHED,
        statistic="PSNR of the test images with the density less that of plain kernels of the same size",
        value=quality["density, 7 x 7"]["PSNR [dB]"] - quality["plain, 7 x 7"]["PSNR [dB]"],
        at_least=GAIN,
        seeds=1,
        scale_ok=not changes,
        unit="dB",
    )
    rows: list[list[Cell]] = [[name, *values.values()] for name, values in quality.items()]
    section = Section("DnCNN", [claim, Table("Test images", ["network", "PSNR [dB]", "SSIM"], rows)])
    return finished("Weighted convolution: full test of its claims", [section], data=str(data))
