"""Frequency dynamic convolution beyond what the battery tests."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convatlas.errors import Unsupported
from convatlas.networks.registry import create_model
from convatlas.nn.conv.fdconv import (
    FDConv2d,
    FDLinear,
    convert_to_fdconv,
    fix_kernels,
    fourier_weight,
    freeze_spectra,
    frequency_groups,
    inverse_fourier_weight,
)
from convatlas.nn.conv.frequency_modulation import FrequencyBandModulation
from convatlas.training.measure import count_parameters
from convatlas.weights import load_weights

# Channels, filters and kernel size -> parameters, of the spectrum, of KSM global and local and of FBM, for n = 64.
PUBLISHED = {
    (64, 64, 1): (8994, 4224, 4322, 448, 0),
    (64, 64, 3): (46462, 37248, 4475, 3008, 1731),
    (256, 64, 1): (28002, 16512, 10658, 832, 0),
    (512, 512, 3): (2452910, 2362368, 52651, 24064, 13827),
    (2048, 512, 1): (1658178, 1049600, 600898, 7680, 0),
}


def neutral(layer: FDConv2d) -> FDConv2d:
    """Without weights behind its means every factor of a layer is one."""
    ksm = layer.ksm_global
    parts = [ksm.channel_fc, ksm.filter_fc, ksm.spatial_fc, ksm.kernel_fc, *(layer.fbm.convs if layer.fbm else ())]
    with torch.no_grad():
        for part in [*parts, layer.ksm_local.conv if layer.ksm_local else None]:
            if part is not None:
                part.weight.zero_()
    return layer.eval()


@pytest.mark.parametrize("sizes", PUBLISHED)
def test_parameters(sizes: tuple[int, int, int]):
    with torch.device("meta"):
        layer = FDConv2d(*sizes, bias=False)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    parts = [count_parameters(part) if part else 0 for part in (layer.ksm_global, layer.ksm_local, layer.fbm)]
    assert (count_parameters(layer), layer.dft_weight.numel(), *parts) == PUBLISHED[sizes]


def test_a_network_has_the_published_parameters():
    with torch.device("meta"):
        model = create_model("resnet50_fdconv")
    assert count_parameters(model) == 25_557_032 + 3_647_120
    assert {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, FDConv2d)} == {
        *("conv1", "conv2", "conv3")
    }


@pytest.mark.parametrize(("size", "side"), [(1, 3), (3, 5), (3, 20)])  # factors on the map, and on the weight
def test_without_modulation_it_is_the_convolution(size: int, side: int):
    conv = nn.Conv2d(18, 20, size, stride=2, padding=1).double()
    layer = neutral(FDConv2d.from_conv(conv, kernel_num=10))
    x = torch.randn(2, 18, side, side + 1, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))
    torch.testing.assert_close(layer.spatial_kernels().mean(0), conv.weight)
    torch.testing.assert_close(inverse_fourier_weight(layer.dft_weight[0], size), conv.weight)


def test_copies_of_the_spectrum_share_the_weight():
    conv = nn.Conv2d(18, 20, 3).double()
    layer = neutral(FDConv2d.from_conv(conv, kernel_num=10, param_ratio=2, kernel_act="softmax"))
    x = torch.randn(2, 18, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))


def test_factors_on_the_weight_and_on_the_map_agree(monkeypatch: pytest.MonkeyPatch):
    layer = stirred(FDConv2d(18, 20, 3, padding=1, kernel_num=10)).double().eval()
    x = torch.randn(2, 18, 20, 20, dtype=torch.float64)
    on_weight = layer(x)
    channels, filters, taps, kernels = layer.ksm_global(x.mean((2, 3)))
    weight = layer._mixed(kernels) * taps[:, None, None] * layer.ksm_local(x.mean((2, 3)))
    seen = layer.fbm(x) * channels[:, :, None, None]
    each = [nn.functional.conv2d(one[None], own, padding=1) for one, own in zip(seen, weight, strict=True)]
    torch.testing.assert_close(on_weight, torch.cat(each) * filters[:, :, None, None] + layer.bias[:, None, None])


def stirred(layer: Any) -> Any:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def test_groups_are_disjoint_cover_everything_and_rise():
    indices = frequency_groups(20, 3, 18, 10)
    flat = (indices[0] * 28 + indices[1]).flatten()
    assert sorted(flat.tolist()) == list(range(60 * 28))
    distance = torch.hypot(torch.fft.fftfreq(60)[indices[0]], torch.fft.rfftfreq(54)[indices[1]])
    assert (distance.flatten().diff() >= 0).all()
    assert frequency_groups(20, 3, 18, 10, share=0.5).shape == (2, 10, 84)


def test_spectra_of_the_kernels_do_not_overlap():
    layer = FDConv2d(18, 20, 3, kernel_num=10).double()
    spectra = torch.stack([torch.view_as_complex(fourier_weight(kernel)) for kernel in layer.spatial_kernels()])
    # Where a group holds one half of a conjugate pair, the other half is in the first column too.
    overlap = (spectra.abs() > 1e-12)[..., 1:-1].sum(0)
    assert overlap.max() == 1


def test_band_modulation_without_weights_is_the_identity_and_bands_sum_up():
    x = torch.randn(2, 6, 9, 12, dtype=torch.float64)
    for groups, lowest in ((1, False), (3, True)):
        layer = FrequencyBandModulation(6, groups=groups, weigh_lowest=lowest).double()
        for conv in layer.convs:
            nn.init.zeros_(conv.weight)
        torch.testing.assert_close(layer(x), x)
        for conv in layer.convs:
            nn.init.constant_(conv.bias, 30.0)  # factors of two
        low = layer(x) - 2 * x
        constant = torch.ones_like(x)
        torch.testing.assert_close(layer(constant), (2 if lowest else 1) * constant)
        assert lowest == torch.allclose(low, torch.zeros_like(low))


def test_one_sample_can_be_trained():
    layer = FDConv2d(18, 20, 3, kernel_num=10).train()
    before = layer.ksm_global.bn.running_mean.clone()
    layer(torch.randn(1, 18, 5, 5)).sum().backward()
    assert torch.equal(layer.ksm_global.bn.running_mean, before)
    layer(torch.randn(2, 18, 5, 5))
    assert not torch.equal(layer.ksm_global.bn.running_mean, before)


def authors(layer: FDConv2d) -> dict[str, Tensor]:
    names = {"ksm_global": "KSM_Global", "ksm_local": "KSM_Local", "fbm.convs": "FBM.freq_weight_conv_list"}
    state = {key: value for key, value in layer.state_dict().items() if key != "groups"}
    for ours, theirs in names.items():
        state = {key.replace(ours, theirs): value for key, value in state.items()}
    return state


def test_loads_the_authors_layout_with_and_without_their_groups():
    source = stirred(FDConv2d(32, 48, 3, kernel_num=8))
    state = authors(source)
    assert state["dft_weight"].shape == (1, 144, 49, 2)
    assert state["KSM_Local.conv.weight"].shape == (432, 1, 3)
    assert state["FBM.freq_weight_conv_list.2.weight"].shape == (1, 32, 3, 3)
    x = torch.randn(2, 32, 5, 5)
    target = FDConv2d(32, 48, 3, kernel_num=8)
    load_weights(target, state)
    torch.testing.assert_close(target.eval()(x), source.eval()(x))
    indices = frequency_groups(48, 3, 32, 8)[None].roll(1, 2)
    load_weights(target, {**state, "indices": indices})
    assert torch.equal(target.groups, (source.groups + 1) % 8)


def test_a_share_of_the_frequencies():
    conv = nn.Conv2d(18, 20, 3).double()
    layer = neutral(FDConv2d.from_conv(conv, kernel_num=10, param_reduction=0.5))
    assert layer.dft_weight.shape == (1, 840, 2)
    kept = torch.zeros(60 * 28, 2, dtype=torch.float64)
    kept[layer.groups[0]] = fourier_weight(conv.weight).flatten(0, 1)[layer.groups[0]]
    low = inverse_fourier_weight(kept.unflatten(0, (60, 28)), 3) / 9 / 10  # neither times m nor times n
    torch.testing.assert_close(layer.spatial_kernels().mean(0), low)


def test_fixed_kernels_do_the_same():
    model = nn.Sequential(stirred(FDConv2d(18, 20, 3, kernel_num=4)), nn.ReLU()).double().eval()
    x = torch.randn(2, 18, 6, 6, dtype=torch.float64)
    fixed = fix_kernels(model).model
    torch.testing.assert_close(fixed(x), model(x))
    assert count_parameters(fixed) == count_parameters(model) - model[0].dft_weight.numel()
    with pytest.raises(Unsupported):
        fix_kernels(model, max_bytes=1000)


def test_linear_layers():
    linear = nn.Linear(18, 20).double()
    layer = FDLinear.from_linear(linear, kernel_num=5)
    neutral(layer.conv)
    x = torch.randn(2, 3, 4, 18, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))
    with pytest.raises(Unsupported, match="must be a Linear, got Conv2d"):
        FDLinear.from_linear(nn.Conv2d(2, 2, 1))
    with pytest.raises(ValueError, match=r"x must be \(B, ..., 18\), got \(2, 5\)"):
        layer(torch.zeros(2, 5))


def test_models_are_converted_and_stay_nearly_the_same():
    model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Conv2d(20, 24, 3), nn.Conv2d(24, 24, 3, groups=2), nn.Flatten(2))
    model.append(nn.Linear(36, 24))
    x = torch.randn(2, 3, 12, 12)
    changed = convert_to_fdconv(model, kernel_num=4, linear="4", example_input=x)
    assert changed.changed == ("1", "4")
    assert dict(changed.skipped).keys() == {"0", "2"}
    torch.testing.assert_close(changed.model.eval()(x), model(x), rtol=1e-2, atol=1e-2)


def test_frozen_stages_keep_their_modulations_trainable():
    model = nn.Sequential(FDConv2d(18, 20, 3, kernel_num=10), nn.BatchNorm2d(20))
    freeze_spectra(model)
    trained = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"ksm_global", "ksm_local", "fbm"}


def test_number_of_groups_from_the_channels():
    layer = FDConv2d(18, 20, 1, kernel_num=None)
    assert layer.kernel_num == 10
    assert layer.ksm_global.kernel_temperature == pytest.approx(10**0.5)


def test_copies_and_geometry():
    layer = FDConv2d(18, 20, 3, padding="same", dilation=2, kernel_num=4)
    assert copy.deepcopy(layer)(torch.randn(1, 18, 7, 6)).shape == (1, 20, 7, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 2}, "FDConv2d supports groups=1, got 2"),
        ({"kernel_size": (3, 1)}, r"kernel_size must be the same on both axes, got \(3, 1\)"),
        ({"in_channels": 17}, "in_channels \\* kernel_size must be even, got 17 \\* 3"),
        ({"kernel_num": 11}, r"kernel_num must divide the number of frequencies \(1680\), got 11"),
        ({"padding_mode": "reflect"}, "padding_mode must be 'zeros', got 'reflect'"),
        ({"padding": "same", "stride": 2}, "padding must be a number"),
        ({"param_reduction": 0.0}, r"param_reduction in \(0, 1\], got 1, 0.0"),
        ({"fbm": (4, 2)}, r"bands must be positive and rise, got \(4, 2\)"),
        ({"fbm_groups": 4}, "channels must be divisible by groups, got 18 and 4"),
        ({"act": "softmax"}, "unknown act 'softmax'"),
        ({"local_act": "relu"}, "unknown local_act 'relu'"),
        ({"kernel_act": "relu"}, "unknown kernel_act 'relu'"),
    ],
)
def test_impossible_settings_are_named(arguments: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        FDConv2d(**{"in_channels": 18, "out_channels": 20, "kernel_size": 3, "kernel_num": 10, **arguments})
