"""How a network is trained, whatever the task: the settings of one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Training"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a gradient-trained run.

    Attributes:
        epochs: passes over the training data.
        batch_size: samples of one forward pass on one device.
        optimizer: ``adamw``, ``sgd`` (with Nesterov-free momentum) or ``lion``.
        lr: peak learning rate.
        weight_decay: decoupled for adamw and lion, L2 for sgd; not applied to biases, norms and other 1-D parameters.
        momentum: of sgd; of the others it is their first beta.
        schedule: ``cosine`` to ``min_lr``, ``step`` (times ``decay_rate`` every ``decay_epochs``), ``exponential`` (the same,
            at every step of the epoch's fraction) or ``constant``.
        warmup_epochs: linear rise from ``warmup_lr`` before the schedule; counted within ``epochs``.
        warmup_lr: learning rate of the first step.
        min_lr: end of the cosine.
        cooldown_epochs: last epochs of ``epochs`` spent at ``min_lr``.
        decay_epochs, decay_rate: of the step and exponential schedules.
        layer_decay: each layer below the head gets the learning rate of the one above times this; 1 turns it off.
        accumulate: batches whose gradients are summed before a step.
        clip: largest gradient norm; None leaves gradients as they are.
        ema: decay of an exponential moving average of the weights, which is then what is validated and kept; None for none.
        precision: arithmetic of the forward and backward pass.
        patience: stop when the validation has not improved for this many epochs; None never stops early.
        seed: of initialisation, order, augmentation and dropout.
        workers: processes that read data; 0 reads in the main process.
        checkpoint_minutes: time between two checkpoints within an epoch; one is always written at the end of an epoch.
        devices: how many devices to use, ``auto`` for all of the fastest kind.
        accelerator: ``auto``, ``cpu``, ``gpu`` or ``mps``.
    """

    epochs: int = 20
    batch_size: int = 64
    optimizer: Literal["adamw", "sgd", "lion"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    schedule: Literal["cosine", "step", "exponential", "constant"] = "cosine"
    warmup_epochs: float = 1
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    cooldown_epochs: float = 0
    decay_epochs: float = 30
    decay_rate: float = 0.1
    layer_decay: float = 1.0
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    precision: Literal["32", "bf16", "16"] = "32"
    patience: int | None = None
    seed: int = 0
    workers: int = 0
    checkpoint_minutes: float = 10
    devices: int | Literal["auto"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("workers", 0), ("warmup_epochs", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "decay_epochs", "decay_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "min_lr", "warmup_lr", "cooldown_epochs", "checkpoint_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, upper in (("momentum", 1.0), ("ema", 1.0)):
            value = getattr(self, name)
            if value is not None and not 0 <= value < upper:
                raise ValueError(f"{name} must be in [0, {upper:g}), got {value}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be positive, got {self.clip}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        if self.warmup_epochs + self.cooldown_epochs >= self.epochs and self.warmup_epochs + self.cooldown_epochs > 0:
            raise ValueError(
                "warmup_epochs + cooldown_epochs must be less than epochs, "
                f"got {self.warmup_epochs:g} + {self.cooldown_epochs:g} and {self.epochs}"
            )
