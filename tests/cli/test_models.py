"""The verbs that look at models: bench, inspect and export."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.conftest import Run
from convatlas import catalog
from convatlas.networks.registry import create_model
from convatlas.report import Note, Report, Section
from convatlas.weights import load_weights, save_weights
from recognition.pictures import CLASSES

# -- bench -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Benchmarks named eca and networks that keep what they are asked for."""
    calls: list[dict[str, Any]] = []

    def eca(*, threads: Any, quick: bool) -> Report:
        calls.append({"threads": threads, "quick": quick})
        sys.stdout.write("chatter\n")
        return Report("Benchmark: eca", "fine", [Section("Ratios", [Note("none")])])

    def networks(*, threads: Any, quick: bool, models: Any = None) -> Report:
        calls.append({"threads": threads, "quick": quick, "models": models})
        return Report("Benchmark: networks", "fine", [])

    for name, run in (("eca", eca), ("networks", networks)):
        module = types.ModuleType(f"convatlas.bench.{name}")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"convatlas.bench.{name}", module)
    return calls


def test_bench_without_a_name_lists_the_benchmarks(run: Run):
    ended = run("bench")
    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines()] == list(catalog.benchmarks())
    assert json.loads(run("bench", "--json").out) == catalog.benchmarks()
    assert "fft_conv" in run("bench", "--help").out


def test_bench_runs_with_what_it_is_told(run: Run, asked: list[dict[str, Any]], tmp_path: Path):
    ended = run("bench", "eca", "--threads", "1,2", "--quick", "--out", tmp_path / "out", "--json")
    assert (ended.code, ended.err) == (0, "chatter\n")
    assert json.loads(ended.out) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert run("bench", "networks", "--models", "resnet18, resnet34").code == 0
    assert asked == [
        {"threads": [1, 2], "quick": True},
        {"threads": None, "quick": False, "models": ["resnet18", "resnet34"]},
    ]
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("bench-networks-")
    assert (folder / "report.html").stat().st_size > 0


# -- inspect -----------------------------------------------------------------------------------------------------------


def size_of(document: dict[str, Any]) -> dict[str, Any]:
    (table,) = [part for part in document["sections"][0]["parts"] if part["kind"] == "table"]
    return {row[0]: row[1] for row in table["rows"]}


def test_inspect_takes_a_name_a_run_and_a_checkpoint(run: Run, finished: Path, tmp_path: Path):
    model = create_model("inceptionnext_tiny", depths=(1, 1), dims=(8, 16), num_classes=5)
    save_weights(model, tmp_path / "ours.safetensors")
    torch.save(create_model("resnet18", num_classes=5).state_dict(), tmp_path / "theirs.pth")
    size = ["--size", "48,64"]
    commands = {
        "InceptionNeXt": ["inspect", tmp_path / "ours.safetensors", *size],
        "resnet18": ["inspect", tmp_path / "theirs.pth", "--model", "resnet18", "--num-classes", "5", *size],
    }
    parameters = {}
    for name, words in commands.items():
        ended = run(*words, "--json", "--out", tmp_path / name)
        assert (ended.code, ended.err) == (0, "")
        document = json.loads(ended.out)
        assert document["title"] == f"Inspection of {name}"
        assert document["provenance"]["input"] == "1 x 3 x 48 x 64"
        assert json.loads((tmp_path / name / "report.json").read_text()) == document
        parameters[name] = size_of(document)["parameters"]
    assert parameters["InceptionNeXt"] == sum(p.numel() for p in model.parameters())
    ended = run("inspect", finished)
    assert ended.code == 0, ended.err
    assert "Feature pyramid" in ended.out
    assert f"weights: best epoch of {finished}" in ended.out
    assert "report: runs/inspect-inceptionnext_atto-" in ended.out


# -- export ------------------------------------------------------------------------------------------------------------


def test_export_writes_a_run_with_its_classes(run: Run, finished: Path, tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "out" / "model.onnx"
    ended = run("export", finished, "--out", path)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert ended.out.endswith(f"written: {path} and model.json\n")
    assert "The file against the model" in ended.out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    held = session.get_modelmeta().custom_metadata_map
    assert json.loads(held["classes"]) == list(CLASSES)
    preprocess = json.loads(held["preprocess"])
    (given,) = session.get_inputs()
    assert given.shape == ["batch", 3, preprocess["size"], preprocess["size"]]
    assert session.run(None, {given.name: torch.randn(2, *given.shape[1:]).numpy()})[0].shape == (2, 3)
    assert json.loads((tmp_path / "out" / "model.json").read_text())["classes"] == list(CLASSES)


def test_export_of_a_name_as_a_torch_program(run: Run, tmp_path: Path):
    path = tmp_path / "model.bin"
    words = ["--format", "torch", "--size", "40,48", "--num-classes", "3", "--dynamic", "none", "--no-merge", "--json"]
    ended = run("export", "inceptionnext_atto", "--out", path, *words)
    assert (ended.code, ended.err) == (0, "")
    document = json.loads(ended.out)
    assert document["title"] == "Export of inceptionnext_atto"
    assert document["provenance"]["weights"] == "random"
    (table,) = document["sections"][0]["parts"]
    assert [row[0] for row in table["rows"]] == ["1 x 3 x 40 x 48"]
    assert table["rows"][0][1] < 1e-4
    with path.open("rb") as file:
        program = torch.export.load(file)
    model = create_model("inceptionnext_atto", num_classes=3)
    load_weights(model, program.state_dict)
    described = json.loads((tmp_path / "model.json").read_text())
    assert described["preprocess"]["size"] == [40, 48]
    assert described["merged layers"] == []


def test_a_missing_package_is_told_before_anything_is_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    ended = run("export", "inceptionnext_atto", "--out", tmp_path / "a.onnx")
    assert ended.code == 1
    assert ended.err == (
        "convatlas export: error: export as ONNX needs the package onnxruntime: pip install 'convatlas[export]'\n"
    )
    assert not (tmp_path / "a.onnx").exists()
