"""UniRepLKNet beyond what the battery tests: sizes, merging, layouts, and the front ends of other modalities."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from battery.subjects import stir
from convatlas.cost import cost
from convatlas.networks.registry import create_model
from convatlas.networks.unireplknet.audio import LogMelFrontEnd, mask_spectrogram, mix_waveforms, shift_and_disturb
from convatlas.networks.unireplknet.backbone import UniRepLKNet, UniRepLKNetBlock, stage_kernels
from convatlas.networks.unireplknet.corrformer import AutoCorrelation, CorrformerDecoder, correlation, decompose
from convatlas.networks.unireplknet.points import (
    MultiViewFusion,
    PointToImage,
    nearest_neighbours,
    rotation_matrices,
    smoothed_cross_entropy,
)
from convatlas.networks.unireplknet.series import forecast_errors, image_to_series, series_to_image
from convatlas.networks.unireplknet.video import average_views, video_to_image
from convatlas.nn.mixers.dilated_reparam import DilatedReparamBlock
from convatlas.nn.norm import GlobalResponseNorm
from convatlas.surgery import merge
from convatlas.training.measure import count_parameters
from convatlas.training.optim import parameter_groups
from convatlas.weights import load_weights

# Model -> parameters in training and deployed form, and for one of them 10^9 multiply-adds of the latter at 224 x 224.
PUBLISHED = {
    "unireplknet_a": (4_649_060, 4_437_300, 0.640),
    "unireplknet_f": (6_489_328, 6_235_216, None),
    "unireplknet_p": (11_080_520, 10_741_704, None),
    "unireplknet_n": (18_818_880, 18_318_560, None),
    "unireplknet_t": (31_693_420, 31_037_980, None),
    "unireplknet_s": (56_456_704, 55_645_984, None),
    "unireplknet_b": (99_089_416, 98_008_456, None),
    "unireplknet_l": (220_076_056, None, None),
    "unireplknet_xl": (388_690_984, None, None),
}
TINY = {"depths": (1, 2), "dims": (8, 12), "kernel_sizes": ((3,), (7, 5)), "num_classes": 5}


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str):
    trained, deployed, macs = PUBLISHED[name]
    with torch.device("meta"):
        model, merged = create_model(name), create_model(name, deploy=True).eval()
        assert count_parameters(model) == trained
        assert [feature.stride for feature in model.feature_info] == [4, 8, 16, 32]
        if deployed is not None:
            assert count_parameters(merged) == deployed
        if macs is not None:
            assert cost(merged, *merged.example_inputs()).total.macs / 1e9 == pytest.approx(macs, rel=2e-3)


def test_published_kernels():
    assert stage_kernels((2, 2, 6, 2)) == ((3, 3), (13, 13), (13,) * 6, (13, 13))
    assert stage_kernels((3, 3, 6, 3), period=2)[2] == (13, 3, 13, 3, 13, 3)
    assert stage_kernels((3, 3, 6, 3), period=3, last=11)[2:] == ((13, 3, 3, 13, 3, 3), (11, 11, 11))


def test_merged_network_is_the_deployed_one():
    model = create_model("unireplknet_t", **TINY).double()
    stir(model)
    x = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    surgery = merge(model, x)
    torch.testing.assert_close(surgery.model(x), model.eval()(x), rtol=1e-12, atol=1e-12)
    assert not surgery.skipped
    assert not any(isinstance(module, nn.BatchNorm2d) for module in surgery.model.modules())
    deployed = create_model("unireplknet_t", deploy=True, **TINY).double()
    load_weights(deployed, surgery.model.state_dict())
    torch.testing.assert_close(deployed.eval()(x), surgery.model(x), rtol=0, atol=0)
    again = merge(surgery.model, x)
    assert not again.changed


@pytest.mark.parametrize("kernel_size", [0, 5, 13])
def test_blocks_merge_whatever_their_kernel(kernel_size: int):
    block = UniRepLKNetBlock(8, kernel_size, layer_scale_init=None if kernel_size == 5 else 0.5).double()
    stir(block)
    block.eval()
    x = torch.randn(1, 8, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(block.merged()(x), block(x), rtol=1e-12, atol=1e-12)
    assert isinstance(block.norm, nn.Identity) == (kernel_size == 0)
    block.se, block.grn = nn.Identity(), nn.Identity()
    assert block.merged() is None


def test_block_begins_at_the_identity():
    block = UniRepLKNetBlock(8, 7).eval()
    nn.init.zeros_(block.layer_scale.gamma)
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(block(x), x)
    gate = block.se(torch.ones(1, 8, 3, 3))
    assert bool(((gate > 0) & (gate < 1)).all())


def test_global_response_norm():
    norm = GlobalResponseNorm(5).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    assert torch.equal(norm(x), x)
    nn.init.normal_(norm.gamma)
    nn.init.normal_(norm.beta)
    strength = x.square().sum((1, 2)).sqrt()
    relative = strength / (strength.mean(1, keepdim=True) + 1e-6)
    expected = (norm.gamma.flatten() * relative[:, None, None] + 1) * x + norm.beta.flatten()
    torch.testing.assert_close(norm(x), expected)
    assert GlobalResponseNorm(5, bias=False).beta is None


def authors_state(model: UniRepLKNet, *, deployed: bool) -> dict[str, Tensor]:
    """The state dict of a network with the keys and shapes of the authors' code."""
    pairs = [
        (".se.fc1.", ".se.down."),
        (".se.fc2.", ".se.up."),
        (".pwconv1.", ".pwconv1.1."),
        (".grn.", ".act.1."),
        (".pwconv2.", ".pwconv2.0."),
        (".ffn_norm.", ".pwconv2.2."),
        (".layer_scale.gamma", ".gamma"),
        (".large.conv.", ".lk_origin."),
        (".large.norm.", ".origin_bn."),
    ]
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in pairs:
            key = key.replace(ours, theirs)
        if ".dilated." in key:
            start, _, end = key.partition(".dilated.")
            branch, part, name = end.split(".")
            key = f"{start}.dil_{'conv' if part == 'conv' else 'bn'}_{branch}.{name}"
        if deployed and value.dim() == 4 and value.shape[-1] >= 7:
            key = key.replace("dwconv.", "dwconv.lk_origin.")
        if deployed and key.endswith("stages.1.0.dwconv.bias"):
            key = key.replace("dwconv.", "dwconv.lk_origin.")
        state[key] = value[..., None, None] if ".se." in key and key.endswith("weight") else value
    return state


@pytest.mark.parametrize("deployed", [False, True])
def test_authors_layout_loads_completely(deployed: bool):
    source, target = (create_model("unireplknet_t", deploy=deployed, **TINY) for _ in range(2))
    stir(source)
    state = authors_state(source, deployed=deployed)
    assert "stages.1.0.act.1.gamma" in state
    assert ("stages.1.0.dwconv.dil_conv_k5_1.weight" in state) is not deployed
    assert ("stages.1.0.dwconv.lk_origin.bias" in state) is deployed
    report = load_weights(target, {"model": state})
    assert not report.missing
    assert not report.unexpected
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_dense_form_has_a_norm_for_each_map():
    model = create_model("unireplknet_t", dense=True, **TINY).eval()
    keys = set(model.state_dict())
    assert {"norm0.weight", "norm1.bias"} <= keys
    assert not any(key.startswith(("head", "norm.")) for key in keys)
    for feature in model.forward_features(torch.randn(1, 3, 32, 32)):
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature.mean(1)), atol=1e-5, rtol=0)


def test_published_layer_wise_decay():
    with torch.device("meta"):
        model = create_model("unireplknet_s_384")
    assert len(model.layers()) == 14
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.8)
    assert min(group["lr_scale"] for group in groups) == pytest.approx(0.8**13)
    assert sum(parameter.numel() for group in groups for parameter in group["params"]) == count_parameters(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (8,)}, "depths and dims must name the same stages"),
        ({"kernel_sizes": ((3,), (7,))}, "kernel_sizes must name a kernel for each block"),
        ({"kernel_sizes": ((4,), (7, 3))}, "kernel_size must be 0, 3, 5 or an odd number from 7, got 4"),
        ({"kernel_sizes": ((3,), (19, 3))}, "no default dilated branches for kernel 19"),
    ],
)
def test_impossible_settings_are_named(options, message: str):
    with pytest.raises(ValueError, match=message):
        create_model("unireplknet_t", **{**TINY, **options})


# -- sounds ------------------------------------------------------------------------------------------------------------


def test_front_end_pads_cuts_and_normalises():
    waveform = torch.randn(2, 1000) + 3
    for target in (3, 9):
        front_end = LogMelFrontEnd(num_filters=16, target_length=target)
        bank = front_end.filter_bank(waveform)
        assert bank.shape == (2, 4, 16)
        out = front_end(waveform)
        assert out.shape == (2, target, 16)
        frames = min(target, 4)
        torch.testing.assert_close(out[:, :frames], (bank[:, :frames] + 6.845978) / (2 * 5.5654526))
        torch.testing.assert_close(out[:, frames:], torch.full_like(out[:, frames:], 6.845978 / (2 * 5.5654526)))
    with pytest.raises(ValueError, match=r"waveform must be \(B, samples\)"):
        front_end(waveform[0])
    with pytest.raises(ValueError, match="target_length and std must be positive"):
        LogMelFrontEnd(target_length=0)


def test_spectrograms_are_masked_rolled_and_disturbed():
    x = torch.ones(6, 20, 16)
    generator = torch.Generator().manual_seed(0)
    masked = mask_spectrogram(x, frequency_mask=8, time_mask=10, generator=generator)
    gone = masked == 0
    assert gone.any()
    for sample in gone:
        rows, columns = sample.all(1), sample.all(0)
        assert torch.equal(sample, rows[:, None] | columns)
        assert int(rows.sum()) < 10
        assert int(columns.sum()) < 8
    steps = torch.arange(20.0)[:, None].expand(3, 20, 4)
    moved = shift_and_disturb(steps, generator=generator)
    for sample in moved:
        shift = int(sample[:, 0].floor()[0])
        assert torch.equal(sample.floor(), torch.roll(steps[0], -shift, 0))
        assert 0 < float((sample - sample.floor()).max()) < 0.1


def test_waveforms_are_mixed_as_their_targets_are():
    waves, targets = torch.randn(8, 50), torch.eye(8)
    waves = waves - waves.mean(1, keepdim=True)
    mixed, both = mix_waveforms(waves, targets, probability=1.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed, both @ waves)
    torch.testing.assert_close(both.sum(1), torch.ones(8))
    same, unchanged = mix_waveforms(waves, targets, probability=0.0)
    torch.testing.assert_close(same, waves)
    assert torch.equal(unchanged, targets)
    with pytest.raises(ValueError, match=r"waveforms must be \(B, samples\)"):
        mix_waveforms(waves, targets[:3])
    with pytest.raises(ValueError, match="probability must be from 0 to 1"):
        mix_waveforms(waves, targets, probability=2)


def test_audio_network_learns_by_its_loss():
    network = {**TINY, "in_channels": 1}
    model = create_model("unireplknet_s_speech_commands", network=network, num_filters=16, target_length=8)
    waves = torch.randn(3, 1400)
    loss = model.loss(model(waves), F.one_hot(torch.tensor([0, 1, 2]), 5))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=0.05)
    with pytest.raises(ValueError, match="in_channels of the network must be 1, got 3"):
        create_model("unireplknet_s_speech_commands", network={"in_channels": 3})


# -- videos ------------------------------------------------------------------------------------------------------------


def test_frames_become_an_image():
    clip = torch.randn(2, 3, 16, 4, 6)
    flat, mosaic = video_to_image(clip), video_to_image(clip, "mosaic")
    assert flat.shape == mosaic.shape == (2, 3, 16, 24)
    assert torch.equal(flat.flatten(), clip.flatten())
    for frame in range(16):
        row, column = divmod(frame, 4)
        assert torch.equal(mosaic[:, :, 4 * row : 4 * row + 4, 6 * column : 6 * column + 6], clip[:, :, frame])
    assert video_to_image(clip[:, :, :7]).shape == (2, 3, 4, 42)
    with pytest.raises(ValueError, match=r"clip must be \(B, C, T, H, W\), got \(2, 3, 16, 4\)"):
        video_to_image(clip[..., 0])
    with pytest.raises(ValueError, match="unknown layout 'tiles'"):
        video_to_image(clip, "tiles")  # type: ignore[arg-type]


def test_views_are_averaged():
    scores = torch.randn(6, 4)
    torch.testing.assert_close(average_views(scores, 3)[1], scores[3:].softmax(1).mean(0))
    with pytest.raises(ValueError, match=r"scores must be \(B views, classes\) for 4 views"):
        average_views(scores, 4)


# -- points ------------------------------------------------------------------------------------------------------------


def test_rotations_are_right_handed():
    quarter = math.pi / 2
    angles = torch.tensor([[quarter, 0, 0], [0, quarter, 0], [0, 0, quarter], [0.3, -0.7, 2.0]], dtype=torch.float64)
    turned = rotation_matrices(angles)
    for axis in range(3):
        ahead, behind = torch.eye(3, dtype=torch.float64)[[(axis + 1) % 3, (axis + 2) % 3]]
        torch.testing.assert_close(turned[axis] @ ahead, behind, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned[3] @ turned[3].T, torch.eye(3, dtype=torch.float64))


def test_features_are_added_around_the_cell_of_a_point():
    front_end = PointToImage(1, grid_size=12, image_size=12, neighbours=2, channels=4, edge_channels=4, fusion=False)
    seen = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.5, 0.0]]])
    grid = front_end.project(seen, torch.tensor([[[1.0, 10.0]]]))
    assert grid.shape == (1, 1, 12, 12)
    assert float(grid.sum()) == 9 * 11
    assert int((grid == 10).sum()) == int((grid == 1).sum()) == 9
    rows, columns = (grid[0, 0] > 0).nonzero().unbind(1)
    assert (int(rows.min()), int(rows.max())) == (0, 11)
    assert (int(columns.min()) + int(columns.max())) // 2 == 5  # the shorter extent lies in the middle
    near = nearest_neighbours(torch.tensor([[[0.0, 0, 0], [1, 0, 0], [5, 0, 0]]]), 2)
    assert near.sort(2).values.tolist() == [[[0, 1], [0, 1], [1, 2]]]


def test_fusion_lets_the_views_of_a_cloud_see_each_other():
    fusion = MultiViewFusion(4, patch_size=3, num_heads=2, head_channels=5).eval()
    x = torch.randn(4, 4, 6, 7)
    changed = x.clone()
    changed[1] += 1
    before, after = fusion(x, 2), fusion(changed, 2)
    assert before.shape == x.shape
    assert not torch.equal(after[0], before[0])
    torch.testing.assert_close(after[2:], before[2:])


def test_smoothed_targets():
    scores, labels = torch.randn(3, 5), torch.tensor([0, 4, 2])
    targets = torch.full((3, 5), 0.2 / 4)
    targets[torch.arange(3), labels] = 0.8
    torch.testing.assert_close(smoothed_cross_entropy(scores, labels), F.cross_entropy(scores, targets))


def test_wrong_points_are_named():
    front_end = PointToImage(2, grid_size=8, image_size=8, neighbours=4)
    with pytest.raises(ValueError, match=r"points must be \(B, N, 3\), got \(1, 9, 2\)"):
        front_end(torch.zeros(1, 9, 2))
    with pytest.raises(ValueError, match="points must be at least the 4 neighbours, got 3"):
        front_end(torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="num_views must be from 1 to 10, got 11"):
        PointToImage(11)
    for size in (10, 7):
        with pytest.raises(ValueError, match=f"grid_size must be even and from 4 to image_size 8, got {size}"):
            PointToImage(grid_size=size, image_size=8)


# -- series ------------------------------------------------------------------------------------------------------------


def test_series_become_images_in_the_order_of_memory():
    series = torch.randn(2, 9, 4)
    image = series_to_image(series)
    assert image.shape == (2, 1, 6, 6)
    assert torch.equal(image.flatten(), series.flatten())
    maps = torch.randn(2, 4, 3, 3)
    assert image_to_series(maps).shape == (2, 9, 4)
    assert torch.equal(image_to_series(maps).flatten(), maps.flatten())
    with pytest.raises(ValueError, match="a square number"):
        series_to_image(series[:, :8])
    assert forecast_errors(torch.full((3,), 30.0), torch.zeros(3)) == (9.0, 3.0)


def test_correlation_finds_the_lag():
    x = torch.randn(1, 16, dtype=torch.float64)
    assert int(correlation(x.roll(5, -1), x).argmax()) == 5
    direct = torch.stack([(x.roll(-lag, -1) * x).sum(-1) for lag in range(16)], dim=-1)
    torch.testing.assert_close(correlation(x, x), direct)


def test_trend_is_a_moving_mean():
    x = torch.arange(7.0)[None, :, None]
    seasonal, trend = decompose(x, 3)
    torch.testing.assert_close(trend.flatten(), torch.tensor([1 / 3, 1.0, 2.0, 3.0, 4.0, 5.0, 5 + 2 / 3]))
    torch.testing.assert_close(seasonal + trend, x)
    with pytest.raises(ValueError, match="window must be odd, got 4"):
        decompose(x, 4)


def test_short_keys_are_padded_and_long_ones_cut():
    layer = AutoCorrelation(4, 2)
    query = torch.randn(2, 9, 4)
    for length in (5, 13):
        assert layer(query, torch.randn(2, length, 4), torch.randn(2, length, 4)).shape == (2, 9, 4)


def test_weather_network_keeps_shift_and_scale_of_each_series():
    network = {"depths": (1, 1), "dims": (8, 12), "kernel_sizes": ((3,), (0,)), "in_channels": 1, "num_classes": 0}
    options = {"tree": (2, 3), "node_series": 1, "length": 12, "label_length": 5, "horizon": 3, "dim": 12}
    options |= {"num_heads": 2, "hidden_channels": 8, "window": 5, "num_layers": 1, "network": network}
    model = create_model("unireplknet_s_weather", **options).double().eval()
    model.set_positions(torch.rand(6, 3))
    torch.testing.assert_close(model.positions.reshape(6, 3).mean(0), torch.zeros(3, dtype=torch.float64))
    series, time, ahead = torch.randn(1, 12, 6) * 50, torch.rand(1, 12, 4), torch.rand(1, 3, 4)
    series, time, ahead = (tensor.double() for tensor in (series, time, ahead))
    scale, shift = torch.rand(6).double() + 1, torch.randn(6).double() * 9
    forecast = model(series, time, ahead)
    assert forecast.shape == (1, 3, 6)
    torch.testing.assert_close(
        model(series * scale + shift, time, ahead), forecast * scale + shift, rtol=1e-4, atol=1e-3
    )
    with pytest.raises(ValueError, match=r"series must be \(B, 12, 6\), got \(1, 11, 6\)"):
        model(series[:, 1:], time, ahead)
    with pytest.raises(ValueError, match=r"positions must be \(6, 3\), got \(5, 3\)"):
        model.set_positions(torch.rand(5, 3))
    with pytest.raises(ValueError, match="length \\* dim must be a square number"):
        create_model("unireplknet_s_weather", **{**options, "length": 13})
    with pytest.raises(ValueError, match="end in dim = 16 channels"):
        create_model("unireplknet_s_weather", **{**options, "dim": 16})


def test_decoder_names_what_is_wrong():
    decoder = CorrformerDecoder(4, 2, 1, length=6, tree=(2, 2), window=3, hidden_channels=4, num_layers=1)
    with pytest.raises(ValueError, match=r"x must be \(B N, L, C\) with 4 nodes and 6 times"):
        decoder(torch.zeros(3, 6, 4), torch.zeros(3, 6, 4), torch.zeros(3, 6, 1))
    with pytest.raises(ValueError, match="tree must name the children"):
        CorrformerDecoder(4, 2, 1, length=6, tree=())


def test_parts_are_those_of_the_image_network():
    model = create_model("unireplknet_b_video", **TINY)
    assert isinstance(model, UniRepLKNet)
    assert any(isinstance(module, DilatedReparamBlock) for module in model.modules())
