"""Merge a model into the form that is deployed: fewer layers, the same function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from convatlas.errors import Unsupported
from convatlas.nn.scale import LayerScale
from convatlas.surgery.flow import Flow
from convatlas.surgery.selection import (
    Surgery,
    as_inputs,
    has_hooks,
    named,
    place,
    slots,
    tensors,
    undisturbed,
    working_copy,
)

__all__ = ["merge"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEAR = (*_CONVS, *_TRANSPOSED, nn.Linear)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_SCALES = (*_BATCH_NORMS, LayerScale)


def merge(model: nn.Module, example_input: Tensor | tuple[Any, ...] | None = None, *, inplace: bool = False) -> Surgery:
    """Fold what is constant in evaluation into neighbouring layers; the result computes the same up to rounding.

    In this order: layers with ``from_conv`` and ``to_conv()`` become plain convolutions, layers with ``merged()``
    become what it returns, parametrizations of `torch.nn.utils.parametrize` become plain parameters, and batch norms
    and LayerScales become the identity, folded into the convolution or linear layer before or behind them. A batch norm
    is folded only where the tensors between the two go from the one to the other and nowhere else, which is seen in a
    run of the model on the example call, and where padding with zeros does not lie between. Layers that are shared or
    run several times are folded if that holds for all their calls. Arithmetic is done in float64.

    The model is taken as in evaluation, and the result is in evaluation mode. Merging the result again changes nothing.
    With an example call the result is compared with the original on it before it is returned.

    Args:
        model: any model; left as it is.
        example_input: input, or tuple of inputs, of an example call; by default ``model.example_inputs()`` where there
            is such a method. Where the size of the input decides which layers run, give the size that will be used.
        inplace: change the model itself instead of a copy; an error may leave it partly merged.

    Returns:
        The merged model; ``changed`` names the layers that were replaced or made plain, ``skipped`` the norms, scales
        and layers that were not, with the reason. Nothing to merge is no error.

    Raises:
        ValueError: model is no module, or there are norms to fold and no example call.
        Unsupported: the result does not run or does not compute what the model does, or the model cannot be copied.
    """
    holder = working_copy(model, inplace)
    work = holder.get_submodule("model").eval()
    inputs = as_inputs(work, example_input)
    expected = None
    if inputs is not None:
        with undisturbed(work):
            expected = [tensor.clone() for tensor in tensors(work(*inputs))]
    changed, skipped = _plain_layers(holder)
    work = holder.get_submodule("model")
    changed += _plain_parameters(holder)
    if any(type(part) in _SCALES for part in work.modules()):
        if inputs is None:
            raise ValueError("example_input must be given: which layers are neighbours is seen in a run of the model")
        folded, left = _fold_scales(holder, inputs)
        changed += folded
        skipped += left
    if changed and inputs is not None and expected is not None:
        try:
            with undisturbed(work):
                actual = list(tensors(work(*inputs)))
        except Exception as error:
            raise Unsupported(f"the merged {type(model).__name__} does not run: {error}") from error
        _compare(actual, expected, type(model).__name__)
    return Surgery(work, tuple(changed), tuple(skipped))


def _plain_layers(holder: nn.Module) -> tuple[list[str], list[tuple[str, str]]]:
    changed, skipped = [], []
    replaced: dict[nn.Module, nn.Module] = {}
    inside: set[nn.Module] = set()
    for layer, name in named(holder).items():
        conv_like = callable(getattr(layer, "from_conv", None)) and callable(getattr(layer, "to_conv", None))
        if layer in inside or not (conv_like or callable(getattr(layer, "merged", None))):
            continue
        if has_hooks(layer):
            skipped.append((name, "it has forward hooks, which would be lost"))
            continue
        with torch.no_grad():
            plain = layer.to_conv() if conv_like else layer.merged()  # type: ignore[operator]
        if plain is None:
            skipped.append((name, "it depends on its input, so no plain layer does the same"))
        else:
            replaced[layer] = plain.eval()
            inside.update(layer.modules())
            changed.append(name)
    place([(slot, replaced[slot.module]) for slot in slots(holder) if slot.module in replaced])
    return changed, skipped


def _plain_parameters(holder: nn.Module) -> list[str]:
    changed = []
    for module, name in named(holder).items():
        if not is_parametrized(module):
            continue
        lists = module.get_submodule("parametrizations")
        with torch.no_grad():
            values = {key: getattr(module, key).detach().clone() for key, _ in lists.named_children()}
        # Not by torch's own removal, which deletes the property from the class that the original and its copy share.
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
        # Torch's weight normalisation leaves a hook that renames keys to those of its parametrization.
        for number, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(getattr(hook, "hook", hook), "__name__", "") == "_weight_norm_compat_hook":
                del module._load_state_dict_pre_hooks[number]
        for key, value in values.items():
            if originals := list(lists.get_submodule(key).parameters(recurse=False)):
                setattr(module, key, nn.Parameter(value, any(entry.requires_grad for entry in originals)))
            else:
                module.register_buffer(key, value)
        changed.append(name)
    return changed


def _fold_scales(holder: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[str], list[tuple[str, str]]]:
    names = named(holder)
    layers = [part for part in names if _is_linear(part) or type(part) in _SCALES]
    flow = Flow(layers)
    flow.record(holder.get_submodule("model"), inputs)
    owners = Counter(id(t) for part in names for t in chain(part._parameters.values(), part._buffers.values()))
    folder = _Folder(flow, names, owners)
    waiting = [part for part in layers if type(part) in _SCALES]
    identities: dict[nn.Module, nn.Module] = {}
    while True:
        # A layer can be folded into its neighbour once those between them are gone.
        reasons = {part: folder.fold(part) for part in waiting}
        identities |= {part: nn.Identity().eval() for part, reason in reasons.items() if reason is None}
        if len(waiting) == len(waiting := [part for part in waiting if part not in identities]):
            break
    place([(slot, identities[slot.module]) for slot in slots(holder) if slot.module in identities])
    return [names[part] for part in identities], [(names[part], reasons[part] or "") for part in waiting]


class _Folder:
    """Folds affine maps of channels into the linear layers beside them, and keeps account of who is beside whom."""

    def __init__(self, flow: Flow, names: dict[nn.Module, str], owners: Counter[int]) -> None:
        self.flow = flow
        self.names = names
        self.owners = owners

    def fold(self, part: nn.Module) -> str | None:
        """Fold a norm or LayerScale into a neighbour, or say why not."""
        if reason := self._fixed(part) or self._not_static(part):
            return reason
        before = self._before(part)
        if isinstance(before, nn.Module):
            scale, shift = _affine(part)
            _scale_output(before, scale, shift)
            self._join(before, part)
            return None
        behind = self._behind(part)
        if isinstance(behind, nn.Module):
            scale, shift = _affine(part)
            _scale_input(behind, scale, shift)
            self._join(part, behind)
            return None
        return f"{before}; {behind}"

    def _fixed(self, part: nn.Module) -> str | None:
        if self.flow.decides:
            return "the model looks at values while it runs, so it may run other layers next time"
        if has_hooks(part):
            return "it has forward hooks, which would be lost"
        if part not in self.flow.sources:
            return "the model does not call it on the example input"
        if part in self.flow.borrowed:
            return "its parameters are read by other parts of the model"
        return None

    def _not_static(self, part: nn.Module) -> str | None:
        if type(part) in _BATCH_NORMS and getattr(part, "running_mean", None) is None:
            return "it has no running statistics"
        return None

    def _before(self, part: nn.Module) -> nn.Module | str:
        sources = self.flow.sources[part]
        layer = next(iter(sources)) if len(sources) == 1 else None
        if layer is None or not _is_linear(layer):
            return "its input does not come from one convolution or linear layer alone"
        if self.flow.readers[layer] != {part}:
            return f"the output of {self.names[layer]} is used elsewhere too"
        dims = self.flow.dims[layer]
        if any(_axis(layer, count) != _axis(part, count) for count in dims):
            return f"it works on another axis than {self.names[layer]}"
        return self._changeable(layer) or layer

    def _behind(self, part: nn.Module) -> nn.Module | str:
        readers = self.flow.readers[part]
        layer = next(iter(readers)) if len(readers) == 1 else None
        if layer is None or not _is_linear(layer) or self.flow.sources[layer] != {part}:
            return "its output does not go to one convolution or linear layer alone"
        if any(_axis(layer, count) != _axis(part, count) for count in self.flow.dims[part]):
            return f"it works on another axis than {self.names[layer]}"
        if type(layer) in _TRANSPOSED:
            return f"{self.names[layer]} behind it is a transposed convolution, whose borders would change"
        if type(part) in _BATCH_NORMS and _pads_with_zeros(layer):
            return f"{self.names[layer]} behind it pads with zeros"
        return self._changeable(layer) or layer

    def _changeable(self, layer: nn.Module) -> str | None:
        if any(self.owners[id(parameter)] > 1 for parameter in layer.parameters(recurse=False)):
            return f"the weights of {self.names[layer]} are tied to another module"
        reason = self._fixed(layer)
        return reason and f"{self.names[layer]} cannot be changed: {reason}"

    def _join(self, first: nn.Module, second: nn.Module) -> None:
        """One of two neighbours is gone; the other has the input of the first and the output of the second."""
        flow = self.flow
        kept, gone = (first, second) if type(second) in _SCALES else (second, first)
        if kept is first:
            flow.readers[kept] = flow.readers[gone]
            for reader in flow.readers[gone] - {None}:
                flow.sources[reader] = {kept if source is gone else source for source in flow.sources[reader]}  # type: ignore[index]
            flow.dims[kept] = flow.dims[gone]
        else:
            flow.sources[kept] = flow.sources[gone]
            for source in flow.sources[gone] - {None}:
                flow.readers[source] = {kept if reader is gone else reader for reader in flow.readers[source]}  # type: ignore[index]


def _is_linear(layer: nn.Module) -> bool:
    # Subclasses may compute something else, so types are compared exactly, unless a class says that it does not.
    return type(layer) in _LINEAR or getattr(layer, "computes_convolution", False) is True


def _axis(layer: nn.Module, dims: int) -> int:
    """Axis of the channels that a layer reads or writes, in a tensor with so many axes."""
    if isinstance(layer, LayerScale):
        return layer.channel_dim % dims
    if type(layer) in _BATCH_NORMS:
        return 1
    positions = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)  # type: ignore[arg-type]
    return dims - 1 - positions


def _pads_with_zeros(layer: nn.Module) -> bool:
    if not isinstance(layer, _CONVS) or layer.padding_mode != "zeros":
        return False
    if layer.padding == "same":
        return any(size > 1 for size in layer.kernel_size)
    return layer.padding != "valid" and any(layer.padding)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _affine(part: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Factor and, unless it is zero, summand of each channel."""
    if isinstance(part, LayerScale):
        return _wide(part.gamma), None
    mean, variance = _wide(part.running_mean), _wide(part.running_var)  # type: ignore[arg-type]
    scale = (variance + part.eps).rsqrt()  # type: ignore[operator]
    if part.weight is not None:
        scale = scale * _wide(part.weight)  # type: ignore[arg-type]
    shift = -mean * scale
    return scale, shift if part.bias is None else shift + _wide(part.bias)  # type: ignore[arg-type]


def _by_groups(layer: nn.Module) -> Tensor:
    """The weight as (groups, channels, channels, *kernel)."""
    return _wide(layer.weight).unflatten(0, (getattr(layer, "groups", 1), -1))  # type: ignore[arg-type]


def _scale_output(layer: nn.Module, scale: Tensor, shift: Tensor | None) -> None:
    weight = _by_groups(layer)
    kernel = [1] * (weight.dim() - 3)
    groups = weight.shape[0]
    # A transposed convolution has its output channels second.
    shape = (groups, 1, -1, *kernel) if type(layer) in _TRANSPOSED else (groups, -1, 1, *kernel)
    bias = None if layer.bias is None else _wide(layer.bias) * scale  # type: ignore[arg-type]
    if shift is not None:
        bias = shift if bias is None else bias + shift
    _set(layer, weight * scale.reshape(shape), bias)


def _scale_input(layer: nn.Module, scale: Tensor, shift: Tensor | None) -> None:
    weight = _by_groups(layer)
    shape = (weight.shape[0], 1, -1, *[1] * (weight.dim() - 3))
    bias = None if layer.bias is None else _wide(layer.bias)  # type: ignore[arg-type]
    if shift is not None:
        summand = (weight * shift.reshape(shape)).flatten(2).sum(2).flatten()
        bias = summand if bias is None else bias + summand
    _set(layer, weight * scale.reshape(shape), bias)


def _set(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    old = layer.weight
    layer.weight = nn.Parameter(weight.flatten(0, 1).to(old.dtype), old.requires_grad)  # type: ignore[arg-type]
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(old.dtype), old.requires_grad)  # type: ignore[arg-type]


def _compare(actual: list[Tensor], expected: list[Tensor], kind: str) -> None:
    """Refuse a result that differs by more than rounding can explain."""
    if len(actual) != len(expected):
        raise Unsupported(f"the merged {kind} returns {len(actual)} tensors instead of {len(expected)}")
    for ours, theirs in _floating(actual, expected):
        eps = torch.finfo(theirs.dtype).eps
        # Short types and GPUs round more than the type says.
        tolerance = eps**0.5 if theirs.dtype in (torch.float64, torch.complex128) else max(eps**0.5, 1e-2)
        finite = theirs.isfinite()
        if not finite.any():
            continue
        largest = theirs[finite].abs().max()
        error = (ours - theirs)[finite].abs().max()
        if not error <= tolerance * largest:
            raise Unsupported(
                f"merging changes the output of this {kind} by {float(error / largest):.1g} of its largest value, "
                "so its layers work together in a way that a run does not show"
            )


def _floating(actual: list[Tensor], expected: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for ours, theirs in zip(actual, expected, strict=True):
        floating = theirs.is_floating_point() or theirs.is_complex()
        if floating and theirs.numel() and not theirs.is_meta:
            yield ours, theirs
