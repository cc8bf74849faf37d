"""Runs commands of convatlas, each in a process of its own that stops itself at a chosen place.

Importing Lightning takes seconds, so one server process does it once and forks for every command. Started as a script,
this file is that server: it reads an order a line and answers with the exit code a line.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self


@dataclass(frozen=True)
class Stop:
    """Signals that a process and its workers get at the ``at``-th call of a function.

    Attributes:
        target: ``module:name.name`` of the function.
        at: which call, from 1.
        signals: sent one after the other, before the call or after it.
        half: write half of a file first; for ``torch:save``.
    """

    target: str
    at: int = 1
    signals: tuple[int, ...] = (signal.SIGKILL,)
    after: bool = False
    half: bool = False


BATCH = "convatlas.recognition.task:Recognition.losses"
VALIDATION = "convatlas.recognition.task:Recognition.score"
BEST = "convatlas.recognition.task:Recognition.save"
METRICS = "convatlas.training.run:Run.write_metrics"
CHECKPOINT = "torch:save"
REPORT = "convatlas.recognition.reports:training_report"


class Ended(NamedTuple):
    """How a command ended: its exit code (negative for a signal) and what it wrote."""

    code: int
    out: str
    err: str


class Server:
    """The server process, seen from a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = [str(Path(importlib.import_module("convatlas").__file__ or "").parents[1])]
        environment = {**os.environ, "CONVATLAS_PROGRESS": "0", "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def __call__(self, *words: object, stop: Stop | None = None) -> Ended:
        """Run a command to its end."""
        order = {"words": [str(word) for word in words], "stop": stop and asdict(stop), "folder": str(self.folder)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return Ended(code, (self.folder / "out").read_text(), (self.folder / "err").read_text())


def _serve() -> None:
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and every child inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    for module in ("convatlas.training.fit", "convatlas.recognition.reports", "sklearn.metrics", "matplotlib"):
        importlib.import_module(module)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(order)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _run(order: dict[str, Any]) -> NoReturn:
    os.setsid()  # a group of its own, as a terminal would make it
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{order['folder']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if order["stop"]:
        _install(Stop(**order["stop"]))
    from convatlas.cli.main import main

    code = 99
    try:
        code = main(order["words"])
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _install(stop: Stop) -> None:
    module, _, path = stop.target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original: Callable[..., Any] = getattr(owner, name)
    calls: list[int] = []

    def stopping(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) != stop.at:
            return original(*args, **options)
        if stop.half:
            content = io.BytesIO()
            original(args[0], content)
            args[1].write(content.getvalue()[: len(content.getvalue()) // 2])
            args[1].flush()
        result = original(*args, **options) if stop.after else None
        _send(stop.signals)
        return result if stop.after else original(*args, **options)

    setattr(owner, name, stopping)


def _send(signals: Sequence[int]) -> None:
    for number in signals:
        os.killpg(0, number)


if __name__ == "__main__":
    _serve()
