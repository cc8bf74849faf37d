"""One small method for each hook, in the manner of published ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from convatlas.training.method import LossFn, Method
from convatlas.training.settings import Training


class Added(Method):
    """One more loss, as a regulariser."""

    def __init__(self, weight: float = 0.1) -> None:
        self.weight = weight

    def losses(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> dict[str, Tensor]:
        losses = loss_fn(model, batch)
        norm = sum(parameter.square().sum() for parameter in model.parameters())
        return {**losses, "norm": norm, "loss": losses["loss"] + self.weight * norm}


class Adversarial(Method):
    """Another input, found by a backward pass of its own, as adversarial training."""

    def losses(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> dict[str, Tensor]:
        x = batch["x"].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_fn(model, {**batch, "x": x})["loss"], x)
        return loss_fn(model, {**batch, "x": batch["x"] + 0.1 * gradient.sign()})


class Distilled(nn.Module, Method):
    """A frozen teacher and a trained projection, as distillation."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(4, 5).requires_grad_(False)
        self.projection = nn.Linear(3, 5)

    def losses(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> dict[str, Tensor]:
        distance = F.mse_loss(self.projection(model(batch["x"])), self.teacher(batch["x"]))
        return {"loss": loss_fn(model, batch)["loss"] + distance}


class Alternating(Method):
    """Two optimizers that take turns, as a game of two players."""

    def optimizers(self, model: Any, training: Training) -> Sequence[Optimizer]:
        return [SGD(model[0].parameters(), training.lr), SGD(model[3].parameters(), 2 * training.lr, momentum=0.5)]

    def turns(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for number, weight in ((0, 1.0), (1, 0.5)):
            yield number, {"loss": weight * loss_fn(model, batch)["loss"]}


class Replaced(Method):
    """Another optimizer."""

    def optimizers(self, model: nn.Module, training: Training) -> Sequence[Optimizer]:
        return [torch.optim.RMSprop(model.parameters(), training.lr)]


class Growing(Method):
    """A network that changes from epoch to epoch, as one that sees more tokens."""

    def start_epoch(self, model: Any, epoch: int) -> None:
        model[2].p = 0.1 * epoch


class Wrapping(Method):
    """Must not be: it changes the names of the weights."""

    def prepare(self, model: nn.Module) -> nn.Module:
        return nn.Sequential(model)


class NoMethod:
    """Not even a method."""
