"""Training a `GradientTask` with Lightning so that a stopped run goes on exactly where it was.

Lightning keeps the loop, precision, accumulation, clipping, averaging and devices. Added here is what it does not do:
the order of the data and the random states survive a stop in the middle of an epoch, files are never half written, a
signal ends the run after the step that is under way, and a run goes on with another number of devices.
"""

from __future__ import annotations

import copy
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
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from convatlas.errors import CheckpointError, DataError, Interrupted, Unsupported
from convatlas.files import atomic_path
from convatlas.training.devices import (
    FullyShardedStrategy,
    ShardedAveraging,
    broadcast_buffers,
    check_all_used,
    every_process,
    fully_sharded,
    reshard,
    together,
)
from convatlas.training.method import Together
from convatlas.training.optim import learning_rate, make_optimizer, parameter_groups
from convatlas.training.run import Run, check_same_settings, to_mapping
from convatlas.training.sampling import (
    EpochSampler,
    ShareSampler,
    mixed_seed,
    random_states,
    restore_random_states,
    seed_everything,
)
from convatlas.training.settings import MOVABLE, Training
from convatlas.weights import load_weights

if TYPE_CHECKING:
    from convatlas.training.task import GradientTask

__all__ = ["fit"]

_logger = logging.getLogger(__name__)

_PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def fit(task: GradientTask, run: Run, training: Training, method: Together) -> None:
    """Train ``task.network``, going on from the run's last checkpoint if there is one; leaves the best weights in it.

    Raises:
        Interrupted: a signal stopped the run after its state was saved, or another of its processes has died.
        CheckpointError: the last checkpoint cannot be read.
        DataError: the data are not those that the last checkpoint was trained on, or a machine does not see the run.
        SettingsError: the settings are not those that the last checkpoint was trained with.
        ValueError: this machine lacks what the settings ask for, or the loss is not finite any more.
        OSError: a file cannot be written; the run's earlier checkpoint is whole.
    """
    metric, mode = task.monitor
    plain, how = task.network, f"go on with 'convatlas train {task.name} --resume {run.folder}'"
    checkpoints = _Checkpoints(task, run, training, plain, how)
    callbacks: list[Callback] = [_History(run), checkpoints]
    if training.ema is not None:
        averaging = ShardedAveraging if training.strategy == "fsdp" else EMAWeightAveraging
        callbacks.append(averaging(decay=training.ema))
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
        trainer = _trainer(task, training, method, callbacks, run)
        try:
            if training.strategy == "fsdp":  # what is shared out cannot be made whole in place
                task.network = copy.deepcopy(plain)
                module: _Module = _ShardedModule(task, training, method)
            else:
                module = _Module(task, training, method)
            with checkpoints.catching_signals(), together(trainer, how):
                trainer.fit(module, ckpt_path=checkpoints.start)
        finally:
            task.network = plain
    if trainer.is_global_zero:
        load_weights(task.network, run.best)
        task.network.eval()


def _trainer(
    task: GradientTask, training: Training, method: Together, callbacks: list[Callback], run: Run
) -> L.Trainer:
    precision = _PRECISIONS[training.precision]
    several = training.devices != 1 or training.nodes > 1
    strategy: Any = FullyShardedStrategy() if training.strategy == "fsdp" else training.strategy
    skips = task.unused_parameters or method.unused_parameters or method.alternates
    if several and training.strategy != "fsdp" and skips:
        strategy = DDPStrategy(find_unused_parameters=True)
    if method.alternates:
        _check_alternating(training)
    on_gpu = training.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    try:
        trainer = L.Trainer(
            max_epochs=training.epochs,
            accelerator=training.accelerator,
            devices=training.devices,
            num_nodes=training.nodes,
            strategy=strategy,
            # Torch has it for GPUs only. Shared-out weights have it from their module.
            sync_batchnorm=several and on_gpu and training.strategy != "fsdp",
            precision=precision,
            accumulate_grad_batches=training.accumulate,
            gradient_clip_val=None if method.alternates else training.clip,
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


def _check_alternating(training: Training) -> None:
    if training.accumulate != 1:
        raise ValueError(f"accumulate must be 1 with a method of several optimizers, got {training.accumulate}")
    if training.strategy == "fsdp":
        raise Unsupported("a method of several optimizers cannot train with the strategy fsdp: take ddp")
    if training.precision == "16":
        raise ValueError("precision must be 32 or bf16 with a method of several optimizers, got 16")


class _Shared:
    """Holds what needs no copy when averaging copies the module: the task with its data, and the method."""

    def __init__(self, task: GradientTask, method: Together) -> None:
        self.task, self.method = task, method

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class _Module(L.LightningModule):
    """The task as Lightning sees it."""

    def __init__(self, task: GradientTask, training: Training, method: Together) -> None:
        super().__init__()
        self.shared = _Shared(task, method)
        self.training_settings = training
        self.network = task.network
        self.method_parts = nn.ModuleList(method.parts())
        self.automatic_optimization = not method.alternates
        self.val_metrics: Any = task.metrics()
        self.loss_sum: dict[str, Any] = {"loss": 0.0, "batches": 0}
        self.position = (0, 0)
        self.first_step = True

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        method = self.shared.method
        try:
            if method.alternates:
                loss = self._take_turns(method.turns(self.network, batch, self._plain_losses))
            else:
                loss = method.losses(self.network, batch, self._plain_losses).get("loss")
        except ValueError as error:
            if self.training_settings.batch_size == 1 and "more than 1 value per channel" in str(error):
                raise ValueError("batch_size must be at least 2: this network normalises over batches, got 1") from None
            raise
        if loss is None:
            if self.trainer.world_size > 1:  # the others wait for the gradients of this one
                raise DataError("none of the samples of a batch can be read; with several devices each needs some")
            return None
        self.loss_sum["loss"] += loss.detach().double()  # stays on the device: no wait for it every step
        self.loss_sum["batches"] += 1
        self.log("loss", loss, prog_bar=True, logger=False)
        return loss

    def _plain_losses(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        task = self.shared.task
        kept, task.network = task.network, model
        try:
            return task.losses(batch)
        finally:
            task.network = kept

    def _take_turns(self, turns: Iterator[tuple[int, dict[str, Tensor]]]) -> Tensor | None:
        optimizers: Any = self.trainer.strategy._lightning_optimizers
        total = None
        for number, losses in turns:
            if losses:
                optimizers[number].zero_grad()
                self.manual_backward(losses["loss"])
                self.clip_gradients(optimizers[number], self.training_settings.clip, "norm")
                optimizers[number].step()
                total = losses["loss"].detach() + (0 if total is None else total)
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.step()
        return total

    def on_train_start(self) -> None:
        if self.position[1]:  # the run goes on within an epoch, whose start is not told again
            self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        self.shared.method.start_epoch(self.network, self.current_epoch)

    def on_after_backward(self) -> None:
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel) and self.first_step and not wrapped.find_unused_parameters:
            check_all_used(self.network)
        self.first_step = False

    def check_finite(self) -> None:
        """Stop, all processes together, before weights that are lost are saved."""
        lost = not math.isfinite(self.loss_sum["loss"])
        if self.trainer.strategy.reduce_boolean_decision(lost, all=False):
            raise ValueError(
                f"the loss is no finite number in epoch {self.current_epoch + 1}: lower lr "
                f"({self.training_settings.lr:g}), warm up longer or set clip"
            )

    def on_validation_epoch_start(self) -> None:
        self.check_finite()
        self.val_metrics.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        task = self.shared.task
        counts = batch_idx < self._val_sampler().own
        task.score(batch, self.val_metrics if counts else task.metrics().to(self.device))

    def on_validation_epoch_end(self) -> None:
        measured = self.val_metrics.compute()
        self.log_dict(measured)
        metric = self.shared.task.monitor[0]
        self.log(metric.removeprefix("val_"), measured[metric], prog_bar=True)  # one, and short: a line has 80 columns

    def configure_optimizers(self) -> Any:
        training, method = self.training_settings, self.shared.method
        optimizers = list(method.optimizers(self.network, training))
        if not optimizers:
            optimizers = [make_optimizer(self.network, training)]
            decays = {"weight_decay": training.weight_decay, "decay_all": training.decay_all}
            for group in parameter_groups(self.method_parts, **decays):  # type: ignore[arg-type]
                optimizers[0].add_param_group({**group, "lr": training.lr})
        steps = self.steps_per_epoch()

        def factor(step: int) -> float:
            return learning_rate(training, step, steps) / training.lr

        return [
            {"optimizer": each, "lr_scheduler": {"scheduler": LambdaLR(each, factor), "interval": "step"}}
            for each in optimizers
        ]

    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-len(self.sampler()) // self.training_settings.accumulate)

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = self.sampler()
        sampler.start_at(*self.position)
        return self._loader(self.shared.task.train_set, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.shared.task.val_set, self._val_sampler())

    def sampler(self) -> EpochSampler:
        """This process's batches of the training data."""
        return EpochSampler(
            len(self.shared.task.train_set),  # type: ignore[arg-type]
            self.training_settings.batch_size,
            self.training_settings.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def _val_sampler(self) -> ShareSampler:
        return ShareSampler(
            len(self.shared.task.val_set),  # type: ignore[arg-type]
            self.training_settings.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def _loader(self, dataset: Any, sampler: Any) -> DataLoader[Any]:
        # A generator of its own: a loader that draws from the global one would shift dropout when a run goes on.
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.training_settings.workers,
            collate_fn=self.shared.task.collate,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator().manual_seed(self.training_settings.seed),
            persistent_workers=self.training_settings.workers > 0,
        )


class _ShardedModule(_Module):
    """The task where every process holds a share of the weights."""

    def configure_model(self) -> None:
        if self.trainer.strategy.root_device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        fully_sharded(self, self.network, self.device_mesh["data_parallel"])  # type: ignore[index]

    def on_after_backward(self) -> None:
        super().on_after_backward()
        reshard(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        broadcast_buffers(self.network)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        broadcast_buffers(self.network)


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
        sums, group = every_process(_plain(pl_module.loss_sum)), trainer.optimizers[0].param_groups[0]
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": group["lr"] / group.get("lr_scale", 1.0),
            "train_loss": sum(each["loss"] for each in sums) / max(sum(each["batches"] for each in sums), 1),
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


def _plain(loss_sum: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in loss_sum.items()}


class _Checkpoints(Checkpoint):
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
        if self._any(trainer, self.start is not None) and self._any(trainer, self.start is None):
            raise DataError(f"{self.run.last} must lie where the processes of all machines see it; some do not")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._catch()  # Lightning has set handlers of its own meanwhile
        if self.random is not None:
            restore_random_states(self.random)
        elif trainer.global_rank > 0:  # else the same dropout in all processes
            seed_everything(mixed_seed(self.training.seed, *pl_module.position, trainer.global_rank))

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
        current = {key: value.clone() for key, value in self.plain.state_dict().items()}
        trained, self.task.network = self.task.network, self.plain
        self.plain.load_state_dict(weights)
        try:
            self.task.save(self.run.best)
        finally:
            self.plain.load_state_dict(current)
            self.task.network = trained

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
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
        check_same_settings(self.settings, checkpoint["settings"])
        if checkpoint["samples"] != self._samples():
            raise DataError(
                f"the data have changed since the run began: there were {checkpoint['samples'][0]} training and "
                f"{checkpoint['samples'][1]} validation samples, now {self._samples()[0]} and {self._samples()[1]}"
            )
        rank, sums = trainer.global_rank, checkpoint["loss_sum"]
        if len(sums) == trainer.world_size:
            pl_module.loss_sum = dict(sums[rank])
        elif rank == 0:
            pl_module.loss_sum = {name: sum(each[name] for each in sums) for name in sums[0]}
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
            _logger.warning("a step is for %d samples now, it was for %d; accumulate can keep it", sizes[1], sizes[0])
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
