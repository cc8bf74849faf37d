"""Capsules: vectors whose length says how likely something is there, and routing that sends them to classes.

Sabour, Frosst, Hinton: "Dynamic Routing Between Capsules", NeurIPS 2017, arXiv 1710.09829.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.ops.precision import without_autocast

__all__ = ["CapsuleRouting", "Capsules", "MarginLoss", "capsule_length", "primary_capsules", "squash"]


class Capsules(NamedTuple):
    """Class capsules and how they came about.

    Attributes:
        vectors: v (B, K, d_out), shorter than 1.
        coupling: c (B, N, K), how much of each capsule below went to each class; sums to 1 over the classes.
    """

    vectors: Tensor
    coupling: Tensor


def squash(s: Tensor) -> Tensor:
    """|s|^2 / (1 + |s|^2) s / |s| over the last axis (equation 1): the same direction, a length below 1."""
    square = s.square().sum(-1, keepdim=True)
    return square / (1 + square) * s * (square + 1e-8).rsqrt()


def capsule_length(v: Tensor) -> Tensor:
    """Lengths of capsules (..., d), with a gradient at 0 too."""
    return (v.square().sum(-1) + 1e-12).sqrt()


def primary_capsules(x: Tensor, capsule_dim: int) -> Tensor:
    """Squashed capsules (B, T * C / capsule_dim, capsule_dim) of features (B, C, T), time by time.

    Raises:
        ValueError: capsule_dim does not divide C.
    """
    if x.dim() != 3 or capsule_dim < 1 or x.shape[1] % capsule_dim:
        raise ValueError(f"x must be (B, C, T) with C divisible by capsule_dim {capsule_dim}, got {tuple(x.shape)}")
    return squash(x.transpose(1, 2).reshape(x.shape[0], -1, capsule_dim))


class CapsuleRouting(nn.Module):
    """Predictions of every capsule for every class, and routing by agreement (procedure 1).

    Gradients flow through the routing, too.

    Args:
        n_in, d_in: number and size of the capsules below.
        n_out, d_out: number and size of the class capsules.
        iterations: R; 1 takes the mean of the predictions.

    Raises:
        ValueError: a number is smaller than 1.
    """

    def __init__(self, n_in: int, d_in: int, n_out: int, d_out: int, iterations: int = 3) -> None:
        super().__init__()
        if min(n_in, d_in, n_out, d_out, iterations) < 1:
            raise ValueError(
                f"n_in, d_in, n_out, d_out and iterations must be at least 1, got {n_in}, {d_in}, {n_out}, {d_out} and "
                f"{iterations}"
            )
        self.iterations = iterations
        self.W = nn.Parameter(torch.empty(n_in, n_out, d_out, d_in))
        # So that the mean of n_in predictions of squashed capsules is long enough to be told from the others.
        nn.init.normal_(self.W, std=1 / math.sqrt(d_in))

    def forward(self, u: Tensor) -> Capsules:
        """Route capsules (B, n_in, d_in) to the classes."""
        count, classes, size, inner = self.W.shape
        if u.dim() != 3 or u.shape[1:] != (count, inner):
            raise ValueError(f"u must be (B, {count}, {inner}), got {tuple(u.shape)}")
        with without_autocast(u):
            dtype = torch.promote_types(u.dtype, torch.float32)
            weight = self.W.to(dtype).flatten(1, 2).transpose(1, 2)
            predictions = (u.to(dtype).transpose(0, 1) @ weight).transpose(0, 1).unflatten(-1, (classes, size))
            logits = predictions.new_zeros(predictions.shape[:3])
            for iteration in range(self.iterations):
                coupling = logits.softmax(-1)
                vectors = squash(torch.einsum("bnk,bnko->bko", coupling, predictions))
                if iteration < self.iterations - 1:
                    logits = logits + torch.einsum("bnko,bko->bnk", predictions, vectors)
        return Capsules(vectors.to(u.dtype), coupling.to(u.dtype))

    def extra_repr(self) -> str:
        """Show the sizes."""
        count, classes, size, inner = self.W.shape
        return f"{count}, {inner}, {classes}, {size}, iterations={self.iterations}"


class MarginLoss(nn.Module):
    """Loss of class capsules by their lengths (equation 4), mean over the batch.

    Args:
        present: least length of the right class without a loss.
        absent: largest length of another one.
        down: weight of the others.
    """

    def __init__(self, present: float = 0.9, absent: float = 0.1, down: float = 0.5) -> None:
        super().__init__()
        self.present, self.absent, self.down = present, absent, down

    def forward(self, lengths: Tensor, labels: Tensor) -> Tensor:
        """The loss of lengths (B, K) for labels (B)."""
        if lengths.dim() != 2 or labels.shape != lengths.shape[:1]:
            raise ValueError(
                f"lengths and labels must be (B, K) and (B), got {tuple(lengths.shape)}, {tuple(labels.shape)}"
            )
        there = F.one_hot(labels, lengths.shape[1]).to(lengths.dtype)
        short, long = F.relu(self.present - lengths).square(), F.relu(lengths - self.absent).square()
        return (there * short + self.down * (1 - there) * long).sum(1).mean()
