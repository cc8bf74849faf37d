"""Training a `GradientTask` with Lightning so that a stopped run goes on exactly where it was.

Lightning keeps the loop, precision, accumulation, clipping, averaging and devices. Added here is what it does not do:
the order of the data and the random states survive a stop in the middle of an epoch, files are never half written, and
a signal ends the run after the step that is under way.
"""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, EMAWeightAveraging, RichProgressBar
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from convatlas.errors import CheckpointError, Interrupted
from convatlas.files import atomic_path
from convatlas.training.optim import learning_rate, make_optimizer
from convatlas.training.run import Run
from convatlas.training.sampling import EpochSampler, random_states, restore_random_states
from convatlas.training.settings import Training
from convatlas.training.task import GradientTask
from convatlas.weights import load_weights

__all__ = ["fit"]

_PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def fit(task: GradientTask, run: Run, training: Training) -> None:
    """Train ``task.network``, going on from the run's last checkpoint if there is one, and leave the best weights in it.

    Raises:
        Interrupted: a signal stopped the run after its state was saved.
        CheckpointError: the last checkpoint cannot be read.
        OSError: a file cannot be written; the run's earlier checkpoint is whole.
    """
    metric, mode = task.monitor
    callbacks: list[Callback] = [_History(run), _Checkpoints(task, run, training)]
    if training.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=training.ema))
    if training.patience is not None:
        callbacks.append(EarlyStopping(metric, mode=mode, patience=training.patience))
    if training.epochs > 0 and os.environ.get("CONVATLAS_PROGRESS", "1") != "0":
        callbacks.append(RichProgressBar(leave=True, console_kwargs={"stderr": True}))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Lightning warns of things that are decided here: few workers, one device of several, no resumable loader.
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(lightning|torch)\..*")
        trainer = L.Trainer(
            max_epochs=training.epochs,
            accelerator=training.accelerator,
            devices=training.devices,
            precision=_PRECISIONS[training.precision],
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
        trainer.fit(_Module(task, training), ckpt_path=run.last if run.last.is_file() else None)
    load_weights(task.network, run.best)
    task.network.eval()


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
        losses = self.shared.task.losses(batch)
        if not losses:
            return None
        self.loss_sum["loss"] += losses["loss"].detach().double()  # stays on the device: no wait for it every step
        self.loss_sum["batches"] += 1
        self.log("loss", losses["loss"], prog_bar=True, logger=False)
        return losses["loss"]

    def on_validation_epoch_start(self) -> None:
        self.val_metrics.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.shared.task.score(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics.compute(), prog_bar=True)

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
        )

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        # A generator of its own: a loader that draws from the global one would shift dropout when a run goes on.
        return DataLoader(
            dataset,
            num_workers=self.training_settings.workers,
            collate_fn=self.shared.task.collate,
            generator=torch.Generator().manual_seed(self.training_settings.seed),
            persistent_workers=self.training_settings.workers > 0,
            **options,
        )


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
    """Writes ``last.ckpt`` at the end of every epoch, now and then within one and when a signal comes; keeps the best."""

    def __init__(self, task: GradientTask, run: Run, training: Training) -> None:
        self.task, self.run, self.training = task, run, training
        self.best: float | None = None
        self.saved = time.monotonic()
        self.signal: int | None = None
        self.random: dict[str, Any] | None = None
        self.previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.random is not None:
            restore_random_states(self.random)
        with suppress(ValueError):  # signals can only be caught in the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._caught)

    def _caught(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait for the step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Between two optimizer steps there are gradients that a checkpoint does not hold; the last batch of an epoch is
        # followed by the checkpoint of its end.
        stepped = (batch_idx + 1) % self.training.accumulate == 0
        if not stepped or batch_idx + 1 >= trainer.num_training_batches:
            return
        due = time.monotonic() - self.saved >= 60 * self.training.checkpoint_minutes
        if due or self.signal is not None:
            self._save(trainer, pl_module, (trainer.current_epoch, batch_idx + 1))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        metric, mode = self.task.monitor
        value = float(trainer.callback_metrics[metric])
        # Of equal epochs the last is kept: it has learned longer.
        if improved := self.best is None or (value >= self.best if mode == "max" else value <= self.best):
            self.best = value
        self._save(trainer, pl_module, (trainer.current_epoch + 1, 0), best=improved)

    def _save(
        self, trainer: L.Trainer, pl_module: Any, position: tuple[int, int], *, best: bool = False
    ) -> None:
        pl_module.position = position
        trainer.save_checkpoint(self.run.last)
        self.saved = time.monotonic()
        if best and trainer.is_global_zero:
            self._keep_best()
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            raise Interrupted(f"stopped by {name}; go on with --resume {self.run.folder}", 128 + self.signal)

    def _keep_best(self) -> None:
        # Read back from the checkpoint, where Lightning has put the averaged weights if there are any.
        state = torch.load(self.run.last, map_location="cpu", weights_only=True)["state_dict"]
        weights = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
        current = {key: value.clone() for key, value in self.task.network.state_dict().items()}
        self.task.network.load_state_dict(weights)
        try:
            self.task.save(self.run.best)
        finally:
            self.task.network.load_state_dict(current)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._release()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._release()

    def _release(self) -> None:
        while self.previous:
            signal.signal(*self.previous.popitem())

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["position"] = list(pl_module.position)
        checkpoint["loss_sum"] = dict(pl_module.loss_sum)
        checkpoint["random_states"] = random_states()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        pl_module.position = tuple(checkpoint["position"])
        pl_module.loss_sum = dict(checkpoint["loss_sum"])
        self.random = checkpoint["random_states"]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


class _AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint only when the new one is whole on disk, and reads without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_path(path) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            checkpoint: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{Path(path)} cannot be read: {str(error).splitlines()[0]}") from None
        return dict(checkpoint)
