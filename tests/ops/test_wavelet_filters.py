"""The filters equal those of PyWavelets, and do what defines their families."""

from __future__ import annotations

import numpy as np
import pytest
import pywt

from convatlas.errors import UnknownName
from convatlas.ops.wavelet_filters import Wavelet, find_wavelet, wavelet_names

FAST = [name for name in wavelet_names() if name not in ("db37", "db38", *(f"coif{order}" for order in range(8, 18)))]


def test_there_is_every_discrete_wavelet_that_reconstructs():
    assert set(pywt.wavelist(kind="discrete")) - set(wavelet_names()) == {"dmey"}
    assert set(wavelet_names()) <= set(pywt.wavelist(kind="discrete"))


@pytest.mark.parametrize("family", ["haar", "db", "sym", "coif", "bior", "rbio"])
def test_filters_are_those_of_pywavelets(family: str):
    names = [name for name in (*FAST, "coif17") if name.rstrip("0123456789.") == family]
    assert names
    # Its tables of symlets and of bior4.4 to bior6.8 have fewer digits than ours.
    tolerance = {"sym": 5e-11, "bior": 1e-12, "rbio": 1e-12}.get(family, 3e-16)
    for name in names:
        wavelet, theirs = find_wavelet(name), pywt.Wavelet(name)
        ours = (wavelet.dec_lo, wavelet.dec_hi, wavelet.rec_lo, wavelet.rec_hi)
        np.testing.assert_allclose(ours, theirs.filter_bank, rtol=0, atol=tolerance, err_msg=name)
        assert wavelet.length == theirs.dec_len
        assert wavelet.orthogonal or not theirs.orthogonal


@pytest.mark.parametrize("name", ["db7", "db20", "sym5", "sym20", "coif3", "bior5.5", "bior6.8", "rbio3.5"])
def test_filters_are_biorthonormal(name: str):
    wavelet = find_wavelet(name)
    low, high = np.array(wavelet.rec_lo), np.array(wavelet.rec_hi)
    dual_low, dual_high = np.array(wavelet.dec_lo)[::-1], np.array(wavelet.dec_hi)[::-1]
    for a, b, same in ((low, dual_low, 1), (high, dual_high, 1), (low, dual_high, 0), (high, dual_low, 0)):
        even = np.correlate(a, b, "full")[(len(a) - 1) % 2 :: 2]
        np.testing.assert_allclose(even, same * (np.arange(len(even)) == len(even) // 2), atol=1e-14)


@pytest.mark.parametrize(("name", "moments"), [("db6", 6), ("sym8", 8), ("coif3", 6), ("bior3.5", 3), ("bior6.8", 6)])
def test_high_pass_filters_ignore_polynomials(name: str, moments: int):
    taps = np.array(find_wavelet(name).dec_hi)
    positions = np.linspace(-1, 1, len(taps))
    for degree in range(moments):
        assert abs(taps @ positions**degree) < 1e-14
    assert abs(taps @ positions**moments) > 1e-6


def test_coiflets_have_a_low_pass_filter_that_interpolates():
    taps = np.array(find_wavelet("coif2").rec_lo) / np.sqrt(2)
    positions = np.arange(len(taps)) - 4.0
    assert taps @ positions**0 == pytest.approx(1)
    for degree in (1, 2, 3):
        assert abs(taps @ positions**degree) < 1e-13


def test_filters_of_ones_own():
    mine = Wavelet("mine", *pywt.Wavelet("db3").filter_bank)
    assert mine.orthogonal
    np.testing.assert_allclose(mine.dec_lo, find_wavelet("db3").dec_lo, atol=1e-15)
    assert hash(mine) == hash(Wavelet("mine", *pywt.Wavelet("db3").filter_bank))


def test_impossible_wavelets_are_refused():
    with pytest.raises(UnknownName, match="unknown wavelet 'db39': did you mean "):
        find_wavelet("db39")
    for filters in (((1.0, 2.0),) * 3 + ((1.0,),), ((1.0, 2.0, 1.0),) * 4, ((),) * 4):
        with pytest.raises(ValueError, match="the filters of a wavelet must have the same even length, got "):
            Wavelet("odd", *filters)
