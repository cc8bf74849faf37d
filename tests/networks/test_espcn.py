"""ESPCN and SRCNN: sizes, invariants of the sheet of definitions, initial weights, foreign checkpoints, export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from convatlas import create_model, load_weights
from convatlas.cost import cost
from convatlas.errors import CheckpointError, UnknownName, Unsupported
from convatlas.networks.espcn import ESPCN, ESPCNConfig
from convatlas.networks.registry import published_files, published_source
from convatlas.networks.srcnn import SRCNNConfig
from convatlas.ops.resize import resize

#: Parameters by scale, for luma and for RGB.
PARAMETERS = {2: (21_284, 26_796), 3: (22_729, 31_131), 4: (24_752, 37_200), 8: (38_624, 78_816)}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("scale", PARAMETERS)
def test_parameter_counts_are_the_published_ones(scale: int):
    with torch.device("meta"):
        sizes = [count(create_model(f"espcn_x{scale}", in_channels=channels)) for channels in (1, 3)]
        assert tuple(sizes) == PARAMETERS[scale]
        assert count(create_model(f"srcnn_915_x{scale}")) == 8_129
        assert count(create_model(f"srcnn_955_x{scale}")) == 57_281
        assert count(create_model("srcnn_915_x3", in_channels=3)) == 20_099


def test_multiply_adds_are_the_published_ones():
    x = torch.rand(1, 1, 10, 14)
    for scale in PARAMETERS:
        assert cost(create_model(f"espcn_x{scale}"), x).total.macs == 140 * (20_032 + 288 * scale**2)
    layers = {"srcnn_915_x3": 8_032, "srcnn_955_x3": 57_184}
    for name, macs in layers.items():
        model = create_model(name)
        assert cost(model.layers, torch.rand(1, 1, 30, 42)).total.macs == 9 * 140 * macs


@pytest.mark.parametrize("name", ["espcn_x2", "espcn_x3", "espcn_x4", "espcn_x8", "espcn_deconv_x4", "srcnn_915_x2"])
def test_the_image_is_enlarged(name: str):
    scale = int(name[-1])
    model = create_model(name).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 1, 7, 5)).shape == (2, 1, 7 * scale, 5 * scale)
        assert model(torch.rand(1, 1, 1, 1)).shape == (1, 1, scale, scale)
    assert model.scale == scale


def test_without_last_weights_the_output_is_the_pattern_of_the_bias():
    model = create_model("espcn_x2")
    nn.init.zeros_(model.sub_pixel.conv.weight)
    with torch.no_grad():
        model.sub_pixel.conv.bias.copy_(torch.arange(4.0))
        y = model(torch.rand(1, 1, 3, 2))
    assert torch.equal(y[0, 0], torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(3, 2))


@pytest.mark.parametrize("name", ["espcn_x3", "espcn_deconv_x3", "srcnn_955_x3", "srcnn_915_x8"])
def test_moving_the_input_moves_the_output_and_nothing_beyond_its_reach_matters(name: str):
    model = create_model(name).double().eval()
    scale, reach = model.scale, model.reach
    x = torch.rand(1, 1, 4 * reach, 4 * reach, dtype=torch.float64)
    with torch.no_grad():
        y, moved = model(x), model(x.roll(1, 2))
        inner = slice(scale * (reach + 1), -scale * (reach + 1))
        torch.testing.assert_close(moved[:, :, inner, inner], y.roll(scale, 2)[:, :, inner, inner])
        other = x.clone()
        other[:, :, 2 * reach + 1 :] = 0
        first = slice(0, scale * (reach + 1))
        torch.testing.assert_close(model(other)[:, :, first], y[:, :, first])


def test_the_transposed_form_computes_the_same():
    model = create_model("espcn_x3").double()
    nn.init.zeros_(model.sub_pixel.conv.bias)
    other = create_model("espcn_deconv_x3").double()
    other.feature_maps.load_state_dict(model.feature_maps.state_dict())
    other.sub_pixel = model.sub_pixel.to_conv_transpose()
    x = torch.rand(1, 1, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x), rtol=1e-12, atol=1e-12)


def test_clamping():
    x = torch.rand(1, 1, 8, 8)
    torch.manual_seed(0)
    never = ESPCN(ESPCNConfig(channels=8))
    nn.init.normal_(never.sub_pixel.conv.weight)
    assert never(x).min() < 0
    for clamp, in_training in (("inference", False), ("always", True)):
        model = ESPCN(ESPCNConfig(channels=8, clamp=clamp))
        model.load_state_dict(never.state_dict())
        assert torch.equal(model.eval()(x), never(x).clamp(0, 1))
        assert (model.train()(x).min() >= 0) == in_training


def test_several_frames_give_one():
    model = ESPCN(ESPCNConfig(scale=2, frames=3, channels=8, in_channels=3))
    assert (model.frames, model.in_channels) == (3, 3)
    assert model(*model.example_inputs(2)).shape == (2, 3, 128, 128)
    with pytest.raises(ValueError, match=r"x must be \(B, 9, H, W\), got \(1, 3, 8, 8\)"):
        model(torch.rand(1, 3, 8, 8))


def test_initial_weights():
    torch.manual_seed(0)
    wide = ESPCN(ESPCNConfig(channels=64))
    stds = [wide.get_submodule(name).weight.std().item() for name in ("feature_maps.0", "feature_maps.2")]
    assert stds == pytest.approx([(2 / (64 * 25)) ** 0.5, (2 / (32 * 9)) ** 0.5], rel=0.06)
    assert wide.sub_pixel.conv.weight.std().item() == pytest.approx(0.001, rel=0.06)
    assert not any(parameter.any() for name, parameter in wide.named_parameters() if name.endswith("bias"))
    # Both codes take any layer of 32 channels for the last one.
    narrow = ESPCN(ESPCNConfig(channels=32, init="reference"))
    assert narrow.feature_maps[2].weight.std().item() == pytest.approx(0.001, rel=0.06)
    assert narrow.sub_pixel.conv.weight.std().item() == pytest.approx((2 / (9 * 9)) ** 0.5, rel=0.1)
    icnr = ESPCN(ESPCNConfig(channels=64, init="icnr"))
    blocks = icnr(torch.rand(1, 1, 5, 5)).unfold(2, 3, 3).unfold(3, 3, 3)
    torch.testing.assert_close(blocks, blocks[..., :1, :1].expand_as(blocks))
    assert icnr.sub_pixel.conv.weight.std().item() == pytest.approx((2 / (9 * 9)) ** 0.5, rel=0.2)


def test_srcnn_works_on_the_interpolated_image():
    model = SRCNNConfig(scale=2, dims=(4, 3), convention="pillow").build()
    x = torch.rand(1, 1, 6, 5)
    assert torch.equal(model(x), model.layers(resize(x, (12, 10), convention="pillow")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0}, "scale must be a whole number of at least 1, got 0"),
        ({"scale": 2.5}, "scale must be a whole number of at least 1, got 2.5"),
        ({"in_channels": 0}, "in_channels must be a whole number of at least 1, got 0"),
        ({"channels": 7}, "channels must be even and at least 2, got 7"),
        ({"frames": 2}, "frames must be odd, got 2"),
        ({"kernel_sizes": (5, 4, 3)}, r"kernel_sizes must be three odd numbers, got \(5, 4, 3\)"),
        ({"act": "gelu"}, "unknown act 'gelu'"),
        ({"clamp": "sometimes"}, "unknown clamp 'sometimes'"),
        ({"init": "normal"}, "unknown init 'normal'"),
        ({"last": "resize"}, "unknown last 'resize'"),
    ],
)
def test_impossible_networks_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ESPCNConfig().override(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (0, 3)}, "dims must be two numbers of at least 1"),
        ({"kernel_sizes": (9, 2, 5)}, "kernel_sizes must be three odd numbers"),
        ({"convention": "opencv"}, "unknown convention 'opencv'"),
    ],
)
def test_impossible_srcnns_are_refused(changes: dict, message: str):
    with pytest.raises((ValueError, UnknownName), match=message):
        SRCNNConfig().override(**changes)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "x must be floating point with values in .0, 1., got torch.uint8"),
        (torch.zeros(1, 3, 4, 4), r"x must be \(B, 1, H, W\), got \(1, 3, 4, 4\)"),
        (torch.zeros(4, 4), r"x must be \(B, 1, H, W\), got \(4, 4\)"),
    ],
)
def test_what_is_no_image_is_refused(x: Tensor, message: str):
    for name in ("espcn_x2", "srcnn_915_x2"):
        with pytest.raises(ValueError, match=message):
            create_model(name)(x)


# Checkpoints: foreign state dicts are made from ours, the inverse of what loading does.


def yjn870(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"feature_maps.": "first_part.", "sub_pixel.conv.": "last_part.0."}
    return {_renamed(key, names): value for key, value in state.items()}


def lornatang(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {_renamed(key, {"sub_pixel.conv.": "sub_pixel.0."}): value for key, value in state.items()}


def _renamed(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = key.replace(ours, theirs) if key.startswith(ours) else key
    return key


def filled(**changes: object) -> ESPCN:
    model = ESPCN(ESPCNConfig(channels=8).override(**changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


KEYS = {
    "yjn870": {"first_part.0.weight": (8, 3, 5, 5), "first_part.2.bias": (4,), "last_part.0.weight": (27, 4, 3, 3)},
    "lornatang": {"feature_maps.0.weight": (8, 3, 5, 5), "feature_maps.2.bias": (4,), "sub_pixel.0.bias": (27,)},
}


@pytest.mark.parametrize(("layout", "rename"), [("yjn870", yjn870), ("lornatang", lornatang)])
def test_checkpoints_of_both_codes_load_completely(layout: str, rename):
    source, model = filled(in_channels=3), filled(in_channels=3)
    state = rename(source.state_dict())
    assert {key: tuple(state[key].shape) for key in KEYS[layout]} == KEYS[layout]
    report = load_weights(model, state)
    assert report.layout == layout
    assert report.differences() == []
    assert report.loaded == 6
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_averaged_part_of_a_checkpoint_goes_first():
    plain, averaged, model = filled(), filled(), filled()
    file = {
        "epoch": 3000,
        "psnr": 32.5,
        "state_dict": lornatang(plain.state_dict()),
        "ema_state_dict": {"n_averaged": torch.tensor(7)}
        | {f"module.{key}": value for key, value in lornatang(averaged.state_dict()).items()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(8, 1, 5, 5)}}},
    }
    load_weights(model, file)
    assert torch.equal(model.sub_pixel.conv.bias, averaged.sub_pixel.conv.bias)
    load_weights(model, file, part="state_dict")
    assert torch.equal(model.sub_pixel.conv.bias, plain.sub_pixel.conv.bias)


def test_kernels_exported_from_tensorflow_load_in_its_order():
    source, model = filled(in_channels=3, scale=2), filled(in_channels=3, scale=2)
    state = {}
    for number, (key, value) in enumerate(source.state_dict().items()):
        if key.startswith("sub_pixel"):  # torch has (C, r^2), depth_to_space has (r^2, C)
            value = value.unflatten(0, (3, 4)).transpose(0, 1).flatten(0, 1)
        state[f"variable_{number}"] = value.permute(2, 3, 1, 0) if value.dim() == 4 else value
    report = load_weights(model, state)
    assert report.layout == "tensorflow"
    assert report.differences() == []
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("rename", [yjn870, lornatang, dict])
def test_a_checkpoint_of_another_scale_is_refused(rename):
    with pytest.raises(CheckpointError, match=r"enlarges 2 times, the model 3 times|\(4, 4, 3, 3\) for \(9, 4, 3, 3\)"):
        load_weights(filled(), rename(filled(scale=2).state_dict()))


def test_published_files_must_be_fetched_by_hand():
    assert published_files("espcn_x3")[0].figures == {"Set5 PSNR-Y [dB], low resolution by Pillow": 32.88}
    figures = [published_files(f"espcn_clamped_x{scale}")[0].figures["Set5 PSNR-Y [dB]"] for scale in (2, 3, 4)]
    assert figures == [36.64, 32.55, 30.26]
    with pytest.raises(Unsupported, match=r"must be downloaded by hand from https://github\.com/yjn870"):
        published_source("espcn_x3")


# Export


def test_export_with_any_size():
    model = filled().eval()
    sizes = {0: Dim("batch"), 2: Dim("height", min=8, max=2048), 3: Dim("width", min=8, max=2048)}
    program = torch.export.export(model, (torch.rand(2, 1, 16, 24),), dynamic_shapes=(sizes,), strict=False)
    with torch.no_grad():
        for shape in ((1, 1, 9, 31), (3, 1, 40, 8)):
            x = torch.rand(shape)
            torch.testing.assert_close(program.module()(x), model(x))


def test_onnx_has_depth_to_space_in_the_order_of_torch(tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = filled().eval()
    path = tmp_path / "espcn.onnx"
    sizes = {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}
    torch.onnx.export(model, (torch.rand(2, 1, 16, 24),), path, dynamic_shapes=(sizes,), dynamo=True, verbose=False)
    nodes = {node.op_type: node for node in onnx.load(path).graph.node}
    assert set(nodes) == {"Conv", "Tanh", "DepthToSpace"}
    assert next(a.s for a in nodes["DepthToSpace"].attribute if a.name == "mode") == b"CRD"
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.rand(1, 1, 7, 11)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)
