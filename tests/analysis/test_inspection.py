"""What a report says of a model is what the model is, for every network of the library and any module."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from battery.entries import NETWORKS
from battery.subjects import Network
from convatlas.analysis import inspection
from convatlas.analysis.inspection import SECTIONS, Subject, inspect
from convatlas.analysis.waterline import layers, machines
from convatlas.cost import cost
from convatlas.networks.base import Backbone, PublishedFile
from convatlas.networks.registry import create_model
from convatlas.nn.mixers.eca import ECA
from convatlas.ops.sparse import SparseTensor
from convatlas.report import Note, Report, Section
from convatlas.surgery import insert


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVATLAS_PROGRESS", "0")
    monkeypatch.setattr(inspection, "_PASSES", (1, 1))
    monkeypatch.setattr(inspection, "_PAIRS", 3)
    monkeypatch.setattr(machines, "_GEMM_SIDES", (64,))
    monkeypatch.setattr(machines, "_CACHES", 0)
    monkeypatch.setattr(layers, "_PASSES", 1)


def tables(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Every table by its title, a mapping a row."""
    document = json.loads(report.to_json())
    return {
        part["title"]: [dict(zip(part["columns"], row, strict=True)) for row in part["rows"]]
        for section in document["sections"]
        for part in section["parts"]
        if part["kind"] == "table"
    }


def notes(report: Report) -> str:
    return " ".join(part.text for section in report.sections for part in section.parts if isinstance(part, Note))


@pytest.mark.parametrize("entry", NETWORKS, ids=lambda entry: entry.name)
def test_every_network_can_be_inspected(entry: Network):
    model = entry.build()
    inputs = entry.inputs(model, 1)
    found = tables(inspect(model, inputs, name=entry.name))
    counted = cost(model, *inputs).total
    size = {row["quantity"]: row["value"] for row in found["Size"]}
    assert size["parameters"] == counted.parameters
    assert size["multiply-adds"] == counted.macs > 0
    if sum(any(True for _ in part.parameters(recurse=False)) for name, part in model.named_modules() if name) < 2:
        assert "Stages" not in found  # it has no parts
    else:
        stages = found["Stages"]
        assert len(stages) > 1
        assert sum(row["multiply-adds"] for row in stages) == pytest.approx(counted.macs, rel=0.02)
        assert sum(row["parameters"] for row in stages) == pytest.approx(counted.parameters, rel=0.02)
    assert sum(row["MACs"] for row in found["Layers"]) <= counted.macs
    assert {row["what"].partition(",")[0] for row in found["Memory"]} == {"inference", "training step"}
    if isinstance(model, Backbone):
        assert [row["channels"] for row in found["Feature maps"]] == [info.channels for info in model.feature_info]


def test_sparse_samples_are_repeated_whole():
    x = SparseTensor(torch.ones(3, 2), torch.tensor([[0, 1], [0, 2], [0, 4]]), (5,), 1)
    (batch,) = Subject("sparse", nn.Identity(), (x,)).batch(2)
    assert batch.indices.tolist() == [[0, 1], [0, 2], [0, 4], [1, 1], [1, 2], [1, 4]]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = layer(x)
        return self.head(x.mean((2, 3)))


def test_numbers_of_a_module_of_ones_own():
    model = Plain().train()
    model.body[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = inspect(model, torch.randn(1, 3, 8, 8), origin="mine")
    assert [module.training for module in model.modules()] == [True, True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert report.title == "Inspection of Plain"
    assert report.provenance["origin"] == "mine"
    assert report.provenance["input"] == "1 x 3 x 8 x 8"
    found = tables(report)
    convolutions = 108 * 64, 36 * 36
    assert [row["stage"] for row in found["Stages"]] == ["body.0", "body.1", "body.2", "head"]
    assert [row["multiply-adds"] for row in found["Stages"]] == [convolutions[0], 0, convolutions[1], 8]
    layers = {row["layer"]: row for row in found["Layers"]}
    assert layers["body.0"]["output"] == "1 x 4 x 8 x 8"
    assert layers["body.2"]["elements written"] == 4 * 6 * 6
    kinds = {row["convolution"]: row["layers"] for row in found["Convolutions"]}
    assert kinds == {"3 x 3 dense": 1, "3 x 3 depthwise": 1}
    merged = {row["quantity"]: (row["as it is"], row["merged"]) for row in found["Merged for use"]}
    assert merged["multiply-adds of norms"] == (2 * 4 * 64, 0)
    assert merged["parameters"] == (112 + 8 + 40 + 10, 112 + 40 + 10)
    assert merged["layers that compute"] == (4, 3)
    training = found["Memory"][1]
    assert training["gradients [MiB]"] * 2**20 == 4 * (112 + 8 + 40 + 10)
    assert found["Memory"][2]["all [MiB]"] - training["all [MiB]"] == pytest.approx(2 * training["gradients [MiB]"])


def test_a_report_tells_what_cannot_be_done():
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training or len(x) != 1:
                raise ValueError("one sample, please")
            return self.layer(x)

    report = inspect(Stubborn(), torch.randn(1, 3))
    assert "The memory of a training step could not be measured: one sample, please" in notes(report)
    assert "A batch of 8 does not run: one sample, please." in report.to_json()
    assert "merge finds nothing to fold" in notes(report)
    assert "no plain convolution" in notes(report)
    assert not any(section.title in ("Stages", "Feature pyramid", "Published weights") for section in report.sections)
    with pytest.raises(ValueError, match="got function"):
        inspect(lambda x: x, torch.randn(1))  # type: ignore[arg-type]


def test_slots_and_files_are_listed():
    model = create_model("resnet18", num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    file = PublishedFile("https://example.org/a.pth", "MIT", {"top-1 [%]": 70.0}, by_hand=True)
    sections = [inspection._changes, inspection._published]
    report = inspect(model, x, files=[file], sections=sections)
    assert "8 slots for channel attention are empty (the first is layer1.0.attention)" in notes(report)
    (row,) = tables(report)["Files of the authors"]
    assert (row["file"], row["published figures"], row["fetched"]) == (file.url, "top-1 [%]: 70", "by hand")
    filled = insert(model, ECA, at="*.attention", example_input=x).model
    assert "slots" not in notes(inspect(filled, x, sections=sections))


def test_layers_that_take_a_place_are_counted(monkeypatch: pytest.MonkeyPatch):
    class Odd(nn.Module):
        @classmethod
        def from_conv(cls, conv: nn.Conv2d) -> nn.Module:
            if conv.groups > 1:
                raise ValueError("groups must be 1")
            return cls()

    class Choosing(Odd):
        def __init__(self, *, order: int) -> None:
            super().__init__()

    class Line(Odd, nn.Conv1d):
        pass

    monkeypatch.setattr(inspection, "_conv_like", lambda: iter([Odd, Choosing, Line]))
    report = inspect(Plain(), torch.randn(1, 3, 8, 8), sections=[inspection._changes])
    assert [tuple(row.values()) for row in tables(report)["Layers that can take their place"]] == [
        ("Odd", "1 of 2", "groups must be 1"),
        ("Choosing", None, "needs the option order"),
    ]


def test_sections_can_be_chosen_and_added():
    def own(subject: Subject) -> Section:
        return Section("Own", [Note(f"{subject.name} on {subject.shape}: {subject.cost.total.macs}")])

    report = inspect(nn.Linear(3, 4), torch.randn(2, 3), name="line", sections=[own])
    assert [section.title for section in report.sections] == ["Own"]
    assert notes(report) == "line on 2 x 3: 24"
    assert report.summary == "line has 16 parameters and takes 24 multiply-adds for an input of 2 x 3."
    assert own not in SECTIONS
    assert len({maker.__name__ for maker in SECTIONS}) == len(SECTIONS) >= 9


def test_long_lists_are_cut_and_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inspection, "_MOST_LAYERS", 2)
    monkeypatch.setattr(inspection, "_MOST_STAGES", 3)
    text = inspect(nn.Sequential(*(nn.Linear(3, 3) for _ in range(5))), torch.randn(1, 3)).to_json()
    assert "The first 2 of 5 are shown." in text
    assert "The first 3 of 5 are shown." in text
