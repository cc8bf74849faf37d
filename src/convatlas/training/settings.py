"""How a network is trained, whatever the task: the settings of one run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from convatlas.catalog import METHODS
from convatlas.errors import unknown

__all__ = ["MOVABLE", "SettingsError", "Training"]

#: Settings of where and in what portions a run computes; they may change when it goes on.
MOVABLE = ("devices", "nodes", "strategy", "accelerator", "workers", "batch_size", "accumulate", "checkpoint_minutes")


class SettingsError(ValueError):
    """A setting has an unknown name or a value of a wrong type."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a gradient-trained run.

    Attributes:
        epochs: passes over the training data.
        batch_size: samples of one forward pass on one device.
        optimizer: ``adamw``, ``sgd`` (with plain momentum unless ``nesterov``), ``lion`` or ``lamb``.
        lr: peak learning rate.
        weight_decay: decoupled for adamw, lion and lamb, L2 for sgd.
        decay_all: whether biases, norms and other 1-D parameters decay too.
        momentum: of sgd; of the others it is their first beta.
        nesterov: whether the momentum of sgd looks ahead (Nesterov).
        beta2: second beta of the others; when left out, 0.99 of lion and 0.999 of adamw and lamb.
        schedule: ``cosine`` to ``min_lr``, ``step`` (times ``decay_rate`` every ``decay_epochs`` or at ``decay_at``),
            ``exponential`` (the same, but a little at every step), ``plateau`` (times ``decay_rate``, not below
            ``min_lr``, whenever the validation has not improved for ``plateau_epochs``) or ``constant``; all begin with
            the warm-up.
        warmup_epochs: linear rise from ``warmup_lr`` before the schedule; counted within ``epochs``.
        warmup_lr: learning rate of the first step.
        min_lr: end of the cosine, and least of the plateau schedule.
        cosine_epochs: epochs from ``lr`` to ``min_lr``; with more than there are, the cosine is cut off. All between
            warm-up and cool-down when left out.
        cooldown_epochs: of the cosine schedule: last epochs of ``epochs``, spent at ``min_lr``.
        decay_epochs: of the step and exponential schedules: after so many epochs the learning rate is multiplied.
        decay_at: of the step schedule: the epochs after which it is multiplied, instead of every ``decay_epochs``.
        decay_rate: of the step, exponential and plateau schedules: by what it is multiplied.
        plateau_epochs: of the plateau schedule: epochs without improvement.
        layer_decay: each layer below the head gets the learning rate of the one above times this; 1 turns it off.
        lr_factors: by the beginning of a parameter's name, a factor of its learning rate: ``{"sub_pixel": 0.1}``.
        accumulate: batches whose gradients are averaged into one step, for a larger batch than the memory holds.
        drop_last: whether an epoch leaves out the samples that do not fill a batch, other ones each time.
        repeated_augmentation: how often each image of an epoch comes in it, augmented anew each time (Hoffer et al.,
            CVPR 2020, arXiv 1901.09335); the epoch keeps its length, so it holds so many times fewer images.
        clip: largest gradient norm; gradients stay as they are when left out.
        ema: decay of an exponential moving average of the weights, which is then what is validated and kept; none when
            left out.
        precision: arithmetic of the forward and backward pass: float32, or mixed with bfloat16 or float16 (GPU only).
        patience: stop when the validation has not improved for this many epochs; never when left out.
        seed: of initialisation, order, augmentation and dropout.
        workers: processes that read data; 0 reads in the main process.
        checkpoint_minutes: time between two checkpoints within an epoch; one is always written at the end of an epoch.
        methods: what to do otherwise than plain training, by name, with the settings of each, e.g.
            ``{"tract": {"lam": 0.1}}``; ``convatlas list --methods`` shows the names. A name with a colon,
            ``package.module:Class``, is a `Method` of your own.
        devices: how many devices to use on each machine, ``auto`` for all of the fastest kind. Each has a process of
            its own, which gets its share of every epoch, and the gradients are averaged: a step is for ``devices``
            batches.
        nodes: how many machines train together; start the command on each of them with torchrun.
        strategy: ``ddp``, where every device holds the whole network, or ``fsdp``, where each holds a share of weights,
            gradients and optimizer state; ``auto`` is ddp.
        accelerator: ``auto``, ``cpu``, ``gpu`` or ``mps``.
    """

    epochs: int = 20
    batch_size: int = 64
    optimizer: Literal["adamw", "sgd", "lion", "lamb"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    decay_all: bool = False
    momentum: float = 0.9
    nesterov: bool = False
    beta2: float | None = None
    schedule: Literal["cosine", "step", "exponential", "plateau", "constant"] = "cosine"
    warmup_epochs: float = 1
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    cosine_epochs: float | None = None
    cooldown_epochs: float = 0
    decay_epochs: float = 30
    decay_at: tuple[float, ...] = ()
    decay_rate: float = 0.1
    plateau_epochs: int = 10
    layer_decay: float = 1.0
    lr_factors: dict[str, float] = field(default_factory=dict)
    accumulate: int = 1
    drop_last: bool = False
    repeated_augmentation: int = 1
    clip: float | None = None
    ema: float | None = None
    precision: Literal["32", "bf16", "16"] = "32"
    patience: int | None = None
    seed: int = 0
    workers: int = 0
    checkpoint_minutes: float = 10
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    devices: int | Literal["auto"] = 1
    nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("optimizer", "schedule", "precision", "strategy", "accelerator"):
            if getattr(self, name) not in get_args(hints[name]):
                raise unknown(name, str(getattr(self, name)), get_args(hints[name]))
        counts = (
            *("epochs", "batch_size", "accumulate", "repeated_augmentation", "patience", "plateau_epochs", "nodes"),
        )
        for name, least in (*((name, 1) for name in counts), ("workers", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "cosine_epochs", "decay_epochs", "decay_rate", "clip"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "min_lr", "warmup_lr", "warmup_epochs", "cooldown_epochs", "checkpoint_minutes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("momentum", "beta2", "ema"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if list(self.decay_at) != sorted(set(self.decay_at)) or min(self.decay_at, default=1) <= 0:
            raise ValueError(f"decay_at must be positive epochs in rising order, got {self.decay_at}")
        for name, factor in self.lr_factors.items():
            if not 0 <= factor < math.inf:
                raise ValueError(f"lr_factors must not be negative, got {factor} for {name}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError("nesterov needs the optimizer sgd with momentum")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if self.devices != "auto" and self.devices < 1:
            raise ValueError(f"devices must be 'auto' or at least 1, got {self.devices}")
        if self.strategy == "fsdp" and self.precision == "16":
            raise ValueError("precision must be 32 or bf16 with the strategy fsdp, got 16")
        for name in self.methods:
            if ":" not in name and name not in METHODS:
                raise unknown("method", name, METHODS)
        if self.cooldown_epochs and self.schedule != "cosine":
            raise ValueError(
                f"cooldown_epochs must be 0 with the {self.schedule} schedule, got {self.cooldown_epochs:g}"
            )
        if self.warmup_epochs + self.cooldown_epochs > self.epochs:
            raise ValueError(
                "warmup_epochs + cooldown_epochs must not be more than epochs, "
                f"got {self.warmup_epochs:g} + {self.cooldown_epochs:g} and {self.epochs}"
            )
