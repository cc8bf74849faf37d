"""Initial weights: the classical distributions with groups, orthogonal ones, and those that look at data.

"On filter design in deep convolutional neural network", 2024, and the papers that it surveys: LeCun et al. 1998;
Glorot, Bengio 2010; He et al., arXiv 1502.01852; Saxe et al., arXiv 1312.6120 (orthogonal); Xiao et al., arXiv
1806.05393 (delta-orthogonal); Mishkin, Matas, arXiv 1511.06422 (LSUV); Salimans, Kingma, arXiv 1602.07868
(data-dependent); Zhang, Dauphin, Ma, arXiv 1901.09321 (Fixup); De, Smith, arXiv 2002.10444 (SkipInit).

A weight is (out, in / groups, *kernel); fan_in = in / groups * taps and fan_out = out / groups * taps. Every function
changes a weight and returns it; ``draw`` gives the random numbers, of the shape of the weight, in place of a generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported, unknown

__all__ = [
    "INITIALISERS",
    "Mode",
    "data_dependent_",
    "delta_orthogonal_",
    "dirac_",
    "fixup_",
    "gain_of",
    "he_normal_",
    "he_uniform_",
    "initialise",
    "lecun_normal_",
    "lsuv_",
    "normal_",
    "orthogonal_",
    "residual_branches",
    "sparse_",
    "truncated_normal_",
    "xavier_normal_",
    "xavier_uniform_",
    "zero_gamma_",
]

Mode = Literal["fan_in", "fan_out"]

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm)
#: Standard deviation of a standard normal that is cut off at two deviations.
_TRUNCATED = 0.87962566103423978


def gain_of(nonlinearity: str, slope: float = 0.01) -> float:
    """By how much weights have to be larger so that variances survive an activation.

    Raises:
        UnknownName: there is no such activation.
    """
    gains = {
        **dict.fromkeys(("linear", "sigmoid"), 1.0),
        "tanh": 5 / 3,
        "relu": math.sqrt(2),
        "leaky_relu": math.sqrt(2 / (1 + slope**2)),
        "selu": 0.75,
    }
    if nonlinearity not in gains:
        raise unknown("nonlinearity", nonlinearity, gains)
    return gains[nonlinearity]


def _fans(weight: Tensor, groups: int) -> tuple[int, int]:
    if weight.dim() < 2:
        raise ValueError(f"weight must be (out, in, ...), got {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} outputs, got {groups}")
    taps = math.prod(weight.shape[2:])
    return weight.shape[1] * taps, weight.shape[0] * taps // groups


def _scaled(weight: Tensor, scale: float, draw: Tensor | None, generator: torch.Generator | None) -> Tensor:
    with torch.no_grad():
        return weight.copy_(scale * _normal(weight, draw, generator))


def _normal(weight: Tensor, draw: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if draw is None:
        return torch.randn(weight.shape, dtype=weight.dtype, device=weight.device, generator=generator)
    if draw.shape != weight.shape:
        raise ValueError(f"draw must have the shape of the weight {tuple(weight.shape)}, got {tuple(draw.shape)}")
    return draw


def _even(weight: Tensor, bound: float, draw: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if draw is None:
        draw = torch.rand(weight.shape, dtype=weight.dtype, device=weight.device, generator=generator)
    with torch.no_grad():
        return weight.copy_(bound * (2 * draw - 1))


def normal_(
    weight: Tensor, std: float = 0.01, *, draw: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Normal with a constant deviation, as in AlexNet's time."""
    return _scaled(weight, std, draw, generator)


def truncated_normal_(
    weight: Tensor, std: float = 0.01, *, draw: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Normal without what lies beyond two deviations, widened so that the deviation is ``std``.

    ``draw`` is even in (0, 1).
    """
    if draw is None:
        draw = torch.rand(weight.shape, dtype=weight.dtype, device=weight.device, generator=generator)
    low = (1 + math.erf(-math.sqrt(2))) / 2  # share of a normal below two deviations
    with torch.no_grad():
        cut = torch.special.ndtri(low + (1 - 2 * low) * draw.double()).clamp(-2, 2)
        return weight.copy_(std / _TRUNCATED * cut)


def lecun_normal_(weight: Tensor, *, draw: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Normal of variance 1 / fan_in."""
    return _scaled(weight, math.sqrt(1 / _fans(weight, 1)[0]), draw, generator)


def xavier_normal_(
    weight: Tensor,
    gain: float = 1.0,
    groups: int = 1,
    *,
    draw: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Normal of variance 2 gain^2 / (fan_in + fan_out)."""
    return _scaled(weight, gain * math.sqrt(2 / sum(_fans(weight, groups))), draw, generator)


def xavier_uniform_(
    weight: Tensor,
    gain: float = 1.0,
    groups: int = 1,
    *,
    draw: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Even within gain sqrt(6 / (fan_in + fan_out)) of zero; ``draw`` is even in (0, 1)."""
    return _even(weight, gain * math.sqrt(6 / sum(_fans(weight, groups))), draw, generator)


def he_normal_(
    weight: Tensor,
    mode: Mode = "fan_in",
    nonlinearity: str = "relu",
    groups: int = 1,
    *,
    slope: float = 0.01,
    draw: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Normal of variance gain^2 / fan.

    Args:
        weight: to be changed.
        mode: which fan: ``fan_in`` keeps the variance of activations, ``fan_out`` that of gradients.
        nonlinearity: activation behind it; see `gain_of`.
        groups: of the convolution.
        slope: of a leaky ReLU.
        draw, generator: of the random numbers.
    """
    scale = gain_of(nonlinearity, slope) / math.sqrt(_fan(weight, mode, groups))
    return _scaled(weight, scale, draw, generator)


def he_uniform_(
    weight: Tensor,
    mode: Mode = "fan_in",
    nonlinearity: str = "relu",
    groups: int = 1,
    *,
    slope: float = 0.01,
    draw: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Even within gain sqrt(3 / fan) of zero; ``draw`` is even in (0, 1). Arguments as those of `he_normal_`."""
    bound = gain_of(nonlinearity, slope) * math.sqrt(3 / _fan(weight, mode, groups))
    return _even(weight, bound, draw, generator)


def _fan(weight: Tensor, mode: Mode, groups: int) -> int:
    if mode not in ("fan_in", "fan_out"):
        raise unknown("mode", str(mode), ("fan_in", "fan_out"))
    return _fans(weight, groups)[mode == "fan_out"]


def orthogonal_(
    weight: Tensor, gain: float = 1.0, *, draw: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Orthonormal rows of the matrix (out, fan_in), or columns where it is higher than wide, times the gain."""
    with torch.no_grad():
        matrix = _normal(weight, draw, generator).flatten(1)
        wide = matrix.shape[0] < matrix.shape[1]
        q = _orthonormal(matrix.T if wide else matrix)
        return weight.copy_(gain * (q.T if wide else q).reshape(weight.shape))


def _orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns by QR, with the signs that make them evenly distributed."""
    wide = matrix.double()
    q, r = torch.linalg.qr(wide)
    return (q * r.diagonal().sign()).to(matrix.dtype)


def delta_orthogonal_(
    weight: Tensor, gain: float = 1.0, *, draw: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Zero but for the centre tap k // 2, where orthonormal columns stand: an isometry between channels.

    Args:
        weight: (out, in, *kernel) with out >= in; the centre of an even kernel lies behind its middle.
        gain: factor.
        draw: (out, in).
        generator: of the random numbers.

    Raises:
        ValueError: there are fewer outputs than inputs.
    """
    out, channels = weight.shape[:2]
    if out < channels:
        raise ValueError(f"weight must have at least as many outputs as inputs, got {out} and {channels}")
    with torch.no_grad():
        matrix = _normal(weight.new_empty(out, channels), draw, generator)
        weight.zero_()
        _centre(weight).copy_(gain * _orthonormal(matrix))
        return weight


def _centre(weight: Tensor) -> Tensor:
    """The tap k // 2 of every kernel, (out, in), as a view."""
    for size in reversed(weight.shape[2:]):
        weight = weight.select(-1, size // 2)
    return weight


def dirac_(weight: Tensor, groups: int = 1) -> Tensor:
    """The identity: output i is input i, of each group; the centre tap is k // 2."""
    _fans(weight, groups)
    with torch.no_grad():
        weight.zero_()
        for part in weight.chunk(groups):
            _centre(part).diagonal().fill_(1)
        return weight


def sparse_(
    weight: Tensor,
    sparsity: float,
    std: float = 0.01,
    *,
    draw: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Normal, with the same share of zeros in every filter, at random places.

    Raises:
        ValueError: sparsity is not between 0 and 1.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
    _scaled(weight, std, draw, generator)
    with torch.no_grad():
        rows = weight.flatten(1)
        zeros = math.ceil(sparsity * rows.shape[1])
        order = torch.rand(rows.shape, device=weight.device, generator=generator).argsort(1)
        mask = torch.ones_like(rows).scatter_(1, order[:, :zeros], 0)
        return weight.mul_(mask.view_as(weight))


#: Initialisers of one weight by name, as `initialise` takes them.
INITIALISERS: dict[str, Callable[..., Tensor]] = {
    "normal": normal_,
    "truncated_normal": truncated_normal_,
    "lecun_normal": lecun_normal_,
    "xavier_normal": xavier_normal_,
    "xavier_uniform": xavier_uniform_,
    "he_normal": he_normal_,
    "he_uniform": he_uniform_,
    "orthogonal": orthogonal_,
    "delta_orthogonal": delta_orthogonal_,
    "dirac": dirac_,
    "sparse": sparse_,
}
_GROUPED = ("xavier_normal", "xavier_uniform", "he_normal", "he_uniform", "dirac")


def initialise(model: nn.Module, name: str, *, skip: Sequence[str] = (), **options: Any) -> nn.Module:
    """Draw the weights of all convolutions and linear layers of a model anew, in place; their biases become zero.

    Args:
        model: any network.
        name: of `INITIALISERS`.
        skip: names of layers that stay as they are.
        **options: of the initialiser, such as ``gain`` or ``generator``.

    Raises:
        UnknownName: there is no such initialiser.
        ValueError: it does not suit a layer, which the message names.
    """
    if name not in INITIALISERS:
        raise unknown("initialiser", name, INITIALISERS)
    for label, layer in model.named_modules():
        if isinstance(layer, _WEIGHTED) and label not in skip:
            groups = {"groups": getattr(layer, "groups", 1)} if name in _GROUPED else {}
            try:
                INITIALISERS[name](layer.weight, **{**groups, **options})
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from None
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


# -- initialisers that look at data ------------------------------------------------------------------------------------


def lsuv_(
    model: nn.Module,
    batch: Tensor | tuple[Any, ...],
    *,
    tol: float = 0.1,
    max_iter: int = 10,
    orthonormal: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, int]:
    """Layer-sequential unit-variance initialisation: outputs of every layer get the variance 1 on a batch.

    One pass is enough for all layers: each is scaled as it is reached, and the pass goes on with its new output. It
    runs in evaluation mode, so that dropout does not disturb it; behind a batch norm it changes nothing.

    Args:
        model: any network whose layers are convolutions and linear layers; changed in place.
        batch: inputs of the model.
        tol: largest distance of the variance from 1.
        max_iter: corrections of one layer at most.
        orthonormal: begin with orthonormal weights: the QR of random ones, or with ``generator`` None of the present
            ones, and with biases of zero.
        generator: draws new weights.

    Returns:
        How often each layer was corrected, in the order in which they were reached.

    Raises:
        ValueError: a layer puts out a constant, or tol or max_iter is out of range.
    """
    if not tol > 0 or max_iter < 1:
        raise ValueError(f"tol must be positive and max_iter at least 1, got {tol} and {max_iter}")
    counts: dict[str, int] = {}

    def correct(name: str, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if name in counts:
            return None
        counts[name] = 0
        while abs(float(variance := output.double().var(correction=0)) - 1) >= tol and counts[name] < max_iter:
            if not float(variance) > 0:
                raise ValueError(f"{name} puts out a constant on this batch, so that no factor gives it the variance 1")
            layer.weight /= variance.sqrt().to(layer.weight.dtype)
            output = layer.forward(*args)
            counts[name] += 1
        return output

    if orthonormal:
        for _, layer in _layers(model):
            draw = None if generator is not None else layer.weight.detach().clone()
            orthogonal_(layer.weight, draw=draw, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    _pass(model, batch, correct)
    return counts


def data_dependent_(model: nn.Module, batch: Tensor | tuple[Any, ...]) -> None:
    """Scale and shift every channel of every layer to mean 0 and variance 1 on a batch, layer by layer in one pass.

    Layers get their shift by the bias; those without one are only scaled.

    Raises:
        ValueError: a channel is constant on the batch.
    """
    seen: set[str] = set()

    def correct(name: str, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if name in seen:
            return None
        seen.add(name)
        channels = output.double().movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
        deviation, mean = channels.std(1, correction=0), channels.mean(1)
        if not bool((deviation > 0).all()):
            raise ValueError(f"{name} puts out a constant channel on this batch")
        layer.weight /= deviation.to(layer.weight.dtype).view(-1, *(1,) * (layer.weight.dim() - 1))
        if layer.bias is not None:
            layer.bias.copy_((layer.bias.double() - mean) / deviation)
        output = layer.forward(*args)
        return output

    _pass(model, batch, correct)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _WEIGHTED)]
    if not found:
        raise Unsupported(f"this {type(model).__name__} has no convolution and no linear layer")
    return iter(found)


def _pass(model: nn.Module, batch: Tensor | tuple[Any, ...], correct: Callable[..., Tensor | None]) -> None:
    """Run the model in evaluation mode with a correction at every layer, whose result goes on."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with ExitStack() as hooks, torch.no_grad():
            for name, layer in _layers(model):

                def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> Tensor | None:
                    return correct(name, module, args, output)

                hooks.callback(layer.register_forward_hook(hook).remove)
            model(*(batch if isinstance(batch, tuple) else (batch,)))
    finally:
        for module, training in modes.items():
            module.training = training


# -- residual networks -------------------------------------------------------------------------------------------------


def residual_branches(model: nn.Module) -> list[tuple[list[nn.Module], list[nn.Module]]]:
    """Convolutions and norms of the residual branches of a ResNet, each in order.

    Blocks are found by the names that torchvision and convatlas use: ``conv1``, ``conv2`` and so on, ``bn1``, ``bn2``.

    Raises:
        Unsupported: there is no such block.
    """
    found = []
    for block in model.modules():
        parts = dict(block.named_children())
        convs, norms = ([parts[f"{kind}{i}"] for i in range(1, 10) if f"{kind}{i}" in parts] for kind in ("conv", "bn"))
        if len(convs) > 1:
            found.append((convs, norms))
    if not found:
        raise Unsupported(f"this {type(model).__name__} has no residual block with conv1 and conv2: pass branches")
    return found


def zero_gamma_(model: nn.Module) -> int:
    """Set the weight of the last norm of every residual branch to zero, so that blocks begin as the identity.

    Returns:
        How many there are.

    Raises:
        Unsupported: there is no residual branch that ends in a norm.
    """
    ends: list[Any] = [norms[-1] for _, norms in residual_branches(model) if norms and isinstance(norms[-1], _NORMS)]
    if not ends:
        raise Unsupported(f"no residual branch of this {type(model).__name__} ends in a norm")
    for norm in ends:
        nn.init.zeros_(norm.weight)
    return len(ends)


def fixup_(model: nn.Module, branches: Sequence[Sequence[nn.Module]] | None = None) -> None:
    """Fixup: the last layer of every residual branch is zero, the m - 1 others are scaled by L^(-1 / (2 m - 2)).

    L is the number of branches; the present weights, which should be He's, are scaled, and a linear layer that no
    branch holds and that comes last, the classifier, becomes zero. SkipInit, a factor of zero at the end of a branch,
    is what `convatlas.nn.scale.LayerScale` with an initial value of zero does.

    Args:
        model: changed in place.
        branches: layers of each residual branch in order; found by `residual_branches` when left out.
    """
    found: list[list[Any]] = [list(each) for each in branches or [convs for convs, _ in residual_branches(model)]]
    held = {layer for each in found for layer in each}
    with torch.no_grad():
        for layers in found:
            factor = len(found) ** (-1 / (2 * len(layers) - 2)) if len(layers) > 1 else 1.0
            for layer in layers[:-1]:
                layer.weight *= factor
            layers[-1].weight.zero_()
        _, last = list(_layers(model))[-1]
        if isinstance(last, nn.Linear) and last not in held:
            last.weight.zero_()
            if last.bias is not None:
                last.bias.zero_()
