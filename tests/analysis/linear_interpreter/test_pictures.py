from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from analysis.linear_interpreter.nets import classifier, image, translator, upscaler
from convatlas.analysis.linear_interpreter import LinearInterpreter, study
from convatlas.analysis.linear_interpreter.pictures import signed_picture
from convatlas.report import Images, Note, Report, Table


def parts(report: Report, kind: type) -> dict[str, object]:
    return {part.title: part for section in report.sections for part in section.parts if isinstance(part, kind)}


def test_classifier(tmp_path: Path):
    model, x0 = classifier(), image(1, 3, 8, 8)
    names = [f"class {k}" for k in range(10)]
    report = study(model, x0, names=names, folder=tmp_path)
    li = LinearInterpreter(model)(x0)
    best = li.output[0].topk(3).indices.tolist()
    (votes,) = (table for title, table in parts(report, Table).items() if title.startswith("Where"))
    assert [row[0] for row in votes.rows] == [names[k] for k in best]
    for row, k in zip(votes.rows, best, strict=True):
        np.testing.assert_allclose(row[1:4], [li.output[0, k], li.contribution(k).sum(), li.residual[0, k]])
        assert row[4] + row[5] == pytest.approx(1)
    pictures = parts(report, Images)
    assert [len(part.images) for part in pictures.values()] == [4, 3, 4]
    assert all(np.ptp(picture) > 0 for part in pictures.values() for picture, _ in part.images)
    assert f"{li.bias_share:.1%}" in report.summary
    arrays = np.load(tmp_path / "linear_system.npz")
    np.testing.assert_allclose(arrays["rows"][0], li.row(best[0]))
    page = report.save(tmp_path)
    assert "class " in page.read_text()
    assert json.loads((tmp_path / "report.json").read_text())["format"] == "convatlas report 1"


def test_maps_have_columns_and_left_singular_vectors():
    report = study(upscaler(), image(1, 1, 6, 8), mode="tangent", inputs=[0], singular=2)
    pictures = parts(report, Images)
    assert [len(part.images) for part in pictures.values()] == [2, 1, 1, 2, 2]
    columns = next(part for title, part in pictures.items() if title.startswith("Columns"))
    assert columns.images[0][0].shape == (12, 16, 3)
    assert report.provenance["mode"] == "tangent"


def test_cancellation_is_noted():
    report = study(translator(), image(1, 2, 6, 6), singular=0)
    found = [part.text for section in report.sections for part in section.parts if isinstance(part, Note)]
    li = LinearInterpreter(translator())(image(1, 2, 6, 6))
    assert bool(found) == (li.cancellation > 10)
    model = nn.Linear(2, 1).double().eval()
    nn.init.constant_(model.weight, 100.0)
    nn.init.constant_(model.bias, -199.0)
    report = study(model, torch.ones(1, 2, dtype=torch.float64))
    notes = [part.text for section in report.sections for part in section.parts if isinstance(part, Note)]
    assert "A x0 and r nearly cancel" in notes[0]


@pytest.mark.parametrize("shape", [(1, 3), (1, 2, 9), (1, 2, 3, 4, 5)])
def test_any_shape_is_shown(shape: tuple[int, ...]):
    report = study(nn.Sequential(nn.Tanh(), nn.Flatten(1)).eval(), torch.randn(shape), singular=1)
    assert all(
        picture.shape[-1] == 3 or picture.ndim == 2 for p in parts(report, Images).values() for picture, _ in p.images
    )


def test_signed_pictures():
    picture = signed_picture(torch.tensor([[[1.0, 0.0, -0.5]], [[1.0, 0.0, -0.5]]]))
    assert picture.tolist() == [[[255, 0, 0], [255, 255, 255], [128, 128, 255]]]
    assert signed_picture(torch.zeros(1, 2, 2)).tolist() == [[[255] * 3] * 2] * 2


def test_bad_arguments():
    with pytest.raises(ValueError, match="x0 must be one sample, got a batch of 2"):
        study(classifier(), image(2, 3, 8, 8))
    with pytest.raises(ValueError, match="names must name the 10 outputs, got 2"):
        study(classifier(), image(1, 3, 8, 8), names=["a", "b"])
