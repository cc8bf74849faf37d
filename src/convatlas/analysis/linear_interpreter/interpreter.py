"""The interpreter and its views of the frozen network: rows, columns, contributions, singular vectors, the matrix."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from convatlas.analysis.linear_interpreter.replay import Tape, check_model, record
from convatlas.analysis.linear_interpreter.rules import Mode
from convatlas.files import atomic_path

__all__ = ["CANCELLATION", "Index", "Interpretation", "LinearInterpreter", "Singular"]

#: One element of the output or the input of one sample: its place in the flattened tensor, or one index an axis.
Index: TypeAlias = int | Sequence[int]

#: (|A x0| + |r|) / |y| above which A x0 and r nearly cancel.
CANCELLATION = 10.0
#: Vectors of the subspace iteration beyond those asked for.
_SPARE = 5
#: Shorter side and entries of an A whose singular vectors are sooner had from A itself.
_SMALL_SIDE, _SMALL = 1024, 1 << 24


class Singular(NamedTuple):
    """The leading singular triplets, A v_i = sigma_i u_i, the largest entry of each u_i positive.

    Attributes:
        u: (n, shape of the output of one sample).
        sigma: (n), descending.
        v: (n, shape of the input of one sample).
    """

    u: Tensor
    sigma: Tensor
    v: Tensor


class LinearInterpreter:
    """Reads a network at an input x0 as an exact linear system: y = A(x0) x0 + r(x0).

    Every decision that the network takes for x0 is frozen: masks of activations, places of maxima, statistics of
    normalisation, attention maps and gates. What is left is linear in the input, and biases (paper, section 3).

        interp = LinearInterpreter(model)
        li = interp(x0)
        li.contribution(7)  # the vote of each pixel for class 7

    Args:
        model: any network, in evaluation mode. It is left as it is.
        mode: how a pointwise unit f is linearised at h. "mask" (the paper): by the secant through the origin, f(h) / h,
            and products by freezing the gate. "tangent": by the derivative, so that A is the Jacobian. For networks of
            ReLU, max-pooling and batch norm both are the same. Where f(0) is not 0 (sigmoid, softplus) the secant
            explodes near h = 0, and large entries of A cancel: prefer the tangent for numerical work.
        output: picks or makes the tensor to study from what the model returns; needed if that is no tensor. Softmax at
            the output is not interpreted: analyse the logits.
        chunk_size: largest number of probes that are replayed at once.

    Raises:
        ValueError: the model is in training mode, or an argument is out of range.
        Unsupported: the model is wrapped for several devices, or scripted.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: Mode = "mask",
        *,
        output: Callable[[Any], Any] | None = None,
        chunk_size: int = 32,
    ) -> None:
        check_model(model, mode)
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.model, self.mode, self.output, self.chunk_size = model, mode, output, chunk_size

    def __call__(self, x0: Tensor, *args: Any, **kwargs: Any) -> Interpretation:
        """Run the model on x0, once, and freeze it.

        Args:
            x0: input with a batch axis, whose samples are interpreted each by itself.
            args, kwargs: further arguments of the model, which are constants to the linear system.

        Raises:
            ValueError: x0 is no floating-point batch, or the model is in training mode.
            NotImplementedError: there is no rule for an operation that depends on x0; the message names it.
            Unsupported: the output is no tensor, comes from softmax, or does not depend on x0.
        """
        check_model(self.model, self.mode)
        if not isinstance(x0, Tensor) or not x0.is_floating_point() or x0.dim() < 2 or not x0.numel():
            shown = f"{tuple(x0.shape)} of {x0.dtype}" if isinstance(x0, Tensor) else type(x0).__name__
            raise ValueError(f"x0 must be a floating-point batch (B, ...), got {shown}")
        with torch.inference_mode(False):
            y, tape = record(self.model, self.mode, x0, args, kwargs, self.output)
        tensors = (tensor for tensor in (*self.model.parameters(), *self.model.buffers()) if not tensor.is_inference())
        weights = [(tensor, tensor._version) for tensor in tensors]
        return Interpretation(x0.detach().clone(), y, tape, weights, self.chunk_size)


class Interpretation:
    """The frozen network of one x0: y = A x0 + r.

    Attributes:
        x0: the input, (B, ...).
        output: y, what the network returned, (B, ...).
    """

    def __init__(
        self, x0: Tensor, output: Tensor, tape: Tape, weights: list[tuple[Tensor, int]], chunk_size: int
    ) -> None:
        self.x0, self.output = x0, output
        self._tape, self._weights, self._chunk_size = tape, weights, chunk_size

    def __repr__(self) -> str:
        return f"Interpretation(x0 {tuple(self.x0.shape)} -> {tuple(self.output.shape)}, {len(self._tape)} operations)"

    # -- the linear system ---------------------------------------------------------------------------------------------

    def apply(self, z: Tensor, *, bias: bool = False) -> Tensor:
        """A z, or A z + r with ``bias``.

        Args:
            z: of the shape of x0, or (P, shape of x0) for P probes. A gradient flows back to it.
            bias: add r.

        Returns:
            Of the shape of the output, or (P, shape of the output).
        """
        self._check(z, self.x0, "z")
        if z.shape == self.x0.shape:
            return self._tape.run(z, bias)
        return torch.vmap(lambda one: self._tape.run(one, bias), chunk_size=self._chunk_size)(z)

    def apply_transpose(self, c: Tensor) -> Tensor:
        """A^T c, the gradient of <c, A z> with respect to z: one backward pass through the frozen network.

        Args:
            c: of the shape of the output, or (P, shape of the output).

        Returns:
            Of the shape of x0, or (P, shape of x0).
        """
        self._check(c, self.output, "c")

        def linear(z: Tensor) -> Tensor:
            return self._tape.run(z, bias=False)

        # The forward replay runs once, every chunk goes back through it.
        back = torch.func.vjp(linear, torch.zeros_like(self.x0))[1]
        if c.shape == self.output.shape:
            return back(c)[0]
        return torch.vmap(lambda one: back(one)[0], chunk_size=self._chunk_size)(c)

    def _check(self, value: Tensor, like: Tensor, name: str) -> None:
        shape = tuple(like.shape)
        if tuple(value.shape) not in (shape, tuple(value.shape[:1]) + shape):
            raise ValueError(f"{name} must be {shape} or have an axis of probes before it, got {tuple(value.shape)}")
        if value.dtype != like.dtype:
            raise ValueError(f"{name} must be {like.dtype}, got {value.dtype}")
        if any(tensor._version != version for tensor, version in self._weights):
            raise RuntimeError("the weights of the model have changed since x0 was interpreted; interpret it again")

    @cached_property
    def linear(self) -> Tensor:
        """A x0, of the shape of the output."""
        with torch.no_grad():
            return self.apply(self.x0)

    @property
    def residual(self) -> Tensor:
        """r, of the shape of the output: the replay of z = 0 with biases.

        Warns:
            UserWarning: A x0 and r nearly cancel, so that either of them says little about y alone.
        """
        if self.cancellation > CANCELLATION:
            message = f"A x0 and r nearly cancel: (|A x0| + |r|) / |y| is {self.cancellation:.3g}"
            warnings.warn(message, stacklevel=2)
        return self._residual

    @cached_property
    def _residual(self) -> Tensor:
        with torch.no_grad():
            return self.apply(torch.zeros_like(self.x0), bias=True)

    @property
    def bias_share(self) -> float:
        """|r| / |y|, in the 2-norm over all samples."""
        return float(self._residual.norm() / self.output.norm())

    @property
    def cancellation(self) -> float:
        """(|A x0| + |r|) / |y|: 1 where the two add up, large where they nearly cancel."""
        return float((self.linear.norm() + self._residual.norm()) / self.output.norm())

    @property
    def error(self) -> float:
        """The largest entry of abs(A x0 + r - y): rounding, if everything is right."""
        return float((self.linear + self._residual - self.output).abs().max())

    # -- rows and columns ----------------------------------------------------------------------------------------------

    def row(self, k: Index) -> Tensor:
        """Row k of A, A^T e_k: the filter through which output k sees the input, (B, ...) like x0."""
        return self.apply_transpose(_unit(self.output, k, "k"))

    def column(self, i: Index) -> Tensor:
        """Column i of A, A e_i: the response to an impulse at input element i, (B, ...) like the output."""
        with torch.no_grad():
            return self.apply(_unit(self.x0, i, "i"))

    def contribution(self, k: Index) -> Tensor:
        """Row k times x0, elementwise, (B, ...) like x0. Summed over all elements, plus r_k, it gives y_k."""
        return self.row(k) * self.x0

    def votes(self, k: Index) -> Tensor:
        """The contributions to output k summed over the channels: the vote of each pixel, (B, positions...)."""
        return self.contribution(k).sum(1)

    # -- the matrix and its singular vectors ---------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of A: elements of the output and of the input of one sample."""
        return self.output[0].numel(), self.x0[0].numel()

    def matrix(self, *, max_entries: int = 100_000_000) -> Tensor:
        """A of one sample, (outputs, inputs), both flattened.

        It is built from rows or from columns, whichever need fewer replays. Where the network is local, an impulse
        reaches a part of the output only; then one replay gives many columns: impulses stand so far from each other
        that their responses do not meet. How far is found by replaying lines of NaN, which spread to all they reach.

        Raises:
            ValueError: x0 has several samples, or A more entries than allowed.
        """
        rows, columns = self._one_sample("matrix", max_entries)
        with torch.no_grad():
            combs = self._combs() if self.x0.dim() == self.output.dim() > 2 else []
            lines, probes = sum(self.x0.shape[2:]), len(combs) * self.x0.shape[1]
            if combs and lines + probes < min(rows, columns):
                return self._from_combs(combs)
            if rows <= columns:
                units = torch.eye(rows, dtype=self.output.dtype, device=self.output.device)
                return self.apply_transpose(units.view(-1, *self.output.shape)).reshape(rows, columns)
            units = torch.eye(columns, dtype=self.x0.dtype, device=self.x0.device)
            return self.apply(units.view(-1, *self.x0.shape)).reshape(columns, rows).mT.contiguous()

    def _one_sample(self, what: str, max_entries: int) -> tuple[int, int]:
        rows, columns = self.shape
        if len(self.x0) > 1:
            raise ValueError(f"{what} needs x0 with one sample, got a batch of {len(self.x0)}")
        if rows * columns > max_entries:
            count = f"{rows * columns:.2g}" if rows * columns >= 1e6 else rows * columns
            raise ValueError(f"A would have {count} entries ({rows} x {columns}); use row, column or apply")
        return rows, columns

    def _combs(self) -> list[_Comb]:
        """Sets of positions whose responses do not meet; none where an impulse reaches everything."""
        reached = []
        for axis in range(2, self.x0.dim()):
            lines = self._reached(axis)
            if lines is None:
                return []
            reached.append(lines)
        return [_Comb(reached, groups) for groups in itertools.product(*map(_apart, reached))]

    def _reached(self, axis: int) -> Tensor | None:
        """For each position on an axis, which positions of the output a change on that line of the input can reach."""
        length, others = self.x0.shape[axis], [dim for dim in range(self.output.dim()) if dim != axis]
        lines = self.x0.new_zeros(length, *self.x0.shape)
        for position in range(length):
            lines[position].select(axis, position).fill_(math.nan)
        # One line tells where it is no use to go on.
        if self.apply(lines[length // 2]).isnan().amax(others).all():
            return None
        return torch.cat(
            [self.apply(some).isnan().amax([1 + dim for dim in others]) for some in lines.split(self._chunk_size)]
        )

    def _from_combs(self, combs: list[_Comb]) -> Tensor:
        (rows, columns), channels, places = self.shape, self.x0.shape[1], self.x0.shape[2:]
        matrix = self.x0.new_zeros(rows, channels, math.prod(places))
        pairs = list(itertools.product(range(channels), combs))
        for start in range(0, len(pairs), self._chunk_size):
            some = pairs[start : start + self._chunk_size]
            probes = self.x0.new_zeros(len(some), *self.x0.shape)
            for probe, (channel, comb) in zip(probes, some, strict=True):
                probe[0, channel].view(-1)[comb.impulses(places)] = 1
            for response, (channel, comb) in zip(self.apply(probes), some, strict=True):
                # Each element of the output belongs to the one impulse that reaches it, if any.
                owner = comb.owners(places).expand(self.output.shape[1:]).reshape(-1)
                element = (owner >= 0).nonzero().squeeze(1)
                matrix[element, channel, owner[element]] = response.reshape(-1)[element]
        return matrix.view(rows, columns)

    def svd(
        self, n: int = 1, *, steps: int = 200, tolerance: float = 1e-8, generator: torch.Generator | None = None
    ) -> Singular:
        """The n leading singular triplets of A of one sample.

        A small A is built and decomposed. Otherwise a subspace of n + 5 vectors is iterated with products by A and A^T
        only, until no singular value changes by more than ``tolerance`` of itself, or for ``steps``. The vectors of
        equal values are any basis of their space.

        Raises:
            ValueError: x0 has several samples, or n is not between 1 and the smaller side of A.
        """
        rows, columns = self._one_sample("svd", max_entries=1 << 62)
        if not 1 <= n <= min(rows, columns):
            raise ValueError(f"n must be from 1 to {min(rows, columns)}, got {n}")
        with torch.no_grad():
            if min(rows, columns) <= _SMALL_SIDE and rows * columns <= _SMALL:
                u, sigma, vh = torch.linalg.svd(self.matrix(), full_matrices=False)
                u, sigma, v = u[:, :n], sigma[:n], vh[:n].mT
            else:
                u, sigma, v = self._subspace_iteration(n, steps, tolerance, generator)
        sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        u, v = (u * sign).mT, (v * sign).mT
        return Singular(u.reshape(n, *self.output.shape[1:]), sigma, v.reshape(n, *self.x0.shape[1:]))

    def _subspace_iteration(
        self, n: int, steps: int, tolerance: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = self.shape
        size = min(n + _SPARE, rows, columns)
        start = torch.randn(columns, size, generator=generator, dtype=self.x0.dtype)
        v = torch.linalg.qr(start.to(self.x0.device)).Q
        before = torch.zeros(n, dtype=v.dtype, device=v.device)
        for _ in range(steps):
            u, right = torch.linalg.qr(self._times(v))
            left, sigma, turned = torch.linalg.svd(right)  # U^T A V
            if ((sigma[:n] - before).abs() <= tolerance * sigma[:n]).all():
                break
            before = sigma[:n]
            v = torch.linalg.qr(self._transpose_times(u)).Q
        return (u @ left)[:, :n], sigma[:n], (v @ turned.mT)[:, :n]

    def _times(self, v: Tensor) -> Tensor:
        return self.apply(v.mT.reshape(-1, *self.x0.shape)).reshape(v.shape[1], -1).mT

    def _transpose_times(self, u: Tensor) -> Tensor:
        return self.apply_transpose(u.mT.reshape(-1, *self.output.shape)).reshape(u.shape[1], -1).mT

    # -- export --------------------------------------------------------------------------------------------------------

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        rows: Sequence[Index] = (),
        columns: Sequence[Index] = (),
        singular: Singular | None = None,
        max_entries: int = 10_000_000,
    ) -> Path:
        """Write x0, y, A x0 and r into an ``.npz`` file, with the rows and columns asked for and what `svd` gave.

        A itself goes in as ``A`` if x0 is one sample and A has no more than ``max_entries``. The other names are
        ``x0``, ``output``, ``linear``, ``residual``, ``rows`` and ``columns`` (one for each asked for, on the first
        axis), ``row_index`` and ``column_index`` (into the flattened output and input), ``u``, ``sigma`` and ``v``.
        """
        arrays = {"x0": self.x0, "output": self.output, "linear": self.linear, "residual": self._residual}
        if rows:
            arrays["rows"] = torch.stack([self.row(k) for k in rows])
            arrays["row_index"] = torch.tensor([_flat(self.output, k, "k") for k in rows])
        if columns:
            arrays["columns"] = torch.stack([self.column(i) for i in columns])
            arrays["column_index"] = torch.tensor([_flat(self.x0, i, "i") for i in columns])
        if singular is not None:
            arrays |= singular._asdict()
        if len(self.x0) == 1 and math.prod(self.shape) <= max_entries:
            arrays["A"] = self.matrix(max_entries=max_entries)
        path = Path(path)
        plain: dict[str, Any] = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **plain)
        return path


class _Comb:
    """Positions of impulses whose responses do not meet.

    Args:
        reached: for each axis, which positions of the output each position reaches.
        groups: for each axis, the positions at which impulses stand.
    """

    def __init__(self, reached: Sequence[Tensor], groups: Sequence[Tensor]) -> None:
        self.reached = [lines[group] for lines, group in zip(reached, groups, strict=True)]
        self.groups = groups

    def impulses(self, places: torch.Size) -> Tensor:
        """The flat positions of the impulses."""
        return self._flattened(self.groups, places).reshape(-1)

    def owners(self, places: torch.Size) -> Tensor:
        """For each position of the output, the flat position of the impulse that reaches it, or -1."""
        nearest = [
            group[lines.to(torch.uint8).argmax(0)] for group, lines in zip(self.groups, self.reached, strict=True)
        ]
        owner = self._flattened(nearest, places)
        for axis, lines in enumerate(self.reached):
            shape = [-1 if other == axis else 1 for other in range(len(places))]
            owner = torch.where(lines.any(0).view(shape), owner, -1)
        return owner

    def _flattened(self, positions: Sequence[Tensor], places: torch.Size) -> Tensor:
        """Flat positions of all combinations of positions on each axis."""
        flat = positions[0].new_zeros(())
        for own, size in zip(positions, places, strict=True):
            flat = (flat * size).unsqueeze(-1) + own
        return flat


def _apart(reached: Tensor) -> list[Tensor]:
    """Positions in as few groups as come easily, within which none reaches what another reaches."""
    groups: list[tuple[list[int], Tensor]] = []
    for position, own in enumerate(reached):
        for members, covered in groups:
            if not bool((covered & own).any()):
                members.append(position)
                covered |= own
                break
        else:
            groups.append(([position], own.clone()))
    return [torch.tensor(members, device=reached.device) for members, _ in groups]


def _flat(like: Tensor, index: Index, name: str) -> int:
    """The place of an element in a flattened sample."""
    shape = tuple(like.shape[1:])
    whole = math.prod(shape)
    if isinstance(index, int):
        place, fits = index, 0 <= index < whole
    else:
        fits = len(index) == len(shape) and all(0 <= i < size for i, size in zip(index, shape, strict=True))
        place = int(np.ravel_multi_index(tuple(index), shape)) if fits else 0
    if not fits:
        raise ValueError(f"{name} must be below {whole} or an index into {shape}, got {index}")
    return place


def _unit(like: Tensor, index: Index, name: str) -> Tensor:
    unit = torch.zeros_like(like, memory_format=torch.contiguous_format)
    unit.view(len(like), -1)[:, _flat(like, index, name)] = 1
    return unit
