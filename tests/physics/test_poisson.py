"""The task of solving Poisson systems, from the words of a user to the files they get."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from convatlas.cli.main import main
from convatlas.data.linear_systems import random_system, write_binary_matrix, write_binary_vector, write_npz_system
from convatlas.errors import DataError, Unsupported
from convatlas.ops.poisson import PoissonOperator
from convatlas.physics import poisson
from convatlas.physics.poisson import Poisson
from convatlas.training.run import Run
from convatlas.training.settings import Training
from convatlas.training.task import open_task, split_settings

WIDTH = {"width": 4, "depths": [1, 1, 1]}
WORDS = ["--shape", "[8, 8]", "--options", json.dumps(WIDTH), "--lanczos_steps=30", "--vectors=30", "--max_iter=15"]
SHORT = ["--epochs=2", "--accelerator=cpu"]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVATLAS_PROGRESS", "0")
        patch.setattr(poisson, "_SEEDS", (1000,))
        patch.setattr(poisson, "_SMOKE_STEPS", 3)
        yield


@pytest.fixture(scope="module")
def trained(_small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the guide's first command, in small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("poisson"))
        first = next(line for line in guide() if line[1:3] == ["train", "poisson"])
        assert main([*first[1:], *WORDS, *SHORT]) == 0
        return Path(first[first.index("--run") + 1]).absolute()


def guide() -> list[list[str]]:
    """The words of the commands of the guide."""
    page = Path(__file__).parents[2] / "docs" / "guide" / "physics.md"
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_commands_of_the_guide_run(trained: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(trained.parents[1])
    write_npz_system(Path("system.npz"), random_system((6, 8), 1))
    lines = [line for line in guide() if "runs/poisson" in line and line[1] != "train"]
    assert {line[1] for line in lines} == {"evaluate", "predict"}
    for line in lines:
        assert main(line[1:]) == 0
    assert (trained / "evaluation" / "report.html").is_file()
    (solution,) = trained.rglob("system_solution.npz")
    assert np.load(solution)["x"].shape == (6, 8)


def test_training_writes_a_run(trained: Path):
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    assert len(rows) == 2
    assert 0 < float(rows[1]["val_loss"]) < 2
    assert -16 < float(rows[1]["val_residual"]) < 1
    report = json.loads((trained / "report.json").read_text())
    assert report["title"] == "Poisson systems with dcdm_2d_64"
    with Image.open(next((trained / "samples").glob("*_hole_*.png"))) as image:
        assert np.asarray(image).std() > 10
    text = (trained / "report.html").read_text()
    assert all(solver in text for solver in ("DCDM", "Jacobi CG", "IC CG", "deflated CG"))
    assert all(name in text for name in ("box_8x8", "hole_16x16", "smoke_8x8"))


def test_solutions_of_files_solve_them(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, out = tmp_path / "systems", tmp_path / "out"
    (data / "published").mkdir(parents=True)
    system = random_system((10, 12), 3, hole=True)
    write_npz_system(data / "a.npz", system)
    write_npz_system(data / "odd.npz", random_system((9, 12), 3))
    write_npz_system(data / "volume.npz", random_system((4, 4, 4), 3))
    assert main(["predict", str(trained), str(data), "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["title"] == "Solutions of dcdm_2d_64"
    text = (out / "report.html").read_text()
    assert "odd" in text
    assert "needs even sizes" in text
    assert "is for 2 axes" in text
    with np.load(out / "a_solution.npz") as solution:
        x, residuals = solution["x"], solution["residuals"]
    operator = PoissonOperator((10, 12), fluid=torch.from_numpy(system.fluid))
    true = float((torch.from_numpy(system.b) - operator(torch.from_numpy(x))).norm())
    assert true == pytest.approx(residuals[-1])
    energy = torch.from_numpy(x) * (0.5 * operator(torch.from_numpy(x)) - torch.from_numpy(system.b))
    assert float(energy.sum()) < -0.01  # zero at the start, and no step raises it
    assert not x[~system.fluid].any()
    with Image.open(out / "a_solution.png") as image:
        assert image.size == (2 * 12 + 2, 10)
        assert len(np.unique(np.asarray(image))) > 10
    with pytest.raises(DataError, match="odd has the grid"):
        open_task(trained).predict([data / "odd.npz"], out)


def test_evaluation_is_of_held_out_systems_or_others(trained: Path, tmp_path: Path):
    task = open_task(trained)
    report = task.evaluate(folder=tmp_path)
    rows = list(csv.DictReader((tmp_path / "solves.csv").open()))
    assert {row["solver"] for row in rows} == {"DCDM", "CG", "Jacobi CG", "IC CG", "deflated CG"}
    assert len(rows) == 5 * 5
    assert "5 systems" in report.summary
    write_npz_system(tmp_path / "own.npz", random_system((6, 8), 1))
    assert "1 system " in task.evaluate(tmp_path / "own.npz").summary
    quality = task.quality()
    plain = [int(row["iterations"]) for row in rows if row["solver"] == "CG"]
    ours = [int(row["iterations"]) for row in rows if row["solver"] == "DCDM"]
    assert quality["iterations"] == pytest.approx(np.mean(ours))
    assert quality["against CG"] == pytest.approx(np.mean(np.array(ours) / np.array(plain)))
    assert task.better("iterations") == "min"


def test_networks_are_compared(trained: Path, tmp_path: Path):
    tasks = {name: open_task(trained) for name in ("one", "other")}
    tasks["other"].max_iter = 3
    runs = {name: Run(tmp_path / name) for name in tasks}
    report = json.loads(Poisson.compare(tasks, runs, tmp_path).to_json())
    assert report["summary"].startswith("other is the best: iterations 3 ")


def test_learns_from_the_operator_of_files(tmp_path: Path):
    operator = PoissonOperator((4, 4, 4), boundary="neumann")
    write_binary_matrix(tmp_path / "A_1.bin", operator.to_csr())
    b = np.random.default_rng(0).standard_normal(64)
    write_binary_vector(tmp_path / "b_1.bin", b - b.mean())
    options = {"width": 2, "depths": (1, 1, 0)}
    task = Poisson(
        data=str(tmp_path), model="dcdm_64", options=options, lanczos_steps=20, vectors=6, cache=str(tmp_path / "v.npy")
    )
    task.prepare()
    assert task.shape == (4, 4, 4)
    first = task.train_set[1, 99]["b"]
    assert first.shape == (1, 4, 4, 4)
    assert float(first.mean().abs()) < 1e-6  # of this operator, not of the box
    assert np.load(tmp_path / "v.npy").shape == (6, 64)
    task.prepare()
    assert torch.equal(task.train_set[1, 0]["b"], first)
    with pytest.raises(DataError, match=r"v.npy must be \(8, 64\), got \(6, 64\); or delete it"):
        Poisson(data=str(tmp_path), model="dcdm_64", vectors=8, cache=str(tmp_path / "v.npy")).prepare()


def test_a_start_is_used_and_can_be_loaded(trained: Path, tmp_path: Path):
    task = Poisson(
        shape=(8, 8),
        options=WIDTH,
        lanczos_steps=9,
        vectors=4,
        weights=str(trained / "checkpoints" / "best.safetensors"),
    )
    task.prepare()
    kept = open_task(trained).network.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in task.network.state_dict().items())
    assert "loaded" in task.started_from


@pytest.mark.parametrize("recipe", ["dcdm_64", "dcdm_128"])
def test_recipes_are_as_published_and_train(recipe: str, tmp_path: Path):

    values: dict[str, Any] = {"task": "poisson", **yaml.safe_load(Poisson.recipe(recipe).read_text())}
    task, training = split_settings(Poisson, values)
    side = int(recipe.removeprefix("dcdm_"))
    assert (task.shape, task.lanczos_steps, task.vectors, task.theta) == ((side,) * 3, 10_000, 20_000, 500)
    assert (training.epochs, training.batch_size, training.lr, training.weight_decay) == (1000, 10, 1e-4, 0.0)
    assert (training.schedule, training.clip, training.optimizer) == ("constant", None, "adamw")
    words = ["--shape", "[4, 4, 4]", "--lanczos_steps=9", "--vectors=4", "--epochs=1", "--options", json.dumps(WIDTH)]
    words += ["--cache=null", "--accelerator=cpu", "--run", str(tmp_path / "run"), "--theta=1", "--max_iter=5"]
    assert main(["train", "poisson", "--recipe", recipe, *words]) == 0
    assert len(Run.open(tmp_path / "run").read_metrics()) == 1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "dncnn"}, Unsupported, "dncnn gives no search directions"),
        ({"shape": (7, 8)}, ValueError, r"shape must be even, because the network pools by 2, got \(7, 8\)"),
        ({"shape": (8, 8, 8)}, ValueError, r"shape must have 2 sizes for this network, got \(8, 8, 8\)"),
        ({"vectors": 1}, ValueError, "vectors must be at least 2, got 1"),
        ({"val_fraction": 1.0}, ValueError, "val_fraction must be between 0 and 1, got 1.0"),
        ({"tol": 0.0}, ValueError, "tol must be between 0 and 1, got 0.0"),
        ({"cache": "v.npz"}, ValueError, "cache must end in .npy, got v.npz"),
    ],
)
def test_mistakes_are_told(settings: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Poisson(**settings)


def test_data_for_another_network_are_told(tmp_path: Path):
    write_npz_system(tmp_path / "odd.npz", random_system((9, 12), 3))
    with pytest.raises(DataError, match="odd has the grid"):
        Poisson(data=str(tmp_path / "odd.npz")).fit(tmp_path / "run", Training(accelerator="cpu"))
