"""How WaveMix is trained: two phases that each end when nothing improves, and the losses of segmentation and enlarging.

Jeevan, Viswanathan, Anandu, Sethi: "WaveMix: A Resource-efficient Neural Network for Image Analysis", 2022,
arXiv 2205.14375. Segmentation: Cityscapes at 1024 x 2048, batches of 6. Enlarging: DIV2K, 256 to 512 pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from convatlas.ops.image_quality import ssim
from convatlas.training.run import Run
from convatlas.training.settings import Training
from convatlas.training.task import GradientTask

__all__ = ["PHASES", "fit_phases", "focal_cross_entropy", "legacy_wavemix_score", "ssim_loss"]

#: AdamW, then SGD from the best weights, each until 20 epochs bring nothing. Lion with lr 1e-4 did as well as AdamW.
PHASES = (
    Training(
        epochs=1000,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.01,
        decay_all=True,
        schedule="constant",
        warmup_epochs=0,
        patience=20,
    ),
    Training(
        epochs=1000,
        optimizer="sgd",
        lr=1e-3,
        weight_decay=0.0,
        momentum=0.9,
        schedule="constant",
        warmup_epochs=0,
        patience=20,
    ),
)


def fit_phases(task: GradientTask, folder: str | Path, phases: Sequence[Training] = PHASES) -> list[Run]:
    """Train a task several times, each time from the best weights of the time before; goes on where it was stopped.

    Args:
        task: a task with a setting ``weights``, such as `Recognition`.
        folder: gets a run ``phase1``, ``phase2``, ... for each.
        phases: settings of each training.

    Returns:
        The runs; the last one's best weights are the result.

    Raises:
        ValueError: there are no phases, or the task has no setting ``weights``.
        Interrupted: the user stopped a run; the same call goes on with it.
    """
    if not phases:
        raise ValueError("phases must name at least one training")
    if "weights" not in {entry.name for entry in dataclasses.fields(task)}:  # type: ignore[arg-type]
        raise ValueError(f"the task must have a setting 'weights' to start a phase from, {task.name} has none")
    runs: list[Run] = []
    for number, training in enumerate(phases, start=1):
        changes = {"weights": str(runs[-1].best)} if runs else {}
        run = Run(Path(folder) / f"phase{number}")
        dataclasses.replace(task, **changes).fit(run.folder, training, resume=run.config.is_file())  # type: ignore[type-var]
        runs.append(run)
    return runs


def focal_cross_entropy(scores: Tensor, labels: Tensor, gamma: float = 2.0, ignore_index: int = -100) -> Tensor:
    """(1 - exp(-CE))^gamma CE with CE the mean cross-entropy: focal in the mean, not in each pixel.

    Args:
        scores: (B, classes, *positions).
        labels: (B, *positions), class numbers.
        gamma: exponent; 0 gives the cross-entropy.
        ignore_index: label of positions that do not count.
    """
    mean = F.cross_entropy(scores, labels, ignore_index=ignore_index)
    return (1 - torch.exp(-mean)) ** gamma * mean


def ssim_loss(x: Tensor, y: Tensor, data_range: float = 255.0) -> Tensor:
    """1 - SSIM, mean over the batch (B, C, H, W), at least 11 x 11 pixels.

    The authors keep the range of 255 for values in [0, 1], so that SSIM's constants outweigh the image; 1 is what a
    user of other losses expects.
    """
    return (1 - ssim(x, y, data_range=data_range).mean()).to(x.dtype)


def legacy_wavemix_score(prediction: Tensor, labels: Tensor) -> Tensor:
    """What the authors' code reports as mean IoU of Cityscapes, and what 83.04 % is; it is no IoU.

    For each image, the sum over its pixels of the bitwise and of the two class numbers, over that of their bitwise or;
    then in steps of a tenth from 0 at one half to 1 at everything. `torchmetrics.segmentation.MeanIoU` is mean IoU.

    Args:
        prediction: (B, H, W), class numbers.
        labels: the same.

    Returns:
        The mean over the images.
    """
    common = (prediction & labels).sum((1, 2)).double()
    either = (prediction | labels).sum((1, 2)).double()
    share = torch.where(either > 0, common / either.clamp(min=1), 1.0)
    return ((20 * (share - 0.5)).clamp(0, 10).ceil() / 10).mean()
