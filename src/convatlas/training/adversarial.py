"""Adversarial training: a discriminator learns to tell results from the truth, and the network to deceive it.

Goodfellow et al.: "Generative Adversarial Networks", NeurIPS 2014, arXiv 1406.2661; with the relativistic losses and
the feature distance of Wang et al.: "ESRGAN", ECCV Workshops 2018, arXiv 1809.00219, voxel by voxel as in Wang, Mahler,
Steiglechner, Birk, Scheffler, Lohmann: "DISGAN", ICCV Workshops 2023, arXiv 2308.12084. Instance noise: Sonderby,
Caballero, Theis, Shi, Huszar: "Amortised MAP Inference for Image Super-resolution", ICLR 2017, arXiv 1610.04490.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from convatlas.errors import Unsupported
from convatlas.networks.base import Backbone
from convatlas.networks.registry import create_model
from convatlas.ops.adversarial import relativistic_discriminator_loss, relativistic_generator_loss
from convatlas.training.method import LossFn, Method
from convatlas.training.optim import make_optimizer
from convatlas.training.settings import Training
from convatlas.weights import load_weights

__all__ = ["Adversarial"]


class Adversarial(nn.Module, Method):
    """Train a network that restores something against a discriminator, step by step in turn.

    For tasks whose losses hold what the network gave as ``"result"`` and what it should have given as ``"truth"``. With
    C the discriminator's logits, phi features of another network and n one volume of noise for each sample:

        network:        loss + weight BCE(C(x + n) - mean C(t + n), 1) + feature_weight mean |phi(x) - phi(t)|
        discriminator:  (BCE(C(t + n) - mean C(x + n), 1) + BCE(C(x + n) - mean C(t + n), 0)) / 2

    with means of logits over the batch. The standard deviation of n falls from 1 to 0 along the training.

    Args:
        discriminator: name of a network whose output is a logit for each sample or each position.
        discriminator_options: fields of its config to change.
        discriminator_weights: a checkpoint that it starts from.
        weight: of the adversarial loss.
        lr: peak learning rate of the discriminator; that of the network when left out.
        noise_epochs: E of the standard deviation max(0, 1 - epoch / E) of the noise; those of the training when left
            out, and 0 for no noise.
        features: name of a network whose last feature map is compared, such as ``med3d_resnet10``; none when left out.
            It is not trained.
        features_options: fields of its config to change.
        features_weights: a checkpoint of it; without one its weights are random.
        feature_weight: of the distance of features.

    Raises:
        ValueError: a weight, lr or noise_epochs is out of range.
        UnknownName: there is no such network.
        CheckpointError: a checkpoint does not fit.
    """

    def __init__(
        self,
        discriminator: str = "disgan_discriminator",
        discriminator_options: dict[str, Any] | None = None,
        discriminator_weights: str | None = None,
        weight: float = 5e-3,
        lr: float | None = None,
        noise_epochs: int | None = None,
        features: str | None = None,
        features_options: dict[str, Any] | None = None,
        features_weights: str | None = None,
        feature_weight: float = 1e-2,
    ) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("feature_weight", feature_weight)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if lr is not None and lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if noise_epochs is not None and noise_epochs < 0:
            raise ValueError(f"noise_epochs must not be negative, got {noise_epochs}")
        self.weight, self.feature_weight, self.lr, self.noise_epochs = weight, feature_weight, lr, noise_epochs
        self.discriminator = _made(discriminator, discriminator_options, discriminator_weights)
        self.features: nn.Module | None = None
        if features is not None:
            self.features = _made(features, features_options, features_weights).requires_grad_(False).eval()
        self.sigma = 0.0

    def train(self, mode: bool = True) -> Self:
        """Leave the network of the features in evaluation mode."""
        super().train(mode)
        if self.features is not None:
            self.features.eval()
        return self

    def optimizers(self, model: nn.Module, training: Training) -> Sequence[Optimizer]:
        """One as the settings ask for, and the same for the discriminator."""
        if self.noise_epochs is None:
            self.noise_epochs = training.epochs
        own = dataclasses.replace(training, lr=self.lr or training.lr, layer_decay=1.0, lr_factors={})
        return [make_optimizer(model, training), make_optimizer(self.discriminator, own)]

    def start_epoch(self, model: nn.Module, epoch: int) -> None:
        """Lower the noise."""
        self.sigma = max(0.0, 1 - epoch / self.noise_epochs) if self.noise_epochs else 0.0

    def turns(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The network's step, then the discriminator's on the same results.

        Raises:
            Unsupported: the losses hold no result and no truth.
        """
        losses = loss_fn(model, batch)
        if not losses:
            return
        if not {"result", "truth"} <= losses.keys():
            raise Unsupported("adversarial training needs a task whose losses hold 'result' and 'truth'")
        result, truth = losses["result"], losses["truth"]
        noise = self.sigma * torch.randn_like(truth) if self.sigma else torch.zeros_like(truth)
        yield 0, self._deceiving(losses["loss"], result, truth, noise)
        judged = [self.discriminator(volume + noise) for volume in (truth, result.detach())]
        loss = relativistic_discriminator_loss(*judged)
        yield 1, {"loss": loss, "discriminator": loss}

    def _deceiving(self, loss: Tensor, result: Tensor, truth: Tensor, noise: Tensor) -> dict[str, Tensor]:
        with _frozen(self.discriminator):
            with torch.no_grad():
                real = self.discriminator(truth + noise)
            adversarial = relativistic_generator_loss(real, self.discriminator(result + noise))
        parts = {"plain": loss, "adversarial": adversarial}
        total = loss + self.weight * adversarial
        if self.features is not None:
            with torch.no_grad():
                wanted = _described(self.features, truth)
            parts["features"] = F.l1_loss(_described(self.features, result), wanted)
            total = total + self.feature_weight * parts["features"]
        return {"loss": total, **parts}


def _made(name: str, options: Mapping[str, Any] | None, weights: str | None) -> nn.Module:
    model = create_model(name, **(options or {}))
    if weights is not None:
        load_weights(model, weights)
    return model


def _described(features: nn.Module, x: Tensor) -> Tensor:
    described: Tensor = features.forward_features(x)[-1] if isinstance(features, Backbone) else features(x)
    return described


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """What is computed within the block sends no gradient to the parameters, and costs none."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
