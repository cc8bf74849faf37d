"""Every layer that has a name, in every kind of network: it runs, learns, is saved and read back, and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from battery.compare import assert_close, assert_same, leaves, loss
from battery.entries import NETWORKS
from battery.subjects import Network, stir
from convatlas import load_weights, save_weights
from convatlas.catalog import LAYERS, model_module
from convatlas.errors import Unsupported
from convatlas.nn.conv.weighted_conv import BEST_DENSITIES
from convatlas.surgery import merge, place_layer

#: Options with which a layer fits into networks of a few channels.
OPTIONS: dict[str, dict[str, Any]] = {
    "ela": {"groups": 1, "num_groups": 1},
    "fdconv": {"kernel_num": 2},
    "hypercomplex": {"n": 2},
    "squeeze_excite": {"reduction": 2},
    "ulsam": {"num_splits": 1},
    "weighted_conv": {"density": BEST_DENSITIES},
}
_ALGEBRAS = ("hypercomplex", "quaternion")
_CONV_LIKE = tuple(name for name, found in LAYERS.items() if not isinstance(found, str))
#: Layers, networks, and why these layers find no place there.
EXCEPTIONS: list[tuple[tuple[str, ...], tuple[str, ...], str]] = [
    (
        _ALGEBRAS,
        ("as_vit", "crossvit_9_224", "ninformer_cifar10"),
        "its only convolutions of several taps read the three colours, which n does not divide",
    ),
    (
        _ALGEBRAS,
        ("conv_tasnet", "eca_mobilenet_v2", "face_mobilenet_v2_x1_0", "mobilenet_v1_ulsam"),
        "its convolutions of several taps are depthwise",
    ),
    ((*_ALGEBRAS, "fdconv"), ("field_vit",), "its only convolution of several taps reads one channel"),
    (("quaternion",), ("dncnn", "vgg16_bn_small"), "four does not divide the channels of so small a network"),
    (_ALGEBRAS, ("srcnn_915_x3",), "its first and last convolution have one channel on one side"),
    (_ALGEBRAS, ("ffdnn",), "its convolutions read three vegetation indices"),
    (
        ("fdconv",),
        ("convfirst_tiny", "eca_mobilenet_v2", "face_mobilenet_v2_x1_0", "mobilenet_v1_ulsam"),
        "its convolutions of several taps have groups, or read three colours, whose spectrum has no half",
    ),
    (("fdconv",), ("srcnn_915_x3",), "its first and last convolution have one channel on one side"),
    (
        ("fdconv", "cross_d_conv", "deform_conv", "im2win"),
        (
            *("conv_tasnet", "dcdm_64", "disgan_x2", "ffdnn", "med3d_resnet10", "r3d_18", "sequence_cnn"),
            *("skeleton_two_stream", "uniformer3d_small_split"),
        ),
        "the layer is for images only",
    ),
    (
        ("weighted_conv", "finite_difference"),
        (
            *("as_vit", "crossvit_9_224", "field_vit", "inceptionnext_tiny", "ninformer_cifar10", "pvt_tiny"),
            "sgconvnext_tiny",
        ),
        "the kernel must have a middle; its convolutions have even kernels or are called by the operator around them",
    ),
    (tuple(LAYERS), ("emlp", "eccc", "emlp_eccc", "forecast_lstm"), "it has no convolution layer"),
    (tuple(LAYERS), ("long_conv",), "it works on sequences, by kernels as long as they are"),
    (
        tuple(LAYERS),
        ("fno", "oformer", "t1_navier_stokes", "t1_fno_navier_stokes"),
        "it has no convolution of several taps",
    ),
    (_CONV_LIKE, ("wdsr_x2",), "its convolutions have weight normalisation, which another layer would lose"),
    (_CONV_LIKE, ("B_6-Wi_512",), "its only convolution is a linear layer on the whole image"),
    (
        _CONV_LIKE,
        ("phresnet18", "phvgg16", "phsed_full", "cross_d_resnet18"),
        "all its convolutions of several taps are conv-like layers already",
    ),
]


class PlainNetwork(nn.Module):
    """A network as anyone writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of an image (B, 3, H, W)."""
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def _families() -> dict[str, Network]:
    families: dict[str, Network] = {}
    for entry in (each for each in NETWORKS if each.takes_tensors):
        families.setdefault(model_module(entry.model), entry)
    return {entry.name: entry for entry in families.values()}


FAMILIES = _families()


def _build(network: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    if network == "plain":
        model: nn.Module = PlainNetwork()
        stir(model)
        inputs: tuple[Tensor, ...] = (torch.randn(2, 3, 13, 11),)
    else:
        model = FAMILIES[network].build()
        inputs = FAMILIES[network].inputs(model, 2)
    # Random layers in deep networks multiply what rounding changes.
    return model.double().eval(), tuple(x.double() if x.is_floating_point() else x for x in inputs)


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("host", ["plain", *FAMILIES])
def test_layer_in_network(host: str, layer_name: str, tmp_path: Path):
    model, inputs = _build(host)
    options = OPTIONS.get(layer_name, {})
    if any(layer_name in layers and host in hosts for layers, hosts, _ in EXCEPTIONS):
        with pytest.raises(Unsupported):
            place_layer(model, layer_name, example_input=inputs, **options)
        return
    placed = place_layer(model, layer_name, example_input=inputs, **options)
    assert placed.changed
    changed = placed.model
    stir(changed)
    with torch.no_grad():
        expected = changed(*inputs)
        assert [leaf.shape for leaf in leaves(expected)] == [leaf.shape for leaf in leaves(model(*inputs))]

    loss(changed.train()(*inputs)).backward()
    own = [p for name in placed.changed for p in changed.get_submodule(name).parameters() if p.requires_grad]
    reached = [parameter.grad for parameter in own if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in reached)
    assert not own or any(gradient.any() for gradient in reached)

    save_weights(changed.eval(), tmp_path / "weights.safetensors")
    again = place_layer(_build(host)[0], layer_name, example_input=inputs, **options).model.eval()
    load_weights(again, tmp_path / "weights.safetensors")
    merged = merge(again, inputs).model
    with torch.no_grad():
        expected = changed(*inputs)
        assert_same(again(*inputs), expected)
        assert_close(merged(*inputs), expected)
