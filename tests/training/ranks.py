"""Runs a function in several processes that train together, started as torchrun starts them but without its imports."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
# Importing Lightning takes seconds: one server process does it, and is forked for every process.
_CONTEXT.set_forkserver_preload(["convatlas.training.fit", "training.toy"])


class Ended:
    """How one process ended: exit code (negative for a signal) and what it wrote, an error's traceback included."""

    def __init__(self, code: int, text: str) -> None:
        self.code, self.text = code, text


def run(world_size: int, target: Callable[..., None], *args: Any, folder: Path, **options: Any) -> list[Ended]:
    """Call ``target(rank, *args, **options)`` in ``world_size`` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
    processes = []
    for rank in range(world_size):
        variables = {
            **{"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0},
            **{"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"},
            **{"CONVATLAS_PROGRESS": 0, "OMP_NUM_THREADS": 1},
        }
        arguments = (rank, variables, str(folder / f"out{rank}"), target, args, options)
        processes.append(_CONTEXT.Process(target=_start, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    texts = [(folder / f"out{rank}").read_text() for rank in range(world_size)]
    return [Ended(process.exitcode or 0, text) for process, text in zip(processes, texts, strict=True)]


def _start(
    rank: int,
    variables: dict[str, Any],
    out: str,
    target: Callable[..., None],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    import torch

    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    with open(out, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(io.StringIO()):
        try:
            target(rank, *args, **options)
        except SystemExit:
            raise
        except BaseException as error:
            file.write(f"{traceback.format_exc()}{type(error).__name__}: {error}")
            file.flush()
            os._exit(1)


def fit(
    rank: int,
    run: Path,
    training: dict[str, Any],
    toy: dict[str, Any] | None = None,
    *,
    changes: dict[int, dict[str, Any]] | None = None,
    resume: bool = False,
) -> None:
    """Train a `Toy` in one of the processes, with attributes that differ by rank."""
    from convatlas.training.settings import Training
    from training.toy import Toy

    task = Toy(**(toy or {}))
    for name, value in (changes or {}).get(rank, {}).items():
        setattr(task, name, value)
    task.fit(run, Training(**training), resume=resume)
