from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch

from convatlas.ops.dct import dct, idct

BACKENDS = ("naive", "matmul", "fft")


@pytest.mark.parametrize("norm", ["ortho", None])
@pytest.mark.parametrize("points", [1, 2, 3, 4, 8, 9, 17])
def test_scipy_gives_the_same(points: int, norm: str | None):
    x = torch.randn(2, points, dtype=torch.float64)
    modes = (points + 1) // 2
    z = torch.from_numpy(scipy.fft.dct(x.numpy(), norm=norm))
    low = np.concatenate([z.numpy()[:, :modes], np.zeros((2, points - modes))], 1)
    smooth = torch.from_numpy(scipy.fft.idct(low, norm=norm))
    for backend in BACKENDS:
        close = {"rtol": 0, "atol": 1e-12}
        torch.testing.assert_close(dct(x, norm=norm, backend=backend), z, **close)
        torch.testing.assert_close(idct(z, norm=norm, backend=backend), x, **close)
        torch.testing.assert_close(dct(x, -1, modes, norm, backend=backend), z[:, :modes], **close)
        torch.testing.assert_close(idct(z[:, :modes], -1, points, norm, backend=backend), smooth, **close)


def test_planes_keep_their_norm_and_come_back():
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    z = dct(x, (-2, -1))
    torch.testing.assert_close(z, torch.from_numpy(scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")))
    torch.testing.assert_close(z.square().sum(), x.square().sum())
    torch.testing.assert_close(idct(z, (-2, -1)), x)
    torch.testing.assert_close(dct(x, (2, 3), (3, 4)), z[:, :, :3, :4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_precision_holds_over_long_axes(backend: str):
    x = torch.randn(2, 1000, dtype=torch.float64)
    error = (dct(x.float(), backend=backend).double() - dct(x)).abs().max()
    assert error < 1e-6 * 1000**0.5


def test_an_empty_batch_gives_an_empty_one():
    for backend in BACKENDS:
        assert dct(torch.randn(0, 5), low_modes=3, backend=backend).shape == (0, 3)
        assert idct(torch.randn(0, 3), size=5, backend=backend).shape == (0, 5)


def test_bad_input():
    x = torch.randn(2, 5)
    for arguments, message in (
        ((x.cfloat(),), "x must be real floating point, got torch.complex64"),
        ((x, (1, -1)), r"axes must be different, got \(1, -1\)"),
        ((x, 2), "axes must name axes of a tensor with 2, got 2"),
        ((x, -1, 6), "low_modes must be from 1 to the 5 points of axis -1, got 6"),
        ((x, (0, 1), (1,)), r"low_modes and size must have one number for each of the 2 axes, got \(1,\)"),
        ((x[:, :0],), r"x must not be empty along axes -1, got \(2, 0\)"),
        ((x, -1, 2, "forward"), "norm must be 'ortho' or None, got 'forward'"),
    ):
        with pytest.raises(ValueError, match=message):
            dct(*arguments)
    with pytest.raises(ValueError, match="size must be at least the 5 modes of axis -1, got 4"):
        idct(x, size=4)
