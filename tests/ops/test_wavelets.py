"""The wavelet transform: PyWavelets' numbers in every mode, reconstruction, adjoints, levels, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor, nn
from torch.export import Dim

from convatlas.errors import UnknownName, Unsupported
from convatlas.ops.wavelet_filters import Wavelet, find_wavelet
from convatlas.ops.wavelets import Coefficients, Mode, dwt, idwt, max_level, subbands, wavedec, waverec

MODES = get_args(Mode)
SIZES = [(8,), (7,), (2,), (5, 6), (17, 3), (5, 4, 3)]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def theirs(x: Tensor, wavelet: str, mode: str) -> Tensor:
    dims = x.dim() - 2
    bands = pywt.dwtn(x.numpy(), wavelet, mode, axes=range(2, 2 + dims))
    return torch.from_numpy(np.stack([bands[name] for name in subbands(dims)], axis=2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db5", "sym4", "bior2.2", "rbio3.1"])
def test_numbers_are_those_of_pywavelets(wavelet: str, mode: Mode):
    # The table of sym4 in PyWavelets has errors of 1e-12, and the line of mode smooth rises far.
    tolerance = {"rtol": 0.0, "atol": 1e-8 if wavelet == "sym4" else 1e-11}
    for size in SIZES:
        x = random(2, 1, *size)
        y = theirs(x, wavelet, mode)
        bands = {name: y[:, :, index].numpy() for index, name in enumerate(subbands(len(size)))}
        back = torch.from_numpy(pywt.idwtn(bands, wavelet, mode, axes=range(2, 2 + len(size))))
        for backend in ("naive", "conv", "matrix", "auto"):
            torch.testing.assert_close(dwt(x, wavelet, mode, backend=backend), y, **tolerance)
            torch.testing.assert_close(idwt(y, wavelet, mode, backend=backend), back, **tolerance)
        torch.testing.assert_close(idwt(dwt(x, wavelet, mode), wavelet, mode, size), x, **tolerance)


@pytest.mark.parametrize(("wavelet", "mode"), [("db3", "periodization"), ("haar", "zero"), ("coif1", "periodization")])
def test_orthogonal_wavelets_keep_the_energy_and_are_inverted_by_their_transpose(wavelet: str, mode: Mode):
    x, y = random(1, 2, 8, 6), random(1, 2, 4, 4, 3)
    assert dwt(x, wavelet, mode).square().sum().item() == pytest.approx(x.square().sum().item())
    left = (dwt(x, wavelet, mode) * y).sum()
    assert left.item() == pytest.approx((x * idwt(y, wavelet, mode)).sum().item())


def test_biorthogonal_wavelets_are_inverted_by_the_transpose_of_their_dual():
    x, y = random(1, 1, 12), random(1, 1, 2, 6)
    left = (dwt(x, "bior3.5", "periodization") * y).sum()
    dual = find_wavelet("bior3.5")
    turned = Wavelet("turned", *(taps[::-1] for taps in (dual.rec_lo, dual.rec_hi, dual.dec_lo, dual.dec_hi)))
    assert left.item() == pytest.approx((x * idwt(y, turned, "periodization")).sum().item())


def test_haar_is_sums_and_differences_of_neighbours():
    x = random(1, 1, 2, 2)
    (a, b), (c, d) = x[0, 0].tolist()
    expected = [a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]
    for backend in ("auto", "slices", "naive"):
        assert dwt(x, "haar", "zero", backend=backend).flatten().tolist() == pytest.approx([v / 2 for v in expected])
    assert subbands(2) == ("aa", "ad", "da", "dd")
    volume = dwt(torch.ones(1, 1, 2, 2, 2), "haar", "zero").flatten()
    torch.testing.assert_close(volume, torch.tensor([2**1.5, *[0.0] * 7]))


@pytest.mark.filterwarnings("ignore:Level value of 3 is too high")
@pytest.mark.parametrize("size", [(21,), (13, 10), (6, 5, 7)])
@pytest.mark.parametrize(("wavelet", "mode"), [("db2", "symmetric"), ("haar", "zero"), ("bior4.4", "periodization")])
def test_levels(size: tuple[int, ...], wavelet: str, mode: Mode):
    x = random(2, 1, *size)
    low, highs = coefficients = wavedec(x, wavelet, mode, levels=3)
    coarse, *fine = pywt.wavedecn(x.numpy(), wavelet, mode, 3, axes=range(2, x.dim()))
    torch.testing.assert_close(low, torch.from_numpy(coarse), rtol=0, atol=1e-11)
    for high, bands in zip(highs, reversed(fine), strict=True):
        expected = np.stack([bands[name] for name in subbands(len(size))[1:]], axis=2)
        torch.testing.assert_close(high, torch.from_numpy(expected), rtol=0, atol=1e-11)
    torch.testing.assert_close(waverec(coefficients, wavelet, mode, size), x, rtol=0, atol=1e-11)


def test_number_of_levels():
    for size, wavelet in ((64, "db2"), (63, "haar"), (5, "db4"), (1, "haar"), (1000, "coif2")):
        assert max_level(size, wavelet) == pywt.dwt_max_level(size, wavelet), (size, wavelet)
    assert max_level((64, 8), "haar") == 3


def test_gradient_of_the_transform_is_the_transform_of_the_transpose():
    x, y = random(1, 2, 8, 8).requires_grad_(), random(1, 2, 4, 4, 4)
    (dwt(x, "haar", "zero") * y).sum().backward()
    torch.testing.assert_close(x.grad, idwt(y, "haar", "zero"))


def test_twice_differentiable():
    x = random(1, 1, 5, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: dwt(x, "db2", "reflect") ** 2, x, fast_mode=True)


def test_empty_batch():
    for wavelet in ("haar", "db2"):
        y = dwt(torch.zeros(0, 3, 5, 6), wavelet)
        assert idwt(y, wavelet, size=(5, 6)).shape == (0, 3, 5, 6)


class Both(nn.Module):
    def __init__(self, wavelet: str, mode: Mode) -> None:
        super().__init__()
        self.wavelet = find_wavelet(wavelet)
        self.mode: Mode = mode

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = dwt(x, self.wavelet, self.mode)
        return y, idwt(y, self.wavelet, self.mode)


@pytest.mark.parametrize(("wavelet", "mode"), [("haar", "zero"), ("db3", "symmetric"), ("sym2", "periodization")])
def test_export_with_any_even_size(wavelet: str, mode: Mode):
    module, x = Both(wavelet, mode), torch.randn(2, 3, 12, 16)
    half = {2: 2 * Dim("half_height", min=4, max=99), 3: 2 * Dim("half_width", min=4, max=99)}
    program = torch.export.export(module, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=9), **half},), strict=False)
    for other in (x, torch.randn(3, 3, 20, 8)):
        torch.testing.assert_close(program.module()(other), module(other), rtol=1e-4, atol=1e-5)


def test_onnx(tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    module, x = Both("db3", "symmetric").eval(), torch.randn(2, 3, 12, 16)
    torch.onnx.export(module, (x,), tmp_path / "both.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "both.onnx")
    results = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for ours, expected in zip(results, module(x), strict=True):
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)


def test_a_name_can_be_compiled():
    x = torch.randn(1, 2, 9, 8)
    compiled: Any = torch.compile(lambda x: dwt(x, "sym5", "reflect"), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), dwt(x, "sym5", "reflect"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: dwt(torch.zeros(3, 4)),
            r"x must be \(B, C, L\), \(B, C, H, W\) or \(B, C, D, H, W\), got 2 dimensions",
        ),
        (
            lambda: dwt(torch.zeros(1, 1, 4, dtype=torch.cfloat)),
            "needs real floating point numbers, got torch.complex64",
        ),
        (lambda: dwt(torch.zeros(1, 1, 4, 0)), r"at least one position along each axis, got \(4, 0\)"),
        (lambda: idwt(torch.zeros(1, 1, 3, 4)), r"y must be \(B, C, 2\^d, \*d positions\) with d from 1 to 3"),
        (lambda: idwt(torch.zeros(1, 1, 2, 3), "db4"), r"y must have at least 4 positions along each axis, got \(3,\)"),
        (lambda: idwt(torch.zeros(1, 1, 2, 3), size=(7,)), r"size must be at most \(6,\), got \(7,\)"),
        (lambda: wavedec(torch.zeros(1, 1, 4), levels=0), "levels must be at least 1, got 0"),
        (lambda: waverec((torch.zeros(1, 1, 4), ())), "coefficients must have the bands of at least one level"),
        (lambda: waverec((torch.zeros(1, 1, 6), (torch.zeros(1, 1, 1, 3),))), "are not of neighbouring levels"),
        (lambda: waverec((torch.zeros(1, 1, 2), (torch.zeros(1, 1, 1, 3),))), "are not of neighbouring levels"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_names_answer_with_the_nearest():
    x = torch.zeros(1, 1, 4)
    with pytest.raises(UnknownName, match="unknown wavelet 'harr': did you mean haar"):
        dwt(x, "harr")
    with pytest.raises(UnknownName, match="unknown mode 'periodisation': did you mean periodization"):
        dwt(x, "haar", "periodisation")
    with pytest.raises(Unsupported, match="it computes Haar only, got db2"):
        dwt(x, "db2", backend="patches")


def test_coefficients_are_a_plain_pair():
    low, highs = wavedec(torch.randn(1, 1, 8), levels=2)
    assert isinstance(wavedec(torch.randn(1, 1, 8)), Coefficients)
    torch.testing.assert_close(waverec((low, list(highs))), waverec(Coefficients(low, highs)))
