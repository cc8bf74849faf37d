"""The torch Dataset and its batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from convatlas.data.dataset import Augmented, ImageDataset, collate
from convatlas.data.images import from_arrays, read_images
from convatlas.data.transforms import Augment, Preprocess

PREPROCESS = Preprocess(16, crop=1.0)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
IMAGES = from_arrays(PIXELS, np.array([0, 1, 2, 0, 1, 2]))


def test_evaluation_samples() -> None:
    dataset = ImageDataset(IMAGES, PREPROCESS)
    assert len(dataset) == 6
    sample = dataset[np.int64(4)]
    assert torch.equal(sample["image"], PREPROCESS(PIXELS[4]))
    assert (sample["label"], sample["index"]) == (1, 4)
    assert type(sample["label"]) is type(sample["index"]) is int


def test_training_samples_depend_on_the_seed_alone() -> None:
    augment = Augment(color_jitter=0.3, random_erasing=0.5)
    dataset = ImageDataset(IMAGES, Augmented(augment, PREPROCESS))
    expected = augment(PIXELS[2], PREPROCESS, torch.Generator().manual_seed(11))
    assert torch.equal(dataset[(2, 11)]["image"], expected)
    assert not torch.equal(dataset[(2, 12)]["image"], expected)
    assert torch.equal(dataset[2]["image"], dataset[(2, 2)]["image"])


def test_workers_give_the_same_batches() -> None:
    dataset = ImageDataset(IMAGES, Augmented(Augment(), PREPROCESS))
    keys = [[(0, 5), (3, 6)], [(1, 7), (2, 8)], [(4, 9)]]
    runs = [
        list(DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=collate)) for workers in (0, 2)
    ]
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one["image"], two["image"])
        assert torch.equal(one["index"], two["index"])
    assert [batch["index"].tolist() for batch in runs[0]] == [[0, 3], [1, 2], [4]]


def test_unreadable_files_leave_the_batch(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(PIXELS[i]).save(tmp_path / name / f"{i}.png")
    dataset = ImageDataset(read_images(tmp_path)["all"], PREPROCESS)
    (tmp_path / "a" / "1.png").write_bytes(b"gone bad")
    batch = collate([dataset[i] for i in range(4)])
    assert batch["image"].shape == (3, 3, 16, 16)
    assert batch["label"].tolist() == [0, 1, 1]
    assert batch["index"].tolist() == [0, 2, 3]
    assert batch["unreadable"] == ["a/1.png"]
    empty = collate([dataset[1]])
    assert len(empty["image"]) == len(empty["label"]) == len(empty["index"]) == 0
    assert empty["label"].dtype == torch.int64
    assert empty["unreadable"] == ["a/1.png"]
