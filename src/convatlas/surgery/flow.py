"""Which layer of a model reads what which other layer wrote, seen in a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from convatlas.surgery.selection import tensors, undisturbed

__all__ = ["Flow"]

_READS_VALUES = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class Flow(TorchDispatchMode):
    """The ways of tensors between chosen layers, recorded while the model runs.

    Every operation of a run is seen, whether a module, a function or a method asked for it. A layer's output counts
    as used by another layer only when it is that layer's input; any other operation on it, and its being a result of
    the model or of its ``forward_features``, counts as used elsewhere.

    Args:
        layers: modules without children, each of which reads one tensor and writes another.

    Attributes:
        sources: for each layer, who wrote its input; None for anything that is no chosen layer.
        readers: for each layer, who read its output; None for anything that is no chosen layer.
        dims: for each layer, the numbers of axes of its outputs.
        borrowed: layers whose parameters or buffers were read outside their own forward.
        decides: whether the model looked at values of tensors, so that it may take another way next time.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = tuple(layers)
        self.sources: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
        self.readers: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
        self.dims: dict[nn.Module, set[int]] = defaultdict(set)
        self.borrowed: set[nn.Module] = set()
        self.decides = False
        self._writer = WeakTensorKeyDictionary()
        #: For each output, the input that it was made from and how often that had been changed in place by then.
        self._made_from = WeakTensorKeyDictionary()
        self._active: list[tuple[nn.Module, Tensor]] = []
        self._owner = {
            id(tensor): layer
            for layer in self.layers
            for tensor in chain(layer.parameters(recurse=False), layer.buffers(recurse=False))
        }

    def record(self, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Run the model and return its output."""
        handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.layers]
        handles += [layer.register_forward_hook(self._leave) for layer in self.layers]
        tapped = [(part, dict(part.__dict__)) for part in model.modules() if hasattr(part, "forward_features")]
        try:
            for part, _ in tapped:
                # Feature maps are results too, even those that forward itself does not go on with.
                part.__dict__["forward_features"] = self._tapped(part.forward_features)  # type: ignore[arg-type]
            with undisturbed(model), self:
                return self._results(model(*inputs))
        finally:
            for part, before in tapped:
                del part.__dict__["forward_features"]
                part.__dict__ |= {key: value for key, value in before.items() if key == "forward_features"}
            for handle in handles:
                handle.remove()

    def _tapped(self, features: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._results(features(*args, **kwargs))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.decides |= func in _READS_VALUES
        for tensor in tensors((args, kwargs)):
            self._read(tensor)
        return func(*args, **kwargs)

    def _read(self, tensor: Tensor) -> None:
        layer, given = self._active[-1] if self._active else (None, None)
        writer = self._writer.get(tensor)
        if writer is not None:
            self.readers[writer].add(layer if tensor is given else None)
        owner = self._owner.get(id(tensor))
        if owner is not None and owner is not layer:
            self.borrowed.add(owner)

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(tensors((args, kwargs)))
        writer = self._writer.get(given)
        self.sources[layer].add(writer)
        if writer is not None:
            original, changes = self._made_from[given]
            if _changes(original) != changes:
                # Without the writer, this layer would read what stands there now.
                self.readers[writer].add(None)
        self._active.append((layer, given))

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        _, given = self._active.pop()
        self._writer[output] = layer
        self._made_from[output] = given, _changes(given)
        self.dims[layer].add(output.dim())

    def _results(self, value: Any) -> Any:
        for tensor in tensors(value):
            if (writer := self._writer.get(tensor)) is not None:
                self.readers[writer].add(None)
        return value


def _changes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
