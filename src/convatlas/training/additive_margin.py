"""Additive margin: train a classifier of angles to tell classes apart by more than it has to.

Wang, Cheng, Liu, Liu: "Additive Margin Softmax for Face Verification", 2018, arXiv 1801.05599.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.nn.margin_softmax import AMSoftmax
from convatlas.training.method import LossFn, Method

__all__ = ["AdditiveMargin"]


@dataclass(frozen=True, kw_only=True)
class AdditiveMargin(Method):
    """Take the margin off the true class's cosine while a loss is computed, of networks that end in `AMSoftmax`.

    Attributes:
        margin: instead of the classifier's own.
    """

    margin: float | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Check that there is a classifier of angles.

        Raises:
            Unsupported: there is none, or more than one.
        """
        self._classifier(model)
        return model

    def losses(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> dict[str, Tensor]:
        """The losses with the margin; labels stand under ``"label"`` and are numbers of classes.

        Raises:
            ValueError: the labels are mixed ones.
        """
        classifier, labels = self._classifier(model), batch["label"]
        if labels.dim() != 1:
            raise ValueError(f"labels must be numbers of classes (B) for a margin, got {tuple(labels.shape)}")
        shift = classifier.scale * (classifier.margin if self.margin is None else self.margin)

        def shifted(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
            return logits - shift * F.one_hot(labels, logits.shape[1]).to(logits.dtype)

        handle = classifier.register_forward_hook(shifted)
        try:
            return loss_fn(model, batch)
        finally:
            handle.remove()

    @staticmethod
    def _classifier(model: nn.Module) -> AMSoftmax:
        found = [part for part in model.modules() if isinstance(part, AMSoftmax)]
        if len(found) != 1:
            raise Unsupported(f"{type(model).__name__} must have one classifier of angles, got {len(found)}")
        return found[0]
