"""The table of predictions, and sets of images joined for it."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import pytest

from convatlas.data.images import ImageSet, Skipped, from_arrays, read_images
from convatlas.recognition.metrics import CrossEntropy
from convatlas.recognition.predictions import Predictions, joined
from convatlas.training.left_out import tell_skipped
from recognition.pictures import arrays, write_pictures


def predictions(probabilities: list[list[float]], labels: list[int] | None, classes: tuple[str, ...]) -> Predictions:
    images, _ = arrays(len(probabilities))
    given = None if labels is None else np.array(labels)
    image_set = from_arrays(images, given, classes=None if labels is None else classes, name="set")
    return Predictions(image_set, np.array(probabilities, np.float32), classes, ())


def test_the_table_ranks_up_to_five_classes(tmp_path: Path):
    classes = ("a, b", 'c "d"', "e f", "g", "h", "i")
    rows = [[0.05, 0.5, 0.1, 0.2, 0.12, 0.03], [0.1, 0.1, 0.1, 0.1, 0.2, 0.4]]
    predictions(rows, [1, 0], classes).write_csv(tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        header, first, second = csv.reader(file)
    further = [f"{what} {rank}" for rank in (2, 3, 4, 5) for what in ("class", "probability")]
    assert header == ["image", "class", "probability", "true class", *further]
    assert first == [
        *("set/0000", 'c "d"', "0.500000", 'c "d"'),
        *("g", "0.200000", "h", "0.120000", "e f", "0.100000", "a, b", "0.050000"),
    ]
    assert second[:8] == ["set/0001", "i", "0.400000", "a, b", "h", "0.200000", "a, b", "0.100000"]


def test_unlabelled_images_have_no_true_class(tmp_path: Path):
    predictions([[0.4, 0.6]], None, ("x", "y")).write_csv(tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text().splitlines()[1] == "set/0000,y,0.600000,,x,0.400000"


def test_joined_sets_follow_each_other(tmp_path: Path):
    images, labels = arrays(5)
    np.savez(tmp_path / "a.npz", x_train=images[:3], y_train=labels[:3], x_test=images[3:], y_test=labels[3:])
    sets = read_images(tmp_path / "a.npz", labelled=False)
    whole = joined(list(sets.values()))
    assert list(whole.names) == ["a/train/0000", "a/train/0001", "a/train/0002", "a/test/0000", "a/test/0001"]
    assert all(np.array_equal(whole.image(row), images[row]) for row in range(5))
    assert whole.labels.tolist() == [-1] * 5
    some = whole.subset([4, 1])
    assert list(some.names) == ["a/test/0001", "a/train/0001"]
    assert np.array_equal(some.image(0), images[4])


def test_one_set_stays_as_it_is(tmp_path: Path):
    write_pictures(tmp_path, 2)
    (only,) = read_images(tmp_path, labelled=False).values()
    assert joined([only]) is only


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, None),
        (1, "1 file is left out: 0.png: broken"),
        (3, "3 files are left out: 0.png: broken; 1.png: broken; 2.png: broken"),
        (5, "5 files are left out: 0.png: broken; 1.png: broken; 2.png: broken; and 2 more, listed in the report"),
    ],
)
def test_left_out_files_are_counted_and_named(caplog: pytest.LogCaptureFixture, count: int, told: str | None):
    tell_skipped(Skipped(f"{number}.png", "broken") for number in range(count))
    assert [record.getMessage() for record in caplog.records] == ([] if told is None else [told])
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_names_that_cannot_be_printed_do_not_break_the_table(tmp_path: Path):
    images = from_arrays(arrays(1)[0])
    odd = ImageSet((), images.labels, 3, (), type("Odd", (), {"names": ["bad\udcff.png"]})())
    Predictions(odd, np.array([[1.0]], np.float32), ("x",), ()).write_csv(tmp_path / "p.csv")
    assert "bad\ufffd.png" in (tmp_path / "p.csv").read_text(encoding="utf-8")


def test_cross_entropy_is_the_mean_over_samples_not_batches():
    import torch
    import torch.nn.functional as F

    scores, labels = torch.randn(7, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    metric = CrossEntropy()
    metric.update(scores[:5], labels[:5])
    metric.update(scores[5:], labels[5:])
    torch.testing.assert_close(metric.compute(), F.cross_entropy(scores, labels))
    metric.reset()
    metric.update(scores[:2], labels[:2])
    torch.testing.assert_close(metric.compute(), F.cross_entropy(scores[:2], labels[:2]))
