"""Long convolution by FFT: what it computes, what it keeps for its backward pass, which backend serves what."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convatlas.cost import cost
from convatlas.errors import Unsupported
from convatlas.ops import fft_conv as module
from convatlas.ops.backend import chosen
from convatlas.ops.fft_conv import KernelSpectrum, fft_conv, kernel_spectrum
from convatlas.ops.fourier import fast_length

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the triton package and TRITON_INTERPRET=1",
)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected.to(torch.float64)).abs().max() / expected.abs().max()).item()


def complex_form(u: Tensor, k: Tensor, n: int) -> Tensor:
    return torch.fft.ifft(torch.fft.fft(u, n) * torch.fft.fft(k, n), n).real[..., : u.shape[-1]]


def kept_bytes(form, *tensors: Tensor) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = form(*(tensor.requires_grad_() for tensor in tensors))
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("backend", ["auto", "naive", "direct", "fft", "overlap_save"])
@pytest.mark.parametrize(("length", "taps"), [(13, 4), (13, 13), (13, 20), (1, 1), (1, 5)])
def test_causal_by_default_with_the_kernel_turned_against_that_of_conv1d(length: int, taps: int, backend: str):
    u, k = random(2, 3, length), random(3, taps)
    expected = F.conv1d(F.pad(u, (taps - 1, 0)), k.flip(-1)[:, None], groups=3)
    torch.testing.assert_close(fft_conv(u, k, backend=backend), expected)
    for roomy in (length + taps - 1, 64):
        torch.testing.assert_close(fft_conv(u, k, roomy, backend=backend), expected)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(0, 8)), min_size=1, max_size=3),
    gated=st.booleans(),
    backend=st.sampled_from(["naive", "direct", "fft"]),
)
def test_equals_the_complex_transforms_of_any_period_and_number_of_axes(sizes, gated: bool, backend: str):
    sizes = [(length, min(taps, 3) if len(sizes) == 3 else taps, more) for length, taps, more in sizes]
    n = tuple(max(length, taps) + more for length, taps, more in sizes)
    axes = tuple(range(-len(n), 0))
    u, k = random(2, 2, *(s[0] for s in sizes)), random(2, *(s[1] for s in sizes))
    pregate, postgate = (u.flip(0).cos(), u.sin()) if gated else (torch.ones_like(u), torch.ones_like(u))
    spectra = torch.fft.fftn(pregate * u, n, axes) * torch.fft.fftn(k, n, axes)
    expected = torch.fft.ifftn(spectra, n, axes).real[(..., *(slice(s[0]) for s in sizes))] * postgate
    gates = (pregate, postgate) if gated else ()
    torch.testing.assert_close(fft_conv(u, k, n, *gates, backend=backend), expected)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(2, 9), length=st.integers(1, 9), shift=st.integers(0, 9), backend=st.sampled_from(["direct", "fft"])
)
def test_it_is_linear_and_moves_with_its_signal(n: int, length: int, shift: int, backend: str):
    u, v, k, m = random(2, 3, n), random(2, 3, n).cos(), random(3, min(length, n)), random(3, min(length, n)).sin()

    def conv(u: Tensor, k: Tensor) -> Tensor:
        return fft_conv(u, k, n, backend=backend)

    mixed = 2 * (conv(u, k) + 3 * conv(u, m)) - (conv(v, k) + 3 * conv(v, m))
    torch.testing.assert_close(conv(2 * u - v, k + 3 * m), mixed)
    torch.testing.assert_close(conv(u.roll(shift, -1), k), conv(u, k).roll(shift, -1))
    delta = F.pad(torch.ones(3, 1, dtype=torch.float64), (0, n - 1))
    torch.testing.assert_close(conv(u, delta), u)
    ones = torch.ones_like(u)
    torch.testing.assert_close(fft_conv(u, k, n, ones, ones, backend=backend), conv(u, k))


def test_a_kernel_of_twice_the_length_looks_both_ways():
    u, k = random(1, 1, 5), random(1, 10)
    lags = {lag: k[0, lag % 10] for lag in range(-5, 5)}
    expected = [sum(lags[t - s] * u[0, 0, s] for s in range(5)) for t in range(5)]
    torch.testing.assert_close(fft_conv(u, k, 10)[0, 0], torch.stack(expected))


@pytest.mark.parametrize("backend", ["direct", "fft", "overlap_save"])
def test_many_blocks_with_gates_and_their_gradients(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_SHORTEST_BLOCK", 16)
    tensors = [random(2, 3, 101), random(3, 5), random(2, 3, 101).cos(), random(2, 3, 101).sin()]
    ours, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    y = fft_conv(*ours[:2], None, *ours[2:], backend=backend)
    expected = fft_conv(*theirs[:2], None, *theirs[2:], backend="naive")
    torch.testing.assert_close(y, expected)
    g = random(2, 3, 101)
    for a, b in zip(torch.autograd.grad(y, ours, g), torch.autograd.grad(expected, theirs, g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["naive", "direct", "fft", "overlap_save"])
def test_second_derivatives(backend: str):
    tensors = [t.requires_grad_() for t in (random(2, 1, 5), random(1, 3), random(2, 1, 5).cos(), random(2, 1, 5))]

    def call(u: Tensor, k: Tensor, pregate: Tensor, postgate: Tensor) -> Tensor:
        return fft_conv(u, k, None, pregate, postgate, backend=backend)

    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
@pytest.mark.parametrize("backend", ["fft", "overlap_save"])
def test_gradients_are_right_when_only_one_is_wanted(backend: str, wanted: int):
    tensors = [random(2, 3, 9), random(3, 4), random(2, 3, 9).cos(), random(2, 3, 9).sin()]
    tensors[wanted].requires_grad_()
    results = [
        torch.autograd.grad(fft_conv(*tensors[:2], None, *tensors[2:], backend=name).square().sum(), tensors[wanted])
        for name in (backend, "naive")
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["fft", "overlap_save"])
def test_keeps_its_inputs_and_nothing_else(backend: str):
    u, k = torch.randn(4, 3, 256), torch.randn(3, 256)
    ours = kept_bytes(lambda u, k: fft_conv(u, k, backend=backend), u, k)
    assert ours == u.nbytes + k.nbytes
    assert ours <= 0.26 * kept_bytes(lambda u, k: complex_form(u, k, 512), u, k)
    half = u.detach().to(torch.bfloat16)
    assert kept_bytes(lambda u, k: fft_conv(u, k, backend=backend), half, k) == half.nbytes + k.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["naive", "direct", "fft", "overlap_save"])
def test_half_precision_is_computed_in_float32(backend: str, dtype: torch.dtype):
    u, k = random(2, 3, 150).to(dtype), random(3, 40).float()
    exact = fft_conv(u.double(), k.double(), backend="naive")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fft_conv(u, k, backend=backend)
    assert y.dtype == dtype
    assert relative(y, exact) < {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


def test_large_float32_stays_exact_to_its_digits():
    u, k = torch.randn(1, 1, 70000), torch.randn(1, 70000)
    assert relative(fft_conv(u, k), fft_conv(u.double(), k.double())) < 2e-6


def test_a_transformed_kernel_gives_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_SHORTEST_BLOCK", 16)
    for size, taps, n in [((40,), (4,), None), ((9,), (9,), 9), ((7,), (20,), None), ((5, 4), (2, 3), (6, 4))]:
        u, k = random(2, 3, *size), random(3, *taps)
        made = kernel_spectrum(k, size, n)
        assert made.backend == ("overlap_save" if size == (40,) else "fft") == chosen("fft_conv", u, made)
        torch.testing.assert_close(fft_conv(u, made), fft_conv(u, k, n, backend="naive"))
    longer = random(2, 3, 333)
    blocks = kernel_spectrum(k := random(3, 4), 40)
    torch.testing.assert_close(fft_conv(longer, blocks), fft_conv(longer, k, backend="naive"))


def test_a_transformed_kernel_passes_gradients_on():
    u, k = random(2, 3, 9).requires_grad_(), random(3, 9).requires_grad_()
    gates = random(2, 3, 9).cos(), random(2, 3, 9).sin()
    ours = torch.autograd.grad(fft_conv(u, kernel_spectrum(k, 9), None, *gates).square().sum(), (u, k))
    theirs = torch.autograd.grad(fft_conv(u, k, None, *gates, backend="naive").square().sum(), (u, k))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("size", "taps"), [((9,), (1, 4)), ((9,), (4,)), ((5, 4), (2, 3))])
def test_skip_adds_the_gated_signal(size: tuple[int, ...], taps: tuple[int, ...]):
    u, k, skip = random(2, 3, *size), random(3, *taps) if len(taps) == len(size) else random(1, 3, 4), random(3)
    gates = u.cos(), u.sin()
    expected = fft_conv(u, k, None, *gates) + gates[1] * skip.view(-1, *[1] * len(size)) * gates[0] * u
    torch.testing.assert_close(fft_conv(u, k, None, *gates, skip=skip), expected)
    with pytest.raises(ValueError, match=r"skip must be \(3,\) like the channels of k, got \(2,\)"):
        fft_conv(u, k, skip=skip[:2])
    with pytest.raises(ValueError, match="skip must be added to the kernel"):
        fft_conv(u, kernel_spectrum(k.reshape(3, *k.shape[-len(size) :]), size), skip=skip)


@pytest.mark.parametrize(
    "backend", ["naive", "direct", "fft", "overlap_save", pytest.param("triton", marks=interpreted)]
)
def test_no_samples_at_all(backend: str):
    u, k = random(0, 2, 9).requires_grad_(), random(2, 5).requires_grad_()
    y = fft_conv(u, k, backend=backend)
    y.sum().backward()
    assert y.shape == u.grad.shape == (0, 2, 9)
    assert not k.grad.any()


def test_a_kernel_with_a_leading_one_gets_a_gradient_of_its_own_shape():
    u, k = random(2, 3, 9), random(1, 3, 9).requires_grad_()
    fft_conv(u, k, backend="fft").sum().backward()
    assert k.grad is not None
    assert k.grad.shape == (1, 3, 9)


def test_auto_goes_by_the_lengths_of_signal_and_kernel():
    for length, taps, n, backend in [
        (300, 7, None, "direct"),
        (8000, 95, None, "direct"),
        (8000, 128, None, "overlap_save"),
        (8000, 128, 8000, "fft"),
        (8000, 1200, None, "fft"),
        (1 << 20, 1024, None, "overlap_save"),
    ]:
        u, k = torch.empty(1, 1, length), torch.empty(1, taps)
        assert chosen("fft_conv", u, k, n) == backend, (length, taps, n)
    trained = torch.empty(1, 63, requires_grad=True)
    assert chosen("fft_conv", torch.empty(1, 1, 8000), trained) == "overlap_save"
    assert chosen("fft_conv", torch.empty(1, 1, 8000), trained[:, :15]) == "direct"
    assert chosen("fft_conv", torch.empty(1, 1, 56, 56), torch.empty(1, 31, 31)) == "direct"
    assert chosen("fft_conv", torch.empty(1, 1, 56, 56), torch.empty(1, 56, 56)) == "fft"


def test_auto_goes_to_triton_for_short_half_precision_signals_off_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    u, k = (torch.empty(*shape, device="meta", dtype=torch.float16) for shape in [(2, 3, 512), (3, 512)])
    best = "triton" if importlib.util.find_spec("triton") else "fft"
    assert chosen("fft_conv", u, k) == best
    assert chosen("fft_conv", u, k, 1024) == best
    assert chosen("fft_conv", u[..., :511], k[..., :511], 511) == best
    assert chosen("fft_conv", u[..., :511].repeat(1, 1, 2), k, 1022) == "fft"
    assert chosen("fft_conv", u.float(), k) == "fft"
    assert chosen("fft_conv", u, k[:, :9]) == "direct"


@pytest.mark.parametrize("backend", ["direct", "fft"])
def test_exported_programs_serve_every_length(backend: str):
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = torch.nn.Parameter(random(3, 6))

        def forward(self, u: Tensor) -> Tensor:
            return fft_conv(u, self.k, backend=backend)

    layer = Layer()
    length = torch.export.Dim("length", min=8, max=4096)
    program = torch.export.export(layer, (random(2, 3, 20),), dynamic_shapes=({2: length},))
    for size in (20, 51):
        torch.testing.assert_close(program.module()(random(2, 3, size)), layer(random(2, 3, size)))


def test_compiled_training_gives_the_same_gradients():
    torch._dynamo.reset()
    tensors = [t.requires_grad_() for t in (random(2, 3, 50), random(3, 50))]
    compiled = torch.compile(fft_conv, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*tensors, backend="fft").square().sum(), tensors)
    theirs = torch.autograd.grad(fft_conv(*tensors, backend="naive").square().sum(), tensors)
    torch.testing.assert_close(ours, theirs)


@interpreted
@pytest.mark.parametrize(
    ("batch", "length", "taps", "n", "dtype", "tolerance"),
    [
        (3, 100, 150, None, torch.float32, 1e-6),
        (1, 256, 256, 256, torch.float64, 1e-13),
        (2, 500, 13, 512, torch.float32, 1e-6),
        (2, 900, 900, None, torch.bfloat16, 4e-3),
        (2, 4000, 97, None, torch.float16, 5e-4),
        (2, 300, 310, 377, torch.float32, 1e-6),  # an odd period, by a longer one
        (1, 4000, 4100, None, torch.float32, 1e-6),  # order 3
    ],
)
def test_the_monarch_kernel_in_the_interpreter(
    batch: int, length: int, taps: int, n: int | None, dtype: torch.dtype, tolerance: float
):
    u, k = random(batch, 2, length).to(dtype), random(2, taps).to(dtype)
    gates = u.flip(-1).cos(), u.sin()
    tensors = [t.requires_grad_() for t in (u, k, *gates)]
    y = fft_conv(u, k, n, *gates, backend="triton")
    exact = fft_conv(*(t.double() if isinstance(t, Tensor) else t for t in (u, k, n, *gates)), backend="fft")
    assert y.dtype == dtype
    assert relative(y, exact) < tolerance
    longer = 2 * 1024 * k.itemsize if n == 377 else k.nbytes  # the kernel with room for both directions
    assert kept_bytes(lambda u, k: fft_conv(u, k, n, backend="triton"), u.detach(), k.detach()) == u.nbytes + longer
    ours, theirs = (torch.autograd.grad(result.sum(), tensors) for result in (y, exact))
    assert all(relative(a, b) < 10 * tolerance for a, b in zip(ours, theirs, strict=True))


@interpreted
def test_long_signals_are_cut_into_rows_by_an_outer_transform(monkeypatch: pytest.MonkeyPatch):
    from convatlas.ops.kernels import fft_conv as kernels

    monkeypatch.setattr(kernels, "_FUSED", 256)
    u, k = random(1, 1, 1500), random(1, 2000)
    tensors = [t.requires_grad_() for t in (u, k, u.flip(-1).cos(), u.sin())]
    results = [fft_conv(*tensors[:2], None, *tensors[2:], backend=backend) for backend in ("triton", "fft")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(result.sum(), tensors) for result in results))


@interpreted
def test_a_program_takes_several_pairs_of_samples(monkeypatch: pytest.MonkeyPatch):
    from convatlas.ops.kernels import fft_conv as kernels

    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    tensors = [t.requires_grad_() for t in (random(5, 1, 100), random(1, 100))]
    results = [fft_conv(*tensors, backend=backend) for backend in ("triton", "fft")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(result.sum(), tensors) for result in results))


@interpreted
def test_channels_wait_for_room_in_the_workspace(monkeypatch: pytest.MonkeyPatch):
    from convatlas.ops.kernels import fft_conv as kernels

    monkeypatch.setattr(kernels, "_FUSED", 256)
    monkeypatch.setattr(kernels, "_WORKSPACE", 0)
    u, k = random(1, 2, 3000), random(2, 1000)
    torch.testing.assert_close(fft_conv(u, k, backend="triton"), fft_conv(u, k, backend="fft"))


@interpreted
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_large_half_precision_signals_do_not_overflow(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
):
    from convatlas.ops.kernels import fft_conv as kernels

    monkeypatch.setattr(kernels, "_FUSED", 256)
    u, k = (1000 + 100 * random(1, 1, 4096)).to(dtype), 1e-3 * random(1, 4096).float()
    assert relative(fft_conv(u, k, 4096, backend="triton"), fft_conv(u, k, 4096, backend="fft")) < tolerance


@interpreted
def test_the_monarch_operator_keeps_the_rules_of_torch_library():
    from convatlas.ops.kernels.fft_conv import monarch_conv

    tensors = [t.requires_grad_() for t in (random(3, 2, 40), random(2, 7), random(3, 2, 40), random(3, 2, 40))]
    torch.library.opcheck(monarch_conv, (*tensors, 256))


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="the triton package is there")
def test_triton_says_what_it_needs():
    with pytest.raises(Unsupported, match=r"backend 'triton' of fft_conv needs the triton package"):
        fft_conv(random(1, 1, 9), random(1, 9), backend="triton")


def test_lengths_are_even_and_have_small_factors():
    def smooth(n: int) -> bool:
        for prime in (2, 3, 5, 7):
            while n % prime == 0:
                n //= prime
        return n == 1

    good = [n for n in range(2, 5000, 2) if smooth(n)]
    for n in range(1, 4500):
        assert fast_length(n) == next(m for m in good if m >= n)
    assert fast_length((1 << 20) + 1023) == 1049760
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        fast_length(0)


def test_wrong_arguments_are_named():
    u, k = random(2, 3, 8), random(3, 4)
    with pytest.raises(ValueError, match=r"u must be \(B, C, L\), .* got 2 dimensions"):
        fft_conv(u[0], k)
    with pytest.raises(ValueError, match=r"u must be real floating point, got torch.complex128; convolve the real and"):
        fft_conv(u.to(torch.complex128), k)
    with pytest.raises(ValueError, match=r"k must be real floating point, got torch.int64"):
        fft_conv(u, k.long())
    with pytest.raises(ValueError, match=r"k must be \(3, K\) like the channels of u, got \(2, 4\)"):
        fft_conv(u, k[:2])
    with pytest.raises(ValueError, match=r"k must be \(3, H, W\) like the channels of u, got \(3, 4\)"):
        fft_conv(u[..., None], k)
    with pytest.raises(ValueError, match=r"fft_size must not be smaller than the signal \(8\) or kernel \(4\), got 7"):
        fft_conv(u, k, 7)
    with pytest.raises(ValueError, match="fft_size must have 1 numbers, one for each position axis, got 2"):
        fft_conv(u, k, (8, 8))
    with pytest.raises(ValueError, match="pregate and postgate must be given both or none"):
        fft_conv(u, k, None, u)
    with pytest.raises(ValueError, match=r"postgate must have the shape and type of u, \(2, 3, 8\) torch.float64, got"):
        fft_conv(u, k, None, u, u.float())
    with pytest.raises(ValueError, match=r"must not be empty, got sizes \(8,\) and \(0,\)"):
        fft_conv(u, k[:, :0])
    with pytest.raises(ValueError, match="size must have 2 numbers, one for each position axis, got 1"):
        kernel_spectrum(random(3, 2, 2), (8,))
    made = kernel_spectrum(k, 8)
    with pytest.raises(ValueError, match=r"transformed for signals of size \(8,\), got u of size \(7,\)"):
        fft_conv(u[..., 1:], made)
    with pytest.raises(ValueError, match="fft_size must be None"):
        fft_conv(u, made, 11)
    assert isinstance(made, KernelSpectrum)
    with pytest.raises(Unsupported, match=r"backend 'direct' .*: it needs the kernel itself, got its spectrum"):
        fft_conv(u, made, backend="direct")
    with pytest.raises(Unsupported, match=r"backend 'overlap_save' .*: the kernel was transformed for fft"):
        fft_conv(u, made, backend="overlap_save")
    with pytest.raises(Unsupported, match=r"backend 'overlap_save' .* fft_size 8 makes the tail wrap"):
        fft_conv(u, k, 8, backend="overlap_save")


def test_the_kernel_for_gpus_is_counted():
    from convatlas.ops.kernels.fft_conv import monarch_conv

    class Model(torch.nn.Module):
        def forward(self, u: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return monarch_conv(u, k, None, None, 256)

    counted = cost(Model(), torch.empty(4, 3, 100, device="meta"), torch.empty(3, 20, device="meta")).total.macs
    assert counted == 2 * 3 * 8 * 256 * 32  # two pairs, three channels, 16 + 16 points
