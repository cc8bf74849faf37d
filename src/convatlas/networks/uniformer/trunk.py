"""What all UniFormers share: their options, stages of an embedding and blocks, and where the maps come from.

Stages 1 and 2 consist of local blocks, the others of global ones (arXiv 2201.09450, section 3.3).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convatlas.networks.base import Backbone, BackboneConfig, Feature
from convatlas.networks.uniformer.blocks import NORMS, SCALES, BlockOptions, flat_scales
from convatlas.nn.drop import drop_path_rates
from convatlas.nn.init import init_linear
from convatlas.nn.norm import ChannelLayerNorm
from convatlas.weights import Layout

__all__ = ["Stage", "Trunk", "TrunkConfig"]

STAGES = 4
#: Positions of the image that one of the last map spans on each axis.
STRIDE = 32


@dataclass(frozen=True, kw_only=True)
class TrunkConfig(BackboneConfig):
    """Options of all UniFormers.

    Attributes:
        depths: blocks of the four stages.
        dims: channels of the stages.
        head_dim: channels of an attention head; divides ``dims``. No weight's shape depends on it, and weights that
            were trained with another one load without a word and give wrong outputs.
        mlp_ratios: hidden width of the MLPs over ``dims``, for each stage.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor of the attention scores; head_dim^-0.5 when left out.
        layer_scale_init: initial factor of the residual branches of the blocks; None leaves the factors out.
        drop: rate of the dropout in the MLPs, behind the attentions and behind the first embedding.
        attn_drop: rate of the dropout of the attention weights.
        drop_path: rate at the last block; it rises linearly from 0.
    """

    depths: tuple[int, ...] = (3, 4, 8, 3)
    dims: tuple[int, ...] = (64, 128, 320, 512)
    head_dim: int = 64
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    qkv_bias: bool = True
    qk_scale: float | None = None
    layer_scale_init: float | None = None
    drop: float = 0.0
    attn_drop: float = 0.0
    drop_path: float = 0.1


class Stage(nn.Module):
    """An embedding that makes the map coarser, and blocks.

    Args:
        patch_embed: the embedding.
        blocks: what follows.
        drop: rate of the dropout behind the embedding.
        norm: norm of the map that leaves the pyramid; the un-normed one goes on to the next stage.
    """

    def __init__(
        self, patch_embed: nn.Module, blocks: Sequence[nn.Module], *, drop: float = 0.0, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def embed(self, x: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The coarser map, changed."""
        half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        if x.dim() == 5 and x.device.type == "cpu" and half:
            # Torch's gradient of the weight reads memory that nothing has set where volumes lie with channels last.
            x = x.contiguous()
        x = self.patch_embed(x)
        return self.drop(x if change is None else change(x))

    def forward(self, x: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Map (B, C, *grid) to (B, D, *coarser).

        Args:
            x: the map of the stage before.
            change: what is done to the coarser map before the blocks.
        """
        x = self.embed(x, change)
        for block in self.blocks:
            x = block(x)
        return x

    def leave(self, x: Tensor) -> Tensor:
        """The map as it leaves the pyramid."""
        return x if self.norm is None else self.norm(x)


class Trunk(Backbone):
    """Four stages, a norm, the mean over positions and a linear classifier.

    Args:
        config: what to build.
        stage_norms: give each stage's map a LayerNorm of its own and leave out the batch norm behind the last.
        options: fields of `BlockOptions` that all blocks share.

    Raises:
        ValueError: depths, dims and mlp_ratios do not name four stages, or head_dim does not divide dims.
    """

    classifier_modules: ClassVar[tuple[str, ...]] = ("head",)

    config: Any
    _checkpointed: tuple[int, ...] | None = None

    def __init__(self, config: TrunkConfig, *, stage_norms: bool = False, **options: Any) -> None:
        super().__init__(config)
        per_stage = (config.depths, config.dims, config.mlp_ratios)
        if any(len(values) != STAGES for values in per_stage) or min(config.depths) < 1:
            raise ValueError(
                f"depths, dims and mlp_ratios must be of {STAGES} stages with at least one block each, "
                f"got {config.depths}, {config.dims} and {config.mlp_ratios}"
            )
        if config.head_dim < 1 or any(channels % config.head_dim for channels in config.dims[2:]):
            raise ValueError(
                f"head_dim must divide dims of the last two stages, got {config.head_dim} and {config.dims}"
            )
        self.axes = len(config.preprocess.shape)
        self.feature_info = tuple(Feature(width, 4 * 2**stage) for stage, width in enumerate(config.dims))
        self._shared = {"axes": self.axes, **options}
        rates = drop_path_rates(config.drop_path, config.depths)
        stages = []
        for stage, (width, stage_rates) in enumerate(zip(config.dims, rates, strict=True)):
            norm = ChannelLayerNorm(width, eps=1e-6) if stage_norms else None
            blocks = [self._block(stage, index, rate) for index, rate in enumerate(stage_rates)]
            drop = config.drop if stage == 0 else 0.0
            stages.append(self._stage(stage, self._embedding(stage), blocks, drop=drop, norm=norm))
        self.stages = nn.ModuleList(stages)
        self.norm: nn.Module = nn.Identity() if stage_norms else NORMS[self.axes](config.dims[-1])

    def _options(self, stage: int, **changes: Any) -> BlockOptions:
        config = self.config
        values = {
            "channels": config.dims[stage],
            "num_heads": max(1, config.dims[stage] // config.head_dim),
            "mlp_ratio": config.mlp_ratios[stage],
            "qkv_bias": config.qkv_bias,
            "qk_scale": config.qk_scale,
            "drop": config.drop,
            "attn_drop": config.attn_drop,
            "layer_scale_init": config.layer_scale_init,
            **self._shared,
            **changes,
        }
        return BlockOptions(**values)

    @abstractmethod
    def _embedding(self, stage: int) -> nn.Module:
        """The embedding of a stage."""

    @abstractmethod
    def _block(self, stage: int, index: int, drop_path: float) -> nn.Module:
        """A block of a stage."""

    def _stage(self, stage: int, patch_embed: nn.Module, blocks: list[nn.Module], **options: Any) -> Stage:
        return Stage(patch_embed, blocks, **options)

    def _before(self, stage: int) -> int:
        """Channels that a stage reads."""
        return int(self.config.dims[stage - 1] if stage else self.config.in_channels)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        return self._features(x)

    def _features(self, x: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """The maps, where the embedded image is changed."""
        self._check_input(x)
        features: list[Tensor] = []
        for stage in self.stages:
            x = self._run_stage(stage, x) if features else self._run_stage(stage, x, change)
            features.append(stage.leave(x))  # type: ignore[operator]
        features[-1] = self.norm(features[-1])
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(2).mean(2))

    def set_gradient_checkpointing(self, enabled: bool = True, *, blocks: Sequence[int] | None = None) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Args:
            enabled: whether to.
            blocks: of how many first blocks of each stage; of all blocks and embeddings, stage by stage, when left out.

        Raises:
            ValueError: there is not one number a stage.
        """
        if blocks is not None and (len(blocks) != STAGES or min(blocks) < 0):
            raise ValueError(f"blocks must be {STAGES} numbers of at least 0, got {tuple(blocks)}")
        super().set_gradient_checkpointing(enabled)
        self._checkpointed = tuple(blocks) if enabled and blocks is not None else None

    def _run_stage(self, stage: nn.Module, *inputs: Any) -> Any:
        if self._checkpointed is None:
            return super()._run_stage(stage, *inputs)
        count = self._checkpointed[list(self.stages).index(stage)]
        if type(stage) is not Stage:  # its blocks hand on more than the map, so all or none
            return super()._run_stage(stage, *inputs) if count else stage(*inputs)
        x = stage.embed(*inputs)
        for index, block in enumerate(stage.blocks):
            x = super()._run_stage(block, x) if index < count else block(x)
        return x

    def layers(self) -> list[nn.Module]:
        """Embeddings and blocks in their order, what lies behind them, the classifier."""
        steps: list[nn.Module] = []
        for stage in self.stages:
            steps += [stage.patch_embed, *stage.blocks]  # type: ignore[list-item, misc]
            steps += [part for name, part in stage.named_children() if name not in ("patch_embed", "drop", "blocks")]
        steps += [part for name, part in self.named_children() if name != "stages"]
        return [step for step in steps if any(True for _ in step.parameters())]

    def reset_classifier(self, num_classes: int) -> None:
        self.config = self.config.override(num_classes=num_classes)
        self.head = self._classifier(num_classes)

    def _classifier(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        weight = next(self.stages.parameters())
        linear = nn.Linear(self.feature_info[-1].channels, num_classes, device=weight.device, dtype=weight.dtype)
        init_linear(linear)
        return linear.train(self.training)

    def _finish(self) -> None:
        """Give fresh weights: Linear layers as in vision transformers, everything else as torch does."""
        self.apply(init_linear)
        self.reset_classifier(self.config.num_classes)


#: Our names for the authors', which have no dot between word and stage and count stages from 1.
RENAMES = (
    *((rf"^(patch_embed|norm){stage + 1}\.", rf"stages.{stage}.\1.") for stage in range(STAGES)),
    *((rf"^blocks{stage + 1}\.", f"stages.{stage}.blocks.") for stage in range(STAGES)),
    SCALES,
)
LAYOUTS: Mapping[str, Layout] = {"authors": Layout(renames=RENAMES, function=flat_scales)}
