"""The recognition task through its Python API: every form of data, every file it writes, every way data can be bad."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from convatlas.data.images import read_images
from convatlas.data.mixing import mix
from convatlas.data.transforms import Augment
from convatlas.errors import CheckpointError, DataError, UnknownName, Unsupported
from convatlas.networks.registry import create_model
from convatlas.recognition.task import Recognition
from convatlas.training.run import Run
from convatlas.training.task import open_task
from convatlas.weights import save_weights
from recognition.conftest import Trained
from recognition.pictures import CLASSES, TINY, arrays, pixels, short, write_idx, write_pictures


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "best.safetensors")


def part(report: Any, kind: str, title: str) -> dict[str, Any]:
    document = json.loads(report.to_json())
    parts = [part for section in document["sections"] for part in section["parts"]]
    return next(part for part in parts if part["kind"] == kind and part["title"] == title)


# -- every form of data ------------------------------------------------------------------------------------------------


def make_folder(root: Path) -> str:
    return str(write_pictures(root / "photos"))


def make_split_folder(root: Path) -> str:
    for split, count in (("train", 8), ("val", 3), ("test", 4)):
        write_pictures(root / "photos" / split, count, seed=1000 * count)
    return str(root / "photos")


def make_npz(root: Path) -> str:
    images, labels = arrays(36)
    np.savez(root / "photos.npz", images=images, labels=labels, classes=np.array(CLASSES))
    return str(root / "photos.npz")


def make_split_npz(root: Path) -> str:
    (x_train, y_train), (x_test, y_test) = arrays(30), arrays(12, seed=500)
    np.savez(root / "photos.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return str(root / "photos.npz")


def make_bands(root: Path) -> str:
    images, labels = arrays(36, channels=5)
    np.savez(root / "bands.npz", images=images.transpose(0, 3, 1, 2).astype(np.float32) / 255, labels=labels)
    return str(root / "bands.npz")


def make_idx(root: Path) -> str:
    for split, count in (("train", 30), ("t10k", 12)):
        images, labels = arrays(count, seed=count)
        write_idx(root / "mnist", split, np.ascontiguousarray(images[..., 0]), labels)
    return str(root / "mnist")


@pytest.mark.parametrize(
    ("make", "channels", "counts", "classes"),
    [
        (make_folder, 3, {"train": 26, "val": 3, "test": 7}, CLASSES),
        (make_split_folder, 3, {"train": 24, "val": 9, "test": 12}, CLASSES),
        (make_npz, 3, {"train": 26, "val": 3, "test": 7}, CLASSES),
        (make_split_npz, 3, {"train": 27, "val": 3, "test": 12}, ("0", "1", "2")),
        (make_bands, 5, {"train": 26, "val": 3, "test": 7}, ("0", "1", "2")),
        (make_idx, 1, {"train": 27, "val": 3, "test": 12}, ("0", "1", "2")),
    ],
)
def test_every_form_of_data_goes_through_every_verb(
    tmp_path: Path, make: Any, channels: int, counts: dict[str, int], classes: tuple[str, ...]
):
    data = make(tmp_path)
    task = Recognition(data=data, options=TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.fit(tmp_path / "run", short())
    assert {name: len(images) for name, images in task.splits.items()} == counts
    assert task.classes == classes
    assert task.network.in_channels == channels

    loaded = Recognition.load(tmp_path / "run")
    assert loaded.classes == classes
    assert loaded.preprocess == task.preprocess
    assert dict(loaded.network.state_dict()).keys() == dict(task.network.state_dict()).keys()
    report = loaded.evaluate(folder=tmp_path / "evaluation")
    held_out = rows_of(tmp_path / "evaluation" / "predictions.csv")
    assert len(held_out) == counts["test"]
    assert held_out == rows_of(tmp_path / "run" / "predictions.csv")
    accuracy = np.mean([row["class"] == row["true class"] for row in held_out])
    table = part(report, "table", "Measured")
    assert table["rows"][0][table["columns"].index("accuracy")] == pytest.approx(accuracy)

    loaded.predict([data], tmp_path / "predictions")
    predicted = rows_of(tmp_path / "predictions" / "predictions.csv")
    assert len({row["image"] for row in predicted}) == len(predicted)
    assert {row["class"] for row in predicted} <= set(classes)
    assert {row["true class"] for row in predicted} == {""}
    for row in predicted:
        values = [float(row["probability"]), *(float(row[f"probability {rank}"]) for rank in (2, 3))]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert {row["class"], row["class 2"], row["class 3"]} == set(classes)


def test_the_built_in_digits_need_no_files(tmp_path: Path):
    task = Recognition(data="digits", options=TINY)
    task.fit(tmp_path / "run", short(epochs=1, batch_size=256))
    assert {name: len(images) for name, images in task.splits.items()} == {"train": 1294, "test": 359, "val": 144}
    assert task.classes == tuple("0123456789")
    assert task.preprocess.shape == (32, 32)
    counts = np.array([images.counts for images in task.splits.values()])
    assert np.abs(counts / counts.sum(1, keepdims=True) - counts.sum(0) / 1797).max() < 0.01
    again = Recognition.load(tmp_path / "run").evaluate()
    table = part(again, "table", "Measured")
    assert table["columns"] == [
        "accuracy",
        "top-5 accuracy",
        "macro F1",
        "balanced accuracy",
        "cross-entropy [nats]",
    ]


# -- what a run learns and writes --------------------------------------------------------------------------------------


def test_it_learns(trained: Trained):
    probabilities = trained.task.probabilities(trained.task.splits["train"])
    assert (probabilities.best == trained.task.splits["train"].labels).mean() > 0.9


def test_predictions_are_those_of_the_network(trained: Trained, tmp_path: Path):
    paths = [trained.data / "dog" / "03.png", trained.data / "hen" / "05.png"]
    trained.task.predict(paths, tmp_path)
    for row, path in zip(rows_of(tmp_path / "predictions.csv"), paths, strict=True):
        image = np.asarray(Image.open(path))
        with torch.no_grad():
            scores = trained.task.network(trained.task.preprocess(image)[None]).softmax(1)[0]
        assert row["image"] == str(path)
        assert row["class"] == CLASSES[int(scores.argmax())] == path.parent.name
        assert float(row["probability"]) == pytest.approx(float(scores.max()), abs=2e-6)


def test_one_image_can_be_predicted(trained: Trained, tmp_path: Path):
    report = trained.task.predict([trained.data / "cat" / "01.png"], tmp_path / "new" / "folder")
    assert report.summary == "inceptionnext_atto named 1 image."
    assert len(rows_of(tmp_path / "new" / "folder" / "predictions.csv")) == 1


def test_a_run_and_a_saved_file_give_the_same_task(trained: Trained, tmp_path: Path):
    images = trained.task.splits["test"]
    expected = trained.task.probabilities(images).probabilities
    trained.task.save(tmp_path / "task.safetensors")
    for source in (trained.run, tmp_path / "task.safetensors"):
        task = Recognition.load(source)
        assert not task.network.training
        assert np.array_equal(task.probabilities(images).probabilities, expected)
        assert task.options == TINY
    opened = open_task(trained.run)
    assert isinstance(opened, Recognition)


def test_the_configuration_runs_the_run_again_to_the_same_weights(tmp_path: Path):
    data = make_folder(tmp_path)
    options = {**TINY, "drop_path": 0.2, "dropout": 0.2}
    augment = Augment(degrees=10, random_erasing=0.3, rand_augment="rand-m5-inc1")
    settings = {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "augment": augment}
    task = Recognition(data=data, options=options, **settings)
    task.fit(tmp_path / "first", short(ema=0.9, workers=2, accumulate=2))
    from convatlas.training.task import split_settings

    again, training = split_settings(Recognition, Run.open(tmp_path / "first").settings())
    assert again.augment == augment
    again.fit(tmp_path / "second", dataclasses.replace(training, workers=0))
    first, second = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    assert all(torch.equal(first[key], second[key]) for key in first)
    again.fit(tmp_path / "third", dataclasses.replace(training, workers=0, seed=1))
    assert any(not torch.equal(first[key], value) for key, value in weights_of(tmp_path / "third").items())


def test_evaluating_where_the_data_have_changed_is_refused(tmp_path: Path):
    data = write_pictures(tmp_path / "photos")
    Recognition(data=str(data), options=TINY).fit(tmp_path / "run", short(epochs=1))
    Image.fromarray(pixels(0, 999)).save(data / "cat" / "new.png")
    task = Recognition.load(tmp_path / "run")
    with pytest.raises(DataError, match="are not those of the training, so which of them were held out cannot be told"):
        task.evaluate()
    assert "37 images" in task.evaluate(data).summary


def test_evaluating_on_other_data_takes_its_test_part_and_its_classes_by_name(trained: Trained, tmp_path: Path):
    split = make_split_folder(tmp_path)
    assert " of 12 images" in trained.task.evaluate(split).summary
    write_pictures(tmp_path / "some", 5, classes=("dog", "cat"))
    report = trained.task.evaluate(tmp_path / "some", folder=tmp_path / "out")
    matrix = part(report, "heatmap", "Confusion matrix")
    assert matrix["row_labels"] == list(CLASSES)
    assert [sum(row) for row in matrix["values"]] == [5, 5, 0]
    assert {row["true class"] for row in rows_of(tmp_path / "out" / "predictions.csv")} == {"cat", "dog"}
    write_pictures(tmp_path / "other", 2, classes=("cow", "cat"))
    with pytest.raises(DataError, match="1 classes that are not among the 3 expected ones: 'cow'"):
        trained.task.evaluate(tmp_path / "other")


def test_data_without_a_test_part_say_so(tmp_path: Path):
    write_pictures(tmp_path / "photos" / "train", 5)
    write_pictures(tmp_path / "photos" / "val", 2)
    report = Recognition(data=str(tmp_path / "photos"), options=TINY).fit(tmp_path / "run", short(epochs=1))
    assert "no test part" in part(report, "table", "Images")["caption"]


# -- the losses --------------------------------------------------------------------------------------------------------


def batch_of(task: Recognition, count: int = 6) -> dict[str, Any]:
    return task.collate([task.train_set[(index, index)] for index in range(count)])


def test_label_smoothing_spreads_the_target(trained: Trained):
    task = Recognition(data=str(trained.data), options=TINY, label_smoothing=0.3)
    task.prepare()
    batch = batch_of(task)
    torch.manual_seed(0)
    loss = task.losses(batch)["loss"]
    scores = task.network(batch["image"])
    expected = F.cross_entropy(scores, batch["label"], label_smoothing=0.3)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    "settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0, "mix_switch": 0.7}]
)
def test_mixed_batches_have_mixed_targets(trained: Trained, settings: dict[str, float]):
    task = Recognition(data=str(trained.data), options=TINY, label_smoothing=0.1, **settings)
    task.prepare()
    batch = batch_of(task)
    torch.manual_seed(3)
    loss = task.losses(batch)["loss"]
    torch.manual_seed(3)
    images, targets = mix(
        batch["image"],
        batch["label"],
        3,
        mixup=settings.get("mixup", 0),
        cutmix=settings.get("cutmix", 0),
        switch_prob=settings.get("mix_switch", 0.5),
        label_smoothing=0.1,
    )
    assert not torch.equal(images, batch["image"])
    torch.testing.assert_close(loss, F.cross_entropy(task.network(images), targets))


def test_augmentation_changes_training_images_only(trained: Trained):
    task = Recognition(data=str(trained.data), options=TINY)
    task.prepare()
    assert not torch.equal(task.train_set[(0, 1)]["image"], task.train_set[(0, 2)]["image"])
    assert torch.equal(task.train_set[(0, 1)]["image"], task.train_set[(0, 1)]["image"])
    assert torch.equal(task.val_set[0]["image"], task.val_set[(0, 5)]["image"])
    plain = Augment(random_resized_crop=False, hflip=0)
    task = Recognition(data=str(trained.data), options=TINY, augment=plain)
    task.prepare()
    image = task.splits["train"].image(0)
    assert torch.equal(task.train_set[(0, 1)]["image"], task.preprocess(image))


def test_test_time_augmentation_averages_probabilities(trained: Trained):
    task = dataclasses.replace(trained.task, test_augmentations=3, augment=Augment(color_jitter=0.4))
    task.network, task.classes, task.preprocess = trained.task.network, trained.task.classes, trained.task.preprocess
    images = trained.task.splits["test"]
    found = task.probabilities(images, batch_size=4)
    for row in (0, len(images) - 1):
        generator = torch.Generator().manual_seed(row)
        views = [task.augment(images.image(row), task.preprocess, generator) for _ in range(3)]
        with torch.inference_mode():
            expected = task.network(torch.stack(views)).softmax(1).mean(0)
        np.testing.assert_allclose(found.probabilities[row], expected, rtol=1e-4)
    plain = trained.task.probabilities(images)
    assert plain.probabilities.shape == found.probabilities.shape
    assert not np.allclose(plain.probabilities, found.probabilities)


def test_batches_that_shrink_to_one_are_left_out(trained: Trained):
    task = Recognition(data=str(trained.data), options=TINY)
    task.prepare()
    sample = task.train_set[(0, 0)]
    assert task.losses(task.collate([{"unreadable": "x.png"}])) == {}
    assert task.losses(task.collate([{"unreadable": "x.png"}, sample])) == {}
    assert "loss" in task.losses(task.collate([{"unreadable": "x.png"}, sample, sample]))
    assert task.unreadable["x.png"]


# -- bad and unusual images --------------------------------------------------------------------------------------------


def test_what_is_left_out_is_told_at_the_start_and_listed(
    tmp_path: Path, trained: Trained, caplog: pytest.LogCaptureFixture
):
    task = Recognition(data=str(trained.data), options=TINY)
    with caplog.at_level(logging.WARNING, "convatlas"):
        task.prepare()
    assert len(caplog.records) == 1
    told = caplog.records[0].getMessage()
    assert told.startswith("3 files are left out: cat/text.png: not an image; ")
    assert "dog/half.png" in told
    assert "hen/notes.txt" in told
    table = part(trained.report, "table", "3 files were left out")
    assert [row[0] for row in table["rows"]] == ["cat/text.png", "dog/half.png", "hen/notes.txt"]
    caplog.clear()
    report = trained.task.predict([trained.data / "cat" / "text.png", trained.data / "cat" / "00.png"], tmp_path)
    assert "1 file is left out" in caplog.text
    assert part(report, "table", "1 file was left out")["rows"] == [
        [str(trained.data / "cat" / "text.png"), "not an image"]
    ]


def test_files_of_every_split_are_listed(tmp_path: Path):
    data = Path(make_split_folder(tmp_path))
    for split in ("train", "val", "test"):
        (data / split / "cat" / f"{split}.png").write_bytes(b"")
    report = Recognition(data=str(data), options=TINY).fit(tmp_path / "run", short(epochs=1))
    table = part(report, "table", "3 files were left out")
    assert [row[0] for row in table["rows"]] == ["test/cat/test.png", "train/cat/train.png", "val/cat/val.png"]


def test_files_that_fail_during_the_training_are_left_out_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = write_pictures(tmp_path / "photos")
    task = Recognition(data=str(data), options=TINY)
    prepare = task.prepare

    def then_damage() -> None:
        prepare()
        (data / task.splits["train"].names[0]).write_bytes(b"gone")
        (data / task.splits["val"].names[0]).write_bytes(b"gone")
        (data / task.splits["test"].names[0]).unlink()

    monkeypatch.setattr(task, "prepare", then_damage)
    report = task.fit(tmp_path / "run", short())
    damaged = sorted(task.splits[split].names[0] for split in ("train", "val", "test"))
    assert [row[0] for row in part(report, "table", "3 files were left out")["rows"]] == damaged
    assert len(rows_of(tmp_path / "run" / "predictions.csv")) == len(task.splits["test"]) - 1


def test_every_kind_of_image_trains_and_predicts(tmp_path: Path):
    kinds: dict[str, Any] = {}
    for label, name in enumerate(("a", "b")):
        grey = pixels(label, label)[..., label]
        kinds = {
            "grey.png": Image.fromarray(grey),
            "alpha.png": Image.fromarray(np.dstack([pixels(label, 1), grey])),
            "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
            "palette.png": Image.fromarray(pixels(label, 2)).convert("P"),
            "bits.png": Image.fromarray(grey > 100),
            "print.jpg": Image.fromarray(pixels(label, 3)).convert("CMYK"),
            "small.png": Image.fromarray(pixels(label, 4, (3, 2))),
            "wide.png": Image.fromarray(pixels(label, 5, (8, 200))),
            **{f"{number}.png": Image.fromarray(pixels(label, number)) for number in range(5)},
        }
        (tmp_path / "photos" / name).mkdir(parents=True)
        for file, image in kinds.items():
            image.save(tmp_path / "photos" / name / file)
    task = Recognition(data=str(tmp_path / "photos"), options=TINY)
    report = task.fit(tmp_path / "run", short(epochs=1))
    assert task.network.in_channels == 3
    assert not any(section.title == "Skipped files" for section in report.sections)
    task.predict([tmp_path / "photos"], tmp_path / "out")
    assert len(rows_of(tmp_path / "out" / "predictions.csv")) == 2 * len(kinds)


def test_grey_files_stay_grey_and_colour_ones_are_converted_for_a_grey_network(tmp_path: Path):
    for label, name in enumerate(("a", "b")):
        (tmp_path / "grey" / name).mkdir(parents=True)
        for number in range(6):
            Image.fromarray(pixels(label, number)[..., 0]).save(tmp_path / "grey" / name / f"{number}.png")
    task = Recognition(data=str(tmp_path / "grey"), options=TINY)
    task.fit(tmp_path / "run", short(epochs=1))
    assert task.network.in_channels == 1
    Image.fromarray(pixels(0, 0)).save(tmp_path / "colour.png")
    task.predict([tmp_path / "colour.png"], tmp_path / "out")
    assert len(rows_of(tmp_path / "out" / "predictions.csv")) == 1


def test_images_of_other_channels_than_the_network_are_told(tmp_path: Path, trained: Trained):
    bands = make_bands(tmp_path)
    with pytest.raises(DataError, match="bands has images of 5 channels, which cannot be converted to 3"):
        trained.task.predict([bands], tmp_path / "out")
    task = Recognition(data=bands, options=TINY)
    task.prepare()
    with pytest.raises(DataError, match="the images have 3 channels, the network was trained on 5"):
        task.predict([trained.data], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_readable_is_an_error_and_writes_nothing(trained: Trained, tmp_path: Path):
    with pytest.raises(DataError, match=r"text\.png cannot be read: not an image"):
        trained.task.predict([trained.data / "cat" / "text.png"], tmp_path / "out")
    with pytest.raises(DataError, match=r"none of the 2 image files .* can be read"):
        trained.task.predict([trained.data / "cat" / "text.png", trained.data / "dog" / "half.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [4, 5])
def test_few_images_and_a_large_batch_work(tmp_path: Path, count: int):
    write_pictures(tmp_path / "photos", count, classes=CLASSES[:2])
    settings = {"val_fraction": 0.3, "test_fraction": 0.3}
    task = Recognition(data=str(tmp_path / "photos"), options=TINY, **settings)
    task.fit(tmp_path / "run", short(batch_size=1000))
    assert len(rows_of(tmp_path / "run" / "predictions.csv")) == len(task.splits["test"])


def test_too_few_images_for_a_split_are_told(tmp_path: Path):
    write_pictures(tmp_path / "photos", 2)
    with pytest.raises(
        DataError,
        match=r"6 images of 3 classes are too few to split .*; raise val_fraction or test_fraction, or give more",
    ):
        Recognition(data=str(tmp_path / "photos"), options=TINY).fit(tmp_path / "run", short())
    assert not (tmp_path / "run").exists()


def test_a_last_batch_of_one_does_not_end_the_run(tmp_path: Path):
    write_pictures(tmp_path / "photos" / "train", 3)  # 9 images in eights, at maps of one pixel
    write_pictures(tmp_path / "photos" / "val", 3)
    task = Recognition(data=str(tmp_path / "photos"), options=TINY, image_size=32)
    task.fit(tmp_path / "run", short())
    assert [row["step"] for row in Run(tmp_path / "run").read_metrics()] == [1, 2]


def test_a_batch_size_of_one_is_explained(tmp_path: Path, trained: Trained):
    task = Recognition(data=str(trained.data), options=TINY, image_size=32)
    with pytest.raises(ValueError, match="batch_size must be at least 2: this network normalises over batches, got 1"):
        task.fit(tmp_path / "run", short(batch_size=1))
    assert not (tmp_path / "run").exists()


def test_class_names_can_be_anything_a_folder_is_called(tmp_path: Path):
    names = ("<script>alert(1)</script>".replace("/", "\u2215"), 'Ünï çødé; a, "b" =1+1', "漢" * 80)
    write_pictures(tmp_path / "photos", classes=names)
    task = Recognition(data=str(tmp_path / "photos"), options=TINY)
    task.fit(tmp_path / "run", short(epochs=1))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script" in page
    held_out = rows_of(tmp_path / "run" / "predictions.csv")
    assert {row["true class"] for row in held_out} == set(names)
    assert Recognition.load(tmp_path / "run").classes == tuple(sorted(names))
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == len(held_out)


# -- settings and weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"model": "inceptionnext_att"},
            UnknownName,
            "unknown model 'inceptionnext_att': did you mean inceptionnext_atto",
        ),
        (
            {"options": {"depth": [1]}},
            UnknownName,
            "unknown option of InceptionNeXtConfig 'depth': did you mean depths",
        ),
        ({"options": {"num_classes": 3}}, ValueError, "options must not hold num_classes: it follows from the data"),
        ({"options": {"in_channels": 3}}, ValueError, "options must not hold in_channels"),
        ({"options": {"preprocess": {}}}, ValueError, "options must not hold preprocess"),
        ({"val_fraction": 0}, ValueError, "val_fraction must be between 0 and 1, got 0"),
        ({"test_fraction": 1.0}, ValueError, "test_fraction must be between 0 and 1, got 1.0"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"test_augmentations": -1}, ValueError, "test_augmentations must not be negative, got -1"),
        ({"mixup": -1}, ValueError, "mixup and cutmix must not be negative, got -1 and 0.0"),
        ({"mix_switch": 1.5}, ValueError, "mix_switch must be from 0 to 1, got 1.5"),
        ({"channels": 4}, ValueError, r"channels must be 1 \(grey\) or 3 \(RGB\), or left out, got 4"),
        ({"image_size": 0}, ValueError, "image_size must be positive, got 0"),
    ],
)
def test_wrong_settings_are_told_before_any_data_are_read(settings: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Recognition(data="/does/not/exist", **settings)


def test_an_image_smaller_than_the_stride_is_told_before_training(trained: Trained, tmp_path: Path):
    task = Recognition(data=str(trained.data), options=TINY, image_size=16)
    with pytest.raises(ValueError, match="image_size must be at least 32 for inceptionnext_atto, got 16"):
        task.fit(tmp_path / "run", short())
    assert not (tmp_path / "run").exists()


def test_the_image_size_follows_the_images_within_what_the_network_takes(tmp_path: Path):
    sizes = {}
    for side in (8, 50, 500):
        images = np.random.default_rng(0).integers(0, 255, (12, side, side, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{side}.npz", images=images, labels=np.arange(12) % 2)
        task = Recognition(data=str(tmp_path / f"{side}.npz"), options=TINY, val_fraction=0.3, test_fraction=0.3)
        task.prepare()
        sizes[side] = task.preprocess.shape
    assert sizes == {8: (32, 32), 50: (50, 50), 500: (224, 224)}


def test_training_can_start_from_weights_of_other_classes(trained: Trained, tmp_path: Path):
    write_pictures(tmp_path / "photos", classes=("x", "y"))
    weights = trained.run / "checkpoints" / "best.safetensors"
    task = Recognition(data=str(tmp_path / "photos"), options=TINY, weights=str(weights))
    task.prepare()
    theirs = load_file(weights)
    ours = task.network.state_dict()
    same = [key for key in theirs if torch.equal(theirs[key], ours[key])] if ours.keys() == theirs.keys() else []
    classifier = {f"{name}.{what}" for name in task.network.classifier_modules for what in ("weight", "bias")}
    assert set(theirs) - set(same) == classifier
    report = task.fit(tmp_path / "run", short(epochs=1))
    text = report.to_json()
    assert "Started from" in text
    assert "3 classes in the checkpoint, 2 in the model" in text


def test_weights_of_another_model_are_refused(trained: Trained, tmp_path: Path):
    save_weights(create_model("resnet18", num_classes=3), tmp_path / "resnet.safetensors")
    task = Recognition(data=str(trained.data), options=TINY, weights=str(tmp_path / "resnet.safetensors"))
    with pytest.raises(CheckpointError, match="looks like a checkpoint of another model"):
        task.fit(tmp_path / "run", short())
    assert not (tmp_path / "run").exists()


def test_a_file_of_weights_alone_is_no_task(tmp_path: Path):
    save_weights(create_model("inceptionnext_atto", **TINY), tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="was not written by the task recognition"):
        Recognition.load(tmp_path / "weights.safetensors")


def test_a_run_without_a_finished_epoch_is_told(tmp_path: Path):
    Run.create(tmp_path, "recognition", {})
    with pytest.raises(DataError, match="has no finished epoch yet; go on with 'convatlas train recognition --resume"):
        Recognition.load(tmp_path)


def test_verbs_it_lacks_are_told():
    with pytest.raises(Unsupported, match="the task recognition has no verb 'bench'"):
        Recognition.require("bench")


def test_images_are_read_as_the_network_needs_them(trained: Trained):
    images = read_images(trained.data, channels=3)["all"]
    assert np.array_equal(
        trained.task.probabilities(images, batch_size=5).best, trained.task.probabilities(images).best
    )
