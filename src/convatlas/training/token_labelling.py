"""Token labelling: train every token of the last map to name what it shows, beside the image as a whole.

Jiang, Hou, Yuan, Zhou, Shi, Jin, Wang, Feng: "All Tokens Matter: Token Labeling for Training Better Vision
Transformers", NeurIPS 2021, arXiv 2104.10858; as UniFormer (arXiv 2201.09450) uses it. The loss is

    class_weight * H(t_cls, image scores) + token_weight * mean over tokens of H(t_token, token scores)

with the soft cross-entropy H. MixToken puts tokens of the flipped batch into a box of the embedded image; the class
target is mixed by the box's area, and the tokens are put back before they are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.data.mixing import cut_box, mixing_ratio, smooth_targets
from convatlas.errors import Unsupported
from convatlas.networks.base import Backbone
from convatlas.networks.registry import create_model
from convatlas.training.method import LossFn, Method

__all__ = ["TokenLabelling", "teacher_targets", "token_label_loss"]

#: Rows and columns: top, left, bottom, right, the last two outside.
Box = tuple[int, int, int, int]

#: Share of the teacher's class target beside the ground truth, where the two name the same class and where they do not.
_AGREED, _DISAGREED = 0.5, 0.9


def token_label_loss(
    scores: Tensor,
    tokens: Tensor,
    targets: Tensor,
    box: Box = (0, 0, 0, 0),
    *,
    class_weight: float = 1.0,
    token_weight: float = 1.0,
    ground_truth: bool = False,
) -> Tensor:
    """The loss of token labelling.

    Args:
        scores: class scores (B, K) of the images.
        tokens: class scores (B, N, K) of their tokens.
        targets: distributions (B, K), which then hold for every token as well; or (B, K, 2 + N): the ground truth, a
            teacher's for the image and one for each token.
        box: part of the map of the tokens into which the flipped batch was mixed; an empty one mixed nothing.
        class_weight, token_weight: of the two parts.
        ground_truth: mix the ground truth into the teacher's class target, as one half where both have the same largest
            class, as a tenth where not; otherwise the teacher's stands alone.

    Raises:
        ValueError: the shapes do not fit.
    """
    count = tokens.shape[1]
    if targets.shape == scores.shape:
        whole, each = targets, targets.unsqueeze(1).expand_as(tokens)
    elif targets.shape == (*scores.shape, 2 + count):
        whole, each = targets[:, :, 1], targets[:, :, 2:].transpose(1, 2)
        if ground_truth:
            truth = targets[:, :, 0]
            agreed = (whole.argmax(1) == truth.argmax(1)).unsqueeze(1)
            share = torch.where(agreed, _AGREED, _DISAGREED).to(whole.dtype)
            whole = share * whole + (1 - share) * truth
    else:
        raise ValueError(
            f"targets must be {tuple(scores.shape)} or {(*scores.shape, 2 + count)}, got {tuple(targets.shape)}"
        )
    top, left, bottom, right = box
    kept = 1 - (bottom - top) * (right - left) / count
    if kept < 1:
        whole = kept * whole + (1 - kept) * whole.flip(0)
    return class_weight * _soft_cross_entropy(scores, whole) + token_weight * _soft_cross_entropy(tokens, each)


def _soft_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean of -sum target * log softmax(score) over classes; half precision is computed in float32."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return -(targets * wide.log_softmax(-1)).sum(-1).mean()


@torch.no_grad()
def teacher_targets(teacher: Backbone, images: Tensor, truth: Tensor, grid: tuple[int, int]) -> Tensor:
    """Targets (B, K, 2 + N) of images from a network that sees the same pixels.

    Its classifier names each position of its last map, as it names their mean; the distributions are averaged over the
    parts of the image that the tokens stand for.

    Args:
        teacher: in evaluation mode; its `forward_head` takes a map.
        images: (B, C, H, W), as the teacher expects them.
        truth: distributions (B, K).
        grid: rows and columns of the N tokens.
    """
    last = teacher.forward_features(images)[-1]
    positions = last.movedim(1, -1).flatten(0, 2)[:, :, None, None]
    each = teacher.forward_head(positions).softmax(-1).unflatten(0, (len(last), *last.shape[2:])).movedim(-1, 1)
    finer = tuple(max(side, wanted) for side, wanted in zip(each.shape[2:], grid, strict=True))
    pooled = F.adaptive_avg_pool2d(F.interpolate(each, finer, mode="bilinear", align_corners=False), grid)
    whole = teacher.forward_head(last).softmax(-1)
    return torch.cat([truth.to(whole.dtype)[:, :, None], whole[:, :, None], pooled.flatten(2)], dim=2)


@dataclass(kw_only=True)
class TokenLabelling(Method):
    """Train a network with a token head, such as ``uniformer_small_tl``, by token labelling.

    The targets are those of the batch under ``"token_label"`` (B, K, 2 + N), see `token_label_loss`; where there are
    none, those of the teacher; without a teacher the image's class, smoothed, holds for every token. Mixup and CutMix
    of the task do not take part.

    Attributes:
        class_weight: of the image's loss.
        token_weight: of the tokens' loss; LV-ViT takes 0.5, UniFormer 1.
        ground_truth: mix the ground truth into the teacher's class target.
        mix: put tokens of other images into a random box (MixToken).
        label_smoothing: of the ground truth.
        teacher: name of a network of convatlas for the same classes; it sees the images as the network does.
        teacher_weights: its weights, as `convatlas.create_model` takes them.

    Raises:
        ValueError: a weight is negative, or label_smoothing is not in [0, 1).
    """

    class_weight: float = 1.0
    token_weight: float = 1.0
    ground_truth: bool = False
    mix: bool = True
    label_smoothing: float = 0.1
    teacher: str | None = None
    teacher_weights: str = "published"

    def __post_init__(self) -> None:
        if min(self.class_weight, self.token_weight) < 0:
            raise ValueError(
                f"class_weight and token_weight must not be negative, got {self.class_weight} and {self.token_weight}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        self._teacher: Backbone | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Check that the network has a token head, and load the teacher.

        Raises:
            Unsupported: it has none, or the teacher names other classes or expects other images.
        """
        if not isinstance(model, Backbone) or getattr(model, "aux_head", None) is None:
            raise Unsupported(f"{type(model).__name__} has no token head, so no token labelling; take a model ..._tl")
        if self.teacher is not None:
            teacher: Any = create_model(self.teacher, weights=self.teacher_weights)
            if not isinstance(teacher, Backbone) or teacher.num_classes != model.num_classes:
                raise Unsupported(f"teacher must name the {model.num_classes} classes of the network")
            for name in ("mean", "std"):
                expected, given = (getattr(each.config.preprocess, name) for each in (teacher, model))
                if expected != given:
                    raise Unsupported(f"teacher expects images with {name} {expected}, the network gets {given}")
            self._teacher = teacher.eval().requires_grad_(False)
        return model

    def losses(self, model: nn.Module, batch: Any, loss_fn: LossFn) -> dict[str, Tensor]:
        """The loss of image and tokens."""
        images = batch["image"]
        if len(images) == 0 or (len(images) < 2 and batch.get("unreadable")):
            return loss_fn(model, batch)
        box = self._box(model, images) if self.mix else (0, 0, 0, 0)
        output = model(images, box)
        targets = batch.get("token_label")
        if targets is None:
            targets = smooth_targets(batch["label"], output.image.shape[1], self.label_smoothing)
            if self._teacher is not None:
                targets = teacher_targets(self._teacher.to(images.device), images, targets, output.grid)
        loss = token_label_loss(
            output.image,
            output.tokens,
            targets,
            output.box,
            class_weight=self.class_weight,
            token_weight=self.token_weight,
            ground_truth=self.ground_truth,
        )
        return {"loss": loss}

    def _box(self, model: Any, images: Tensor) -> Box:
        """A random box on the map of the first stage, with the share of its area drawn evenly."""
        stride = model.feature_info[0].stride
        top, bottom, left, right = cut_box(images.shape[2] // stride, images.shape[3] // stride, mixing_ratio(1.0))
        return top, left, bottom, right
