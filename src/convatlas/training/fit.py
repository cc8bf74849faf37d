"""Training a `GradientTask` with Lightning so that a stopped run goes on exactly where it was.

Lightning keeps the loop, precision, accumulation, clipping, averaging and devices. Added here is what it does not do:
the order of the data and the random states survive a stop in the middle of an epoch, files are never half written, and
a signal ends the run after the step that is under way.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, EMAWeightAveraging, RichProgressBar
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from convatlas.errors import CheckpointError, DataError, Interrupted
from convatlas.files import atomic_path
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.run import Run, check_same_settings, to_mapping
from convatlas.training.sampling import EpochSampler, random_states, restore_random_states
from convatlas.training.settings import Training
from convatlas.weights import load_weights

if TYPE_CHECKING:
    from convatlas.training.task import GradientTask

__all__ = ["fit"]

_PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def fit(task: GradientTask, run: Run, training: Training) -> None:
    """Train ``task.network``, going on from the run's last checkpoint if there is one; leaves the best weights in it.

    Raises:
        Interrupted: a signal stopped the run after its state was saved.
        CheckpointError: the last checkpoint cannot be read.
        DataError: the data are not those that the last checkpoint was trained on.
        SettingsError: the settings are not those that the last checkpoint was trained with.
        ValueError: this machine lacks what the settings ask for, or the loss is not finite any more.
        OSError: a file cannot be written; the run's earlier checkpoint is whole.
    """
    metric, mode = task.monitor
    checkpoints = _Checkpoints(task, run, training)
    callbacks: list[Callback] = [_History(run), checkpoints]
    if training.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=training.ema))
    if training.patience is not None:
        callbacks.append(_EarlyStopping(metric, mode=mode, patience=training.patience))
    if os.environ.get("CONVATLAS_PROGRESS", "1") != "0":
        callbacks.append(RichProgressBar(leave=True, console_kwargs={"stderr": True}))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Lightning warns of things that are decided here: few workers, one device of several, no resumable loader.
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(lightning|torch)\..*")
        trainer = _trainer(training, callbacks, run)
        with checkpoints.catching_signals():
            trainer.fit(_Module(task, training), ckpt_path=run.last if run.last.is_file() else None)
    if trainer.is_global_zero:
        load_weights(task.network, run.best)
        task.network.eval()


def _trainer(training: Training, callbacks: list[Callback], run: Run) -> L.Trainer:
    precision = _PRECISIONS[training.precision]
    try:
        trainer = L.Trainer(
            max_epochs=training.epochs,
            accelerator=training.accelerator,
            devices=training.devices,
            precision=precision,
            accumulate_grad_batches=training.accumulate,
            gradient_clip_val=training.clip,
            callbacks=callbacks,
            plugins=[_AtomicCheckpointIO()],
            default_root_dir=run.folder,
            logger=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=any(isinstance(callback, RichProgressBar) for callback in callbacks),
        )
    except MisconfigurationException as error:
        asked = f"accelerator {training.accelerator} and devices {training.devices}"
        raise ValueError(f"{asked} cannot be had on this machine: {error}") from None
    if trainer.precision != precision:  # Lightning takes another one
        raise ValueError(f"precision must be 32 or bf16 on this machine, got {training.precision}")
    return trainer


class _Shared:
    """Holds the task; averaging copies the module, and the data need no copy."""

    def __init__(self, task: GradientTask) -> None:
        self.task = task

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class _Module(L.LightningModule):
    """The task as Lightning sees it."""

    def __init__(self, task: GradientTask, training: Training) -> None:
        super().__init__()
        self.shared = _Shared(task)
        self.training_settings = training
        self.network = task.network
        self.val_metrics: Any = task.metrics()
        self.loss_sum: dict[str, Any] = {"loss": 0.0, "batches": 0}
        self.position = (0, 0)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        try:
            losses = self.shared.task.losses(batch)
        except ValueError as error:
            if self.training_settings.batch_size == 1 and "more than 1 value per channel" in str(error):
                raise ValueError("batch_size must be at least 2: this network normalises over batches, got 1") from None
            raise
        if not losses:
            return None
        self.loss_sum["loss"] += losses["loss"].detach().double()  # stays on the device: no wait for it every step
        self.loss_sum["batches"] += 1
        self.log("loss", losses["loss"], prog_bar=True, logger=False)
        return losses["loss"]

    def check_finite(self) -> None:
        """Stop before weights that are lost are saved."""
        if not math.isfinite(self.loss_sum["loss"]):
            raise ValueError(
                f"the loss is no finite number in epoch {self.current_epoch + 1}: lower lr "
                f"({self.training_settings.lr:g}), warm up longer or set clip"
            )

    def on_validation_epoch_start(self) -> None:
        self.check_finite()
        self.val_metrics.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.shared.task.score(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        measured = self.val_metrics.compute()
        self.log_dict(measured)
        metric = self.shared.task.monitor[0]
        self.log(metric.removeprefix("val_"), measured[metric], prog_bar=True)  # one, and short: a line has 80 columns

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.network, self.training_settings)
        steps = -(-len(self._sampler()) // self.training_settings.accumulate)

        def factor(step: int) -> float:
            return learning_rate(self.training_settings, step, steps) / self.training_settings.lr

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = self._sampler()
        sampler.start_at(*self.position)
        return self._loader(self.shared.task.train_set, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.shared.task.val_set, batch_size=self.training_settings.batch_size)

    def _sampler(self) -> EpochSampler:
        return EpochSampler(
            len(self.shared.task.train_set),  # type: ignore[arg-type]
            self.training_settings.batch_size,
            self.training_settings.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            repeats=self.training_settings.repeated_augmentation,
        )

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        # A generator of its own: a loader that draws from the global one would shift dropout when a run goes on.
        return DataLoader(
            dataset,
            num_workers=self.training_settings.workers,
            collate_fn=self.shared.task.collate,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator().manual_seed(self.training_settings.seed),
            persistent_workers=self.training_settings.workers > 0,
            **options,
        )


def _ignore_signals(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; a worker that it ends could not give what a step still waits for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _EarlyStopping(EarlyStopping):
    """Does not go on when a run that it has ended is resumed."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience


class _History(Callback):
    """Keeps one row an epoch, in the checkpoint and in ``metrics.csv``."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows: list[dict[str, float]] = []
        self.started = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        sums, group = pl_module.loss_sum, trainer.optimizers[0].param_groups[0]
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": group["lr"] / group["lr_scale"],
            "train_loss": float(sums["loss"]) / max(sums["batches"], 1),
        }
        row |= {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        row["seconds"] = round(time.monotonic() - self.started, 3)
        self.rows.append(row)
        pl_module.loss_sum = {"loss": 0.0, "batches": 0}
        if trainer.is_global_zero:
            self.run.write_metrics(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


class _Checkpoints(Checkpoint):
    """Writes ``last.ckpt`` after every epoch, now and then within one and when a signal comes; keeps the best epoch."""

    def __init__(self, task: GradientTask, run: Run, training: Training) -> None:
        self.task, self.run, self.training = task, run, training
        self.best: float | None = None
        self.improved = False
        self.saved = time.monotonic()
        self.signal: int | None = None
        self.random: dict[str, Any] | None = None
        self.settings = {**to_mapping(task), **to_mapping(training)}

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
        how = f"go on with 'convatlas train {self.task.name} --resume {self.run.folder}'"
        return Interrupted(f"stopped by {signal.Signals(number).name}; {how}", 128 + number)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._catch()  # Lightning has set handlers of its own meanwhile
        if self.random is not None:
            restore_random_states(self.random)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Between two optimizer steps there are gradients that a checkpoint does not hold; the last batch of an epoch is
        # followed by the checkpoint of its end.
        stepped = (batch_idx + 1) % self.training.accumulate == 0
        if not stepped or batch_idx + 1 >= trainer.num_training_batches:
            return
        due = time.monotonic() - self.saved >= 60 * self.training.checkpoint_minutes
        if self._any(trainer, due or self.signal is not None):
            self._save(trainer, pl_module, (trainer.current_epoch, batch_idx + 1))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
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
        current = {key: value.clone() for key, value in self.task.network.state_dict().items()}
        self.task.network.load_state_dict(weights)
        try:
            self.task.save(self.run.best)
        finally:
            self.task.network.load_state_dict(current)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["position"] = list(pl_module.position)
        checkpoint["loss_sum"] = {name: float(value) for name, value in pl_module.loss_sum.items()}
        checkpoint["random_states"] = random_states()
        checkpoint["settings"] = self.settings
        checkpoint["samples"] = self._samples()
        if self.improved and trainer.is_global_zero:
            # Before the checkpoint that says so: a kill between the two repeats the epoch. Averaging, which comes
            # before this callback, has put its weights in the checkpoint.
            self._keep_best(checkpoint["state_dict"])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        check_same_settings(self.settings, checkpoint["settings"])
        if checkpoint["samples"] != self._samples():
            raise DataError(
                f"the data have changed since the run began: there were {checkpoint['samples'][0]} training and "
                f"{checkpoint['samples'][1]} validation samples, now {self._samples()[0]} and {self._samples()[1]}"
            )
        pl_module.position = tuple(checkpoint["position"])
        pl_module.loss_sum = dict(checkpoint["loss_sum"])
        self.random = checkpoint["random_states"]

    def _samples(self) -> list[int]:
        return [len(self.task.train_set), len(self.task.val_set)]  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


class _AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint only when the new one is whole on disk, and reads without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_path(path) as part, open(part, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                if isinstance(failed := error.__context__, OSError):  # torch covers up what the disk said
                    raise OSError(failed.errno, failed.strerror, str(path)) from None
                raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            checkpoint: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            what = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(f"{Path(path)} cannot be read: {what}") from None
        if "random_states" not in checkpoint:
            raise CheckpointError(f"{Path(path)} is not the checkpoint of a run")
        return dict(checkpoint)
