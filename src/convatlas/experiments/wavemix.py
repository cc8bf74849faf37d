"""Do wavelet blocks classify and enlarge images on less memory than convolutions with as many parameters?

Jeevan, Viswanathan, Anandu, Sethi: "WaveMix: A Resource-efficient Neural Network for Image Analysis", 2022,
arXiv 2205.14375. It claims the accuracy of larger networks with fewer parameters and less GPU memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.images import read_images
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    FullRun,
    accuracy_differences,
    accuracy_parts,
    compare,
    finished,
    full_parts,
    progress,
    published_accuracy,
    train_by_recipe,
)
from convatlas.networks.wavemix import WaveMix, WaveMixConfig, WaveMixSR, WaveMixSRConfig
from convatlas.ops.image_quality import psnr
from convatlas.ops.resize import resize
from convatlas.report import Bars, Cell, Claim, Images, Note, Report, Section, Table
from convatlas.training.measure import kept_bytes
from convatlas.training.settings import Training
from convatlas.training.task import seed_everything

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Accuracy in % that the small classifier must reach on the digits.
ACCURACY = 97.0
#: Points that WaveMix may lose against convolutions: two standard errors of a paired difference of three runs that are
#: 97 % right on 900 images each.
TOLERANCE = 1.0
#: Bytes that convolutions keep for the backward pass over those that WaveMix keeps: "less" means above one.
MEMORY_RATIO = 1.0
#: Decibels by which the enlarged crops must be nearer to the originals than bicubic interpolation.
PSNR_GAIN = 0.0

SEEDS = (0, 1, 2)
TRAIN_FRACTION = 0.5
TRAINING = Training(epochs=8, batch_size=32, lr=5e-3, warmup_epochs=1)
#: Dropout is left out, because it slows so short a training.
NETWORK = WaveMixConfig(depth=3, dim=32, level=2, patch_size=4, dropout=0.0, num_classes=10, in_channels=1)
#: Hidden channels of the convolutional blocks that give them as many parameters.
CONV_WIDTH = 59
MEMORY_BATCH = 32

SR_NETWORK = WaveMixSRConfig(depth=1, dim=24, dropout=0.0)
SR_STEPS = 1500
SR_BATCH = 8
SR_LR = 2e-2
SR_WARMUP = 20
SR_CROP = 32
SR_TEST_CROP = 64
SR_TEST_CROPS = 32
SR_REPORTED = 100

# Full: one training in two phases, as the authors did.

RECIPES = {
    IMAGENET_CLASSES: ("wavemix_192_16_l3", "wavemix_imagenet", 75.06),
    10: ("wavemix_320_8_l1_cifar10", "wavemix_cifar", 95.37),
}
#: Points of top-1 by which two trainings of one recipe differ.
RUN_NOISE = 0.3


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small classifiers on digits and small networks that enlarge photographs; "full" trains
            WaveMix by the recipe, with AdamW and then SGD.
        data: for "full": ImageNet-1K or, with 10 classes, CIFAR-10, a folder with ``train`` and ``val`` and a folder
            for each class in them.
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


def quick() -> Report:
    """WaveMix beside convolutions on digits, memory, and images of twice the size."""
    with progress(len(SEEDS) * (2 * TRAINING.epochs + SR_STEPS // SR_REPORTED)) as advance:
        classification = _classification(advance)
        enlarging = _enlarging(advance)
    return finished("WaveMix: quick test of its claims", [classification, enlarging])


# -- classification ----------------------------------------------------------------------------------------------------


def _conv_block(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, CONV_WIDTH, 3, padding=1),
        nn.BatchNorm2d(CONV_WIDTH),
        nn.GELU(),
        nn.Conv2d(CONV_WIDTH, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
    )


def _classification(advance: Callable[[str], None]) -> Section:
    networks: dict[str, Callable[[], nn.Module]] = {
        "WaveMix": lambda: WaveMix(NETWORK),
        "3 x 3 convolutions": lambda: WaveMix(NETWORK, block=_conv_block),
    }
    trained = compare(networks, TRAINING, seeds=SEEDS, train_fraction=TRAIN_FRACTION, advance=advance)
    wavemix, convolutions = trained.values()
    kept = {name: _kept(build()) for name, build in networks.items()}
    kept_wavemix, kept_convolutions = kept.values()
    claims = [
        Claim.judge(
            "A small WaveMix learns the digits",
            published="99 % on MNIST with 3566 parameters (another version of the block)",
            statistic="accuracy on the test digits after the last epoch",
            value=[result.accuracy for result in wavemix],
            at_least=ACCURACY,
            seeds=len(SEEDS),
            unit="%",
        ),
        Claim.judge(
            "WaveMix is as accurate as convolutions with as many parameters",
            published="accuracies of larger networks with fewer parameters",
            statistic="accuracy of WaveMix less that of a residual network of 3x3 convolutions, on the same digits",
            value=accuracy_differences(wavemix, convolutions),
            at_least=-TOLERANCE,
            seeds=len(SEEDS),
            unit="points",
        ),
        Claim.judge(
            "WaveMix needs less memory in training",
            published="less GPU memory than networks of equal accuracy",
            statistic="bytes that the network of convolutions keeps for the backward pass over those of WaveMix",
            value=kept_convolutions / kept_wavemix,
            at_least=MEMORY_RATIO,
            seeds=0,
            unit="times",
        ),
    ]
    parts = accuracy_parts(
        trained,
        SEEDS,
        caption=f"Networks that differ in the blocks only, after the last of {TRAINING.epochs} epochs on "
        f"{TRAIN_FRACTION:.0%} of scikit-learn's 1797 digits at 32 x 32 pixels.",
    )
    bars = Bars(
        f"Kept for the backward pass of {MEMORY_BATCH} images",
        "MB",
        {name: size / 1e6 for name, size in kept.items()},
        "Every tensor that autograd saves, without the parameters, counted once.",
    )
    note = Note(
        f"{NETWORK.depth} blocks of {NETWORK.dim} channels, {NETWORK.level} levels, patches of {NETWORK.patch_size} "
        f"pixels, no dropout; the convolutions have {CONV_WIDTH} hidden channels. AdamW, learning rate "
        f"{TRAINING.lr:g}, {TRAINING.warmup_epochs:g} epoch of warm-up, cosine decay, batches of {TRAINING.batch_size}."
    )
    return Section("Classification", [*claims, *parts, bars, note])


def _kept(network: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, without the parameters."""
    x = torch.randn(MEMORY_BATCH, 1, 32, 32)
    return kept_bytes(lambda: network.train()(x), without=network.parameters())


# -- images of twice the size ------------------------------------------------------------------------------------------


class _Enlarged(NamedTuple):
    psnr: float
    bicubic: float
    picture: list[tuple[Tensor, str]]


def _enlarging(advance: Callable[[str], None]) -> Section:
    results = [_enlarge(seed, advance) for seed in SEEDS]
    claim = Claim.judge(
        "WaveMix enlarges images better than bicubic interpolation",
        published="a network of 4 blocks for DIV2K, without a figure for these images",
        statistic="mean PSNR of test crops enlarged by the network less that of bicubic interpolation",
        value=[result.psnr - result.bicubic for result in results],
        at_least=PSNR_GAIN,
        seeds=len(SEEDS),
        unit="dB",
    )
    rows: list[list[Cell]] = [
        [seed, result.psnr, result.bicubic, result.psnr - result.bicubic]
        for seed, result in zip(SEEDS, results, strict=True)
    ]
    table = Table(
        "PSNR on test crops",
        ["seed", "WaveMix [dB]", "bicubic [dB]", "gain [dB]"],
        rows,
        f"{SR_TEST_CROPS} crops of {SR_TEST_CROP} pixels from a photograph of a coffee cup that no training saw.",
    )
    shown = Images(
        "A test crop",
        [(_pixels(image), caption) for image, caption in results[0].picture],
        "Reduced to half by bicubic interpolation and enlarged again.",
    )
    note = Note(
        f"{SR_NETWORK.depth} block of {SR_NETWORK.dim} channels, {SR_STEPS} steps of {SR_BATCH} crops of {SR_CROP} "
        f"pixels from scikit-image's astronaut and cat, AdamW, learning rate {SR_LR:g} with cosine decay. The loss is "
        "the mean absolute difference: the published one, 1 - SSIM with a range of 255 on values in [0, 1], hardly "
        "sees the image beside its constants and needs far more steps."
    )
    return Section("Images of twice the size", [claim, table, shown, note])


def _photograph(name: str) -> Any:
    from skimage import data

    return getattr(data, name)()


def _enlarge(seed: int, advance: Callable[[str], None]) -> _Enlarged:
    seed_everything(seed)
    photographs = [_tensor(_photograph(name)) for name in ("astronaut", "cat")]
    generator = torch.Generator().manual_seed(seed)
    originals = _crops(_tensor(_photograph("coffee")), SR_TEST_CROPS, SR_TEST_CROP, generator)
    reduced = _resized(originals, 0.5)
    interpolated = _resized(reduced, 2.0).clamp(0, 1)
    network = WaveMixSR(SR_NETWORK)
    optimizer = torch.optim.AdamW(network.parameters(), lr=SR_LR, weight_decay=0.01)
    for step in range(SR_STEPS):
        decay = 0.5 * (1 + math.cos(math.pi * step / SR_STEPS))
        for group in optimizer.param_groups:
            group["lr"] = SR_LR * decay * min(1.0, (step + 1) / SR_WARMUP)
        y = torch.cat([_crops(image, SR_BATCH // 2, SR_CROP, generator) for image in photographs])
        loss = F.l1_loss(network(_resized(y, 0.5)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % SR_REPORTED == 0:
            advance("training to enlarge")
    network.eval()
    with torch.inference_mode():
        enlarged = network(reduced).clamp(0, 1)
    quality, bicubic = (psnr(images, originals, data_range=1).mean().item() for images in (enlarged, interpolated))
    pictures = [(originals, "original"), (reduced, "reduced"), (interpolated, "bicubic"), (enlarged, "WaveMix")]
    return _Enlarged(quality, bicubic, [(images[0], caption) for images, caption in pictures])


def _tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255


def _pixels(image: Tensor) -> Any:
    return image.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def _crops(image: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    tops, lefts = (torch.randint(side - size + 1, (count,), generator=generator).tolist() for side in image.shape[1:])
    return torch.stack([image[:, y : y + size, x : x + size] for y, x in zip(tops, lefts, strict=True)])


def _resized(images: Tensor, scale: float) -> Tensor:
    return resize(images, scale=scale, convention="matlab", interpolation="bicubic")


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train WaveMix by the recipe, in two phases, and measure the published weights.

    Args:
        data: ImageNet-1K or CIFAR-10, a folder with ``train`` and ``val``.
        folder: where the runs lie: the second phase below the name of the model, the first beside it.
        changes: settings that differ from the recipe, e.g. ``epochs=30``. With any, or with other data, the accuracies
            cannot be held against the published ones, and the verdict says so.
    """
    classes = len(read_images(str(data))["train"].classes)
    model, recipe, published = RECIPES.get(classes, RECIPES[IMAGENET_CLASSES])
    settings = {"data": str(data), "model": model, **changes}
    first = train_by_recipe(recipe, Path(folder) / f"{model}_adamw", **settings)
    second = train_by_recipe(f"{recipe}_sgd", Path(folder) / model, **settings, weights=str(first.run.best))
    claim = Claim.judge(
        "WaveMix trained by the recipe reaches its published accuracy",
        published=f"{published} % top-1",
        statistic="top-1 accuracy of the best epoch of both phases on the validation images",
        value=max(first.top1, second.top1),
        at_least=published - RUN_NOISE,
        seeds=1,
        scale_ok=not changes and classes in RECIPES,
        unit="%",
    )
    runs: dict[str, FullRun] = {model: second}
    imagenet = classes == IMAGENET_CLASSES
    weights = {model: published_accuracy(model, second.task.splits["test"])} if imagenet else {}
    note = Note(f"The first phase, with AdamW, reached {first.top1:.2f} %; the table has the second, with SGD.")
    return finished(
        "WaveMix: full test of its claims",
        [Section("Accuracy", [claim, *full_parts(runs, {model: published}, weights), note])],
        data=str(data),
    )
