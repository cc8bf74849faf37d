"""Optimizers, their parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from convatlas.errors import Unsupported
from convatlas.training.settings import Training

__all__ = ["Lamb", "Lion", "learning_rate", "make_optimizer", "parameter_groups", "restarted_cosine"]


class Lion(Optimizer):
    """Steps of equal size in the direction of the sign of an interpolated momentum.

    Chen et al.: "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, arXiv 2302.06675, algorithm 2:
    c = b1 m + (1 - b1) g; w <- w - lr (sign(c) + weight_decay w); m <- b2 m + (1 - b2) g.

    Args:
        params: parameters or parameter groups.
        lr: learning rate; a third to a tenth of AdamW's is usual.
        betas: b1 of the step and b2 of the momentum, in [0, 1).
        weight_decay: decoupled decay.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr and weight_decay must not be negative, got {lr} and {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; ``closure`` recomputes the loss if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum, gradient = state["momentum"], parameter.grad
                direction = torch.lerp(gradient, momentum, first).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                momentum.lerp_(gradient, 1 - second)
        return loss


class Lamb(Optimizer):
    """Adam whose step is as long as the weights that it changes, so that very large batches train well.

    You et al.: "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020, arXiv 1904.00962,
    algorithm 2, with bias correction: u = m / (sqrt(v) + eps) + weight_decay w; w <- w - lr (|w| / |u|) u. The ratio is
    1 where weights are not decayed or one of the norms is 0.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: of the means of gradients and of their squares, in [0, 1).
        eps: added to the root of the second mean.
        weight_decay: share of the weights in the step.
        max_grad_norm: largest norm of all gradients together; they stay as they are when left out.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        if min(lr, eps, weight_decay) < 0:
            raise ValueError(f"lr, eps and weight_decay must not be negative, got {lr}, {eps} and {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; ``closure`` recomputes the loss if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shrink = self._shrink()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
                state["step"] += 1
                mean, square, gradient = state["mean"], state["square"], parameter.grad * shrink
                mean.lerp_(gradient, 1 - first)
                square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
                corrected = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
                update = (mean / (1 - first ** state["step"])).div_(corrected)
                decay = group["weight_decay"]
                if decay > 0:
                    update.add_(parameter, alpha=decay)
                    long, wide = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
                    update.mul_(torch.where((long > 0) & (wide > 0), long / wide, torch.ones_like(long)))
                parameter.add_(update, alpha=-group["lr"])
        return loss

    def _shrink(self) -> Tensor | float:
        """By what the gradients of all groups are multiplied."""
        gradients = [each.grad for group in self.param_groups for each in group["params"] if each.grad is not None]
        if self.max_grad_norm is None or not gradients:
            return 1.0
        norm = torch.nn.utils.get_total_norm(gradients)
        return 1 / (norm / self.max_grad_norm).clamp(min=1.0)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    decay_all: bool = False,
    lr_factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters by weight decay and by layer-wise learning rate.

    1-D parameters are not decayed, nor are those that the model names in ``undecayed``, unless ``decay_all``. Every
    group has ``lr_scale``: 1 at the head, times ``layer_decay`` for each layer below it, times the factor of the
    longest beginning of the name in ``lr_factors``. Parameters with the factor 0 are left out.

    Raises:
        Unsupported: layer_decay is not 1 and the model does not name its layers.
        ValueError: ``lr_factors`` has a beginning that no parameter has.
    """
    scales: dict[int, float] = {}
    if layer_decay != 1:
        if not hasattr(model, "layers"):
            raise Unsupported(f"layer_decay needs a network that names its layers, {type(model).__name__} does not")
        layers: list[nn.Module] = model.layers()  # type: ignore[operator]
        for depth, layer in enumerate(reversed(layers)):
            scales.update({id(parameter): layer_decay**depth for parameter in layer.parameters()})
        lowest = layer_decay ** (len(layers) - 1)
        scales = {id(parameter): scales.get(id(parameter), lowest) for parameter in model.parameters()}
    factors = lr_factors or {}
    names = [name for name, _ in model.named_parameters()]
    for start in factors:
        if not any(name.startswith(start) for name in names):
            raise ValueError(f"lr_factors names {start!r}, but no parameter begins so; the first is {names[0]}")
    groups: dict[tuple[float, float], list[Tensor]] = {}
    undecayed: tuple[str, ...] = getattr(model, "undecayed", ())
    for name, parameter in model.named_parameters():
        longest = max((start for start in factors if name.startswith(start)), key=len, default=None)
        scale = scales.get(id(parameter), 1.0) * (1.0 if longest is None else factors[longest])
        if parameter.requires_grad and scale > 0:
            decays = parameter.dim() > 1 and name.rpartition(".")[2] not in undecayed
            decay = weight_decay if decays or decay_all else 0.0
            groups.setdefault((decay, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]


def make_optimizer(model: nn.Module, training: Training) -> Optimizer:
    """The optimizer that the settings ask for, over the trainable parameters of ``model``."""
    groups = parameter_groups(
        model,
        weight_decay=training.weight_decay,
        layer_decay=training.layer_decay,
        decay_all=training.decay_all,
        lr_factors=training.lr_factors,
    )
    for group in groups:
        group["lr"] = training.lr * group["lr_scale"]
    if training.optimizer == "sgd":
        return SGD(groups, lr=training.lr, momentum=training.momentum, nesterov=training.nesterov)
    if training.optimizer == "lion":
        return Lion(groups, lr=training.lr, betas=(training.momentum, training.beta2 or 0.99))
    betas = (training.momentum, training.beta2 or 0.999)
    if training.optimizer == "lamb":
        return Lamb(groups, lr=training.lr, betas=betas)
    return AdamW(groups, lr=training.lr, betas=betas)


def learning_rate(training: Training, step: int, steps_per_epoch: int, *, plateau: float = 1.0) -> float:
    """Learning rate of optimizer step ``step`` (from 0), before layer-wise scales.

    ``plateau`` is what the plateau schedule has multiplied it by so far.
    """
    epoch = step / steps_per_epoch
    if epoch < training.warmup_epochs:
        return training.warmup_lr + (training.lr - training.warmup_lr) * epoch / training.warmup_epochs
    if training.schedule == "constant":
        return training.lr
    if training.schedule == "plateau":
        return max(training.lr * plateau, training.min_lr)
    if training.schedule == "step" and training.decay_at:
        return training.lr * training.decay_rate ** sum(epoch >= end for end in training.decay_at)
    if training.schedule == "step":
        return training.lr * training.decay_rate ** math.floor(epoch / training.decay_epochs)
    if training.schedule == "exponential":
        return training.lr * training.decay_rate ** (epoch / training.decay_epochs)
    span = training.cosine_epochs or training.epochs - training.cooldown_epochs - training.warmup_epochs
    progress = min((epoch - training.warmup_epochs) / span, 1.0) if span > 0 else 1.0
    return training.min_lr + (training.lr - training.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def restarted_cosine(epoch: int, first: int = 10, growth: int = 2) -> float:
    """Factor of the learning rate in an epoch or a step, from 1 towards 0 within each period; periods grow.

    Raises:
        ValueError: a number is smaller than 1, or the epoch is negative.
    """
    if min(first, growth) < 1 or epoch < 0:
        raise ValueError(f"first and growth must be at least 1, and epoch 0, got {first}, {growth} and {epoch}")
    period = first
    while epoch >= period:
        epoch, period = epoch - period, period * growth
    return (1 + math.cos(math.pi * epoch / period)) / 2
