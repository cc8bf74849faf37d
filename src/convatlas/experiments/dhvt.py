"""Does DHVT learn from few images what a plain vision transformer does not, and do both of its modules help?

Lu, Xie, Liu, Zhang: "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small
Datasets", NeurIPS 2022, arXiv 2210.05958.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.images import read_images, stratified_split
from convatlas.experiments.small_training import (
    Samples,
    Trained,
    accuracy_differences,
    accuracy_parts,
    compare,
    finished,
    full_parts,
    progress,
    resolved,
    train_by_recipe,
)
from convatlas.networks.dhvt import DHVT, DHVTConfig
from convatlas.nn.embedding import PatchEmbed
from convatlas.report import Claim, Images, Note, Part, Report, Section
from convatlas.training.settings import Training

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Points that are a clear margin: a quarter of what DHVT-T gains over DeiT-T on CIFAR-100 (80.9 against 67.6).
MARGIN = 3.3
#: Accuracy of DHVT in %, below which nothing has been learned that could be compared (chance is 10).
LEARNED = 50.0
#: Training loss in nats, above which the plain transformer still learns, so that more images cannot show yet.
CONVERGED = 0.5

SEEDS = (0, 1, 2)
SIDE = 16
#: So many training images, and how often each comes, shifted by up to so many pixels; the numbers of steps are equal.
FEW, MANY = 300, 1200
COPIES = {FEW: 4, MANY: 1}
SHIFT = 2
TRAINING = Training(epochs=8, batch_size=32, lr=2e-3, warmup_epochs=1)
NETWORK = DHVTConfig(
    dim=48, depth=2, num_heads=4, drop_path=0.0, num_classes=10, in_channels=1, preprocess=DHVTConfig().preprocess
).override(preprocess={"size": SIDE, "crop": 1.0})
#: Hidden widths over C that give the networks without DAFF about as many parameters; the plain one has no SOPE either.
MLP_RATIO, PLAIN_RATIO = 4.9, 6.1

# Full: one training each, as the paper did.

CIFAR_CLASSES = 100
TOP1 = {
    "dhvt_tiny_cifar_patch4": 80.93,
    "dhvt_small_cifar_patch4": 82.91,
    "dhvt_tiny_cifar_patch2": 83.54,
    "dhvt_small_cifar_patch2": 85.68,
}
RECIPE = "dhvt_cifar"
#: Points of top-1 by which two CIFAR-100 trainings of one recipe differ.
RUN_NOISE = 0.5


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" trains small networks on few digits; "full" trains the networks for CIFAR-100 by the recipe.
        data: for "full": CIFAR-100, a folder with ``train`` and ``test`` and a folder for each class in them.
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


class _Positioned(nn.Module):
    """Patches that do not overlap, and a learnt position embedding."""

    def __init__(self, config: DHVTConfig) -> None:
        super().__init__()
        side = SIDE // config.patch_size
        self.embed = PatchEmbed(config.in_channels, config.dim, config.patch_size, norm=None)
        self.table = nn.Parameter(torch.empty(1, config.dim, side, side))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.embed(x) + self.table
        return y


def _plain() -> nn.Module:
    config = NETWORK.override(attention="self", mlp="plain", mlp_ratio=PLAIN_RATIO)
    model = DHVT(config)
    model.patch_embed = _Positioned(config)  # type: ignore[assignment]
    return model


def quick() -> Report:
    """DHVT, a plain transformer of as many parameters, and DHVT without either module, on few and on more digits."""
    networks: dict[str, Callable[[], nn.Module]] = {
        "DHVT": lambda: DHVT(NETWORK),
        "plain transformer": _plain,
        "DHVT without head tokens": lambda: DHVT(NETWORK.override(attention="self")),
        "DHVT without DAFF": lambda: DHVT(NETWORK.override(mlp="plain", mlp_ratio=MLP_RATIO)),
    }
    pair = dict(list(networks.items())[:2])
    with progress(len(SEEDS) * (len(networks) + len(pair)) * TRAINING.epochs) as advance:
        few = compare(networks, TRAINING, seeds=SEEDS, samples=lambda seed: _digits(FEW, seed), advance=advance)
        many = compare(pair, TRAINING, seeds=SEEDS, samples=lambda seed: _digits(MANY, seed), advance=advance)
    sections = [Section("Few images", _few_parts(few)), Section("More images", _many_parts(few, many))]
    return finished("DHVT: quick test of its claims", sections)


def _few_parts(few: dict[str, list[Trained]]) -> list[Part]:
    dhvt, plain, without_heads, without_daff = few.values()
    learned = statistics.mean(result.accuracy for result in dhvt) >= LEARNED
    by_heads, by_daff = accuracy_differences(dhvt, without_heads), accuracy_differences(dhvt, without_daff)
    claims = [
        Claim.judge(
            "With few images DHVT is clearly better than a plain transformer of as many parameters",
            published="80.9 % on CIFAR-100 from scratch with DHVT-T, about 67.6 % with DeiT-T",
            statistic=f"accuracy of DHVT less that of a transformer with position embedding, trained on {FEW} digits",
            value=accuracy_differences(dhvt, plain),
            at_least=MARGIN,
            seeds=len(SEEDS),
            scale_ok=learned,
            unit="points",
        ),
        Claim.judge(
            "The convolutional MLP that scales the class token (DAFF) helps",
            published="each module adds to the accuracy on CIFAR-100",
            statistic="accuracy of DHVT less that with plain MLPs; judged if the mean is at least twice its standard "
            "error",
            value=by_daff,
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=learned and resolved(by_daff),
            unit="points",
        ),
        Claim.judge(
            "The head tokens help",
            published="each module adds to the accuracy on CIFAR-100",
            statistic="accuracy of DHVT less that without head tokens; judged if the mean is at least twice its "
            "standard error",
            value=by_heads,
            at_least=0.0,
            seeds=len(SEEDS),
            scale_ok=learned and resolved(by_heads),
            unit="points",
        ),
    ]
    parts = accuracy_parts(
        few,
        SEEDS,
        caption=f"After the last of {TRAINING.epochs} epochs on {COPIES[FEW]} shifted copies of {FEW} of the 1797 "
        "digits of scikit-learn; the others are the test images.",
    )
    shown = _digits(FEW, SEEDS[0])
    pictures = [(255 * (0.25 * image[0] + 0.5)).round().to(torch.uint8).numpy() for image in shown.images[:8]]
    example = Images("Training images", list(zip(pictures, map(str, shown.labels.tolist()), strict=False)))
    note = Note(
        f"Digits enlarged to {SIDE} x {SIDE} pixels, in training shifted by up to {SHIFT}. Width {NETWORK.dim}, "
        f"{NETWORK.num_heads} heads, {NETWORK.depth} blocks, patches of {NETWORK.patch_size}; AdamW, learning rate "
        f"{TRAINING.lr:g}, cosine decay, batches of {TRAINING.batch_size}. Small networks on small images: they test "
        "the mechanism, not the accuracy on CIFAR-100. In so few steps part of a gap is how fast a network learns."
    )
    return [*claims, *parts, example, note]


def _many_parts(few: dict[str, list[Trained]], many: dict[str, list[Trained]]) -> list[Part]:
    with_few, with_many = (accuracy_differences(each["DHVT"], each["plain transformer"]) for each in (few, many))
    shrinks = [a - b for a, b in zip(with_few, with_many, strict=True)]
    learned = all(statistics.mean(result.accuracy for result in each["DHVT"]) >= LEARNED for each in (few, many))
    converged = all(result.losses[-1] <= CONVERGED for each in (few, many) for result in each["plain transformer"])
    claim = Claim.judge(
        "The gap is larger, the fewer the images are",
        published="the gap between transformers and convolutional networks is one of small data sets",
        statistic=f"gap of DHVT and the plain transformer with {FEW} images less that with {MANY}, in as many steps; "
        f"judged if it is at least twice its standard error and the plain transformer has come below {CONVERGED} nats",
        value=shrinks,
        at_least=0.0,
        seeds=len(SEEDS),
        scale_ok=learned and converged and resolved(shrinks),
        unit="points",
    )
    caption = f"After the last of {TRAINING.epochs} epochs on {MANY} digits, in as many steps as with {FEW}."
    return [claim, *accuracy_parts(many, SEEDS, caption=caption)]


def _digits(count: int, seed: int) -> Samples:
    """So many digits to train on, in shifted copies, and all others to test on."""
    digits = read_images("digits")["all"]
    sets = stratified_split(digits, {"train": count / len(digits), "test": 1 - count / len(digits)}, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for name, copies, shift in (("train", COPIES[count], SHIFT), ("test", 1, 0)):
        images = sets[name]
        pixels = torch.stack([torch.tensor(images.image(index)[..., 0]) for index in range(len(images))])
        enlarged = F.interpolate(pixels[:, None].float() / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        repeated = F.pad(enlarged, (SHIFT,) * 4).repeat(copies, 1, 1, 1)
        moves = SHIFT + torch.randint(-shift, shift + 1, (len(repeated), 2), generator=generator)
        moved = [image[:, y : y + SIDE, x : x + SIDE] for image, (y, x) in zip(repeated, moves.tolist(), strict=True)]
        tensors += [(torch.stack(moved) - 0.5) / 0.25, torch.from_numpy(images.labels).repeat(copies)]
    return Samples(*tensors)


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Train the four networks for CIFAR-100 by the recipe.

    Args:
        data: CIFAR-100, a folder with ``train`` and ``test``.
        folder: where the runs lie, each below the name of its model.
        changes: settings that differ from the recipe, e.g. ``epochs=30``. With any, or with other data than CIFAR-100,
            the accuracies cannot be held against the published ones, and the verdicts say so.
    """
    runs = {
        model: train_by_recipe(RECIPE, Path(folder) / model, **{"data": str(data), "model": model, **changes})
        for model in TOP1
    }
    same_setting = not changes and len(next(iter(runs.values())).task.classes) == CIFAR_CLASSES
    claims = [
        Claim.judge(
            f"{model} trained by the recipe reaches its published accuracy",
            published=f"{TOP1[model]} % on CIFAR-100",
            statistic="accuracy of the best epoch on the validation images",
            value=trained.top1,
            at_least=TOP1[model] - RUN_NOISE,
            seeds=1,
            scale_ok=same_setting,
            unit="%",
        )
        for model, trained in runs.items()
    ]
    return finished(
        "DHVT: full test of its claims", [Section("Accuracy", [*claims, *full_parts(runs, TOP1, {})])], data=str(data)
    )
