"""The verbs, from the words of a user to the files they get."""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from cli.conftest import Run, training_words
from convatlas import catalog
from convatlas.networks.registry import create_model
from convatlas.report import Claim, Report, Section
from recognition.pictures import TINY, arrays

SLUG = "inceptionnext"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- looking things up -------------------------------------------------------------------------------------------------


def test_list_has_a_line_for_every_system(run: Run):
    ended = run("list")
    assert ended.code == 0
    lines = [line.split() for line in ended.out.splitlines()]
    listed = {words[0]: words for words in lines if words and words[0] in catalog.cards()}
    assert listed.keys() == catalog.cards().keys()
    assert ("available" in listed[SLUG]) is catalog.card(SLUG).available
    assert f"{len(catalog.cards())} systems, " in ended.out


def test_list_can_be_narrowed_and_read_by_machines(run: Run):
    every = json.loads(run("list", "--json").out)
    assert {card["slug"] for card in every} == set(catalog.cards())
    some = json.loads(run("list", "--json", "--available", "--kind", "network").out)
    expected = {slug for slug, card in catalog.cards().items() if card.available and "network" in card.kinds}
    assert {card["slug"] for card in some} == expected
    assert run("list", "--models").out.split() == sorted(catalog.models())
    assert json.loads(run("list", "--models", "--json").out) == sorted(catalog.models())
    assert run("list", "--methods").out.split() == sorted(catalog.METHODS)
    assert json.loads(run("list", "--methods", "--json").out) == sorted(catalog.METHODS)


def test_show_tells_what_a_system_is(run: Run):
    ended = run("show", SLUG)
    card = catalog.card(SLUG)
    assert ended.code == 0
    for text in (card.title, "2303.16900", "inceptionnext_tiny", "convatlas reproduce inceptionnext"):
        assert text in ended.out
    document = json.loads(run("show", SLUG, "--json").out)
    assert document["models"] == list(card.models)
    assert "InceptionNeXt" in document["public"]["convatlas.networks.inceptionnext"]


def test_show_tells_how_a_method_is_used(run: Run):
    assert "convatlas train TASK --methods '{tract: {}}'" in run("show", "tract").out


# -- train, evaluate, predict ------------------------------------------------------------------------------------------


def test_train_writes_a_run_and_says_where(run: Run, pictures: Path, tmp_path: Path):
    ended = run(*training_words(pictures, tmp_path / "new" / "run"))
    assert ended.code == 0
    assert ended.err == ""
    assert ended.out.splitlines()[-2:] == [
        f"run: {tmp_path / 'new' / 'run'}",
        f"report: {tmp_path / 'new' / 'run' / 'report.html'}",
    ]
    files = {path.relative_to(tmp_path / "new" / "run").as_posix() for path in (tmp_path / "new" / "run").rglob("*")}
    assert {
        *("config.yaml", "metrics.csv", "report.html", "report.json", "predictions.csv", "samples"),
        *("checkpoints/last.ckpt", "checkpoints/best.safetensors"),
    } <= files
    assert len(rows_of(tmp_path / "new" / "run" / "metrics.csv")) == 2


def test_train_without_a_folder_makes_one_below_runs(run: Run, pictures: Path, tmp_path: Path):
    words = [word for word in training_words(pictures, tmp_path, epochs=1) if not word.startswith("--run=")]
    ended = run(*words)
    assert ended.code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("recognition-inceptionnext_atto-")
    assert f"run: runs/{folder.name}\n" in ended.out


def test_json_is_one_document_and_nothing_else(run: Run, pictures: Path, finished: Path, tmp_path: Path):
    commands = {
        "Recognition with": [*training_words(pictures, tmp_path / "run", epochs=1), "--json"],
        "Evaluation of": ["evaluate", finished, "--json", "--out", tmp_path / "evaluation"],
        "Predictions of": ["predict", finished, pictures, "--json", "--out", tmp_path / "predictions"],
    }
    for title, words in commands.items():
        ended = run(*words)
        assert (ended.code, ended.err) == (0, "")
        document = json.loads(ended.out)
        assert document["format"] == "convatlas report 1"
        assert document["title"] == f"{title} inceptionnext_atto"
        folder = tmp_path / "run" if title.startswith("Recognition") else Path(words[-1])
        assert json.loads((folder / "report.json").read_text()) == document


def test_the_configuration_holds_every_setting_and_runs_again(run: Run, pictures: Path, finished: Path, tmp_path: Path):
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert settings["task"] == "recognition"
    assert settings["data"] == str(pictures)
    assert settings["options"] == TINY
    assert settings["epochs"] == 2
    assert settings["augment"]["scale"] == [0.08, 1.0]
    ended = run("train", "recognition", "--config", finished / "config.yaml", "--run", tmp_path / "again")
    assert ended.code == 0
    first, second = (load_file(each / "checkpoints" / "best.safetensors") for each in (finished, tmp_path / "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text()) == settings


def test_a_method_is_named_in_words_and_stored(run: Run, pictures: Path, finished: Path, tmp_path: Path):
    words = training_words(pictures, tmp_path / "run", methods="{tract: {lam: 0.2}}")
    ended = run(*words)
    assert ended.code == 0, ended.err
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["methods"] == {"tract": {"lam": 0.2}}
    plain, trained = (load_file(each / "checkpoints" / "best.safetensors") for each in (finished, tmp_path / "run"))
    assert plain.keys() == trained.keys()
    assert not all(torch.equal(plain[key], trained[key]) for key in plain)
    ended = run("train", "recognition", "--config", tmp_path / "run" / "config.yaml", "--run", tmp_path / "again")
    assert ended.code == 0, ended.err
    again = load_file(tmp_path / "again" / "checkpoints" / "best.safetensors")
    assert all(torch.equal(again[key], value) for key, value in trained.items())


def test_words_override_a_recipe_and_a_recipe_the_defaults(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from convatlas.recognition.task import Recognition

    recipe = tmp_path / "quick.yaml"
    recipe.write_text(yaml.safe_dump({"epochs": 1, "lr": 0.5, "warmup_epochs": 0, "augment": {"hflip": 0.25}}))
    monkeypatch.setattr(Recognition, "recipes", lambda: {"quick": recipe})
    data = [f"--data={pictures}", "--options", json.dumps(TINY), "--run", str(tmp_path / "run")]
    for number, words in enumerate((["--recipe", "quick", "--lr", "0.01"], ["--lr=0.01", "--recipe=quick"])):
        data[-1] = str(tmp_path / f"run{number}")
        ended = run("train", "recognition", *words, *data)
        assert ended.code == 0, ended.err
        settings = yaml.safe_load((tmp_path / f"run{number}" / "config.yaml").read_text())
        assert (settings["epochs"], settings["lr"], settings["augment"]["hflip"]) == (1, 0.01, 0.25)
    ended = run("train", "recognition", "--recipe", "quik")
    assert (ended.code, "unknown recipe of recognition 'quik': did you mean quick?" in ended.err) == (1, True)


def test_evaluate_writes_beside_the_run_or_elsewhere(run: Run, finished: Path, pictures: Path, tmp_path: Path):
    ended = run("evaluate", finished)
    assert ended.code == 0
    assert ended.out.endswith(f"report: {finished / 'evaluation' / 'report.html'}\n")
    assert rows_of(finished / "evaluation" / "predictions.csv") == rows_of(finished / "predictions.csv")
    ended = run("evaluate", finished, "--data", pictures, "--out", tmp_path / "other")
    assert "of 36 images are named rightly" in ended.out
    assert len(rows_of(tmp_path / "other" / "predictions.csv")) == 36


def test_predict_takes_files_folders_and_arrays(run: Run, finished: Path, pictures: Path, tmp_path: Path):
    ended = run("predict", finished, pictures / "cat" / "00.png", pictures / "dog", "--out", tmp_path / "out")
    assert ended.code == 0
    assert ended.out.endswith(f"predictions: {tmp_path / 'out'}\n")
    assert len(rows_of(tmp_path / "out" / "predictions.csv")) == 13
    np.savez(tmp_path / "new.npz", images=arrays(5)[0])
    assert run("predict", finished, tmp_path / "new.npz").code == 0
    assert run("predict", finished, tmp_path / "new.npz").code == 0
    folders = sorted((finished / "predictions").iterdir())
    assert len(folders) == 2  # an earlier answer is never overwritten
    for folder in folders:
        assert [row["image"] for row in rows_of(folder / "predictions.csv")] == [f"new/000{row}" for row in range(5)]
        assert (folder / "report.html").stat().st_size > 0


def test_skipped_files_are_told_in_the_terminal_and_as_json(run: Run, pictures: Path, finished: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes((pictures / "cat" / "00.png").read_bytes())
    (tmp_path / "in" / "bad.png").write_text("no picture")
    ended = run("predict", finished, tmp_path / "in", "--out", tmp_path / "out")
    assert ended.code == 0
    assert ended.err == "convatlas predict: 1 file is left out: bad.png: not an image\n"
    assert "Skipped files" in ended.out
    assert "bad.png" in ended.out
    document = json.loads(run("predict", finished, tmp_path / "in", "--out", tmp_path / "out", "--json").out)
    assert {"bad.png", "not an image"} <= set(document["sections"][-1]["parts"][0]["rows"][0])


# -- compare, reproduce, convert ---------------------------------------------------------------------------------------


def test_compare_trains_each_model_and_writes_one_report(run: Run, pictures: Path, tmp_path: Path):
    models = {
        "tiny": {"model": "inceptionnext_atto", "options": TINY},
        "conv": {"model": "convnext_tiny", "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}},
    }
    shared = ["--data", pictures, "--epochs=1", "--warmup_epochs=0", "--batch_size=8"]
    ended = run("compare", "recognition", "--models", json.dumps(models), *shared, "--out", tmp_path / "both")
    assert ended.code == 0, ended.err
    assert ended.out.endswith(f"report: {tmp_path / 'both' / 'report.html'}\n")
    for name in models:
        assert (tmp_path / "both" / name / "report.html").is_file()
    document = json.loads((tmp_path / "both" / "report.json").read_text())
    assert document["title"] == f"tiny and conv on {pictures}"
    (table,) = [
        part for section in document["sections"] for part in section["parts"] if part.get("title") == "Quality and cost"
    ]
    assert {row[0] for row in table["rows"]} == {"tiny", "conv"}


def test_compare_takes_names_with_commas(run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from convatlas.recognition.task import Recognition

    fitted: list[tuple[str, str]] = []
    monkeypatch.setattr(
        Recognition, "fit", lambda task, folder, training, resume: fitted.append((task.model, folder.name))
    )
    monkeypatch.setattr(Recognition, "compare", lambda tasks, runs, folder: Report("Both", "", []))
    ended = run("compare", "recognition", "--models", "resnet18, inceptionnext_atto", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert fitted == [("resnet18", "resnet18"), ("inceptionnext_atto", "inceptionnext_atto")]


def test_compare_tries_layers_in_one_network(run: Run, pictures: Path, tmp_path: Path):
    layers = {"eca": {"layer": "eca"}, "se": {"layer": "squeeze_excite", "layer_options": {"reduction": 4}}}
    shared = ["--data", pictures, "--epochs=1", "--warmup_epochs=0", "--batch_size=8"]
    words = ["--model=inceptionnext_atto", "--options", json.dumps(TINY), "--with", json.dumps(layers), *shared]
    ended = run("compare", "recognition", *words, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    (table,) = [
        part for section in document["sections"] for part in section["parts"] if part.get("title") == "Quality and cost"
    ]
    sizes = {row[0]: row[table["columns"].index("parameters")] for row in table["rows"]}
    assert sizes.keys() == {"inceptionnext_atto", "inceptionnext_atto-eca", "inceptionnext_atto-se"}
    assert sizes["inceptionnext_atto"] < sizes["inceptionnext_atto-eca"] < sizes["inceptionnext_atto-se"]
    again = run("evaluate", tmp_path / "out" / "inceptionnext_atto-eca")
    assert again.code == 0, again.err


def test_reproduce_runs_the_experiment_and_saves_its_report(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, object, Path]] = []

    def experiment(budget: str, *, data: str | None, folder: Path) -> Report:
        asked.append((budget, data, folder))
        claim = Claim.judge("It works.", published="yes", statistic="share", value=0.9, at_least=0.5, seeds=0)
        return Report("Made up", "", [Section("Claims", [claim])])

    fake = types.ModuleType("convatlas.experiments.eca")
    fake.run = experiment  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "convatlas.experiments.eca", fake)
    monkeypatch.setattr("convatlas.cli.reproduce.experiment_module", lambda slug: "convatlas.experiments.eca")
    ended = run("reproduce", "eca", "--out", tmp_path / "out", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["claims"][0]["verdict"] == "holds"
    assert (tmp_path / "out" / "report.html").is_file()
    assert asked == [("quick", None, tmp_path / "out")]
    ended = run("reproduce", "eca", "--budget", "full", "--data", "mine")
    assert ended.code == 0
    assert asked[1][:2] == ("full", "mine")
    assert asked[1][2].parent.name == "runs"
    assert f"report: {asked[1][2] / 'report.html'}" in ended.out


def test_convert_writes_a_checkpoint_in_our_layout(run: Run, tmp_path: Path):
    model = create_model("inceptionnext_atto", num_classes=7)
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "a.pth"
    )
    arguments = ["--model", "inceptionnext_atto", "--num-classes", "7"]
    ended = run("convert", tmp_path / "a.pth", tmp_path / "b.safetensors", *arguments)
    assert ended.code == 0, ended.err
    assert f"written: {tmp_path / 'b.safetensors'}" in ended.out
    assert "loaded" in ended.out
    written = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(written[key], value) for key, value in model.state_dict().items())
    ended = run("convert", tmp_path / "a.pth", tmp_path / "c.npz")
    assert ended.code == 0, ended.err
    with np.load(tmp_path / "c.npz") as plain:
        assert set(plain) == set(model.state_dict())
    assert f"{len(model.state_dict())} tensors under their own names" in ended.out
