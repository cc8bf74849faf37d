"""Commands for several devices, as a user types them: started by Lightning or by torchrun, killed and gone on with."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import convatlas
from cli.conftest import Run
from convatlas.networks.registry import create_model
from recognition.pictures import TINY, arrays

pytestmark = pytest.mark.slow

SOURCE = str(Path(convatlas.__file__).parents[1])
ENVIRONMENT = {**os.environ, "CONVATLAS_PROGRESS": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": SOURCE}
COMMAND = ["convatlas.cli.main", "train", "recognition"]


def settings(tmp_path: Path) -> list[str]:
    images, labels = arrays(60)
    np.savez(tmp_path / "photos.npz", images=images, labels=labels)
    values = {
        **{"data": tmp_path / "photos.npz", "run": tmp_path / "run", "options": json.dumps(TINY)},
        **{"epochs": 2, "batch_size": 4, "checkpoint_minutes": 0, "accelerator": "cpu"},
    }
    return [f"--{name}={value}" for name, value in values.items()]


def steps(run: Path) -> list[int]:
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def helper_of(parent: int) -> int | None:
    """The process that a command has started for its second device."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words, status = (entry / "cmdline").read_bytes(), (entry / "stat").read_text()
            except OSError:  # it has ended meanwhile
                continue
            if b"convatlas.cli.main" in words and int(status.rpartition(")")[2].split()[1]) == parent:
                return int(entry.name)
    return None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_killed_process_ends_the_command_and_the_run_goes_on_with_one_device(run: Run, tmp_path: Path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", *COMMAND, *settings(tmp_path), "--devices=2", "--strategy=fsdp", "--epochs=500"]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, stdout=err, stderr=err, env=ENVIRONMENT)
        until = time.monotonic() + 200
        while not (folder / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, (tmp_path / "err").read_text()
            assert time.monotonic() < until
            time.sleep(0.1)
        os.kill(helper_of(process.pid) or 0, signal.SIGKILL)
        assert process.wait(60) == 1
    how = f"go on with 'convatlas train recognition --resume {folder}'"
    told = f"convatlas train: error: process 1 of the run was ended by SIGKILL; {how}\n"
    assert (tmp_path / "err").read_text() == told
    position = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["position"]
    assert position > [0, 0]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["devices"], config["strategy"]) == (2, "fsdp")
    shorter = {**config, "epochs": position[0] + 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(shorter))
    kept = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    kept["settings"]["epochs"] = position[0] + 1
    torch.save(kept, folder / "checkpoints" / "last.ckpt")
    ended = run("train", "recognition", "--resume", folder, "--devices", 1, "--strategy=auto", "--accumulate=2")
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert len(steps(folder)) == position[0] + 1
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["devices"], config["strategy"], config["accumulate"]) == (1, "auto", 2)
    plain = create_model("inceptionnext_atto", **TINY, num_classes=3).state_dict()
    best = load_file(folder / "checkpoints" / "best.safetensors")
    assert {key: value.shape for key, value in best.items()} == {key: value.shape for key, value in plain.items()}


def test_machines_train_together_under_torchrun(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*settings(tmp_path), "--epochs=1", "--nodes=2", "--json"]
    processes = []
    for node in range(2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        meeting = [f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        command = [*torchrun, *meeting, "-m", "--", *COMMAND, *words]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        )
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert json.loads(outputs[0][0])["title"] == "Recognition with inceptionnext_atto"
    assert outputs[1][0] == ""
    assert steps(tmp_path / "run") == [6]  # 43 images, 22 for each machine
