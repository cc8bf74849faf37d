"""Conv-TasNet: published sizes, causality, masks, ends, streaming, errors and filter banks."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convatlas.errors import UnknownName, Unsupported
from convatlas.networks.conv_tasnet.filterbank import make_filterbank
from convatlas.networks.conv_tasnet.network import VARIANTS, ConvTasNet, ConvTasNetConfig
from convatlas.networks.registry import create_model
from convatlas.nn.norm import CumulativeLayerNorm
from convatlas.training.measure import count_parameters

TINY: dict[str, Any] = {
    "num_filters": 12,
    "kernel_size": 10,
    "bottleneck_channels": 6,
    "hidden_channels": 8,
    "skip_channels": 4,
    "num_blocks": 3,
    "num_repeats": 2,
}

PARAMETERS = {
    "conv_tasnet": 5_050_545,
    "conv_tasnet_causal": 5_050_545,
    "conv_tasnet_3src": 5_116_593,
    "conv_tasnet_relu_16k": 5_066_929,
    "conv_tasnet_naplab": 5_066_929,
    "conv_tasnet_no_skip": 3_474_609,
    "conv_tasnet_v1": 8_710_720,
}


def tiny(**options: Any) -> ConvTasNet:
    torch.manual_seed(0)
    model = ConvTasNet(ConvTasNetConfig(**{**TINY, **options})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def mixture(batch: int = 2, length: int = 403) -> Tensor:
    return torch.randn(batch, length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str):
    with torch.device("meta"):
        assert count_parameters(create_model(name)) == PARAMETERS[name]


def test_size_of_the_first_version_with_biases():
    options = {"input_norm": None, "bias": True, "mask_prelu": True}
    with torch.device("meta"):
        assert count_parameters(create_model("conv_tasnet_v1", **options)) == 8_752_449


def test_receptive_field():
    assert VARIANTS["conv_tasnet"].receptive_field == 1531
    config = ConvTasNetConfig(**TINY, norm="frame")
    assert config.receptive_field == 1 + 2 * 2 * 7
    model = tiny(norm="frame")
    w = torch.randn(1, 12, 61, dtype=torch.float64, requires_grad=True)
    model.separator(w)[..., 30].sum().backward()
    reached = w.grad.abs().sum((0, 1)).nonzero().flatten()
    assert (reached.min(), reached.max()) == (30 - 14, 30 + 14)


def test_multiplications_of_a_second():
    config = VARIANTS["conv_tasnet"]
    with torch.device("meta"):
        model = config.build()
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 3 and "23.residual" not in name)
    decoder = (config.num_sources - 1) * config.num_filters * config.kernel_size
    assert (weights + decoder) * config.sample_rate / config.hop == pytest.approx(5.1e9, rel=0.05)


def test_shapes_of_mixtures():
    model, x = tiny(), mixture()
    y = model(x)
    assert y.shape == (2, 2, 403)
    torch.testing.assert_close(model(x.unsqueeze(1)), y)
    torch.testing.assert_close(model(x[0]), y[0])


@pytest.mark.parametrize("ends", ["trimmed", "padded", "aligned"])
@pytest.mark.parametrize("norm", ["cumulative", "frame"])
def test_a_causal_output_does_not_see_what_comes(norm: str, ends: str):
    model, x = tiny(causal=True, norm=norm, ends=ends), mixture()
    later = x.clone()
    later[:, 211:] = 5
    before, after = model(x), model(later)
    seen = 211 - model.latency + 1
    torch.testing.assert_close(after[..., :seen], before[..., :seen], rtol=0, atol=1e-13)
    assert not torch.allclose(after[..., 211:], before[..., 211:])


def test_masks():
    w = tiny().encode(mixture())
    sigmoid = tiny(mask_act="sigmoid").separator(w)
    assert 0 < sigmoid.min() < sigmoid.max() < 1
    assert tiny(mask_act="relu").separator(w).min() == 0
    assert -1 < tiny(mask_act="tanh").separator(w).min() < 0
    model = tiny(mask_act="softmax", num_sources=3)
    w = model.encode(mixture())
    masks = model.separator(w)
    assert masks.shape == (2, 3, *w.shape[1:])
    torch.testing.assert_close(masks.sum(1), torch.ones_like(w))
    # Masks that sum to one give sources that sum to the decoded mixture.
    whole = model.decoder(w.unsqueeze(1))[:, 0]
    torch.testing.assert_close(model(mixture()).sum(1)[:, : whole.shape[1]], whole)


@pytest.mark.parametrize("length", [400, 401, 403, 405, 409])
def test_ends(length: int):
    x = mixture(length=length)
    trimmed = tiny(ends="trimmed")(x)
    lost = (length - 10) % 5
    assert not trimmed[..., length - lost :].any()
    assert trimmed[..., length - lost - 1].all()
    for ends in ("padded", "aligned"):
        assert tiny(ends=ends)(x).shape == (2, 2, length)
        assert tiny(ends=ends)(x)[..., [0, -1]].all()


BLOCKS = {"single": [1] * 203, "odd": [7] * 29, "ragged": [0, 9, 1, 90, 3, 100], "whole": [203]}


@pytest.mark.parametrize("ends", ["trimmed", "padded", "aligned"])
@pytest.mark.parametrize(
    ("norm", "dtype", "tolerance"),
    [("cumulative", torch.float64, 1e-12), ("cumulative", torch.float32, 1e-5), ("frame", torch.float64, 1e-12)],
    ids=str,
)
def test_streaming_is_the_whole_at_once(norm: str, dtype: torch.dtype, tolerance: float, ends: str):
    options = {"conv_kernel_size": 5, "skip_channels": 0} if norm == "frame" else {}
    model, x = tiny(causal=True, norm=norm, ends=ends, **options).to(dtype), mixture(2, 203).to(dtype)
    expected = model(x)
    for sizes in BLOCKS.values() if dtype == torch.float64 else [BLOCKS["odd"]]:
        state, pieces, received, given = model.initial_state(2), [], 0, 0
        for block in x.split(sizes, 1):
            y, state = model.step(block, state)
            pieces.append(y)
            received, given = received + block.shape[1], given + y.shape[2]
            assert received - given <= model.latency
        together = torch.cat([*pieces, model.finish(state)], 2)
        assert together.shape == expected.shape
        assert (together - expected).abs().max() <= tolerance * expected.abs().max()


def test_streaming_with_running_statistics_and_from_a_copied_state():
    model, x = tiny(causal=True, norm="batch"), mixture()
    first, state = model.step(x[:, :100], model.initial_state(2))
    kept = copy.deepcopy(state)
    one = torch.cat([first, model.step(x[:, 100:], state)[0]], 2)
    other = torch.cat([first, model.step(x[:, 100:], kept)[0]], 2)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(one, model(x)[..., : one.shape[2]])
    with pytest.raises(Unsupported, match="streaming needs a causal model"):
        model.train().initial_state()


def test_what_cannot_stream_says_so():
    for options in ({}, {"norm": "cumulative"}, {"causal": True}, {"causal": True, "norm": "feature"}):
        with pytest.raises(Unsupported, match="streaming needs a causal model with cumulative or frame-wise norm"):
            tiny(**options).initial_state()
    changed = tiny(causal=True, norm="frame")
    changed.separator.blocks[1].act = nn.GELU()
    with pytest.raises(Unsupported, match="the network's own layers only, got GELU"):
        changed.initial_state()
    model = tiny(causal=True, norm="frame")
    with pytest.raises(ValueError, match=r"x must be \(1, n\), got \(2, 30\)"):
        model.step(mixture(2, 30), model.initial_state(1))
    with pytest.raises(ValueError, match="one encoder frame of 10 samples, got 0"):
        model.finish(model.initial_state())


def test_separate_gives_files_fit_to_be_written():
    model = tiny(causal=True, norm="frame", ends="padded")
    x = mixture(1, 1500)[0]
    y = model.separate(x)
    torch.testing.assert_close(y.abs().amax(1), x.abs().max().expand(2))
    quiet = model.separate(x, level="rms").square().mean(1).sqrt()
    torch.testing.assert_close(quiet, x.square().mean().sqrt().expand(2))
    torch.testing.assert_close(model.separate(x, level=None), model(x).detach())
    # A network of short memory gives nearly what it gives at once: chunks differ where they begin.
    chunked, whole = model.separate(x, level=None, chunk=600), model(x).detach()
    assert (chunked - whole).square().mean() < 0.03 * whole.square().mean()
    with pytest.raises(ValueError, match="x must be finite, got NaN or infinity"):
        model.separate(x * torch.nan)


def test_errors_name_the_argument():
    model = tiny()
    for x in (torch.zeros(2, 2, 40), torch.zeros(2, 1, 1, 40)):
        with pytest.raises(ValueError, match=re.escape(f"of one channel, got {tuple(x.shape)}")):
            model(x)
    with pytest.raises(ValueError, match=r"x must be floating point, got torch\.int16"):
        model(torch.zeros(2, 40, dtype=torch.int16))
    with pytest.raises(ValueError, match="x must not be shorter than one encoder frame of 10 samples, got 9"):
        model(torch.zeros(2, 9))
    for options, message in (
        ({"conv_kernel_size": 4}, "conv_kernel_size must be odd, or frames would get lost, got 4"),
        ({"stride": 11}, "stride must be from 1 to kernel_size 10, got 11"),
        ({"num_sources": 0}, "num_sources must be at least 1, got 0"),
        ({"skip_channels": -1}, "skip_channels must not be negative"),
        ({"norm": "gLN"}, "unknown norm 'gLN'"),
        ({"mask_act": "softmaxx"}, "unknown mask_act 'softmaxx': did you mean softmax"),
        ({"filterbank": "fft"}, "unknown filterbank 'fft'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ConvTasNetConfig(**{**TINY, **options})
    with pytest.warns(UserWarning, match="a softmax over one source is always 1"):
        tiny(num_sources=1, mask_act="softmax")


@pytest.mark.parametrize("options", [{}, {"causal": True, "norm": "cumulative", "ends": "padded"}], ids=["", "causal"])
def test_exported_programs_take_any_length(options: dict[str, Any]):
    model = tiny(**options)
    time = torch.export.Dim("time", min=40, max=100_000)
    program = torch.export.export(model, (mixture(),), dynamic_shapes=({1: time},), strict=False)
    x = mixture(length=517)
    torch.testing.assert_close(program.module()(x), model(x))


def test_weights_of_the_first_version_begin_by_xaviers_rule():
    torch.manual_seed(0)
    model = create_model("conv_tasnet_v1", num_blocks=1, num_repeats=1)
    for layer in (model.separator.blocks[0].conv, model.separator.mask):
        outputs, inputs = layer.weight.shape[:2]
        assert layer.weight.std().item() == pytest.approx((2 / (inputs + outputs)) ** 0.5, rel=0.02)


def test_useless_last_residual_is_not_trained():
    model = tiny()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"separator.blocks.5.residual.weight", "separator.blocks.5.residual.bias"}
    assert all(parameter.requires_grad for parameter in tiny(skip_channels=0).parameters())


# Filter banks


def test_analytic_filters_are_hilbert_pairs():
    real, turned = make_filterbank("analytic_free", 12, 10, 5, 8000)()[:, 0].double().chunk(2)
    spectrum = torch.fft.fft(torch.complex(real, turned))
    assert spectrum[:, 6:].abs().max() < 1e-6 < spectrum[:, 1:5].abs().min()


def test_fourier_filters_give_the_mixture_back():
    model = tiny(filterbank="stft", kernel_size=16, num_filters=20, mask_act="linear")
    assert sum(p.numel() for p in model.encoder.parameters()) == 0
    x = mixture()
    w = model.encode(x)
    assert w.shape[1] == 22
    frame = x[0, 8:24] * torch.hann_window(16, dtype=torch.float64).sqrt()
    padded = torch.nn.functional.pad(frame, (2, 2))
    expected = torch.fft.rfft(padded)
    ratio = torch.complex(w[0, :11, 1], w[0, 11:, 1])[1:-1] / expected[1:-1]
    torch.testing.assert_close(ratio, ratio[0].expand(9), rtol=1e-5, atol=0)
    whole = model.decoder(w.unsqueeze(1))[:, 0]
    torch.testing.assert_close(whole[:, 16:-16], x[:, 16 : whole.shape[1] - 16], rtol=1e-5, atol=1e-5)


def test_sinc_filters_pass_their_band():
    bank = make_filterbank("param_sinc", 8, 251, 125, 8000)
    low = 50 + bank.low_hz.abs()
    high = low + 50 + bank.band_hz.abs()
    even, odd = bank().detach()[:, 0].chunk(2)
    response = torch.fft.rfft(even, 8000).abs()[:, :4000]
    for band, (first, last) in enumerate(zip(low[:, 0], high[:, 0], strict=True)):
        middle = response[band, int((first + last) / 2)]
        assert middle == pytest.approx(response[band].max().item(), rel=0.2)
        outside = torch.cat([response[band, : max(int(first) - 100, 0)], response[band, int(last) + 100 :]])
        assert outside.max() < 0.05 * middle
    torch.testing.assert_close(odd, -odd.flip(1))
    torch.testing.assert_close(even, even.flip(1))


def test_filter_banks_refuse_sizes():
    for kind, filters, size, message in (
        ("stft", 8, 10, "num_filters of filterbank 'stft' must be at least kernel_size 10, got 8"),
        ("stft", 11, 10, "num_filters of this filterbank must be even, got 11"),
        ("analytic_free", 11, 10, "must be even, got 11"),
        ("param_sinc", 12, 10, "kernel_size of filterbank 'param_sinc' must be odd, got 10"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_filterbank(kind, filters, size, 5, 8000)
    with pytest.raises(UnknownName, match="unknown filterbank"):
        make_filterbank("fre", 12, 10, 5, 8000)


# Norm


def test_cumulative_norm_over_a_long_signal_far_from_zero():
    norm = CumulativeLayerNorm(4)
    x = 1000 + torch.randn(1, 4, 30_000, generator=torch.Generator().manual_seed(0))
    wide = x.double()
    for frame in (0, 10, 29_999):
        past = wide[..., : frame + 1]
        expected = (wide[..., frame] - past.mean()) / (past.var(correction=0) + 1e-8).sqrt()
        torch.testing.assert_close(norm(x)[..., frame].double(), expected, rtol=0, atol=2e-3)
