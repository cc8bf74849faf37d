"""Cross-D Conv: what its kernels are, and how networks get and lose a dimension."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from convatlas.data.volume_transforms import VolumePreprocess
from convatlas.errors import UnknownName, Unsupported
from convatlas.networks.registry import create_model
from convatlas.nn.conv.cross_d_conv import CrossDConv2d, convert_to_3d, convert_to_cross_d, inflate_weight
from convatlas.ops.fourier_shift import shifted_slices
from convatlas.ops.per_sample_conv import per_sample_conv

TINY = {"depths": (1, 1), "widths": (4, 6), "stem_width": 4, "num_classes": 3}


def test_without_an_angle_kernels_are_rolled_or_the_middle_slice():
    weight = torch.randn(2, 3, 5, 5, 5, dtype=torch.float64)
    ones = torch.ones(1, 3, dtype=torch.float64)
    rolled = weight.roll((1, 1, 1), (2, 3, 4))[:, :, 2]
    torch.testing.assert_close(shifted_slices(weight, ones)[0], rolled)
    torch.testing.assert_close(shifted_slices(weight, 0 * ones)[0], weight[:, :, 2])


def test_a_shift_keeps_the_sums_of_kernels_and_is_linear():
    weight, shift = torch.randn(2, 3, 3, 3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    # All slices of one kernel: those of the kernel rolled along its depth.
    whole = torch.stack([shifted_slices(weight.roll(step, 2), shift) for step in range(3)])
    expected = weight.sum((2, 3, 4)).expand(4, -1, -1)
    torch.testing.assert_close(whole.sum((0, 4, 5)), expected)
    doubled = shifted_slices(2 * weight + 1, shift)
    torch.testing.assert_close(doubled, 2 * shifted_slices(weight, shift) + 1)


def test_shift_is_that_of_the_turned_frequencies():
    layer = CrossDConv2d(3, 4, 3, bias=False).double().eval()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    axis, angle = layer.axis_angle(x)
    assert angle.abs().max() < math.pi / 4
    zero = torch.zeros(2, dtype=torch.float64)
    kx, ky, kz = axis.unbind(1)
    cross = torch.stack([zero, -kz, ky, kz, zero, -kx, -ky, kx, zero], 1).unflatten(1, (3, 3))
    turn = torch.eye(3, dtype=torch.float64) + angle[..., None] * cross
    torch.testing.assert_close(layer.shift(x), turn.sum(1))


def test_starts_as_the_convolution_that_it_replaces():
    for centered in (False, True):
        conv = nn.Conv2d(4, 6, 3, 2, "valid", groups=2).double()
        layer = CrossDConv2d.from_conv(conv, centered=centered).eval()
        x = torch.randn(3, 4, 8, 7, dtype=torch.float64)
        torch.testing.assert_close(layer(x), conv(x))
        layer(x).square().sum().backward()
        assert layer.rotation_params[3].weight.grad[3].any(), "the angle must be able to leave 0"
    with pytest.raises(Unsupported, match="cubic"):
        CrossDConv2d.from_conv(nn.Conv2d(2, 2, (3, 1)))


def test_pads_as_torch_does():
    x = torch.randn(2, 2, 6, 7)
    for options in ({"padding": "same", "kernel_size": 4}, {"padding": (2, 1), "padding_mode": "reflect"}):
        conv = nn.Conv2d(2, 3, **{"kernel_size": 3, "dilation": 1, **options})
        torch.testing.assert_close(CrossDConv2d.from_conv(conv).eval()(x), conv(x), rtol=1e-4, atol=1e-5)


def test_a_network_goes_from_images_to_volumes_and_keeps_its_kernels():
    model = create_model("resnet18", **TINY).eval()
    same = convert_to_cross_d(model, keep_weights=True).model
    x = torch.randn(2, 3, 33, 31)
    torch.testing.assert_close(same(x), model(x), rtol=1e-4, atol=1e-4)
    changed = convert_to_cross_d(model)
    assert len(changed.changed) == 6
    solid = convert_to_3d(changed.model)
    assert not solid.skipped
    assert torch.equal(solid.model.layer1[0].conv1.weight, changed.model.layer1[0].conv1.weights_3d)
    assert isinstance(solid.model.bn1, nn.BatchNorm3d)
    assert isinstance(solid.model.config.preprocess, VolumePreprocess)
    assert solid.model(torch.randn(2, 3, 9, 17, 16)).shape == (2, 3)
    assert isinstance(model.conv1, nn.Conv2d)
    centred = convert_to_3d(model, inflation="centre").model
    layers = centred.conv1, model.conv1
    volume = torch.randn(1, 3, 15, 12, 13)
    torch.testing.assert_close(layers[0](volume)[:, :, 2], layers[1](volume[:, :, 4]), rtol=1e-4, atol=1e-5)


def test_what_has_no_third_axis_is_named():
    model = nn.Sequential(nn.Conv2d(2, 2, (3, 1)), nn.MaxPool2d((2, 1)), nn.AvgPool2d(2), nn.Dropout2d(0.5))
    surgery = convert_to_3d(model)
    assert surgery.changed == ("2", "3")
    assert dict(surgery.skipped) == {
        "0": "its kernels are not square: (3, 1)",
        "1": "its kernel_size differs between height and width: (2, 1)",
    }
    with pytest.raises(Unsupported, match="no 2-D convolution"):
        convert_to_3d(nn.Linear(2, 2))


def test_inflation():
    weight = torch.randn(2, 3, 3, 3)
    torch.testing.assert_close(inflate_weight(weight, "mean").sum(2), weight)
    centre = inflate_weight(weight)
    assert torch.equal(centre[:, :, 1], weight)
    assert centre[:, :, ::2].abs().sum() == 0
    with pytest.raises(UnknownName, match="did you mean centre"):
        inflate_weight(weight, "center")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight must be"):
        inflate_weight(weight[..., :2])


def test_bad_input():
    for arguments, message in (
        ({"kernel_size": (3, 5)}, "cubic kernels"),
        ({"kernel_size": 3, "groups": 2}, "groups must divide"),
        ({"kernel_size": 3, "padding_mode": "constant"}, "padding_mode"),
        ({"kernel_size": 3, "padding": "same", "stride": 2}, "stride of 1"),
        ({"kernel_size": 3, "padding": "full"}, "padding"),
    ):
        with pytest.raises(ValueError, match=message):
            CrossDConv2d(3, 4, **arguments)
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\)"):
        CrossDConv2d(3, 4, 3)(torch.randn(1, 3, 4, 5, 6))
    with pytest.raises(ValueError, match="shift must be"):
        shifted_slices(torch.randn(1, 1, 3, 3, 3), torch.randn(2, 2))
    with pytest.raises(ValueError, match="weight must hold kernels for 2 samples, got 3"):
        per_sample_conv(torch.randn(2, 1, 4), torch.randn(3, 1, 1, 3))
