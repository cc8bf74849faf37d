"""What a run writes while it trains, so that it goes on exactly where it was: checkpoints and the history.

The order of the data and the random states survive a stop in the middle of an epoch, files are never half written, a
signal ends the run after the step that is under way, and a run goes on with another number of devices.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor, nn

from convatlas.errors import CheckpointError, DataError, Interrupted
from convatlas.files import atomic_path
from convatlas.training.devices import every_process
from convatlas.training.run import Run, check_same_settings, to_mapping
from convatlas.training.sampling import mixed_seed, random_states, restore_random_states, seed_everything
from convatlas.training.settings import MOVABLE, Training

if TYPE_CHECKING:
    from convatlas.training.task import GradientTask

__all__ = ["NOTHING_YET", "AtomicCheckpointIO", "Checkpoints", "History"]

_logger = logging.getLogger(__name__)

#: What a process sums up over an epoch: losses of its batches, norms of the gradients of its steps before clipping, and
#: under names that begin with ``train_`` what a method of several steps tells of its losses.
NOTHING_YET = {"loss": 0.0, "batches": 0, "gradient": 0.0, "steps": 0}


class History(Callback):
    """Keeps one row an epoch, in the checkpoint and in ``metrics.csv``."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows: list[dict[str, float]] = []
        self.started = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Add the row of the epoch."""
        sums, group = every_process(_plain(pl_module.loss_sum)), trainer.optimizers[0].param_groups[0]
        batches = max(sum(each["batches"] for each in sums), 1)
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": group["lr"] / group.get("lr_scale", 1.0),
            "train_loss": sum(each["loss"] for each in sums) / batches,
            "grad_norm": sum(each["gradient"] for each in sums) / max(sum(each["steps"] for each in sums), 1),
        }
        parts = [name for name in sums[0] if name.startswith("train_")]
        row |= {name: sum(each.get(name, 0.0) for each in sums) / batches for name in sorted(parts)}
        row |= {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        row["seconds"] = round(time.monotonic() - self.started, 3)
        self.rows.append(row)
        pl_module.loss_sum = dict(NOTHING_YET)
        if trainer.is_global_zero:
            self.run.write_metrics(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the rows of a checkpoint."""
        self.rows = list(state_dict["rows"])


def _plain(loss_sum: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in loss_sum.items()}


class Checkpoints(Checkpoint):
    """Writes ``last.ckpt`` after every epoch, now and then within one and when a signal comes; keeps the best epoch."""

    def __init__(self, task: GradientTask, run: Run, training: Training, plain: nn.Module, how: str) -> None:
        self.task, self.run, self.training = task, run, training
        self.plain, self.how = plain, how
        self.start = run.last if run.last.is_file() else None
        self.best: float | None = None
        self.improved = False
        self.saved = time.monotonic()
        self.signal: int | None = None
        self.random: dict[str, Any] | None = None
        settings = {**to_mapping(task), **to_mapping(training)}
        self.settings = {name: value for name, value in settings.items() if name not in MOVABLE}

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the run after its next step."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._catch()
        try:
            yield
        finally:
            with suppress(ValueError):
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def _catch(self) -> None:
        with suppress(ValueError):  # signals can only be caught in the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._caught)

    def _caught(self, number: int, frame: Any) -> None:
        if self.signal is not None:  # a second one does not wait for the step
            raise self._interruption(number)
        self.signal = number

    def _interruption(self, number: int) -> Interrupted:
        return Interrupted(f"stopped by {signal.Signals(number).name}; {self.how}", 128 + number)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse processes that do not see the same files."""
        if self._any(trainer, self.start is not None) and self._any(trainer, self.start is None):
            raise DataError(f"{self.run.last} must lie where the processes of all machines see it; some do not")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Put the random states back, each process its own."""
        self._catch()  # Lightning has set handlers of its own meanwhile
        if trainer.global_rank > 0:  # else the same dropout in all processes
            seed_everything(mixed_seed(self.training.seed, *pl_module.position, trainer.global_rank))
        if self.random is not None:
            restore_random_states(self.random)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write a checkpoint where one is due or a signal came."""
        # Between two optimizer steps there are gradients that a checkpoint does not hold; the last batch of an epoch is
        # followed by the checkpoint of its end.
        stepped = (batch_idx + 1) % self.training.accumulate == 0
        if not stepped or batch_idx + 1 >= trainer.num_training_batches:
            return
        due = time.monotonic() - self.saved >= 60 * self.training.checkpoint_minutes
        if self._any(trainer, due or self.signal is not None):
            self._save(trainer, pl_module, (trainer.current_epoch, batch_idx + 1))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the best epoch and write a checkpoint."""
        metric, mode = self.task.monitor
        value = float(trainer.callback_metrics[metric])
        # Of equal epochs the last is kept: it has learned longer.
        self.improved = self.best is None or (value >= self.best if mode == "max" else value <= self.best)
        self.best = value if self.improved else self.best
        self._save(trainer, pl_module, (trainer.current_epoch + 1, 0))
        self.improved = False

    def _save(self, trainer: L.Trainer, pl_module: Any, position: tuple[int, int]) -> None:
        pl_module.check_finite()
        pl_module.position = position
        trainer.save_checkpoint(self.run.last)
        self.saved = time.monotonic()
        if self._any(trainer, self.signal is not None):
            raise self._interruption(self.signal or signal.SIGTERM)

    def _any(self, trainer: L.Trainer, wanted: bool) -> bool:
        """Whether one of the processes wants it: clocks and signals differ between them, and all must do the same."""
        return bool(trainer.strategy.reduce_boolean_decision(wanted, all=False))

    def _keep_best(self, state: Mapping[str, Tensor]) -> None:
        weights = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
        current = {key: value.clone() for key, value in self.plain.state_dict().items()}
        trained, self.task.network = self.task.network, self.plain
        self.plain.load_state_dict(weights)
        try:
            self.task.save(self.run.best)
        finally:
            self.plain.load_state_dict(current)
            self.task.network = trained

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what going on exactly takes; every process takes part."""
        checkpoint["position"] = list(pl_module.position)
        checkpoint["loss_sum"] = every_process(_plain(pl_module.loss_sum))
        checkpoint["random_states"] = every_process(random_states())
        checkpoint["settings"] = self.settings
        checkpoint["portions"] = self._portions(trainer)
        checkpoint["samples"] = self._samples()
        if self.improved and trainer.is_global_zero:
            # Before the checkpoint that says so: a kill between the two repeats the epoch. Averaging, which comes
            # before this callback, has put its weights in the checkpoint.
            self._keep_best(checkpoint["state_dict"])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Check that the run is the same, and take up its position."""
        check_same_settings(self.settings, checkpoint["settings"])
        if checkpoint["samples"] != self._samples():
            raise DataError(
                f"the data have changed since the run began: there were {checkpoint['samples'][0]} training and "
                f"{checkpoint['samples'][1]} validation samples, now {self._samples()[0]} and {self._samples()[1]}"
            )
        rank, sums = trainer.global_rank, checkpoint["loss_sum"]
        if len(sums) == trainer.world_size:
            pl_module.loss_sum = {**NOTHING_YET, **sums[rank]}
        elif rank == 0:
            pl_module.loss_sum = {**NOTHING_YET, **{name: sum(each[name] for each in sums) for name in sums[0]}}
        if rank < len(sums):
            self.random = checkpoint["random_states"][rank]
        if checkpoint["portions"] != self._portions(trainer):
            self._move(trainer, pl_module, checkpoint)
        pl_module.position = tuple(checkpoint["position"])

    def _portions(self, trainer: L.Trainer) -> dict[str, int]:
        training = self.training
        portions = {"batch_size": training.batch_size, "accumulate": training.accumulate}
        return {**portions, "world_size": trainer.world_size}

    def _move(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Count what was done in batches of another size."""
        earlier, now = checkpoint["portions"], self._portions(trainer)
        sizes = [math.prod(portions.values()) for portions in (earlier, now)]
        if sizes[0] != sizes[1] and trainer.is_global_zero:
            told = "a step is for %d samples now, it was for %d: choose accumulate so that it stays the same"
            _logger.warning(told, sizes[1], sizes[0])
        epoch, batch = checkpoint["position"]
        length, seen = len(pl_module.sampler()), batch * earlier["batch_size"] * earlier["world_size"]
        # What does not fill a step is done again.
        step = min(seen // (now["batch_size"] * now["world_size"]), length - 1) // now["accumulate"]
        done = step * now["accumulate"]
        checkpoint["position"] = [epoch, done]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        if batch == 0:  # the end of the epoch before
            progress.update(ready=length, started=length, processed=length, completed=length)
        else:
            progress.update(ready=done, started=done, processed=done, completed=done - 1)
        for scheduler in checkpoint["lr_schedulers"]:
            scheduler["last_epoch"] = epoch * pl_module.steps_per_epoch() + step

    def _samples(self) -> list[int]:
        return [len(self.task.train_set), len(self.task.val_set)]  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """The best value."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best value of a checkpoint."""
        self.best = state_dict["best"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint only when the new one is whole on disk, and reads without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file, or leave the one before."""
        with atomic_path(path) as part, open(part, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                if isinstance(failed := error.__context__, OSError):  # torch covers up what the disk said
                    raise OSError(failed.errno, failed.strerror, str(path)) from None
                raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file.

        Raises:
            CheckpointError: it cannot be read, or is of something else.
        """
        try:
            checkpoint: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            what = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(f"{Path(path)} cannot be read: {what}") from None
        if "random_states" not in checkpoint:
            raise CheckpointError(f"{Path(path)} is not the checkpoint of a run")
        return dict(checkpoint)
