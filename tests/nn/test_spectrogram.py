"""Spectrogram layers: the transforms that they stand for, both ways to compute them, trained kernels, checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convatlas.nn import spectrogram
from convatlas.nn.spectrogram import (
    CFP,
    CQT1992,
    CQT2010,
    MFCC,
    NNAUDIO_LAYOUT,
    STFT,
    VQT,
    Combined_Frequency_Periodicity,
    CQT1992v2,
    CQT2010v2,
    Gammatonegram,
    Griffin_Lim,
    MelSpectrogram,
    iSTFT,
    least_squares_inverse,
)
from convatlas.weights import load_weights

CQT_OPTIONS: dict[str, Any] = {"sr": 4000, "hop_length": 64, "fmin": 110.0, "n_bins": 36}
#: Small layers, each by its name.
SMALL: dict[str, dict[str, Any]] = {
    "STFT": {"n_fft": 32, "hop_length": 8, "output_format": "Magnitude"},
    "MelSpectrogram": {"sr": 4000, "n_fft": 64, "n_mels": 6, "hop_length": 16},
    "MFCC": {"sr": 4000, "n_fft": 64, "n_mels": 6, "n_mfcc": 4, "hop_length": 16},
    "Gammatonegram": {"sr": 4000, "n_fft": 64, "n_bins": 5, "hop_length": 16, "fmin": 50.0},
    "CQT1992": {**CQT_OPTIONS, "n_bins": 13, "fmin": 440.0},
    "CQT1992v2": {**CQT_OPTIONS, "n_bins": 13, "fmin": 440.0},
    "CQT2010": {**CQT_OPTIONS, "n_bins": 13, "fmin": 440.0},
    "CQT2010v2": {**CQT_OPTIONS, "n_bins": 13, "fmin": 440.0},
    "VQT": {**CQT_OPTIONS, "n_bins": 13, "fmin": 440.0, "gamma": 10},
    "Combined_Frequency_Periodicity": {
        **{"fr": 50, "fs": 4000, "hop_length": 40, "window_size": 61},
        **{"fc": 200, "tc": 1 / 800, "NumPerOct": 6},
    },
}
TRAINED = {
    "STFT": "trainable",
    "MelSpectrogram": "trainable_STFT",
    "MFCC": "trainable_mel",
    "Gammatonegram": "trainable_bins",
    "CQT1992": "trainable_CQT",
    "CQT1992v2": "trainable",
    "CQT2010": "trainable_STFT",
    "CQT2010v2": "trainable",
    "VQT": "trainable",
}
each_layer = pytest.mark.parametrize("name", SMALL)


def build(name: str, **changes: Any) -> Any:
    return getattr(spectrogram, name)(**{**SMALL[name], **changes})


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def sinusoid(frequency: float, length: int, sr: float) -> Tensor:
    return torch.sin(2 * torch.pi * frequency * torch.arange(length, dtype=torch.float64) / sr)


# -- every layer -------------------------------------------------------------------------------------------------------


@each_layer
def test_one_two_and_three_axes_give_the_same(name: str):
    layer, x = build(name), torch.randn(3, 700)
    whole = first(layer(x))
    assert torch.equal(first(layer(x[:, None])), whole)
    torch.testing.assert_close(first(layer(x[1])), whole[1:2], rtol=1e-4, atol=1e-4)
    assert whole.shape[0] == 3
    assert whole.isfinite().all()
    with pytest.raises(ValueError, match=r"x must be \(L,\), \(B, L\) or \(B, 1, L\), got \(3, 2, 700\)"):
        layer(torch.zeros(3, 2, 700))
    with pytest.raises(ValueError, match=r"got torch.int64: convert it to float"):
        layer(torch.zeros(700, dtype=torch.long))


@each_layer
def test_gradients_are_those_of_finite_differences(name: str):
    torch.manual_seed(0)
    options = {TRAINED[name]: True} if name in TRAINED else {}
    for changes in ({}, options):
        layer = build(name, dtype=torch.float64, **changes)
        x = torch.randn(1, 300, dtype=torch.float64, requires_grad=True)
        weights = [w.requires_grad_() for w in layer.parameters()]
        names = [key for key, _ in layer.named_parameters()]

        def call(signal: Tensor, *values: Tensor, layer: nn.Module = layer, names: list[str] = names) -> Tensor:
            return first(torch.func.functional_call(layer, dict(zip(names, values, strict=True)), signal))

        assert bool(weights) == bool(changes)
        assert torch.autograd.gradcheck(call, (x, *weights), fast_mode=True)


@each_layer
def test_silence_has_finite_gradients(name: str):
    x = torch.zeros(1, 600, requires_grad=True)
    first(build(name)(x)).sum().backward()
    assert x.grad.isfinite().all()


@each_layer
def test_precision(name: str):
    layer, x = build(name), torch.randn(2, 600)
    exact = first(build(name, dtype=torch.float64)(x.double()))
    single = first(layer(x))
    assert relative(single, exact) < 1e-4
    half = first(build(name).to(torch.bfloat16)(x.to(torch.bfloat16)))
    assert half.dtype == torch.bfloat16
    assert float((half.float() - single).norm() / single.norm()) < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(first(layer(x)), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_a_copy_of_a_trained_layer_survives(name: str):
    trained, x = build(name, **{TRAINED[name]: True}), torch.randn(1, 600)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    # Kernels that a fixed layer loads are used, although they are not those of the transform.
    fixed = build(name)
    load_weights(fixed, trained.state_dict())
    torch.testing.assert_close(fixed(x), trained(x), rtol=1e-3, atol=1e-3)
    assert relative(build(name)(x), trained(x)) > 1e-3


def test_reference_checkpoints_load():
    layer = build("CQT2010v2")
    state = {key.replace("lengths", "lenghts"): value for key, value in layer.state_dict().items()}
    assert set(state) == {
        *("cqt_kernels_real", "cqt_kernels_imag", "lenghts", "lowpass_filter"),
        *({"early_downsample_filter"} if layer.downsample_factor > 1 else ()),
    }
    load_weights(layer, state)
    network = nn.Sequential(build("CQT1992v2"), nn.Linear(2, 2))
    renamed = {key.replace("lengths", "lenghts"): value for key, value in network.state_dict().items()}
    network.load_state_dict(NNAUDIO_LAYOUT.apply(renamed, network))
    keys = set(build("MFCC").state_dict())
    assert keys == {
        *(f"melspec_layer.stft.{key}" for key in ("wsin", "wcos", "window_mask")),
        *("melspec_layer.mel_basis", "amin", "ref"),
    }


@pytest.mark.parametrize("name", ["STFT", "MelSpectrogram", "CQT1992v2", "CQT2010v2"])
def test_export(name: str):
    layer, x = build(name), torch.randn(2, 600)
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-4)


# -- STFT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
@pytest.mark.parametrize(
    ("n_fft", "win_length", "hop", "kind"),
    [(64, 50, 16, "hann"), (63, 63, 17, "blackman"), (2048, 2048, 512, "hamming")],
)
def test_stft_is_that_of_torch(n_fft: int, win_length: int, hop: int, kind: str, pad_mode: str, center: bool):
    x = torch.randn(2, 3 * n_fft, dtype=torch.float64)
    options = {"center": center, "pad_mode": pad_mode, "window": kind, "dtype": torch.float64}
    layer = STFT(n_fft, win_length, hop_length=hop, **options)
    window = layer.window_mask.flatten()
    theirs = torch.stft(x, n_fft, hop, window=window, center=center, pad_mode=pad_mode, return_complex=True)
    for backend in ("fft", "conv"):
        ours = STFT(n_fft, win_length, hop_length=hop, backend=backend, **options)(x)
        assert relative(ours, torch.view_as_real(theirs)) < 1e-10
    assert relative(STFT(n_fft, win_length, hop_length=hop, **{**options, "dtype": None})(x.float()), ours) < 2e-6


def test_the_shortest_signal():
    layer = STFT(64, hop_length=16)
    assert layer(torch.randn(1, 33)).shape == (1, 33, 3, 2)
    with pytest.raises(ValueError, match=r"shorter than reflect padding length \(n_fft // 2\)"):
        layer(torch.randn(1, 32))


def test_formats():
    x, layer = torch.randn(1, 200), STFT(32)
    real, imag = layer(x).unbind(-1)
    torch.testing.assert_close(layer(x, "Magnitude"), torch.hypot(real, imag))
    torch.testing.assert_close(layer(x, "Phase"), torch.atan2(imag + 0.0, real))
    assert float(layer(torch.zeros(1, 99), "Phase").abs().max()) == 0
    assert float(STFT(32, trainable=True)(torch.zeros(1, 99), "Magnitude").detach().max()) == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="output_format must be 'Complex', 'Magnitude' or 'Phase', got 'Power'"):
        layer(x, "Power")


@pytest.mark.parametrize(("n_fft", "win_length", "hop"), [(64, 64, 16), (64, 50, 11), (63, 63, 20)])
def test_inverse_is_exact(n_fft: int, win_length: int, hop: int):
    x = torch.randn(2, 500, dtype=torch.float64)
    for backend in ("fft", "conv"):
        layer = STFT(n_fft, win_length, hop_length=hop, iSTFT=True, backend=backend, dtype=torch.float64)
        assert relative(layer.inverse(layer(x), length=480), x[:, :480]) < 1e-10
    other = iSTFT(n_fft, win_length, hop_length=hop, dtype=torch.float64)
    torch.testing.assert_close(other(layer(x), onesided=True, length=480), x[:, :480])
    free = torch.view_as_real(torch.fft.fft(torch.randn(1, n_fft, 5, dtype=torch.float64), dim=1))
    torch.testing.assert_close(other(free), other(free[:, : n_fft // 2 + 1], onesided=True))
    trained = iSTFT(n_fft, trainable_kernels=True, trainable_window=True)
    assert {key for key, _ in trained.named_parameters()} == {"kernel_sin", "kernel_cos", "window_mask"}


def test_inverse_of_a_warped_scale():
    options = {"freq_scale": "log", "sr": 8000, "fmax": 3000, "iSTFT": True, "dtype": torch.float64}
    layer = STFT(32, hop_length=8, **options)
    X = layer(torch.randn(1, 200, dtype=torch.float64))
    cos, sin = layer.kernel_cos_inv[:, 0, :, 0], layer.kernel_sin_inv[:, 0, :, 0]
    real, imag = X.unbind(-1)
    # The bins above half are conjugates of those below, in reverse.
    real, imag = torch.cat([real, real[:, 1:16].flip(1)], 1), torch.cat([imag, -imag[:, 1:16].flip(1)], 1)
    frame = (cos.T @ real[0, :, 4] - sin.T @ imag[0, :, 4]) / 32
    single = STFT(32, hop_length=32, center=False, **options)
    taper = layer.window_mask.flatten()
    torch.testing.assert_close(single.inverse(X[:, :, 4:5])[0, 1:] * taper[1:], frame[1:])
    legacy = STFT(32, hop_length=32, center=False, **options, legacy_inverse=True).inverse(X[:, :, 4:5])
    assert relative(legacy, single.inverse(X[:, :, 4:5])) > 0.1


def test_inverse_is_refused():
    with pytest.raises(NameError, match="Please activate the iSTFT module by setting `iSTFT=True`"):
        STFT(32).inverse(torch.zeros(1, 17, 4, 2))
    with pytest.raises(ValueError, match="Inverse iSTFT only works for complex number"):
        STFT(32, iSTFT=True).inverse(torch.zeros(1, 17, 4))
    with pytest.raises(ValueError, match="must have 17 bins, got 9"):
        STFT(32, iSTFT=True).inverse(torch.zeros(1, 9, 4, 2))


def test_griffin_lim_begins_where_it_is_told():
    x = torch.randn(1, 640)
    S = STFT(64, hop_length=16)(x, "Magnitude")
    phase = STFT(64, hop_length=16)(x, "Phase")
    torch.testing.assert_close(Griffin_Lim(64, 0, hop_length=16)(S, phase), x, rtol=1e-4, atol=1e-4)
    a, b = (Griffin_Lim(64, 3)(S, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert relative(a, b) > 0.1


# -- constant Q --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CQT1992, CQT1992v2, CQT2010, CQT2010v2, VQT])
def test_a_sinusoid_has_its_amplitude_in_its_bin(kind: type[nn.Module]):
    layer = kind(**CQT_OPTIONS, dtype=torch.float64)
    for number in (3, 17, 33):
        x = sinusoid(float(layer.frequencies[number]), 8000, 4000)
        values = layer(x, normalization_type="wrap")[0, :, 40:-40]
        assert values.argmax(0).unique().tolist() == [number]
        assert float((values[number] - 1).abs().max()) < 2e-3


def test_all_forms_agree_inside():
    x = torch.randn(2, 8000, dtype=torch.float64)
    whole = CQT1992v2(**CQT_OPTIONS, dtype=torch.float64)(x)
    assert relative(CQT1992(**CQT_OPTIONS, dtype=torch.float64)(x), whole) < 1e-4
    x = torch.randn(1, 40000, dtype=torch.float64)
    for kind in (CQT2010, CQT2010v2, VQT):
        for early in (False, True):
            options = {"sr": 16000, "hop_length": 256, "fmin": 110.0, "n_bins": 30, "dtype": torch.float64}
            layer = kind(**options, earlydownsample=early)
            expected = CQT1992v2(**options)(x)[..., 30:-30]
            assert relative(layer(x)[..., 30:-30], expected) < (0.02 if early else 4e-3)
        assert layer.downsample_factor == 4
        legacy = kind(**options, legacy_downsample=True)(x, normalization_type="librosa")
        if kind is not VQT:  # whose kernels find other frequencies then
            torch.testing.assert_close(legacy, layer(x) * (0.5 if kind is CQT2010 else 2.0))


def test_the_signs_of_the_reference():
    x = torch.randn(1, 2000)
    ours, theirs = (build("CQT1992", legacy_spectra=legacy) for legacy in (False, True))
    torch.testing.assert_close(ours(x, "Complex"), theirs(x, "Complex"))
    torch.testing.assert_close(ours(x, "Phase") * torch.tensor([1.0, -1.0]), theirs(x, "Phase"))
    scale = theirs.wcos.shape[-1]
    a, b = (layer(x, normalization_type="convolutional") for layer in (ours, theirs))
    torch.testing.assert_close(a * scale, b)
    ours, theirs = (build("CQT2010", legacy_spectra=legacy) for legacy in (False, True))
    torch.testing.assert_close(ours(x, "Complex") * torch.tensor([1.0, -1.0]), theirs(x, "Complex"))


def test_a_filter_passes_no_more_energy_than_its_gain():
    x = torch.randn(1, 3000, dtype=torch.float64)
    options = {**CQT_OPTIONS, "hop_length": 1, "norm": 2, "pad_mode": "constant", "dtype": torch.float64}
    layer = CQT1992v2(**options, output_format="Complex")
    energy = layer(x, normalization_type="convolutional").square().sum((2, 3))[0]
    kernels = torch.complex(layer.cqt_kernels_real, layer.cqt_kernels_imag).squeeze(1)
    torch.testing.assert_close(kernels.abs().square().sum(1), torch.ones(36, dtype=torch.float64))
    gain = torch.fft.fft(kernels, 16384).abs().square().amax(1)
    assert bool((energy < gain * x.square().sum()).all())
    assert bool((energy > 0).all())


def test_hops_that_octaves_cannot_share():
    x = torch.randn(1, 8000, dtype=torch.float64)
    options = {**CQT_OPTIONS, "hop_length": 50, "dtype": torch.float64, "earlydownsample": False}
    with pytest.warns(UserWarning, match="hop_length 50 is no multiple of 4"):
        rough = CQT2010v2(**options)(x)
    exact = CQT1992v2(**{**CQT_OPTIONS, "hop_length": 50, "dtype": torch.float64})(x)
    for kind in (CQT2010v2, CQT2010, VQT):
        placed = kind(**options, rounded_hop=True)(x)
        assert placed.shape == exact.shape
        assert relative(placed[..., 20:-20], exact[..., 20:-20]) < 0.05
    assert relative(rough[..., 20:-20], exact[..., 20 : rough.shape[-1] - 20]) > 0.1
    with pytest.raises(ValueError, match="hop_length must be at least 4 for 3 octaves, got 3"):
        CQT2010v2(**{**CQT_OPTIONS, "hop_length": 3, "earlydownsample": False})
    short = CQT2010v2(**{**CQT_OPTIONS, "hop_length": 3, "earlydownsample": False}, rounded_hop=True)
    assert short(x[:, :1200]).shape[-1] == 401


def test_short_signals_are_padded_by_zeros():
    with pytest.warns(UserWarning, match="too short to be mirrored around filters"):
        assert build("CQT2010v2")(torch.randn(1, 20)).isfinite().all()


def test_fmax_decides_the_bins():
    with pytest.warns(UserWarning, match="fmax is given, so n_bins follows from it"):
        layer = CQT1992v2(sr=8000, fmin=110, fmax=880)
    assert layer.bins.n_bins == 36
    assert CQT1992v2(sr=8000, fmin=110, fmax=900, n_bins=None).bins.n_bins == 37


@pytest.mark.parametrize("kind", [CQT2010, CQT2010v2, VQT])
def test_what_the_reference_ignores_is_ignored_on_request(kind: type[nn.Module]):
    x, options = torch.randn(1, 3000), {"sr": 8000, "fmin": 110, "hop_length": 64, "n_bins": 24}
    with pytest.warns(UserWarning, match="fmax is given, so n_bins follows from it"):
        ours = kind(**options, fmax=440 * 2**0.5, window="hamming")
    assert ours.bins.n_bins == 30
    theirs = kind(**options, fmax=440 * 2**0.5, window="hamming", legacy_arguments=True)
    assert torch.equal(theirs(x), kind(**options)(x))
    assert relative(kind(**options, window="hamming")(x), theirs(x)) > 1e-3
    only = {**options, "n_bins": None, "fmax": 880.0}
    assert kind(**only, legacy_arguments=True).bins.n_bins == 36


@pytest.mark.parametrize("kind", [CQT2010, CQT2010v2, VQT])
def test_fewer_bins_than_an_octave(kind: type[nn.Module]):
    options = {"sr": 8000, "hop_length": 64, "n_bins": 5, "earlydownsample": False, "dtype": torch.float64}
    ours, theirs = (kind(**options, fmin=220.0, legacy_octave=legacy) for legacy in (False, True))
    found = {}
    for name, layer in (("ours", ours), ("theirs", theirs)):
        for frequency in (float(ours.frequencies[2]), float(ours.frequencies[2]) * 2 ** (-7 / 12)):
            values = layer(sinusoid(frequency, 8000, 8000), normalization_type="wrap")[0, :, 40:-40]
            found[name, round(frequency)] = float(values[2].mean())
    # The reference's filters are where they would be if its five bins ended the octave that begins with them.
    high, low = sorted({frequency for _, frequency in found}, reverse=True)
    assert found["ours", high] == pytest.approx(1, abs=2e-3)
    assert found["theirs", low] == pytest.approx(1, abs=2e-3)
    assert max(found["ours", low], found["theirs", high]) < 0.05
    lower = kind(**options, fmin=220.0 * 2 ** (-7 / 12))
    x = torch.randn(1, 2000, dtype=torch.float64)
    torch.testing.assert_close(theirs(x, normalization_type="wrap"), lower(x, normalization_type="wrap"))
    more = {**options, "n_bins": 17, "fmin": 220.0}
    assert torch.equal(kind(**more, legacy_octave=True)(x), kind(**more)(x))


def test_the_norm_of_a_cepstrum():
    x, options = torch.randn(1, 3000), {"sr": 8000, "n_mfcc": 5, "n_mels": 20, "n_fft": 256, "hop_length": 64}
    orthonormal, plain = (MFCC(**options, norm=norm)(x) for norm in ("ortho", None))
    scale = torch.tensor([2 * 20**0.5, *([(2 * 20) ** 0.5] * 4)])[:, None]
    torch.testing.assert_close(plain, orthonormal * scale)
    assert torch.equal(MFCC(**options, norm=None, legacy_arguments=True)(x), orthonormal)


def test_spectrograms_can_be_inverted():
    x = torch.sin(
        torch.arange(3000, dtype=torch.float64) / 4 + torch.sin(torch.arange(3000, dtype=torch.float64) / 90)
    )[None]
    layer = CQT1992v2(**CQT_OPTIONS, dtype=torch.float64, output_format="Complex")
    y = least_squares_inverse(layer, layer(x), 3000, n_iter=60)
    assert relative(layer(y), layer(x)) < 0.02
    assert relative(y[:, 400:-400], x[:, 400:-400]) < 0.1
    with pytest.raises(ValueError, match="transform must give the shape of spectrum"):
        least_squares_inverse(layer, layer(x), 2000)


@pytest.mark.parametrize("kind", [MelSpectrogram, Gammatonegram])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_bands_can_be_inverted(kind: type[nn.Module], power: float):
    torch.manual_seed(0)
    layer = kind(sr=8000, n_fft=256, hop_length=64, power=power, dtype=torch.float64)
    x = sinusoid(700.0, 4000, 8000) + 0.3 * sinusoid(1900.0, 4000, 8000)
    bands = layer(x)
    magnitudes = layer.magnitudes(bands)
    assert magnitudes.shape == (1, 129, bands.shape[2])
    assert bool((magnitudes >= 0).all())
    basis = getattr(layer, "mel_basis", getattr(layer, "gammatone_basis", None))
    errors = [relative(basis @ layer.magnitudes(bands, n) ** power, bands) for n in (0, 10, 100)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05
    y = Griffin_Lim(256, 32, hop_length=64)(magnitudes)
    assert int(torch.fft.rfft(y[0]).abs().argmax()) == pytest.approx(700 * y.shape[1] / 8000, abs=8)
    assert relative(layer(y)[..., 5:-5], bands[..., 5:-5][..., : layer(y).shape[2] - 10]) < 0.5
    with pytest.raises(ValueError, match="bands must not be negative, got -1"):
        layer.magnitudes(-torch.ones_like(bands))
    with pytest.raises(ValueError, match=r"bands must be \(B, \d+, T\), got \(1, 3, 4\)"):
        layer.magnitudes(torch.ones(1, 3, 4))


# -- CFP and arguments -------------------------------------------------------------------------------------------------


def test_a_harmonic_sound_has_its_fundamental():
    options = {"fr": 4, "fs": 8000, "hop_length": 160, "window_size": 1025, "NumPerOct": 24}
    x = sum(sinusoid(200 * k, 4000, 8000) / k for k in range(1, 6))
    maps = Combined_Frequency_Periodicity(**options)(x.float())
    assert maps.Z[0, :, 10].argmax() == pytest.approx(24 * torch.log2(torch.tensor(200 / 80)), abs=1)
    every = CFP(**options)(x.float())
    torch.testing.assert_close(every.Z[:, :, 1:-1], maps.Z)
    logarithmic = Combined_Frequency_Periodicity(**options, g=(0.24, 0, 1))(x.float())
    assert logarithmic.Z.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: STFT(1), "n_fft must be at least 2, got 1"),
        (lambda: STFT(32, 33), "win_length must be from 1 to n_fft = 32, got 33"),
        (lambda: STFT(32, hop_length=0), "hop_length must be at least 1, got 0"),
        (lambda: STFT(32, pad_mode="circular"), "pad_mode must be 'reflect' or 'constant', got 'circular'"),
        (lambda: STFT(32, window="hannn"), "window must be one that scipy.signal.get_window knows, got 'hannn'"),
        (lambda: STFT(32, freq_scale="bark"), "freq_scale must be 'no', 'linear', 'log' or 'log2', got 'bark'"),
        (lambda: STFT(32, output_format="Power"), "output_format must be"),
        (lambda: STFT(32, backend="gemm"), "backend must be 'auto', 'fft' or 'conv', got 'gemm'"),
        (lambda: STFT(32, trainable=True, backend="fft"), "computes fixed kernels with freq_scale 'no' only"),
        (lambda: MelSpectrogram(power=0), "power must be positive, got 0"),
        (lambda: MFCC(top_db=-1), "top_db must not be negative, got -1"),
        (lambda: MFCC(amin=0), "amin and ref must be positive"),
        (lambda: MFCC(n_mfcc=200), "n_mfcc must be from 1 to n_mels = 128, got 200"),
        (lambda: Gammatonegram(fmin=-1.0), "fmin must be from 0 to below fmax"),
        (lambda: CQT1992(), "The top bin .*Hz has exceeded the Nyquist frequency, please reduce the n_bins"),
        (lambda: CQT1992v2(fmin=0), "fmin must be positive, got 0"),
        (lambda: CQT1992v2(n_bins=None), "give n_bins or fmax, got neither"),
        (lambda: VQT(gamma=-1), "gamma must not be negative, got -1"),
        (lambda: build("CQT1992v2")(torch.zeros(999), normalization_type="l2"), "'l2' is not part of our current"),
        (lambda: Griffin_Lim(32, momentum=1.0), "momentum from 0 to below 1"),
        (lambda: CFP(window_size=9000), "window_size must be from 1 to fs / fr = 8000, got 9000"),
        (lambda: CFP(g=(1,)), "g must hold at least two exponents"),
    ],
)
def test_wrong_arguments_are_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
