"""Does a discriminator that sees wavelets teach a generator to enlarge volumes and to clean them of noise on the way?

Wang, Mahler, Steiglechner, Birk, Scheffler, Lohmann: "DISGAN: Wavelet-informed Discriminator Guides GAN to MRI
Super-resolution with Noise Cleaning", ICCV Workshops 2023, arXiv 2308.12084. It claims super-resolution at least as
good as that of adversarial networks without wavelets, and noise cleaning that was never trained for.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from convatlas.data.phantoms import phantom
from convatlas.experiments.small_training import finished, progress
from convatlas.networks.registry import create_model
from convatlas.ops.volume_quality import volume_psnr
from convatlas.ops.volume_resize import linear_enlarge, shrink
from convatlas.report import Cell, Claim, Files, Images, Lines, Note, Report, Section, Table
from convatlas.restoration.volume_evaluation import mean_volume_quality
from convatlas.restoration.volume_pictures import middle_slices, orthogonal_slices, residual_slices
from convatlas.restoration.volume_super_resolution import VolumeSuperResolution
from convatlas.training.adversarial import Adversarial
from convatlas.training.method import Method
from convatlas.training.run import Run
from convatlas.training.settings import Training
from convatlas.training.task import split_settings

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: PSNR over trilinear interpolation in dB below which the network has not learned enough to be compared.
LEARNED = 0.5
#: Gains in dB over trilinear interpolation: from clean low resolution, and from noisy, which no training has seen.
CLEAN_GAIN, NOISY_GAIN = 0.5, 0.2
#: dB that a difference between two ways to train must be above, or may be below, to count. A way is better only if the
#: seeds agree on it; otherwise the difference cannot be told at this scale.
BETTER, NO_WORSE = 0.0, -0.1

SEEDS = (0, 1, 2)
SIDE, PATCH, BATCH = 32, 16, 4
TRAIN, TEST = 12, 4
NOISE = 0.05
#: Steps by the mean difference alone, which all ways begin with, then steps of each way.
FIRST, STEPS = 180, 32
LEARNING_RATE = 3e-3
TRAINING = Training(epochs=4, lr=1e-3, weight_decay=0.0, schedule="constant", warmup_epochs=0)
GENERATOR: dict[str, Any] = {"filters": 8, "num_blocks": 1}
DISCRIMINATOR: dict[str, Any] = {"levels": 3, "filters": 4}
L1, PLAIN, WAVELET = "mean difference", "GAN, plain U-Net", "GAN, wavelets"
DISCRIMINATORS = {L1: None, PLAIN: "disgan_plain_discriminator", WAVELET: "disgan_discriminator"}

RECIPES = ("disgan_l1", "disgan_plain", "disgan")


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains a small generator on simulated heads in three ways; "full" the published one by recipe.
        data: for "full": a folder with ``train`` and ``test`` volumes (HCP 1200 T1w in the paper).
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


class _Heads(NamedTuple):
    """Volumes (N, 1, D, H, W) to learn from, and test volumes with their clean and noisy low resolution."""

    train: Tensor
    test: Tensor
    low: Tensor
    noisy: Tensor


class _Result(NamedTuple):
    """PSNR of the test volumes in dB from clean and from noisy low resolution, and the first of each enlarged."""

    clean: float
    noisy: float
    volumes: tuple[Tensor, Tensor]


def _heads(seed: int) -> _Heads:
    random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    volumes = torch.from_numpy(np.stack([phantom(SIDE, random) for _ in range(TRAIN + TEST)]))[:, None]
    low = shrink(volumes[TRAIN:], 2)
    return _Heads(volumes[:TRAIN], volumes[TRAIN:], low, low + NOISE * torch.randn(low.shape, generator=generator))


def _psnr(result: Tensor, truth: Tensor) -> float:
    return statistics.fmean(float(volume_psnr(one[0], other[0])) for one, other in zip(result, truth, strict=True))


def _batch(volumes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Patches at random places whose corners lie on blocks."""
    rows = torch.randint(len(volumes), (BATCH,), generator=generator)
    places = 2 * torch.randint((SIDE - PATCH) // 2 + 1, (BATCH, 3), generator=generator)
    high = torch.stack(
        [
            volumes[row][(slice(None), *(slice(start, start + PATCH) for start in place))]
            for row, place in zip(rows, places.tolist(), strict=True)
        ]
    )
    return {"low": shrink(high, 2), "high": high}


def _losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    result = model(batch["low"])
    return {"loss": (result - batch["high"]).abs().mean(), "result": result, "truth": batch["high"]}


def _begun(heads: _Heads, seed: int, advance: Callable[..., None]) -> tuple[nn.Module, list[float]]:
    """A generator that has learned from the mean difference, and the loss of each step."""
    torch.manual_seed(seed)
    model, generator = create_model("disgan_x2", **GENERATOR), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    losses = []
    for step in range(FIRST):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 20) * (0.6 + 0.4 * math.cos(math.pi * step / FIRST))
        loss = _losses(model, _batch(heads.train, generator))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        advance(f"seed {seed}")
    return model, losses


def _gone_on(begun: nn.Module, way: str, heads: _Heads, seed: int, advance: Callable[..., None]) -> _Result:
    """Some more steps in one of the ways, and what comes out."""
    torch.manual_seed(seed)
    model, generator = copy.deepcopy(begun), torch.Generator().manual_seed(1000 + seed)
    name = DISCRIMINATORS[way]
    method = Method() if name is None else Adversarial(name, DISCRIMINATOR)
    optimizers = list(method.optimizers(model, TRAINING)) or [torch.optim.Adam(model.parameters(), TRAINING.lr)]
    for step in range(STEPS):
        if step % (STEPS // TRAINING.epochs) == 0:
            method.start_epoch(model, step // (STEPS // TRAINING.epochs))
        for number, losses in method.turns(model, _batch(heads.train, generator), _losses):
            optimizers[number].zero_grad()
            losses["loss"].backward()
            optimizers[number].step()
        advance(f"seed {seed}, {way}")
    model.eval()
    with torch.inference_mode():
        clean, noisy = model(heads.low), model(heads.noisy)
    return _Result(_psnr(clean, heads.test), _psnr(noisy, heads.test), (clean[0, 0], noisy[0, 0]))


def quick() -> Report:
    """A small generator on simulated heads, trained in three ways, with and without noise in what it enlarges."""
    results: dict[str, list[_Result]] = {way: [] for way in DISCRIMINATORS}
    linear: list[tuple[float, float]] = []
    curves: dict[str, tuple[list[int], list[float]]] = {}
    shown: dict[str, Tensor] = {}
    with progress(len(SEEDS) * (FIRST + len(DISCRIMINATORS) * STEPS)) as advance:
        for seed in SEEDS:
            heads = _heads(seed)
            between = [linear_enlarge(low, 2) for low in (heads.low, heads.noisy)]
            linear.append((_psnr(between[0], heads.test), _psnr(between[1], heads.test)))
            begun, losses = _begun(heads, seed, advance)
            means = [statistics.fmean(losses[start : start + 10]) for start in range(0, FIRST, 10)]
            curves[f"seed {seed}"] = (list(range(10, FIRST + 1, 10)), means)
            for way, found in results.items():
                found.append(_gone_on(begun, way, heads, seed, advance))
            if seed == SEEDS[0]:
                shown = {"truth": heads.test[0, 0], "trilinear interpolation": between[1][0, 0]}
                shown |= {way: found[0].volumes[1] for way, found in results.items()}
    section = _quality(results, linear)
    pictures = _pictures(shown)
    lines = Lines("Before the ways part", "step", "mean absolute difference", curves, log_y=True)
    note = Note(
        f"{FIRST} steps by the mean difference, then {STEPS} steps in each way, on {TRAIN} simulated heads of {SIDE} "
        f"voxels a side; {TEST} others are enlarged. The paper trains from the start against the discriminator, for "
        "days. So few steps can show that a network beats interpolation; that wavelets clean better than a plain U-Net "
        "they can only hint at, because 5 thousandths of the adversarial loss move little in this time."
    )
    return finished("DISGAN: quick test of its claims", [section, pictures, Section("Training", [lines, note])])


def _quality(results: dict[str, list[_Result]], linear: list[tuple[float, float]]) -> Section:
    def gains(way: str, noisy: bool) -> list[float]:
        found = [each.noisy if noisy else each.clean for each in results[way]]
        return [value - base[noisy] for value, base in zip(found, linear, strict=True)]

    def over(other: str, noisy: bool) -> list[float]:
        return [ours - theirs for ours, theirs in zip(gains(WAVELET, noisy), gains(other, noisy), strict=True)]

    learned = statistics.fmean(gains(L1, False)) >= LEARNED
    common: dict[str, Any] = {"seeds": len(SEEDS), "unit": "dB"}
    claims = [
        Claim.judge(
            "DISGAN enlarges volumes better than interpolation",
            published="super-resolution on MRI of several collections; no figure for interpolation",
            statistic=f"mean PSNR of {TEST} unseen heads less that of trilinear interpolation",
            value=gains(WAVELET, False),
            at_least=CLEAN_GAIN,
            **common,
        ),
        Claim.judge(
            "Trained for super-resolution only, it also cleans noise",
            published="denoising without pairs of noisy and clean scans",
            statistic=f"the same from low resolution with noise of {NOISE:g} of the range, less that of interpolation",
            value=gains(WAVELET, True),
            at_least=NOISY_GAIN,
            scale_ok=learned,
            **common,
        ),
        Claim.judge(
            "It enlarges as well as against a discriminator without wavelets",
            published="on par with or better than adversarial networks of ESRGAN's kind",
            statistic="PSNR less that of the same generator against a plain U-Net, clean",
            value=over(PLAIN, False),
            at_least=NO_WORSE,
            scale_ok=learned,
            **common,
        ),
        Claim.judge(
            "It cleans more noise than against a discriminator without wavelets",
            published="the wavelets of the discriminator are what cleans",
            statistic="PSNR less that of the same generator against a plain U-Net, noisy",
            value=over(PLAIN, True),
            at_least=BETTER,
            scale_ok=learned and _agree(over(PLAIN, True)),
            **common,
        ),
        Claim.judge(
            "It cleans more noise than without a discriminator",
            published="the wavelets of the discriminator are what cleans",
            statistic="PSNR less that of the same generator trained by the mean difference alone, noisy",
            value=over(L1, True),
            at_least=BETTER,
            scale_ok=learned and _agree(over(L1, True)),
            **common,
        ),
    ]
    base = [statistics.fmean(column) for column in zip(*linear, strict=True)]
    rows: list[list[Cell]] = [["trilinear interpolation", base[0], 0.0, base[1], 0.0]]
    for way in results:
        clean, noisy = (statistics.fmean(gains(way, which)) for which in (False, True))
        rows.append([way, base[0] + clean, clean, base[1] + noisy, noisy])
    columns = ["", "PSNR [dB]", "gain [dB]", "PSNR from noisy [dB]", "gain from noisy [dB]"]
    highlight: Any = {"PSNR [dB]": "max", "PSNR from noisy [dB]": "max"}
    table = Table("PSNR of unseen heads", columns, rows, f"Means of {len(SEEDS)} seeds.", highlight)
    return Section("Quality", [*claims, table])


def _agree(differences: list[float]) -> bool:
    return min(differences) > 0 or max(differences) < 0


def _pictures(volumes: dict[str, Tensor]) -> Section:
    planes = {name: middle_slices(volume.numpy()) for name, volume in volumes.items()}
    pictures = [(orthogonal_slices(each), name) for name, each in planes.items()]
    pictures += [
        (residual_slices(each, planes["truth"]), f"{name}, residual")
        for name, each in planes.items()
        if name != "truth"
    ]
    caption = (
        "Axial, coronal and sagittal. Residuals: red is too bright, blue too dark, full colour a quarter of the range."
    )
    return Section("Slices", [Images("Enlarged from noisy low resolution", pictures, caption)])


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train the published generator by the three recipes and compare them on the test volumes.

    Args:
        data: a folder with ``train`` and ``test``.
        folder: where the runs lie, each below the name of its recipe.
        changes: settings that differ from the recipes; with any the verdicts say that the setting is not the paper's.
    """
    measured = {}
    for recipe in RECIPES:
        settings = yaml.safe_load(VolumeSuperResolution.recipe(recipe).read_text(encoding="utf-8"))
        changed = {name: value for name, value in changes.items() if name != "methods" or recipe != RECIPES[0]}
        task, training = split_settings(VolumeSuperResolution, {**settings, "data": str(data), **changed})
        place = Path(folder) / recipe
        task.fit(place, training, resume=Run(place).config.is_file())
        measured[recipe] = task.measure(task.splits["test"])[0]
    clean = {name: mean_volume_quality(each.network for each in volumes) for name, volumes in measured.items()}
    noisy = {name: mean_volume_quality(each.noisy_network for each in volumes) for name, volumes in measured.items()}
    some = measured[RECIPES[-1]]
    linear, noisy_linear = (
        mean_volume_quality(getattr(each, which) for each in some) for which in ("linear", "noisy_linear")
    )
    common: dict[str, Any] = {"seeds": 1, "scale_ok": not changes, "unit": "dB"}
    claims = [
        Claim.judge(
            "DISGAN enlarges volumes better than interpolation",
            published="super-resolution on MRI of several collections; no figure for interpolation",
            statistic="mean PSNR of the test volumes less that of trilinear interpolation",
            value=clean["disgan"].psnr - linear.psnr,
            at_least=CLEAN_GAIN,
            **common,
        ),
        Claim.judge(
            "Trained for super-resolution only, it also cleans noise",
            published="denoising without pairs of noisy and clean scans",
            statistic="the same from noisy low resolution",
            value=noisy["disgan"].psnr - noisy_linear.psnr,
            at_least=NOISY_GAIN,
            **common,
        ),
        Claim.judge(
            "It cleans more noise than against a discriminator without wavelets",
            published="the wavelets of the discriminator are what cleans",
            statistic="PSNR from noisy low resolution less that of the recipe disgan_plain",
            value=noisy["disgan"].psnr - noisy["disgan_plain"].psnr,
            at_least=BETTER,
            **common,
        ),
    ]
    rows: list[list[Cell]] = [["trilinear", *linear[:4], noisy_linear.psnr]]
    rows += [[name, *clean[name][:4], noisy[name].psnr] for name in RECIPES]
    columns = ["", "PSNR [dB]", "SSIM", "slice SSIM", "NRMSE", "PSNR from noisy [dB]"]
    links = Files("Runs", {f"report of {name}": f"{name}/report.html" for name in RECIPES})
    section = Section("Quality", [*claims, Table("Test volumes", columns, rows), links])
    return finished("DISGAN: full test of its claims", [section], data=str(data))
