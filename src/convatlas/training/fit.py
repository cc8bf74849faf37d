"""Training a `GradientTask` with Lightning so that a stopped run goes on exactly where it was.

Lightning keeps the loop, precision, accumulation, clipping, averaging and devices. What it does not do is added:
methods here, exact checkpoints in `checkpoints`, processes and shared-out weights in `devices`.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import signal
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, RichProgressBar
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from convatlas.errors import DataError, Unsupported
from convatlas.training.checkpoints import NOTHING_YET, AtomicCheckpointIO, Checkpoints, History
from convatlas.training.devices import (
    FullyShardedStrategy,
    ShardedAveraging,
    broadcast_buffers,
    check_all_used,
    fix_buckets,
    fully_sharded,
    reshard,
    together,
)
from convatlas.training.method import Together
from convatlas.training.optim import learning_rate, make_optimizer, parameter_groups
from convatlas.training.run import Run
from convatlas.training.sampling import EpochSampler, ShareSampler
from convatlas.training.settings import Training
from convatlas.weights import load_weights

if TYPE_CHECKING:
    from convatlas.training.task import GradientTask

__all__ = ["fit"]

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
    checkpoints = Checkpoints(task, run, training, plain, how)
    callbacks: list[Callback] = [History(run), checkpoints]
    if training.schedule == "plateau":
        callbacks.append(_Plateau(metric, mode, training))
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
            plugins=[AtomicCheckpointIO()],
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
        self.loss_sum: dict[str, Any] = dict(NOTHING_YET)
        self.position = (0, 0)
        self.first_step = True
        self.plateau = 1.0

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
        schedulers: list[Any] = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        total = None
        for number, losses in turns:
            if losses:
                optimizers[number].zero_grad()
                self.manual_backward(losses["loss"])
                self.clip_gradients(optimizers[number], self.training_settings.clip, "norm")
                optimizers[number].step()
                total = losses["loss"].detach() + (0 if total is None else total)
                for name, value in losses.items():  # what else the method tells becomes a curve
                    if name != "loss" and value.dim() == 0:
                        so_far = self.loss_sum.get(f"train_{name}", 0.0)
                        self.loss_sum[f"train_{name}"] = so_far + value.detach().double()
        for scheduler in schedulers:
            scheduler.step()
        return total

    def on_train_start(self) -> None:
        if self.trainer.strategy.model is not None:
            fix_buckets(self.trainer.strategy.model)
        if self.position[1]:  # the run goes on within an epoch, whose start is not told again
            self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        self.shared.method.start_epoch(self.network, self.current_epoch)

    def on_after_backward(self) -> None:
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel) and self.first_step and not wrapped.find_unused_parameters:
            check_all_used(self.network)
        self.first_step = False

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.trainer.is_global_zero:  # it is the same in every process
            self.loss_sum["gradient"] += norm.double()
            self.loss_sum["steps"] += 1

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
            return learning_rate(training, step, steps, plateau=self.plateau) / training.lr

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
            drop_last=self.training_settings.drop_last,
            repeats=self.training_settings.repeated_augmentation,
            order=getattr(self.shared.task.train_set, "order", None),
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


class _Plateau(Callback):
    """Lowers the learning rate when the validation no longer improves. Torch's own would miss its turn in a resume."""

    def __init__(self, metric: str, mode: str, training: Training) -> None:
        self.metric, self.sign, self.training = metric, 1 if mode == "max" else -1, training
        self.best, self.waited, self.factor = -math.inf, 0, 1.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.plateau = self.factor

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        value = self.sign * float(trainer.callback_metrics[self.metric])
        self.best, self.waited = (value, 0) if value > self.best else (self.best, self.waited + 1)
        if self.waited >= self.training.plateau_epochs:
            self.factor, self.waited = self.factor * self.training.decay_rate, 0
            pl_module.plateau = self.factor

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "factor": self.factor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.waited, self.factor = state_dict["best"], state_dict["waited"], state_dict["factor"]
