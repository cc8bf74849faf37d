"""The Monarch decomposition: its layout, its factors, what is left out, its cost model and the authors' constants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convatlas.ops.fft_conv import fft_conv
from convatlas.ops.monarch import (
    Machine,
    choose_factors,
    choose_order,
    monarch_cost,
    monarch_dft,
    monarch_fft_conv,
    monarch_idft,
    monarch_length,
    permute_kernel_spectrum,
    roots,
    unpermute_kernel_spectrum,
)
from convatlas.ops.monarch_tables import authors_constants, authors_factors

#: Length -> published factors, with the butterflies of 16 where there are others.
PUBLISHED = {
    **{256: (16, 16), 1024: (32, 32), 4096: (16, 16, 16), 8192: (32, 16, 16), 16384: (16, 32, 32)},
    **{32768: (32, 32, 32), 65536: (16, 16, 16, 16), 131072: (32, 16, 16, 16), 262144: (32, 32, 16, 16)},
    **{524288: (32, 16, 32, 32), 1048576: (32, 32, 32, 32), 2097152: (64, 32, 32, 32), 4194304: (128, 32, 32, 32)},
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@settings(max_examples=40, deadline=None)
@given(factors=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_it_is_a_fourier_transform_of_any_factors(factors: list[int], data: st.DataObject):
    n = math.prod(factors)
    length = data.draw(st.integers(1, n))
    keep = [data.draw(st.integers(1, factor)) for factor in factors]
    x = torch.complex(random(2, length), random(2, length).cos())
    natural = torch.fft.fft(x, n)
    permuted = permute_kernel_spectrum(natural, factors)
    block = (..., *(slice(k) for k in keep))
    torch.testing.assert_close(unpermute_kernel_spectrum(permuted, factors), natural)
    torch.testing.assert_close(monarch_dft(x, factors, keep), permuted[block])
    torch.testing.assert_close(monarch_dft(x, factors, keep, norm="forward"), permuted[block] / n)
    torch.testing.assert_close(monarch_idft(permuted, factors, length), x)
    blocked = torch.zeros_like(permuted)
    blocked[block] = permuted[block]
    expected = torch.fft.ifft(unpermute_kernel_spectrum(blocked, factors))[:, :length]
    torch.testing.assert_close(monarch_idft(permuted[block], factors, length), expected)
    # Parseval, and adjointness of the two directions
    y = torch.complex(random(2, n), random(2, n).sin())
    spectrum = monarch_dft(y, factors)
    torch.testing.assert_close(spectrum.abs().square().sum(), n * y.abs().square().sum())
    backward = monarch_idft(permuted, factors, norm="forward")
    torch.testing.assert_close((spectrum.conj() * permuted).sum(), (y.conj() * backward).sum())


def test_the_layout_of_order_three_is_that_of_the_equations():
    a, b, c = 2, 3, 4
    k_f = torch.arange(24)
    expected = k_f.reshape(b * c, a).T.reshape(a, c, b).transpose(1, 2)
    assert torch.equal(permute_kernel_spectrum(k_f, (a, b, c)), expected)
    assert torch.equal(permute_kernel_spectrum(k_f, (4, 6)), k_f.reshape(6, 4).T)


@pytest.mark.parametrize("n", [*PUBLISHED][:7])
def test_published_factors_are_exact(n: int):
    x = random(1, n)
    exact = permute_kernel_spectrum(torch.fft.fft(x), PUBLISHED[n])
    assert (monarch_dft(x, PUBLISHED[n]) - exact).abs().max() < 1e-10
    torch.testing.assert_close(monarch_idft(exact, PUBLISHED[n]).real, x)


def test_angles_of_long_transforms_keep_their_digits():
    n = 1 << 16
    table = roots(300, 500, n)
    angle = torch.tensor(-2 * math.pi * ((299 * 499) % n) / n, dtype=torch.float64)
    torch.testing.assert_close(table[299, 499], torch.polar(torch.ones_like(angle), angle), atol=1e-15, rtol=0)
    torch.testing.assert_close(table[256, 256], torch.ones((), dtype=table.dtype), atol=0, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 6)),
    gated=st.booleans(),
    wraps=st.booleans(),
)
def test_convolution_by_it_equals_fft_conv(sizes: tuple[int, int, int, int], gated: bool, wraps: bool):
    batch, length, taps, more = sizes
    n = max(length, taps) + more if wraps else None
    u, k = random(batch, 2, length), random(2, taps)
    gates = (u.cos(), u.sin()) if gated else ()
    torch.testing.assert_close(monarch_fft_conv(u, k, n, *gates), fft_conv(u, k, n, *gates, backend="naive"))


def test_gradients_of_the_twin():
    tensors = [t.requires_grad_() for t in (random(3, 1, 7), random(1, 5), random(3, 1, 7), random(3, 1, 7))]

    def call(u: Tensor, k: Tensor, *gates: Tensor) -> Tensor:
        return monarch_fft_conv(u, k, 12, *gates, factors=(2, 3, 2))

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_half_precision_operands_lose_as_much_as_stated(dtype: torch.dtype, tolerance: float):
    u, k = random(2, 2, 4096).to(dtype), random(2, 4096)
    exact = fft_conv(u.double(), k, 4096)
    y = monarch_fft_conv(u, k.float(), 4096, factors=(16, 16, 16), operand=dtype)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() < tolerance * exact.abs().max()
    large = monarch_fft_conv((1000 * u).half(), 1e-3 * k.float(), 4096, operand=torch.float16)
    assert large.isfinite().all()  # divided by N before it could grow


def test_the_cost_model_chooses_the_published_orders():
    orders = {2048: 2, 4096: 3, 32768: 3, 65536: 4, 4194304: 4}
    assert {n: choose_order(n) for n in orders} == orders
    for n, factors in PUBLISHED.items():
        assert sorted(choose_factors(n)) == sorted(factors)
        assert monarch_cost(choose_factors(n)) <= monarch_cost(factors)
    n, machine = 4096, Machine(matrix_flops=2.0, general_flops=1.0, fast_bandwidth=4.0, bandwidth=1.0, fused_points=256)
    stages = [16 * 16 / 2 + 4 / 1, 16 * 32 / 2 + 4 / 4, 16 * 8 / 1 + 4 / 4]
    assert monarch_cost((16, 32, 8), machine) == pytest.approx(n * sum(stages))


def test_every_length_has_factors():
    assert choose_factors(509) == (1, 509)
    assert choose_factors(1) == (1, 1)
    assert math.prod(choose_factors(30030, 4)) == 30030
    for n in (1, 17, 100, 1025, 3001, 70001):
        length, factors = monarch_length(n)
        assert n <= length == math.prod(factors) <= max(16, 1 << (n - 1).bit_length())


@pytest.mark.parametrize("use_32_butterfly", [True, False])
def test_constants_make_the_transform(use_32_butterfly: bool):
    for n in (256, 512, 4096, 8192, 16384, 32768, 131072):
        factors = authors_factors(n, use_32_butterfly)
        assert math.prod(factors) == (n // 2 if n == 512 else n)
        found = authors_constants(n, torch.bfloat16, use_32_butterfly)
        for name, table in found.items():
            assert table.dtype == torch.bfloat16, name
        assert ("twid" in found) == (n == 512)
    assert authors_factors(131072, use_32_butterfly)[0] == (32 if use_32_butterfly else 16)
    names = set(authors_constants(131072, torch.bfloat16))
    ways = ("fft", "ifft")
    outer = {
        f"{name}_{way}_{part}" for name in ("twiddle_factors", "f_32") for way in ways for part in ("real", "imag")
    }
    sizes = ("twiddle_factors_{}_16_16", "twiddle_factors_{}_16_256", "f_sqrt_N_{}")
    assert names == outer | {size.format(way) for size in sizes for way in ways}
    assert not {f"f_32_{way}_real" for way in ("fft", "ifft")} & set(authors_constants(131072))
    shapes = {name: tuple(table.shape) for name, table in authors_constants(16384).items()}
    assert shapes["twiddle_factors_fft_16_1K"] == (16, 1024, 2)
    assert (shapes["f_16_fft"], shapes["f_32_ifft"]) == ((16, 16, 2), (32, 32, 2))
    scaled = authors_constants(65536)["twiddle_factors_fft_real"]
    torch.testing.assert_close(scaled.double(), (roots(16, 4096, 65536).real / 16), atol=5e-4, rtol=0)


def test_wrong_arguments_are_named():
    x = random(2, 8)
    with pytest.raises(ValueError, match=r"factors must multiply to the 8 frequencies of k_f, got \(3, 3\)"):
        permute_kernel_spectrum(x, (3, 3))
    with pytest.raises(ValueError, match=r"permuted must be \(..., 2, 2\), got \(2, 8\)"):
        unpermute_kernel_spectrum(x, (2, 2))
    with pytest.raises(ValueError, match="x must have from 1 to 4 samples, the product of factors, got 8"):
        monarch_dft(x, (2, 2))
    with pytest.raises(ValueError, match=r"from 1 to all of each of the factors \(2, 4\) can be kept, got \(3, 4\)"):
        monarch_dft(x, (2, 4), (3, 4))
    with pytest.raises(ValueError, match="length must be from 1 to 8, the product of factors, got 9"):
        monarch_idft(x.reshape(2, 2, 4), (2, 4), 9)
    with pytest.raises(ValueError, match=r"factors must be numbers of at least 1, got \(\)"):
        monarch_dft(x, ())
    with pytest.raises(ValueError, match="n and order must be at least 1, got 0 and None"):
        choose_factors(0)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        monarch_length(0)
    with pytest.raises(ValueError, match=r"factors must have the product 8, at least 8, got \(2, 2\)"):
        monarch_fft_conv(x[None], x, 8, factors=(2, 2))
    with pytest.raises(ValueError, match=r"factors must have the product at least 15, got \(2, 4\)"):
        monarch_fft_conv(x[None], x, factors=(2, 4))
    with pytest.raises(ValueError, match=r"u and k must be \(B, C, L\) and \(C, K\), got \(2, 8\) and \(2, 8\)"):
        monarch_fft_conv(x, x)
    with pytest.raises(ValueError, match="seqlen must be a power of two from 256 to 4194304, got 128"):
        authors_constants(128)
    with pytest.raises(ValueError, match=r"dtype must be float16 or bfloat16, got torch.float32"):
        authors_constants(256, torch.float32)
