"""Layers are exchanged, inserted and removed where they fit; the others are named, the original stays."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from battery.entries import NETWORKS
from battery.subjects import Network
from convatlas.errors import Unsupported
from convatlas.networks.registry import create_model
from convatlas.nn.mixers.eca import ECA
from convatlas.nn.mixers.squeeze_excite import SqueezeExcite
from convatlas.nn.norm import ChannelLayerNorm
from convatlas.surgery import insert, merge, remove, swap
from surgery.toys import (
    BATCH_NORMS,
    DoubledConv2d,
    Model,
    check_same,
    count,
    ready,
    triple,
)

networks = pytest.mark.parametrize(
    "network", [entry for entry in NETWORKS if entry.takes_tensors], ids=lambda network: network.name
)


# Swap


def test_swap_takes_geometry_and_weights():
    model = ready(create_model("resnet18", depths=(1, 1), widths=(8, 12), stem_width=8, num_classes=3))
    x = torch.randn(2, 3, 33, 35, dtype=torch.float64)
    result = swap(model, nn.Conv2d, DoubledConv2d, factor=4.0)
    assert count(result.model, DoubledConv2d) == count(model, nn.Conv2d) == len(result.changed)
    assert count(model, DoubledConv2d) == 0
    check_same(model, result, x)
    assert merge(result.model).model(x).shape == (2, 3)
    assert count(merge(result.model).model, (DoubledConv2d, *BATCH_NORMS)) == 0
    assert not any(part.training for part in result.model.modules())


def test_swap_where_and_reasons():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, (1, 3)), nn.Conv2d(4, 4, 3))
    result = swap(model, nn.Conv2d, DoubledConv2d)
    assert result.changed == ("0", "2")
    assert result.skipped == (("1", "the kernel must be square"),)
    assert swap(model, nn.Conv2d, DoubledConv2d, where="[12]").changed == ("2",)
    assert swap(model, "2", DoubledConv2d).changed == ("2",)
    assert swap(model, nn.Conv2d, DoubledConv2d, where=lambda name, conv: conv.in_channels == 3).changed == ("0",)
    assert swap(model, (nn.Conv2d, nn.Linear), lambda conv: nn.Identity()).changed == ("0", "1", "2")
    with pytest.raises(Unsupported, match="nothing was swapped: 0: it is a DoubledConv2d already"):
        swap(result.model, "0", DoubledConv2d)
    with pytest.raises(Unsupported, match="has no module that ConvTranspose2d selects"):
        swap(model, nn.ConvTranspose2d, DoubledConv2d)
    with pytest.raises(Unsupported, match=r"nothing was swapped: 1: the kernel must be square$"):
        swap(model, "1", DoubledConv2d)
    with pytest.raises(ValueError, match="selected by type, types, name pattern or function, got 3"):
        swap(model, 3, DoubledConv2d)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer must be"):
        swap(model, nn.Conv2d, "conv")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unknown"):
        swap(model, nn.Conv2d, DoubledConv2d, unknown=1)


def test_swap_tries_each_layer_on_the_example():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3), nn.Flatten())

    def shape_keeping(conv: nn.Conv2d) -> nn.Module:
        return nn.Conv2d(conv.in_channels, 4, 1)

    result = swap(model, nn.Conv2d, shape_keeping, example_input=torch.randn(2, 3, 6, 6))
    assert result.changed == ("0",)
    assert result.skipped[0][0] == "1"
    assert "makes (2, 4, 6, 6) of (2, 4, 6, 6), not (2, 5, 4, 4)" in result.skipped[0][1]
    with pytest.raises(Unsupported, match=r"Linear cannot run on \(2, 3, 6, 6\): "):
        swap(model, "0", lambda conv: nn.Linear(5, 6), example_input=torch.randn(2, 3, 6, 6))


def test_swap_leaves_modules_whose_weights_others_read():
    model = create_model("inceptionnext_tiny", depths=(1,), dims=(16,), num_classes=3)
    result = swap(model, nn.Conv2d, DoubledConv2d)
    assert "stem.0" in result.changed
    named = dict(result.skipped)
    assert named["stages.0.blocks.0.token_mixer.dwconv_hw"] == "the model does not call it"
    check_same(
        model.double().eval(), swap(model, nn.Conv2d, DoubledConv2d), model.example_inputs()[0][..., :64].double()
    )


def test_swap_keeps_sharing_hooks_and_types():
    conv = nn.Conv2d(3, 3, 1)
    model = nn.ModuleDict({"a": conv, "b": conv, "c": nn.Conv2d(3, 3, 1)}).bfloat16()
    model["c"].register_forward_hook(triple)
    result = swap(model, nn.Conv2d, DoubledConv2d)
    assert result.changed == ("a", "b")
    assert result.model["a"] is result.model["b"]
    assert result.model["a"].weight.dtype == torch.bfloat16
    assert "hooks" in result.skipped[0][1]
    assert swap(model, nn.Conv2d, DoubledConv2d, where="b").model["a"].__class__ is nn.Conv2d


def test_swap_of_the_whole_model_and_in_place():
    conv = nn.Conv2d(3, 4, 3)
    result = swap(conv, nn.Conv2d, DoubledConv2d)
    assert result.changed == ("",)
    assert isinstance(result.model, DoubledConv2d)
    model = nn.Sequential(conv)
    assert swap(model, nn.Conv2d, DoubledConv2d, inplace=True).model is model
    assert isinstance(model[0], DoubledConv2d)


def test_swap_leaves_the_inside_of_what_it_replaces():
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.ReLU())), nn.ReLU())
    result = swap(model, nn.Sequential, lambda inner: nn.Sequential(nn.Tanh(), inner), where="?*")
    assert result.changed == ("0",)
    assert [type(part) for part in result.model[0]] == [nn.Tanh, nn.Sequential]


def test_mode_of_what_a_replacement_keeps():
    block = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    model = nn.Sequential(block).train()
    block[0].eval()
    result = swap(model, "0", lambda inner: nn.Sequential(inner, nn.Dropout().eval())).model
    assert [part.training for part in (result[0], result[0][0][0], result[0][0][1], result[0][1])] == [
        *(True, False, True),
        True,
    ]


def test_complex_parameters_stay_complex():
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
            self.bias = nn.Parameter(torch.ones(3))

    result = swap(nn.Sequential(nn.Conv2d(3, 3, 1)).double(), nn.Conv2d, lambda conv: Spectral()).model
    assert (result[0].weight.dtype, result[0].bias.dtype) == (torch.complex64, torch.float64)


# Insert


@networks
@pytest.mark.parametrize("layer", [ECA, SqueezeExcite])
def test_insert_after_every_convolution(network: Network, layer: type[nn.Module]):
    model = network.build()
    x = network.inputs(model, 2)[0]
    options = {"reduction": 2} if layer is SqueezeExcite else {}
    kinds = (nn.Conv2d, nn.Conv3d)
    if not count(model, kinds):
        with pytest.raises(Unsupported, match="has no module that Conv2d or Conv3d selects"):
            insert(model, after=kinds, layer=layer, example_input=x, **options)
        return
    result = insert(model, after=kinds, layer=layer, example_input=x, **options)
    assert len(result.changed) + len(result.skipped) == count(model, kinds)
    assert count(result.model, layer) == len(result.changed) + count(model, layer)
    for name, reason in result.skipped:
        # Some layers take weights or geometry from convolutions, and one channel cannot be squeezed.
        known = r"the model does not call it|has no attribute|reduction must"
        assert re.search(known, reason), (name, reason)
    with torch.no_grad():
        ours, theirs = result.model(x), model(x)
    assert ours.shape == theirs.shape
    assert not torch.equal(ours, theirs)


def test_insert_fills_the_slots_of_residual_blocks():
    model = create_model("resnet18", depths=(1, 2), widths=(8, 12), stem_width=8)
    result = insert(model, ECA, at="*.attention", kernel_size=3)
    assert result.changed == ("layer1.0.attention", "layer2.0.attention", "layer2.1.attention")
    assert [result.model.get_submodule(name).channels for name in result.changed] == [8, 12, 12]
    wanted = create_model("eca_resnet18", depths=(1, 2), widths=(8, 12), stem_width=8, eca_kernel_sizes=(3, 3))
    wanted.load_state_dict(result.model.state_dict())
    x = torch.randn(2, 3, 33, 35)
    torch.testing.assert_close(result.model.eval()(x), wanted.eval()(x))


def test_insert_finds_channels():
    layers = [
        *(nn.Conv1d(3, 4, 1), nn.ConvTranspose2d(3, 5, 1), nn.Linear(3, 6), nn.BatchNorm2d(7)),
        *(nn.GroupNorm(2, 8), nn.LayerNorm(9), ChannelLayerNorm(10), ECA(11)),
    ]
    seen: list[int] = []

    def layer(channels: int) -> nn.Module:
        seen.append(channels)
        return nn.Identity()

    insert(nn.ModuleList(layers), layer, after=lambda name, module: name != "")
    assert seen == list(range(4, 12))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with pytest.raises(Unsupported, match="only a run can tell the channels after a ReLU: give example_input"):
        insert(model, ECA, after=nn.ReLU)
    result = insert(model, ECA, after=nn.ReLU, example_input=torch.randn(1, 3, 5, 5))
    assert result.model[1][1].channels == 4


def test_insert_skips_what_the_layer_does_not_take():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 40, 1), nn.Flatten(), nn.Linear(360, 64))
    result = insert(model, SqueezeExcite, after=(nn.Conv2d, nn.Linear), example_input=torch.randn(2, 3, 3, 3))
    assert result.changed == ("2",)
    reasons = dict(result.skipped)
    assert "channels // reduction must be at least 1, got 4 // 16" in reasons["0"]
    assert "SqueezeExcite cannot run on (2, 64): x must be (B, 64, ...)" in reasons["4"]
    with pytest.raises(Unsupported, match=r"nothing was inserted: 1: it is a ReLU, not an empty slot"):
        insert(model, ECA, at="1")
    with pytest.raises(ValueError, match="exactly one of after and at"):
        insert(model, ECA)
    with pytest.raises(ValueError, match="exactly one of after and at"):
        insert(model, ECA, after="0", at="1")
    with pytest.raises(Unsupported, match=r"Upsample makes \(2, 4, 6, 6\) of \(2, 4, 3, 3\), not \(2, 4, 3, 3\)"):
        insert(model, lambda channels: nn.Upsample(scale_factor=2), after="0", example_input=torch.randn(2, 3, 3, 3))


def test_insert_takes_type_and_mode_and_nests():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())).double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    result = insert(model, ECA, after=_outer_and_inner, example_input=x)
    assert set(result.changed) == {"0", "0.0"}
    assert count(result.model, ECA) == 2
    assert result.model(x).dtype == torch.float64
    assert not any(part.training for part in result.model.modules())


def _outer_and_inner(name: str, module: nn.Module) -> bool:
    return name in ("0", "0.0")


# Remove


def test_remove_norms_and_attention():
    model = ready(create_model("eca_resnet18", depths=(1,), widths=(8,), stem_width=8, eca_kernel_sizes=(3,)))
    x = torch.randn(2, 3, 33, 35, dtype=torch.float64)
    result = remove(model, ECA)
    assert result.changed == ("layer1.0.attention",)
    assert count(result.model, ECA) == 0
    back = insert(result.model, ECA, at="*.attention", kernel_size=3)
    back.model.load_state_dict(model.state_dict())
    check_same(model, back, x)
    without = remove(model, BATCH_NORMS).model
    assert count(without, BATCH_NORMS) == 0
    assert without(x).shape == model(x).shape


def test_remove_needs_the_same_shape():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Identity())
    result = remove(model, lambda name, module: name != "", example_input=torch.randn(2, 3, 5, 5))
    assert result.changed == ("0", "1")
    reasons = dict(result.skipped)
    assert "makes (2, 3, 5, 5) of (2, 3, 5, 5), not (2, 4, 3, 3)" in reasons["2"]
    assert reasons["3"] == "it is the identity already"
    without = remove(model, (nn.ReLU, nn.Conv2d))
    assert without.changed == ("1",)
    assert "only a run can tell whether a Conv2d keeps the shape" in without.skipped[0][1]
    with pytest.raises(Unsupported, match="nothing was removed"):
        remove(model, nn.Conv2d)


def test_remove_leaves_modules_with_several_inputs():
    model = Model(lambda m, x: m.pair(x, x), pair=nn.Bilinear(3, 3, 3))
    with pytest.raises(Unsupported, match="it takes more than one tensor"):
        remove(model, nn.Bilinear, example_input=torch.randn(2, 3))


def test_probing_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout()).train()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 5, 5)
    state = torch.get_rng_state()
    result = remove(model, nn.Dropout, example_input=x)
    assert all(part.training for part in (*model.modules(), *result.model.modules()))
    torch.testing.assert_close(dict(result.model.state_dict()), dict(before), rtol=0, atol=0)
    assert not any(part._forward_hooks for part in (*model.modules(), *result.model.modules()))
    assert torch.equal(torch.get_rng_state(), state)
