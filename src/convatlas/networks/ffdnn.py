"""FFDNN: Fourier convolution along time and capsules, to tell what stresses a crop from satellite time series.

Shi, Han, Gonzalez-Moreno, Dancey, Huang, Zhang, Liu, Huang, Miao, Dai: "A Fast Fourier Convolutional Deep Neural
Network For Accurate and Explainable Discrimination Of Wheat Yellow Rust And Nitrogen Deficiency From Sentinel-2
Time-Series Data", Frontiers in Plant Science 2023, arXiv 2306.17207. There is no code and no checkpoint of the authors;
widths, kernels and details of the routing, which the paper does not give, are choices made here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.networks.sequence_classifier import SequenceClassifier, SequenceConfig
from convatlas.nn.capsules import CapsuleRouting, Capsules, MarginLoss, capsule_length, primary_capsules
from convatlas.nn.fourier_conv import FourierConv1d

__all__ = ["FFDNN", "VARIANTS", "Explanation", "FFDNNConfig", "FastFourierBlock1d", "explain"]

#: Weight of the squared error of the reconstruction, for each number of a series.
_RECONSTRUCTION = 0.0005


@dataclass(frozen=True, kw_only=True)
class FFDNNConfig(SequenceConfig):
    """Config of `FFDNN`.

    Attributes:
        widths: channels of each block.
        modes: frequencies of the Fourier convolutions from 0 on; all when left out.
        band: lowest and highest frequency instead. The paper finds stress in medium ones, soil and background in low
            and weather in high ones.
        padding: ``circular`` or ``linear``, see `convatlas.nn.fourier_conv.FourierConv1d`.
        capsule_dim: channels of a capsule of one time; divides the last width.
        class_dim: size of a class capsule.
        iterations: of the routing.
        decoder: whether the series is reconstructed from the capsule of its class, as a regulariser and to look into
            the capsules.

    Raises:
        ValueError: a value is out of range.
    """

    widths: tuple[int, ...] = (16, 32)
    modes: int | None = None
    band: tuple[int, int] | None = None
    padding: Literal["circular", "linear"] = "circular"
    capsule_dim: int = 8
    class_dim: int = 16
    iterations: int = 3
    decoder: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be at least one number of at least 1, got {self.widths}")
        if self.capsule_dim < 1 or self.widths[-1] % self.capsule_dim:
            raise ValueError(f"channels {self.widths[-1]} must be divisible by capsule_dim, got {self.capsule_dim}")

    def build(self) -> FFDNN:
        return FFDNN(self)


class FastFourierBlock1d(nn.Module):
    """ReLU of the batch norm of a global and a local convolution.

    Args:
        in_channels, out_channels, length: sizes.
        modes, band, padding: of the Fourier convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        length: int,
        modes: int | None = None,
        *,
        band: tuple[int, int] | None = None,
        padding: Literal["circular", "linear"] = "circular",
    ) -> None:
        super().__init__()
        self.fourier = FourierConv1d(in_channels, out_channels, length, modes, band=band, padding=padding)
        self.local = nn.Conv1d(in_channels, out_channels, 3, padding=1)
        self.bn = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, T) to (B, out_channels, T)."""
        y: Tensor = self.bn(self.fourier(x) + self.local(x))
        return y.relu()


class FFDNN(SequenceClassifier):
    """Fast Fourier blocks, a capsule for each time and group of channels, and routing to the classes.

    The scores are the lengths of the class capsules, below 1.

    Args:
        config: what to build.
    """

    def __init__(self, config: FFDNNConfig) -> None:
        super().__init__(config)
        widths = (config.in_channels, *config.widths)
        self.blocks = nn.Sequential(
            *(
                FastFourierBlock1d(before, after, config.length, config.modes, band=config.band, padding=config.padding)
                for before, after in itertools.pairwise(widths)
            )
        )
        groups = widths[-1] // config.capsule_dim
        self.caps = CapsuleRouting(
            config.length * groups, config.capsule_dim, config.num_classes, config.class_dim, config.iterations
        )
        self.margin = MarginLoss()
        self.decoder = (
            nn.Sequential(
                nn.Linear(config.num_classes * config.class_dim, 64),
                nn.ReLU(),
                nn.Linear(64, 128),
                nn.ReLU(),
                nn.Linear(128, config.in_channels * config.length),
                nn.Sigmoid(),
            )
            if config.decoder
            else None
        )

    def capsules(self, x: Tensor) -> Capsules:
        """Class capsules and coupling of standardised series (B, in_channels, length)."""
        self._check_input(x)
        routed: Capsules = self.caps(primary_capsules(self.blocks(x), self.config.capsule_dim))
        return routed

    def forward(self, x: Tensor) -> Tensor:
        return capsule_length(self.capsules(x).vectors)

    def training_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The margin loss; with a decoder the error of its reconstruction besides, which is 0.0005 of a squared sum."""
        vectors = self.capsules(x).vectors
        loss: Tensor = self.margin(capsule_length(vectors).float(), labels)
        if self.decoder is not None:
            error = F.mse_loss(self.reconstruct(vectors, labels).float(), x.float().sigmoid())
            loss = loss + _RECONSTRUCTION * x[0].numel() * error
        return loss

    def probabilities(self, scores: Tensor) -> Tensor:
        """Lengths over their sum; they are not calibrated."""
        return scores / scores.sum(1, keepdim=True)

    def reconstruct(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """The sigmoid of standardised series (B, in_channels, length), from the capsules of the classes ``labels``.

        Raises:
            Unsupported: the network has no decoder.
        """
        if self.decoder is None:
            raise Unsupported("the network has no decoder: build it with decoder=True")
        seen = F.one_hot(labels, self.num_classes).to(vectors.dtype)
        decoded: Tensor = self.decoder((vectors * seen[..., None]).flatten(1))
        return decoded.unflatten(1, (self.in_channels, self.config.length))

    @torch.no_grad()
    def traverse(self, x: Tensor, steps: Sequence[float] = (-0.2, -0.1, 0.0, 0.1, 0.2)) -> Tensor:
        """Series that the decoder makes when one number of the capsule of the found class is moved.

        Args:
            x: standardised series (B, in_channels, length).
            steps: by how much.

        Returns:
            Standardised series (B, class_dim, steps, in_channels, length).

        Raises:
            Unsupported: the network has no decoder.
        """
        vectors = self.capsules(x).vectors
        labels = capsule_length(vectors).argmax(1)
        moves = torch.eye(vectors.shape[2], dtype=x.dtype, device=x.device)[:, None] * x.new_tensor(steps)[:, None]
        moved = vectors[:, None, None] + moves[:, :, None]
        count = moves.shape[0] * moves.shape[1]
        series = self.reconstruct(moved.flatten(0, 2), labels.repeat_interleave(count))
        return series.logit(eps=1e-6).unflatten(0, (len(x), *moves.shape[:2]))


class Explanation(NamedTuple):
    """What a decision rests on.

    Attributes:
        scores: lengths of the class capsules (B, K).
        importance: coupling of every time and group of features to every class, (B, K, T, groups); for one time and
            group it sums to 1 over the classes.
        vectors: class capsules (B, K, class_dim).
    """

    scores: Tensor
    importance: Tensor
    vectors: Tensor

    @property
    def over_time(self) -> Tensor:
        """Importance of each time, (B, K, T): the mean over the groups."""
        return self.importance.mean(-1)


@torch.no_grad()
def explain(model: FFDNN, x: Tensor) -> Explanation:
    """How much each time and group of features of standardised series (B, C, T) speaks for each class.

    The mean over the series of a class gives the importance of the dates for that class.
    """
    vectors, coupling = model.capsules(x)
    importance = coupling.transpose(1, 2).unflatten(2, (int(model.config.length), -1))
    return Explanation(capsule_length(vectors), importance, vectors)


VARIANTS: dict[str, FFDNNConfig] = {
    "ffdnn": FFDNNConfig(),
    "ffdnn_small": FFDNNConfig(length=24, widths=(8, 8), capsule_dim=4, class_dim=6),
    "ffdnn_decoder": FFDNNConfig(decoder=True),
}
