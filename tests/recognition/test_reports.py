"""What a user sees of a classifier: right numbers, pages that open, pictures that show something."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convatlas.data.images import Skipped, from_arrays
from convatlas.recognition.predictions import Predictions
from convatlas.recognition.reports import evaluation_report, prediction_report, quality
from convatlas.recognition.task import Recognition
from convatlas.training.run import Run
from recognition.conftest import Trained
from recognition.pictures import CLASSES, TINY, arrays, short


class Page(HTMLParser):
    """Which tags a page has, what they refer to, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        given = dict(attributes)
        if tag in ("img", "image", "script", "link", "iframe", "source"):
            self.sources += [given[key] for key in ("src", "href", "xlink:href") if given.get(key)]
        if tag == "a" and "href" in given:
            self.links.append(given["href"])

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parts_of(folder: Path) -> dict[str, dict[str, Any]]:
    document = json.loads((folder / "report.json").read_text())
    return {part.get("title", ""): part for section in document["sections"] for part in section["parts"]}


def made_up(probabilities: Any, labels: Any, classes: tuple[str, ...], skipped: int = 0) -> Predictions:
    images, _ = arrays(len(labels))
    given = from_arrays(images, np.array(labels), classes=classes)
    left_out = tuple(Skipped(f"{number:05}.png", "broken") for number in range(skipped))
    return Predictions(given, np.array(probabilities, np.float32), classes, left_out)


def test_quality_is_what_the_definitions_say():
    probabilities = [[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]
    measured = quality(made_up(probabilities, [0, 1, 1, 2], CLASSES))
    assert list(measured) == ["accuracy", "macro F1", "balanced accuracy", "cross-entropy [nats]"]
    assert measured["accuracy"] == 0.75
    assert measured["balanced accuracy"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert measured["macro F1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    expected = -sum(map(math.log, (0.7, 0.6, 0.3, 0.5))) / 4
    assert measured["cross-entropy [nats]"] == pytest.approx(expected, rel=1e-6)


def test_top_5_is_told_where_there_are_more_classes():
    classes = tuple("abcdefg")
    ranked = [[0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05]] * 4
    measured = quality(made_up(ranked, [0, 4, 5, 6], classes))
    assert measured["top-5 accuracy"] == 0.5
    assert measured["accuracy"] == 0.25


def test_classes_without_images_do_not_count_and_certainty_of_zero_stays_finite():
    measured = quality(made_up([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [0, 1], CLASSES))
    assert measured["balanced accuracy"] == 0.5
    assert measured["macro F1"] == pytest.approx((2 / 3 + 0) / 2)
    assert math.isfinite(measured["cross-entropy [nats]"])
    single = quality(made_up([[0.9, 0.05, 0.05]], [0], CLASSES))
    assert single["balanced accuracy"] == 1


def test_the_numbers_of_the_training_report_are_those_of_its_table(trained: Trained):
    with (trained.run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    accuracy = sum(row["class"] == row["true class"] for row in rows) / len(rows)
    parts = parts_of(trained.run)
    measured = dict(zip(parts["Measured"]["columns"], parts["Measured"]["rows"][0], strict=True))
    assert measured["accuracy"] == pytest.approx(accuracy)
    assert f"{accuracy:.2%} of {len(rows)} held-out images" in trained.report.summary
    matrix = np.array(parts["Confusion matrix"]["values"])
    for row in rows:
        matrix[CLASSES.index(row["true class"]), CLASSES.index(row["class"])] -= 1
    assert not matrix.any()
    history = Run(trained.run).read_metrics()
    curve = parts["Loss"]["series"]
    assert curve["training"]["y"] == [row["train_loss"] for row in history]
    assert curve["validation"]["y"] == [row["val_loss"] for row in history]
    cost = dict(zip(parts["Cost on this machine"]["columns"], parts["Cost on this machine"]["rows"][0], strict=True))
    assert cost["parameters"] == sum(p.numel() for p in trained.task.network.parameters())
    weights = trained.run / "checkpoints" / "best.safetensors"
    assert cost["file [MiB]"] == pytest.approx(weights.stat().st_size / 2**20)
    assert 0 < cost["latency [ms]"] < 5000
    assert cost["training time [s]"] == pytest.approx(sum(row["seconds"] for row in history))
    best = max(history, key=lambda row: (row["val_accuracy"], row["epoch"]))
    assert f"best epoch {best['epoch']:.0f} of {len(history)}" in trained.report.summary
    assert dict(parts["Images"]["rows"]) == {name: len(images) for name, images in trained.task.splits.items()}


def assert_self_contained(folder: Path) -> Page:
    page = Page(folder / "report.html")
    assert {"svg", "table"} <= set(page.tags)
    assert "script" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    local = [link for link in page.links if not link.startswith("#")]
    assert all((folder / link).is_file() for link in local)
    return page


def test_the_page_of_a_run_needs_nothing_else_and_leads_to_its_files(trained: Trained):
    page = assert_self_contained(trained.run)
    assert {"config.yaml", "checkpoints/best.safetensors", "metrics.csv", "predictions.csv"} <= set(page.links)
    text = " ".join(page.words)
    for word in ("Confusion matrix", "Worst mistakes", "Skipped files", "cat/text.png", "Cost on this machine"):
        assert word in text


def test_the_page_of_predictions_shows_every_picture(trained: Trained, tmp_path: Path):
    trained.task.predict([trained.data], tmp_path)
    page = assert_self_contained(tmp_path)
    assert len(page.sources) == 36
    images = trained.task.probabilities(trained.task.splits["train"]).images
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each.partition(",")[2])))) for each in page.sources]
    assert all(picture.std() > 10 for picture in shown)
    assert len({picture.tobytes() for picture in shown}) == 36
    assert images.names[0] in " ".join(page.words)


def test_samples_are_the_pictures_with_both_classes_in_the_name(trained: Trained):
    files = sorted((trained.run / "samples").iterdir())
    assert len(files) == min(16, len(trained.task.splits["test"]))
    predictions = trained.task.probabilities(trained.task.splits["test"])
    shown = np.random.default_rng(0).permutation(len(predictions.images))
    for file, row in zip(files, shown, strict=False):
        true, best = CLASSES[predictions.images.labels[row]], CLASSES[predictions.best[row]]
        assert file.name.endswith(f"_true-{true}_predicted-{best}.png")
        with Image.open(file) as image:
            picture = np.asarray(image)
        original = predictions.images.image(int(row))
        scale = picture.shape[0] // original.shape[0]
        assert picture.shape == (original.shape[0] * scale, original.shape[1] * scale, 3)
        assert max(picture.shape) >= 128
        assert np.array_equal(picture[::scale, ::scale], original)
        assert picture.std() > 10


def test_worst_mistakes_are_the_surest_wrong_answers(trained: Trained):
    probabilities = [[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.05, 0.0, 0.95], [0.3, 0.3, 0.4]]
    report = evaluation_report(trained.task, made_up(probabilities, [0, 0, 0, 0], CLASSES))
    document = json.loads(report.to_json())
    (images,) = [part for section in document["sections"] for part in section["parts"] if part["kind"] == "images"]
    assert [image["caption"] for image in images["images"]] == [
        "array/0002: hen (95%), truly cat",
        "array/0001: dog (80%), truly cat",
        "array/0003: hen (40%), truly cat",
    ]
    assert images["caption"] == ""
    assert "25.00% of 4 images" in report.summary


def test_no_mistakes_are_said(trained: Trained):
    report = evaluation_report(trained.task, made_up([[1, 0, 0], [0, 1, 0]], [0, 1], CLASSES))
    assert "Every held-out image was named rightly." in report.to_json()


def test_large_and_many_pictures_keep_the_page_small(trained: Trained, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (70, 600, 900, 3), dtype=np.uint8)
    images = from_arrays(noise)
    predictions = Predictions(images, np.full((70, 3), 1 / 3, np.float32), CLASSES, ())
    report = prediction_report(trained.task, predictions)
    (shown,) = [part for section in report.sections for part in section.parts if type(part).__name__ == "Images"]
    assert len(shown.images) == 60
    assert shown.caption == "The first 60 of 70; predictions.csv has all."
    assert all(max(pixels.shape) == 320 for pixels, _ in shown.images)


def test_long_lists_of_skipped_files_are_cut_and_say_so(trained: Trained):
    for count, title, caption in (
        (1, "1 file was left out", ""),
        (2000, "2000 files were left out", "The first 1000 are listed."),
    ):
        report = evaluation_report(trained.task, made_up([[1, 0, 0]], [0], CLASSES, skipped=count))
        table = report.sections[-1].parts[0]
        assert (table.title, table.caption) == (title, caption)
        assert len(table.rows) == min(count, 1000)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_pictures_of_any_channels_can_be_shown(tmp_path: Path, channels: int):
    images, labels = arrays(36, channels=channels)
    floats = images.astype(np.float32) / 255 * 7 - 2  # not in [0, 1] either
    np.savez(tmp_path / "photos.npz", images=floats, labels=labels)
    Recognition(data=str(tmp_path / "photos.npz"), options=TINY).fit(tmp_path / "run", short(epochs=1))
    for file in (tmp_path / "run" / "samples").iterdir():
        with Image.open(file) as picture:
            assert picture.mode == ("RGB" if channels >= 3 else "L")
            assert np.asarray(picture).std() > 10


def test_a_comparison_puts_models_side_by_side(tmp_path: Path, trained: Trained):
    tasks, runs = {"wide": trained.task}, {"wide": Run(tmp_path / "wide")}
    small = Recognition(data=str(trained.data), options={**TINY, "dims": [8, 8, 8, 4]})
    tasks["small"], runs["small"] = small, Run(tmp_path / "small")
    again = Recognition(data=str(trained.data), options=TINY)
    again.fit(tmp_path / "wide", short(epochs=1))
    tasks["wide"] = again
    small.fit(tmp_path / "small", short(epochs=1))
    report = Recognition.compare(tasks, runs, tmp_path)
    report.save(tmp_path)
    parts = parts_of(tmp_path)
    table = parts["Quality and cost"]
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    assert rows.keys() == tasks.keys()
    measured = {name: quality(task.probabilities(task.splits["test"])) for name, task in tasks.items()}
    for name, row in rows.items():
        assert {measure: row[measure] for measure in measured[name]} == pytest.approx(measured[name])
    assert [row[1] for row in table["rows"]] == sorted((row["accuracy"] for row in rows.values()), reverse=True)
    for column in ("parameters", "MACs"):
        assert rows["small"][column] < rows["wide"][column]
    points = parts["Accuracy against latency"]["points"]
    assert points["small"]["x"] == pytest.approx(rows["small"]["latency [ms]"])
    assert points["small"]["y"] == pytest.approx(measured["small"]["accuracy"])
    assert {"wide/report.html", "small/report.html"} <= set(assert_self_contained(tmp_path).links)
    assert set(parts["Accuracy"]["series"]) == {"wide, validation", "small, validation"}


def test_long_names_are_shortened_below_pictures(trained: Trained):
    classes = ("a" * 100, "b" * 48, "c")
    images = from_arrays(arrays(2)[0], np.array([0, 1]), classes=classes, name="folder/" * 20)
    report = prediction_report(trained.task, Predictions(images, np.eye(3, dtype=np.float32)[:2], classes, ()))
    (shown,) = [part for section in report.sections for part in section.parts if type(part).__name__ == "Images"]
    (_, first), (_, second) = shown.images
    assert first.startswith("\u2026folder/")
    assert first.endswith(f"/0000: {'a' * 47}\u2026 (100%), truly {'a' * 47}\u2026")
    assert second.endswith(f"/0001: {'b' * 48} (100%), truly {'b' * 48}")
