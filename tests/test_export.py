"""Files run without the model's code and give its results, or are not written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convatlas.errors import MissingExtra, UnknownName, Unsupported
from convatlas.export import export


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


X = torch.randn(1, 3, 9, 12)


def session(path: Path) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_onnx_runs_elsewhere_on_any_size(tmp_path: Path):
    model = small().train()
    metadata = {"classes": ["kät", "dog"], "preprocess": {"mean": [0.5], "size": [9, 12]}, "model": "small"}
    axes = ("batch", "height", "width")
    done = export(model, X, tmp_path / "new" / "m.onnx", dynamic=axes, metadata=metadata)
    assert model.training
    assert isinstance(model[1], nn.BatchNorm2d)
    assert done.merged == ("1",)
    assert [check.shapes[0] for check in done.checks] == [
        (1, 3, 9, 12),
        (3, 3, 9, 12),
        (1, 3, 13, 12),
        (1, 3, 9, 18),
        (1, 3, 9, 13),
    ]
    assert all(check.error < 1e-5 for check in done.checks)
    running = session(done.path)
    (given,) = running.get_inputs()
    assert given.shape == ["batch", 3, "height", "width"]
    x = torch.randn(5, 3, 21, 10)
    with torch.no_grad():
        expected = model.eval()(x)
    torch.testing.assert_close(torch.from_numpy(running.run(None, {given.name: x.numpy()})[0]), expected)
    held = running.get_modelmeta().custom_metadata_map
    assert json.loads(held["classes"]) == metadata["classes"]
    assert json.loads(held["preprocess"]) == metadata["preprocess"]
    assert held["model"] == "small"
    described = json.loads((tmp_path / "new" / "m.json").read_text())
    assert done.description == tmp_path / "new" / "m.json"
    assert described["classes"] == metadata["classes"]
    assert described["inputs"][0]["dynamic"] == {"batch": 0, "height": 2, "width": 3}
    assert described["checks"][0]["error"] == done.checks[0].error
    report = done.report("small")
    assert "5 sizes" in report.summary
    assert len(report.sections[0].parts[0].rows) == 5  # type: ignore[union-attr]


def test_a_torch_program_is_read_back(tmp_path: Path):
    model = small().eval()
    done = export(model, (X,), tmp_path / "m.pt2", form="torch", metadata={"classes": ["a"]})
    extra = {"convatlas.json": ""}
    program = torch.export.load(str(done.path), extra_files=extra)
    assert json.loads(extra["convatlas.json"])["classes"] == ["a"]
    x = torch.randn(4, 3, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))
    assert [check.shapes[0][0] for check in done.checks] == [1, 3]


def test_layers_are_kept_where_asked(tmp_path: Path):
    assert export(small(), X, tmp_path / "m.pt2", form="torch", merged=False, dynamic=()).merged == ()
    with torch.no_grad():
        kept = torch.export.load(str(tmp_path / "m.pt2"))
    assert any("running_mean" in name for name in kept.state_dict)


class Two(nn.Module):
    """Takes a signal and indices, gives two results; one input has no effect on the first."""

    def forward(self, x: Tensor, index: Tensor) -> dict[str, Tensor]:
        return {"a": x.cumsum(-1), "b": index * 2}


def test_several_inputs_and_results(tmp_path: Path):
    inputs = (torch.randn(2, 3, 8), torch.arange(2))
    done = export(Two(), inputs, tmp_path / "m.onnx", dynamic=["batch", "length"], merged=False)
    assert (1, 3, 8) in {check.shapes[0] for check in done.checks}
    assert {check.shapes[0][2] for check in done.checks} == {8, 12, 9}
    described = json.loads(done.description.read_text())
    assert [entry["name"] for entry in described["inputs"]] == ["x", "index"]
    assert described["inputs"][1]["dynamic"] == {"batch": 0}


class Choosy(nn.Module):
    """Takes even widths only, and tells so."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[3] % 2:
            raise ValueError("x must be even")
        return x.unflatten(3, (-1, 2)).sum(-1)


def test_sizes_that_the_model_refuses_are_not_tried(tmp_path: Path):
    done = export(Choosy(), X, tmp_path / "m.pt2", form="torch", dynamic=["height"])
    assert {check.shapes[0][2] for check in done.checks} == {9, 13}
    done = export(Choosy(), X, tmp_path / "m.pt2", form="torch", dynamic=["width"])
    assert {check.shapes[0][3] for check in done.checks} == {12, 18}


class Fixed(nn.Module):
    """Adds a number to each column, so that their number is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.columns


def test_an_axis_that_the_model_fixes_cannot_be_dynamic(tmp_path: Path):
    with pytest.raises(
        Unsupported, match=r"this Fixed cannot be traced: .*; of its axes, batch, width were to be dynamic"
    ):
        export(Fixed(), X, tmp_path / "m.pt2", form="torch", dynamic=["batch", "width"])
    assert not list(tmp_path.iterdir())
    assert len(export(Fixed(), X, tmp_path / "m.pt2", form="torch", dynamic=["batch"]).checks) == 2


class Values(nn.Module):
    """Looks at values, which no file can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path):
    path = tmp_path / "m.pt2"
    path.write_text("older")
    with pytest.raises(Unsupported, match="this Values cannot be traced: "):
        export(Values(), X, path, form="torch", merged=False)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def other(*args: object) -> object:
        return lambda inputs: [torch.zeros(len(inputs[0]), 4)]

    monkeypatch.setattr("convatlas.export._write_torch", other)
    with pytest.raises(Unsupported, match="the file computes something else on 1 x 3 x 9 x 12: off by"):
        export(small(), X, tmp_path / "m.pt2", form="torch")
    monkeypatch.setattr("convatlas.export._write_torch", lambda *args: lambda inputs: [torch.zeros(2)])
    with pytest.raises(Unsupported, match=r"the file gives 1 results of shapes \[\(2,\)\], the model \[\(1, 4\)\]"):
        export(small(), X, tmp_path / "m.pt2", form="torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"form": "tflite"}, UnknownName, "unknown form 'tflite'"),
        ({"dynamic": ["hight"]}, UnknownName, "unknown axis of the inputs 'hight': did you mean height"),
        ({"dynamic": ["depth"]}, UnknownName, "unknown axis of the inputs 'depth'"),
        ({"path": "m.json"}, ValueError, "path must not end in .json"),
        ({"inputs": ()}, ValueError, "inputs must be tensors, got none"),
        ({"inputs": (X, 3)}, ValueError, "inputs must be tensors, got Tensor, int"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, options: dict[str, Any], error: type[Exception], told: str):
    given = {"inputs": X, "path": "m.onnx", **options}
    with pytest.raises(error, match=told):
        export(small(), given.pop("inputs"), tmp_path / given.pop("path"), **given)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        MissingExtra, match=r"export as ONNX needs the package onnxscript: pip install 'convatlas\[export\]'"
    ):
        export(small(), X, tmp_path / "m.onnx")


def test_weights_beyond_one_file_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("convatlas.export._LARGEST_ONNX", 10)
    with pytest.raises(
        Unsupported, match=r"the weights take .* GiB, and one ONNX file holds 2: choose the form 'torch'"
    ):
        export(small(), X, tmp_path / "m.onnx")
