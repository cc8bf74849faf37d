"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["DropPath", "drop_path_rates"]


class DropPath(nn.Module):
    """Drop the whole residual branch of a sample with probability ``rate`` while training, and rescale the others.

    Huang, Sun, Liu, Sedra, Weinberger: "Deep Networks with Stochastic Depth", ECCV 2016, arXiv 1603.09382. Kept
    branches are divided by 1 - rate, so evaluation needs no change. The identity when ``rate`` is 0.

    Args:
        rate: probability to drop, in [0, 1).

    Raises:
        ValueError: rate is out of range.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to the same shape."""
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep.div_(1 - self.rate)

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"rate={self.rate:g}"


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates that rise linearly over all blocks, from 0 at the first to ``rate`` at the last, grouped by stage."""
    total = sum(depths)
    flat = [rate * index / max(total - 1, 1) for index in range(total)]
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [flat[start : start + depth] for start, depth in zip(starts, depths, strict=True)]
