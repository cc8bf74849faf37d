"""Does masked computation keep the pattern of a mask, and does masked pre-training help where labels are few?

Tian, Jiang, Diao, Lin, Wang, Yuan: "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked
Modeling", ICLR 2023, arXiv 2301.03580.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import yaml
from torch import Tensor, nn

from convatlas.data.images import read_images, stratified_split
from convatlas.data.transforms import Preprocess
from convatlas.experiments.small_training import (
    IMAGENET_CLASSES,
    Samples,
    accuracy_differences,
    accuracy_parts,
    compare,
    device,
    finished,
    one_thread,
    progress,
    resolved,
    train_by_recipe,
)
from convatlas.networks.registry import create_model
from convatlas.networks.resnet import ResNetConfig
from convatlas.nn.masked import masked
from convatlas.recognition.pretraining import Pretraining
from convatlas.report import Claim, Files, Images, Lines, Note, Part, Report, Section, Table
from convatlas.training.optim import learning_rate
from convatlas.training.run import Run
from convatlas.training.settings import Training
from convatlas.training.spark import SparK
from convatlas.training.task import seed_everything, split_settings

__all__ = ["full", "quick", "run"]

# Thresholds, fixed before anything was measured.

#: Largest difference of the share of non-zero positions from the visible share that rounding may make.
SAME_SHARE = 1e-6
#: Share of non-zero positions from which on the pattern of the mask has vanished.
VANISHED = 0.95
#: Points of accuracy that pre-training must bring on few labels.
GAIN = 2.0
#: Accuracy of the network from scratch in %, below which the networks have not learned enough to be compared.
LEARNED = 40.0
#: Mean squared error of hidden cells of new images; their variance is 1.
RECONSTRUCTED = 0.8

SEEDS = (0, 1, 2)
MODEL, SIDE, RATIO = "resnet18", 224, 0.6
LABELS, UNLABELLED = 50, 1000
NETWORK = ResNetConfig(
    depths=(1, 1, 1), widths=(16, 32, 64), stem_width=16, small_stem=True, stem_pool=True, num_classes=10, in_channels=1
)
DECODER_WIDTH = 32
PRETRAINING = Training(epochs=10, batch_size=64, lr=4e-3, warmup_epochs=2)
TRAINING = Training(epochs=60, batch_size=25, lr=2e-3, warmup_epochs=6)

# Full: the published recipes of ResNet-50.

RECIPE = "spark_resnet"
TOP1 = 80.6
#: Points of accuracy by which two trainings of one recipe differ.
RUN_NOISE = 0.3


def run(
    budget: Literal["quick", "full"], *, data: str | Path | None = None, folder: str | Path | None = None
) -> Report:
    """Test the claims of the paper.

    Args:
        budget: "quick" counts what a mask becomes in ResNet-18 and pre-trains a small ResNet on unlabelled digits;
            "full" pre-trains and fine-tunes ResNet-50 by the recipes.
        data: for "full": ImageNet-1K in any form that ``convatlas train recognition`` reads.
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
    """Count non-zero positions in ResNet-18; pre-train a small ResNet on digits and fine-tune it on few labels."""
    names = ("from scratch", "pre-trained")
    with progress(1 + len(SEEDS) * (PRETRAINING.epochs + len(names) * TRAINING.epochs)) as advance, one_thread():
        pattern = _pattern_section()
        advance("following a mask")
        sets = {seed: _digits(seed) for seed in SEEDS}
        pretrained = [_pretrain(sets[seed], seed, partial(advance, "pre-training")) for seed in SEEDS]
        starts = iter(pretrained)
        trained = compare(
            {"from scratch": NETWORK.build, "pre-trained": lambda: copy.deepcopy(next(starts).network)},
            TRAINING,
            seeds=SEEDS,
            samples=lambda seed: sets[seed].labelled,
            advance=advance,
        )
    gains = accuracy_differences(trained["pre-trained"], trained["from scratch"])
    learned = statistics.mean(each.accuracy for each in trained["from scratch"]) >= LEARNED
    claims: list[Part] = [
        Claim.judge(
            "A pre-trained network names more images rightly when labels are few",
            published="fine-tuned on ImageNet, ResNet-50 gains 0.8 to 2.0 points over training from scratch",
            statistic=f"accuracy of the pre-trained less that of the same network from scratch, {LABELS} labels",
            value=gains,
            at_least=GAIN,
            seeds=len(SEEDS),
            scale_ok=learned and resolved(gains),
            unit="points",
        ),
        Claim.judge(
            "The decoder tells from the visible cells what the hidden ones hold",
            published="reconstructions (figure 4)",
            statistic="mean squared error of hidden cells of images that were not trained on; their variance is 1",
            value=[each.error for each in pretrained],
            at_most=RECONSTRUCTED,
            seeds=len(SEEDS),
        ),
    ]
    caption = f"After {TRAINING.epochs} epochs on {LABELS} labelled digits; tested on those that neither training saw."
    losses = {
        f"seed {seed}": (range(1, 1 + len(e.losses)), e.losses) for seed, e in zip(SEEDS, pretrained, strict=True)
    }
    note = (
        f"{UNLABELLED} digits without labels, enlarged to 32 x 32 pixels; a ResNet of total stride 8, so a mask of "
        f"4 x 4 cells; {PRETRAINING.epochs} epochs of pre-training."
    )
    sections = [
        pattern,
        Section("Pre-training", [*claims, *accuracy_parts(trained, SEEDS, caption=caption)]),
        Section(
            "Reconstruction",
            [
                Images("Original, masked, reconstructed", pretrained[0].pictures, _CAPTION),
                Lines("Loss of the pre-training", "epoch", "mean squared error", losses),
                Note(note),
            ],
        ),
    ]
    return finished("SparK: quick test of its claims", sections)


_CAPTION = "Test images of the first seed; a reconstructed cell gets the mean and deviation of the true one back."


# -- the pattern of the mask -------------------------------------------------------------------------------------------


def _pattern_section() -> Section:
    """Shares of non-zero positions in the maps of a network, computed densely and masked."""
    seed_everything(0)
    model: Any = create_model(MODEL, num_classes=0).train()
    spark, grid = SparK(RATIO), (SIDE // 32, SIDE // 32)
    cells = spark.mask(2, grid, generator=torch.Generator().manual_seed(0))
    visible = cells.double().mean().item()
    shares: dict[str, list[float]] = {}
    with torch.no_grad(), masked(cells) as active:
        images = active.mask(torch.randn(2, 3, SIDE, SIDE))
        shares["dense"] = _shares(model.forward_features(images))
    with torch.no_grad(), masked(cells, model):
        shares["masked"] = _shares(model.forward_features(images))
    sizes = [f"{SIDE // feature.stride} x {SIDE // feature.stride}" for feature in model.feature_info]
    return Section(
        "The pattern of the mask",
        [
            Claim.judge(
                "Masked computation keeps the pattern of the mask through all stages",
                published="sparse convolution keeps it (figure 2)",
                statistic=f"largest difference of the shares of non-zero positions of a stage of {MODEL} from the mask",
                value=max(abs(share - visible) for share in shares["masked"]),
                at_most=SAME_SHARE,
                seeds=0,
            ),
            Claim.judge(
                "Dense computation of a masked image loses it",
                published="mask pattern vanishing (figure 2)",
                statistic=f"share of non-zero positions behind the last stage of {MODEL}",
                value=shares["dense"][-1],
                at_least=VANISHED,
                seeds=0,
            ),
            Table(
                "Positions with a value other than zero",
                ["computation", "input", *sizes],
                [[name, visible, *values] for name, values in shares.items()],
                f"{visible:.0%} of the cells are visible.",
            ),
        ],
    )


def _shares(maps: list[Tensor]) -> list[float]:
    return [(each.abs().amax(1) > 0).double().mean().item() for each in maps]


# -- pre-training ------------------------------------------------------------------------------------------------------


class _Digits(NamedTuple):
    """Images to pre-train on (N, 1, 32, 32), and those with labels."""

    images: Tensor
    labelled: Samples


class _Pretrained(NamedTuple):
    network: nn.Module
    losses: list[float]
    error: float
    pictures: list[tuple[npt.NDArray[np.uint8], str]]


def _digits(seed: int) -> _Digits:
    digits = read_images("digits")["all"]
    sets = stratified_split(digits, {"train": UNLABELLED / len(digits), "test": 1 - UNLABELLED / len(digits)}, seed)
    few = stratified_split(sets["train"], {"few": LABELS / UNLABELLED, "rest": 1 - LABELS / UNLABELLED}, seed)["few"]
    preprocess = Preprocess(size=32, mean=(0.5,), std=(0.25,), interpolation="bicubic", crop=1.0)

    def pixels(images: Any) -> Tensor:
        return torch.stack([preprocess(images.image(index)) for index in range(len(images))]).to(device())

    labels = {name: torch.from_numpy(each.labels) for name, each in (("few", few), ("test", sets["test"]))}
    labelled = Samples(pixels(few), labels["few"], pixels(sets["test"]), labels["test"])
    return _Digits(pixels(sets["train"]), labelled)


def _pretrain(digits: _Digits, seed: int, advance: Callable[[], None]) -> _Pretrained:
    seed_everything(seed)
    network, spark = NETWORK.build().to(device()), SparK(RATIO, DECODER_WIDTH)
    spark.prepare(network)
    (optimizer,) = spark.optimizers(network, PRETRAINING)
    order, steps = torch.Generator().manual_seed(seed), -(-len(digits.images) // PRETRAINING.batch_size)
    losses, done = [], 0
    for _ in range(PRETRAINING.epochs):
        total = 0.0
        for batch in torch.randperm(len(digits.images), generator=order).split(PRETRAINING.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(PRETRAINING, done, steps)
            loss = spark.losses(network, {"image": digits.images[batch]}, lambda model, batch: {})["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, done = total + loss.item(), done + 1
        losses.append(total / steps)
        advance()
    network.eval(), spark.eval()
    test = digits.labelled.test_images
    cells = spark.mask(len(test), (4, 4), generator=torch.Generator().manual_seed(0), device=test.device)
    with torch.inference_mode():
        error = spark(network, test, cells).loss.item()
    rows = zip(test[:6], *spark.pictures(network, test[:6], cells[:6]), strict=True)
    pictures = [(_picture(row), f"digit {number + 1}") for number, row in enumerate(rows)]
    return _Pretrained(network, losses, error, pictures)


def _picture(tensors: tuple[Tensor, ...]) -> npt.NDArray[np.uint8]:
    side_by_side = torch.cat([torch.nn.functional.pad(each, (1, 1), value=2.0) for each in tensors], 2)[0].cpu()
    return (((side_by_side * 0.25 + 0.5).clamp(0, 1)) * 255).round().to(torch.uint8).numpy()


# -- full --------------------------------------------------------------------------------------------------------------


def full(data: str | Path, folder: str | Path, **changes: Any) -> Report:
    """Pre-train ResNet-50 without labels and fine-tune it, both by the recipes.

    Args:
        data: ImageNet-1K.
        folder: where the two runs lie.
        changes: settings of both that differ from the recipes, e.g. ``epochs=30``. With any, or with other data, the
            accuracy cannot be held against the published one, and the verdict says so.
    """
    first = Path(folder) / "pretraining"
    recipe = yaml.safe_load(Pretraining.recipe(RECIPE).read_text(encoding="utf-8"))
    task, training = split_settings(Pretraining, {**recipe, "data": str(data), **changes})
    task.fit(first, training, resume=Run(first).config.is_file())
    tuned = train_by_recipe(
        f"{RECIPE}_finetune",
        Path(folder) / "finetuning",
        **{"data": str(data), "model": task.model, "weights": str(first), **changes},
    )
    claim = Claim.judge(
        f"{task.model} pre-trained without labels and fine-tuned reaches its published accuracy",
        published=f"{TOP1} % on ImageNet-1K",
        statistic="accuracy of the best epoch on the validation images",
        value=tuned.top1,
        at_least=TOP1 - RUN_NOISE,
        seeds=1,
        scale_ok=not changes and len(tuned.task.classes) == IMAGENET_CLASSES,
        unit="%",
    )
    runs = {name: f"{name}/report.html" for name in ("pretraining", "finetuning")}
    settings = Table(
        "Settings", ["setting", "pre-training"], [[n, str(v)] for n, v in dataclasses.asdict(training).items()]
    )
    return finished(
        "SparK: full test of its claims", [Section("Accuracy", [claim, settings, Files("Runs", runs)])], data=str(data)
    )
