"""A run that is stopped, however and wherever, goes on to the same files as one that was never stopped."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cli.stopping import BATCH, BEST, CHECKPOINT, METRICS, REPORT, VALIDATION, Server, Stop
from recognition.pictures import TINY, arrays

pytestmark = pytest.mark.slow

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
OPTIONS = {**TINY, "drop_path": 0.2, "dropout": 0.2}
# Everything that draws random numbers or keeps a state; a checkpoint after every step.
SETTINGS: dict[str, Any] = {
    "options": json.dumps(OPTIONS),
    "augment.degrees": 10,
    "augment.random_erasing": 0.3,
    "augment.rand_augment": "rand-m5-inc1",
    "label_smoothing": 0.1,
    "mixup": 0.4,
    "cutmix": 1.0,
    "ema": 0.9,
    "accumulate": 2,
    "workers": 2,
    "epochs": 3,
    "batch_size": 4,
    "lr": 0.01,
    "clip": 1.0,
    "patience": 3,
    "checkpoint_minutes": 0,
}
BATCHES = 11  # of an epoch


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "photos.npz"
    images, labels = arrays(60)
    np.savez(path, images=images, labels=labels)
    return path


def words(data: Path, run: Path, **changes: Any) -> list[str]:
    settings = {"data": data, **SETTINGS, "run": run, **changes}
    return ["train", "recognition", *(f"--{name}={value}" for name, value in settings.items())]


@pytest.fixture(scope="module")
def whole(server: Server, data: Path) -> Path:
    """A run that was never stopped."""
    run = server.folder / "whole"
    ended = server(*words(data, run))
    assert ended.code == 0, ended.err
    return run


def contents(run: Path) -> dict[str, Any]:
    """What a stop must not change: every weight, the state that training goes on from, the history, the predictions."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    with (run / "metrics.csv").open() as file:
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    return {
        "averaged": checkpoint["state_dict"],
        "current": checkpoint["current_model_state"],
        "optimizer": checkpoint["optimizer_states"][0]["state"],
        "random": checkpoint["random_states"],
        "best": load_file(run / "checkpoints" / "best.safetensors"),
        "metrics": rows,
        "predictions": (run / "predictions.csv").read_text(),
    }


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two trees differ; tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        keys = [] if one.keys() == other.keys() else [f"{name}: keys"]
        return keys + [
            line for key in one.keys() & other.keys() for line in differences(one[key], other[key], f"{name}.{key}")
        ]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{name}.{index}")]
    else:
        same = one == other
    return [] if same else [name]


def assert_same(run: Path, whole: Path) -> None:
    assert differences(contents(run), contents(whole)) == []
    assert (run / "report.html").stat().st_size > 0
    assert not list(run.rglob("*.part"))


def test_a_run_that_is_stopped_again_and_again_ends_as_one_that_never_was(server: Server, data: Path, whole: Path):
    run = server.folder / "stopped"
    stops = [
        Stop(BATCH, 5),
        Stop(BATCH, 4, (TERM,)),
        Stop(CHECKPOINT, 1, half=True),
        Stop(BEST, 1, after=True),  # best.safetensors is ahead of last.ckpt
        Stop(METRICS, 1, after=True),  # and so is metrics.csv
        Stop(VALIDATION, 1, (INT,)),
        Stop(BATCH, 3, (INT,)),
        Stop(CHECKPOINT, 2, half=True),
        Stop(VALIDATION, 1),
        Stop(BATCH, 3, (TERM,)),
        Stop(REPORT, 1),
    ]
    positions = [[0, 4], [0, 8], [0, 8], [0, 10], [0, 10], [1, 0], [1, 4], [1, 6], [1, 10], [2, 2], [3, 0]]
    ends = []
    for number, (stop, position) in enumerate(zip(stops, positions, strict=True)):
        command = words(data, run) if number == 0 else ["train", "recognition", "--resume", str(run)]
        ended = server(*command, stop=stop)
        ends.append(ended.code)
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["position"] == position, number
        if stop.signals != (KILL,):
            name = signal.Signals(stop.signals[0]).name
            how = f"stopped by {name}; go on with 'convatlas train recognition --resume {run}'"
            assert ended.err == f"convatlas train: error: {how}\n"
            assert ended.out == ""
    expected = {KILL: -KILL, TERM: 128 + TERM, INT: 128 + INT}
    assert ends == [expected[stop.signals[0]] for stop in stops]
    ended = server("train", "recognition", "--resume", run)
    assert ended.code == 0, ended.err
    assert_same(run, whole)


def test_a_stop_before_the_first_checkpoint_starts_over(server: Server, data: Path, whole: Path):
    run = server.folder / "early"
    assert server(*words(data, run), stop=Stop(BATCH, 1)).code == -KILL
    assert not (run / "checkpoints" / "last.ckpt").exists()
    assert server("train", "recognition", "--resume", run, stop=Stop(CHECKPOINT, 1, half=True)).code == -KILL
    assert not (run / "checkpoints" / "last.ckpt").exists()
    assert list((run / "checkpoints").glob(".*.part"))
    assert server("train", "recognition", "--resume", run).code == 0
    assert_same(run, whole)


def test_a_second_signal_does_not_wait(server: Server, data: Path, whole: Path):
    run = server.folder / "twice"
    ended = server(*words(data, run), stop=Stop(BATCH, BATCHES + 3, (INT, INT)))
    assert ended.code == 130
    assert ended.err.startswith("convatlas train: error: stopped by SIGINT; go on with ")
    position = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["position"]
    assert position == [1, 2]  # that of the step before; the one under way is lost
    assert server("train", "recognition", "--resume", run).code == 0
    assert_same(run, whole)


@pytest.mark.parametrize("number", [INT, TERM])
def test_workers_that_get_the_signal_too_still_give_the_batches_of_the_step(server: Server, data: Path, number: int):
    run = server.folder / f"workers{number}"
    ended = server(*words(data, run, accumulate=9, workers=1), stop=Stop(BATCH, 2, (number,)))
    assert ended.code == 128 + number
    assert ended.err.startswith(f"convatlas train: error: stopped by {signal.Signals(number).name}; go on with ")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["position"] == [0, 9]


def test_a_signal_while_the_report_is_made_is_told_and_made_up_for(server: Server, data: Path, whole: Path):
    run = server.folder / "report"
    ended = server(*words(data, run), stop=Stop(REPORT, 1, (INT,)))
    assert ended.code == 130
    assert ended.err == f"convatlas train: error: stopped; go on with 'convatlas train recognition --resume {run}'\n"
    assert not (run / "report.html").exists()
    assert server("train", "recognition", "--resume", run).code == 0
    assert_same(run, whole)


def test_resuming_a_finished_run_only_reports_again(server: Server, whole: Path):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and "report" not in path.name}
    ended = server("train", "recognition", "--resume", whole, "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["title"] == "Recognition with inceptionnext_atto"
    after = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and "report" not in path.name}
    assert after == before


def test_the_configuration_of_a_run_runs_it_again(server: Server, whole: Path):
    run = server.folder / "again"
    assert server("train", "recognition", "--config", whole / "config.yaml", "--run", run).code == 0
    assert_same(run, whole)


def test_an_interrupted_comparison_goes_on(server: Server, data: Path):
    folder = server.folder / "comparison"
    models = json.dumps({name: {"model": "inceptionnext_atto", "options": OPTIONS} for name in ("a", "b")})
    settings = {**SETTINGS, "epochs": 1, "workers": 0}
    del settings["options"]
    command = ["compare", "recognition", f"--models={models}", f"--data={data}", f"--out={folder}"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    ended = server(*command, stop=Stop(BATCH, BATCHES + 3, (TERM,)))
    assert ended.code == 143
    how = f"stopped; go on with the same command and --out {folder} --resume"
    assert ended.err == f"convatlas compare: error: {how}\n"
    ended = server(*command)
    assert ended.code == 1
    assert "already exists: choose another folder, or go on with it by --resume" in ended.err
    finished = (folder / "a" / "checkpoints" / "last.ckpt").read_bytes()
    assert server(*command, "--resume").code == 0
    assert (folder / "a" / "checkpoints" / "last.ckpt").read_bytes() == finished
    assert (folder / "report.html").is_file()
    # Both are the same network under the same seed, and one of them was stopped.
    weights = [load_file(folder / name / "checkpoints" / "best.safetensors") for name in ("a", "b")]
    assert differences(*weights) == []


def test_ctrl_c_in_a_terminal_stops_the_command_itself(tmp_path: Path, data: Path):
    """The installed command, with its start and its workers, as a user has it."""
    run, out = tmp_path / "run", tmp_path / "err"
    command = [sys.executable, "-m", "convatlas.cli.main", *words(data, run, epochs=400, workers=1)]
    with out.open("w") as err:
        environment = {**os.environ, "CONVATLAS_PROGRESS": "0"}
        process = subprocess.Popen(command, stderr=err, stdout=err, start_new_session=True, env=environment)
        started = time.monotonic()
        while not (run / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, out.read_text()
            assert time.monotonic() - started < 120
            time.sleep(0.05)
        os.killpg(process.pid, INT)
        assert process.wait(60) == 130
    how = f"stopped by SIGINT; go on with 'convatlas train recognition --resume {run}'"
    assert out.read_text() == f"convatlas train: error: {how}\n"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["position"] > [0, 1]


def test_two_devices_share_the_work_of_one_run(tmp_path: Path, data: Path):
    """Lightning starts the command once more for the second device; both must use the folder that the first chose."""
    given = [word for word in words(data, tmp_path, epochs=2, workers=0) if not word.startswith("--run=")]
    command = [sys.executable, "-m", "convatlas.cli.main", *given, "--devices=2", "--accelerator=cpu", "--json"]
    environment = {**os.environ, "CONVATLAS_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["title"] == "Recognition with inceptionnext_atto"
    (run,) = (tmp_path / "runs").iterdir()
    with (run / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [3, 6]  # 43 images, 22 for each device: 6 batches, of which 2 make a step
    assert load_file(run / "checkpoints" / "best.safetensors")
