"""What a user wants to see of a pre-training: the loss, and what the network makes of hidden cells."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from convatlas.data.dataset import collate
from convatlas.files import atomic_path
from convatlas.report import Files, Images, Lines, Note, Report, Section, Table
from convatlas.training.left_out import skipped_sections
from convatlas.training.measure import count_parameters, provenance
from convatlas.training.run import Run

if TYPE_CHECKING:
    from convatlas.recognition.pretraining import Pretraining

__all__ = ["pretraining_report", "reconstructions"]

_PICTURES = 6
#: White pixels between pictures.
_GAP = 4


def pretraining_report(task: Pretraining, run: Run) -> Report:
    """The curve of the loss, originals, masked images and reconstructions; writes the pictures in ``samples``."""
    rows = run.read_metrics()
    best = min(rows, key=lambda row: (row["val_loss"], -row["epoch"]))
    pictures = reconstructions(task)
    for number, (pixels, _) in enumerate(pictures):
        with atomic_path(run.samples / f"{number:02d}_original-masked-reconstruction.png") as part:
            Image.fromarray(pixels).save(part, format="PNG")
    epochs = [row["epoch"] for row in rows]
    curves = {name: (epochs, [row[key] for row in rows]) for name, key in _CURVES.items()}
    go_on = f"convatlas train recognition --data FOLDER --model {task.model} --weights {run.folder}"
    if task.options:
        go_on += f" --options '{json.dumps(task.options)}'"
    size = " x ".join(map(str, task.preprocess.shape))
    counts = Table(
        "Data and parameters",
        ["training images", "validation images", "size", "parameters of the network", "of the method"],
        [
            [
                len(task.splits["train"]),
                len(task.splits["val"]),
                size,
                count_parameters(task.network),
                count_parameters(task.method),
            ]
        ],
    )
    files = Files(
        "In the folder of the run",
        {
            "settings": "config.yaml",
            "weights of the best epoch": "checkpoints/best.safetensors",
            "one row an epoch": "metrics.csv",
        },
    )
    share = f"{task.method.mask_ratio:.0%} of the cells of {task.method.stride} pixels are hidden"
    caption = (
        f"Original, what the network sees ({share}), and the reconstruction, which gets the mean and deviation of each "
        "true cell back; of validation images."
    )
    origin = [Note(f"Started from {task.started_from}")] if task.started_from else []
    sections = [
        Section("Reconstruction", [Images("Original, masked, reconstructed", pictures, caption)]),
        Section("Training", [Lines("Loss", "epoch", "mean squared error", curves), counts, *origin]),
        *skipped_sections(task.unreadable),
        Section("Files", [files, Note(f"Fine-tune it: {go_on}")]),
    ]
    summary = (
        f"{task.model} predicts hidden cells with a mean squared error of {best['val_loss']:.4g} (1 is their variance; "
        f"best epoch {best['epoch']:.0f} of {len(rows)})."
    )
    return Report(f"Pre-training of {task.model}", summary, sections, provenance(data=task.data))


_CURVES = {"training": "train_loss", "validation": "val_loss"}


@torch.inference_mode()
def reconstructions(task: Pretraining, most: int = _PICTURES) -> list[tuple[npt.NDArray[np.uint8], str]]:
    """Pictures of original, masked image and reconstruction side by side, with the names of the files."""
    dataset: Any = task.val_set
    batch = collate([dataset[index] for index in range(min(len(dataset), most))])
    if not len(batch["image"]):
        return []
    device = next(task.network.parameters()).device
    task.method.to(device)
    images = batch["image"].to(device)
    cells = task.fixed_cells(images, 0)
    rows = zip(images, *task.method.pictures(task.network, images, cells), strict=True)
    names = [task.splits["val"].names[int(index)] for index in batch["index"]]
    return [(_side_by_side(task, row), name) for row, name in zip(rows, names, strict=True)]


def _side_by_side(task: Pretraining, tensors: tuple[Tensor, ...]) -> npt.NDArray[np.uint8]:
    pictures = [task.preprocess.denormalise(tensor) for tensor in tensors]  # hidden cells have the mean colour
    gap = np.full((len(pictures[0]), _GAP, *pictures[0].shape[2:]), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)
