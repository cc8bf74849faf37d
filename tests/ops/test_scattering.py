"""Filters of wavelet scattering, and what it does beyond what the battery asks of every operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convatlas.ops.morlet import Morlet1D, harmonics, morlet_1d, morlet_2d
from convatlas.ops.scattering import harmonic_scattering_3d, scattering_1d, scattering_2d


def bank_1d(length: int, J: int, Q: int = 1, **changes: object) -> Morlet1D:
    options = {"average": "local", "log2_stride": J, "max_order": 2, **changes}
    return morlet_1d(length, J, (Q, 1), 2**J, **options)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(
    J=st.integers(1, 4),
    more=st.integers(0, 20),
    first=st.integers(1, 5),
    second=st.integers(1, 2),
    less=st.integers(0, 4),
    average=st.sampled_from(["local", "none", "global"]),
)
def test_signals_of_any_size_agree_with_the_definition(
    J: int, more: int, first: int, second: int, less: int, average: str
):
    length = 2**J + more
    stride = max(J - less, 0) if average == "local" else None
    bank = morlet_1d(length, J, (first, second), 2**J, average=average, log2_stride=stride, max_order=2)
    x = torch.randn(2, length, dtype=torch.float64)
    y = scattering_1d(x, bank)
    torch.testing.assert_close(y, scattering_1d(x, bank, backend="naive"), rtol=1e-9, atol=1e-12)
    if average == "none":
        assert y.shape[-1] == sum(bank.lengths())
    else:
        assert y.shape[1:] == (len(bank.paths), bank.lengths()[0])
    if average == "local":
        assert abs(y.shape[-1] - length / 2**stride) < 1  # type: ignore[operator]


@settings(max_examples=10, deadline=None)
@given(J=st.integers(1, 3), more=st.tuples(st.integers(0, 9), st.integers(0, 9)), L=st.integers(1, 5))
def test_images_of_any_size_agree_with_the_definition(J: int, more: tuple[int, int], L: int):
    shape = (2**J + more[0], 2**J + more[1])
    bank = morlet_2d(shape, J, L, max_order=2)
    x = torch.randn(2, *shape, dtype=torch.float64)
    y = scattering_2d(x, bank)
    torch.testing.assert_close(y, scattering_2d(x, bank, backend="naive"), rtol=1e-9, atol=1e-12)
    assert y.shape[1:] == (1 + L * J + L * L * J * (J - 1) // 2, shape[0] >> J, shape[1] >> J)


def test_wavelets_have_no_mean_and_low_passes_sum_to_one():
    signals = bank_1d(256, 4, 4)
    for wave in (*signals.psi1, *signals.psi2):
        assert abs(wave.levels[0][0]) < 1e-12
        assert np.abs(np.fft.ifft(wave.levels[0].numpy())).sum() == pytest.approx(1)
    assert float(signals.phi[0][0]) == pytest.approx(1)
    images = morlet_2d((32, 24), 3, 8, max_order=2)
    assert all(abs(wave.levels[0][0, 0]) < 1e-12 for wave in images.psi)
    assert float(images.phi[0][0, 0]) == pytest.approx(1, abs=1e-4)  # 3.1415 for pi


@pytest.mark.parametrize("backend", ["naive", "grouped"])
def test_a_constant_has_only_a_mean(backend: str):
    signals = scattering_1d(torch.full((64,), 3.0, dtype=torch.float64), bank_1d(64, 3, 2), backend=backend)
    images = scattering_2d(
        torch.full((16, 12), 3.0, dtype=torch.float64), morlet_2d((16, 12), 2, 4, max_order=2), backend=backend
    )
    for y in (signals, images):
        torch.testing.assert_close(y[0], torch.full_like(y[0], 3.0), rtol=1e-4, atol=0)
        assert y[1:].abs().max() < 1e-12


def test_numbers_of_paths():
    assert [len(morlet_2d((32, 32), J, L, max_order=2).paths) for J, L in ((2, 8), (3, 8), (2, 4))] == [81, 217, 25]
    bank = bank_1d(256, 4, 4)
    assert (len(bank.paths), bank.padded, bank.lengths()[0]) == (29, 512, 16)
    assert bank.short  # 2^J is half of what reflection can pad
    assert not bank_1d(1000, 3).short
    assert bank.paths[15] == (0, 3)


def test_legacy_energy_shrinks_by_the_strides():
    x = torch.randn(128, dtype=torch.float64)
    now, then = bank_1d(128, 4, 2), bank_1d(128, 4, 2, legacy_energy=True)
    ours, theirs = scattering_1d(x, now), scattering_1d(x, then)
    for number, path in enumerate(now.paths):
        waves = [bank[n] for bank, n in zip((now.psi1, now.psi2), path, strict=False)]
        torch.testing.assert_close(theirs[number], ours[number] / 2 ** sum(wave.j for wave in waves))


def test_shifts_change_little():
    # Of a signal that ends in zeros, so that what reflection puts around it shifts along.
    x = torch.zeros(256, dtype=torch.float64)
    x[100:130] = torch.randn(30, dtype=torch.float64)
    y, moved = (scattering_1d(part, bank_1d(256, 6, 2)) for part in (x, x.roll(2)))
    assert (y - moved).norm() < 0.15 * y.norm()
    assert (x - x.roll(2)).norm() > x.norm()


def _turned(x: Tensor, axes: tuple[int, int]) -> Tensor:
    """A quarter turn around the centre of the periodic grid, which is its origin."""
    centred = torch.roll(x, (4, 4, 4), (0, 1, 2))
    padded = torch.nn.functional.pad(centred[None, None], (0, 1) * 3, mode="circular")[0, 0]
    return torch.roll(padded.rot90(1, axes)[:-1, :-1, :-1], (-4, -4, -4), (0, 1, 2))


def test_quarter_turns_of_a_volume_change_nothing():
    bank = harmonics((8, 8, 8), 1, 3, 0.6, max_order=2, rotation_covariant=True, powers=(0.5, 1.0, 2.0))
    # Without the Nyquist planes, which are not turned into themselves.
    x = torch.randn(8, 8, 8, dtype=torch.float64)
    spectrum = torch.fft.fftn(x)
    for axis in range(3):
        spectrum.index_fill_(axis, torch.tensor([4]), 0)
    x = torch.fft.ifftn(spectrum).real
    y = harmonic_scattering_3d(x, bank)
    for axes in ((0, 1), (1, 2), (0, 2)):
        turned = harmonic_scattering_3d(_turned(x, axes), bank)
        torch.testing.assert_close(turned[:2], y[:2], rtol=1e-9, atol=0)
    torch.testing.assert_close(harmonic_scattering_3d(x.roll((1, 2, 3), (0, 1, 2)), bank), y)


def test_spherical_harmonics_are_those_of_scipy():
    from scipy.special import sph_harm_y

    bank = harmonics((4, 5, 6), 0, 3, 1.0, max_order=1, rotation_covariant=True, powers=(1.0,))
    z, y, x = np.meshgrid(*(2 * np.pi * np.fft.fftfreq(n) for n in (4, 5, 6)), indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    polar, azimuth = np.arctan2(z, np.hypot(x, y)) + np.pi / 2, np.arctan2(y, x)
    factors = {1: -1j / (4 * np.sqrt(3 * np.pi)), 2: -1 / (2 * np.pi * np.sqrt(2.5) * 3)}
    for degree, factor in factors.items():
        radial = (2 * np.pi) ** 1.5 * factor * radius**degree * np.exp(-(radius**2) / 2)
        for order in range(-degree, degree + 1):
            expected = radial * sph_harm_y(degree, order, polar, azimuth)
            np.testing.assert_allclose(bank.psi[degree][0][order + degree].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("backend", ["naive", "grouped"])
def test_gradients_at_zero_are_zero(backend: str):
    calls = [
        (scattering_1d, (16,), bank_1d(16, 2)),
        (scattering_2d, (8, 8), morlet_2d((8, 8), 2, 2, max_order=2)),
        (
            harmonic_scattering_3d,
            (4, 4, 4),
            harmonics((4, 4, 4), 1, 1, 1.0, max_order=2, rotation_covariant=True, powers=(0.5, 1.0)),
        ),
    ]
    for function, shape, bank in calls:
        x = torch.zeros(shape, requires_grad=True)
        function(x, bank, backend=backend)[1:].sum().backward()
        assert x.grad is not None
        assert not x.grad.any()


def test_bad_input_is_named():
    bank = morlet_2d((8, 8), 2, 2, max_order=2)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 8, 8\), got \(3, 8, 9\)"):
        scattering_2d(torch.zeros(3, 8, 9), bank)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 8, 8\), got \(8,\)"):
        scattering_2d(torch.zeros(8), bank)
    with pytest.raises(ValueError, match=r"x must be real floating point, got torch\.complex64"):
        scattering_1d(torch.zeros(16, dtype=torch.complex64), bank_1d(16, 2))
    with pytest.raises(ValueError, match=r"x must hold at least one sample, got \(0, 16\)"):
        scattering_1d(torch.zeros(0, 16), bank_1d(16, 2))
