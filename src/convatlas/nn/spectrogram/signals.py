"""What the spectrogram layers share: their input, output formats, checkpoints, and the way back from a spectrogram."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from convatlas.ops.framing import PadMode
from convatlas.weights import Layout

__all__ = [
    "NNAUDIO_LAYOUT",
    "OutputFormat",
    "SpectrogramLayer",
    "check_format",
    "check_padding",
    "formatted",
    "least_squares_inverse",
    "magnitude",
    "signals",
]

OutputFormat = Literal["Complex", "Magnitude", "Phase"]

#: nnAudio's checkpoints, which call the lengths of filters "lenghts". Give it to a network that has such a layer:
#: ``layouts = {"nnaudio": NNAUDIO_LAYOUT}``.
NNAUDIO_LAYOUT = Layout(renames=((r"(^|\.)lenghts$", r"\1lengths"),))

#: What keeps the square root of a trained magnitude differentiable at zero.
_TRAINED_FLOOR = 1e-8


class SpectrogramLayer(nn.Module):
    """A layer that takes signals; keeps its kernels as buffers, or as parameters where they are trained."""

    layouts: ClassVar[Mapping[str, Layout]] = {"nnaudio": NNAUDIO_LAYOUT}

    def __init__(self, verbose: bool = False) -> None:
        super().__init__()
        if verbose:
            logging.getLogger("convatlas").info("creating the kernels of %s", type(self).__name__)

    @property
    def reach(self) -> int | None:
        """Samples before and after the middle of a frame that it depends on; None where frames are not centred."""
        return None

    @property
    def grid(self) -> int:
        """A signal may be cut at multiples of so many samples without a change of the frames far from the cut."""
        return 1

    def after_loading(self, refresh: Callable[[Any, object], None]) -> None:
        """Call ``refresh`` with this layer whenever it has loaded a checkpoint."""
        self.register_load_state_dict_post_hook(refresh)  # type: ignore[no-untyped-call]

    def keep(self, name: str, kernels: Tensor, trained: bool = False) -> None:
        """Register a tensor as a parameter if it is trained, else as a buffer."""
        if trained:
            self.register_parameter(name, nn.Parameter(kernels))
        else:
            self.register_buffer(name, kernels)


def signals(x: Tensor) -> Tensor:
    """Signals (L,), (B, L) or (B, 1, L) as (B, L).

    Raises:
        ValueError: x has another shape, more than one channel, or is not floating point.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be real floating point, got {x.dtype}: convert it to float, integers to [-1, 1]")
    if x.dim() == 1:
        return x.unsqueeze(0)
    if x.dim() == 3 and x.shape[1] == 1:
        return x.squeeze(1)
    if x.dim() != 2:
        raise ValueError(
            f"x must be (L,), (B, L) or (B, 1, L), got {tuple(x.shape)}; put several channels into the batch"
        )
    return x


def check_format(output_format: str) -> None:
    """Refuse an unknown output format."""
    if output_format not in get_args(OutputFormat):
        raise ValueError(f"output_format must be 'Complex', 'Magnitude' or 'Phase', got {output_format!r}")


def check_padding(hop_length: int, pad_mode: str) -> None:
    """Refuse a hop that is not positive and an unknown way of padding."""
    if hop_length < 1:
        raise ValueError(f"hop_length must be at least 1, got {hop_length}")
    if pad_mode not in get_args(PadMode):
        raise ValueError(f"pad_mode must be 'reflect' or 'constant', got {pad_mode!r}")


def magnitude(spectrum: Tensor, trained: bool) -> Tensor:
    """Magnitudes of (..., 2), real and imaginary parts; safe to differentiate at zero."""
    if trained:
        return (spectrum.square().sum(-1) + _TRAINED_FLOOR).sqrt()
    if spectrum.requires_grad:  # whose gradient at zero is zero
        return torch.linalg.vector_norm(spectrum, dim=-1)
    real, imag = spectrum.unbind(-1)
    return torch.addcmul(real * real, imag, imag).sqrt()


def formatted(spectrum: Tensor, output_format: OutputFormat, trained: bool, *, as_vector: bool) -> Tensor:
    """A spectrum (B, F, T, 2) in the format that is asked for; phases as an angle or as (cosine, sine)."""
    if output_format == "Complex":
        return spectrum
    if output_format == "Magnitude":
        return magnitude(spectrum, trained)
    # Adding zero turns -0 into 0, which has the angle 0 instead of -pi.
    angle = torch.atan2(spectrum[..., 1] + 0.0, spectrum[..., 0])
    return torch.stack([angle.cos(), angle.sin()], dim=-1) if as_vector else angle


def least_squares_inverse(
    transform: Callable[[Tensor], Tensor], spectrum: Tensor, length: int, *, n_iter: int = 50, damping: float = 1e-6
) -> Tensor:
    """The signals whose transform is nearest to ``spectrum``, by conjugate gradients.

    For transforms that are linear in the signal, e.g. ``lambda x: cqt(x, output_format="Complex")``, and also for those
    that lose part of it. The gradients of the transform are its transpose.

    Args:
        transform: maps (B, length) to the shape of spectrum.
        spectrum: (B, ...), real.
        length: samples of the signals.
        n_iter: steps at most.
        damping: weight of the squared signal, over the largest gain of the transform that is met.

    Returns:
        (B, length).

    Raises:
        ValueError: length or n_iter is not positive, or the transform gives another shape.
    """
    if length < 1 or n_iter < 1:
        raise ValueError(f"length and n_iter must be positive, got {length} and {n_iter}")
    with torch.enable_grad():
        probe = torch.zeros(len(spectrum), length, dtype=spectrum.dtype, device=spectrum.device, requires_grad=True)
        output = transform(probe)
    if output.shape != spectrum.shape:
        raise ValueError(
            f"transform must give the shape of spectrum, {tuple(spectrum.shape)}, got {tuple(output.shape)}"
        )

    def transpose(y: Tensor) -> Tensor:
        return torch.autograd.grad(output, probe, y, retain_graph=True)[0]

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1, keepdim=True)

    tiny = torch.finfo(spectrum.dtype).tiny
    x = torch.zeros_like(probe)
    residual = transpose(spectrum.detach())
    direction, energy = residual, dot(residual, residual)
    first, weight = energy, torch.zeros_like(energy)
    with torch.no_grad():
        for _ in range(n_iter):
            image = transpose(transform(direction))
            gain = dot(direction, image) / dot(direction, direction).clamp_min(tiny)
            weight = torch.maximum(weight, damping * gain) if not weight.any() else weight
            image = image + weight * direction
            step = energy / dot(direction, image).clamp_min(tiny)
            x, residual = x + step * direction, residual - step * image
            fresh = dot(residual, residual)
            direction, energy = residual + fresh / energy.clamp_min(tiny) * direction, fresh
            if bool((energy <= torch.finfo(x.dtype).eps ** 2 * first).all()):
                break
    return x
