"""Feature extractors of any frames: what the theory says about them holds to the last digits."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from convatlas.errors import UnknownName
from convatlas.nn.frame_scattering import (
    NONLINEARITIES,
    Nonlinearity,
    ScatteringLayer,
    ScatteringNetwork,
    make_admissible,
)
from convatlas.ops.frames import Frame, atrous, cone, learned, meyer, polar, tensor_atrous, weyl_heisenberg

FRAMES = {
    "meyer": (partial(meyer, J=2), 12),
    "weyl_heisenberg": (partial(weyl_heisenberg, M=3), 12),
    "atrous": (partial(atrous, J=2, wavelet="db2"), 12),
    "polar": (partial(polar, J=1, K0=4), (8, 4)),
    "cone": (partial(cone, J=1, K0=4, real=True), (4, 8)),
    "tensor": (partial(tensor_atrous, J=1), (4, 4)),
}
POOLINGS = {"none": 1, "subsample": 2, "average": 2, "max": 2}


def signal(shape, *lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*lead, *((shape,) if isinstance(shape, int) else shape), dtype=dtype)


def literal(network: ScatteringNetwork, x: Tensor) -> list[Tensor]:
    """Path by path, by the definition."""
    spectrum_of = partial(torch.fft.fftn, dim=list(range(x.dim())))
    back = partial(torch.fft.ifftn, dim=list(range(x.dim())))
    features = []
    for depth, frame in enumerate(network.frames):
        found = []
        for path in network.paths(depth):
            u = x.to(torch.complex128)
            for number, index in enumerate(path):
                layer = network.layers[number]
                y = back(spectrum_of(u) * network.frames[number].filters[index])
                y = layer.function.function(y)
                step = layer.factor
                if layer.pooling == "subsample":
                    y = y[(slice(None, None, step),) * y.dim()]
                elif layer.pooling != "none":
                    for axis in range(y.dim()):
                        blocks = y.unflatten(axis, (-1, step))
                        y = blocks.mean(axis + 1) if layer.pooling == "average" else blocks.amax(axis + 1)
                u = y.to(torch.complex128)
            found.append(back(spectrum_of(u) * frame.atom))
        features.append(torch.stack(found))
    return features


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", FRAMES)
def test_features_are_those_of_the_definition(name: str, pooling: str):
    frame, shape = FRAMES[name]
    layers = [ScatteringLayer(frame, "modulus", pooling, POOLINGS[pooling]), ScatteringLayer(frame, "tanh")]
    network = ScatteringNetwork(layers, frame, shape)
    for x in (signal(shape), signal(shape, dtype=torch.complex128)):
        for ours, theirs in zip(network(x), literal(network, x), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("name", FRAMES)
def test_features_are_no_further_apart_than_signals(name: str, nonlinearity: str):
    frame, shape = FRAMES[name]
    for pooling, factor in POOLINGS.items():
        layers = [ScatteringLayer(frame, nonlinearity, pooling, factor), ScatteringLayer(frame, nonlinearity)]
        if pooling == "max" and not frame(signal(shape).shape).is_real and nonlinearity != "modulus":
            continue
        network = ScatteringNetwork(layers, frame, shape)
        for scale in (1e-2, 1.0, 10.0):
            f, h = scale * signal(shape, 2), scale * signal(shape, 2)
            distance = network.norm([a - b for a, b in zip(network(f), network(h), strict=True)])
            assert (distance <= (f - h).flatten(1).norm(dim=1) * (1 + 1e-12)).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_move_with_the_signal(pooling: str):
    factor = POOLINGS[pooling]
    layers = [ScatteringLayer(partial(meyer, J=2), "modulus", pooling, factor)] * 2
    network = ScatteringNetwork(layers, partial(weyl_heisenberg, M=3), 32)
    x = signal(32, 2)
    for before, after, step in zip(network(x), network(x.roll(8, -1)), (1, factor, factor**2), strict=True):
        torch.testing.assert_close(after, before.roll(8 // step, -1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", FRAMES)
def test_no_energy_is_lost_without_pooling(name: str):
    frame, shape = FRAMES[name]
    network = ScatteringNetwork([ScatteringLayer(frame)] * 2, frame, shape)
    x = signal(shape, dtype=torch.complex128)
    features, maps = network(x), network.propagated(x)
    energy = float(x.abs().square().sum())
    for depth in range(3):
        kept = sum(float(part.abs().square().sum()) for part in features[:depth])
        assert kept + float(maps[depth].abs().square().sum()) == pytest.approx(energy)
    assert float(network.norm(features)) ** 2 < energy


@pytest.mark.parametrize(
    "frame",
    [lambda grid: Frame(2 * torch.ones(grid), torch.ones(1, *grid)), partial(learned, weight=torch.randn(3, 1, 4))],
)
@pytest.mark.parametrize("lipschitz", ["tight", "paper"])
def test_scaling_makes_admissible(frame, lipschitz):
    steep = Nonlinearity(lambda x: 3 * x.abs(), 3.0, 4.0)
    layers, output = make_admissible([ScatteringLayer(frame, steep)], frame, lipschitz=lipschitz)
    network = ScatteringNetwork(layers, output, 8)
    constant = 9 if lipschitz == "tight" else 16
    assert network.frames[0].bounds()[1] == pytest.approx(1 / constant)
    assert network.frames[1].bounds()[1] == pytest.approx(1)
    f, h = signal(8), signal(8)
    distance = network.norm([a - b for a, b in zip(network(f), network(h), strict=True)])
    assert distance <= (f - h).norm() * (1 + 1e-12)
    tight = [ScatteringLayer(partial(meyer, J=1), "sigmoid")]
    same = make_admissible(tight, partial(meyer, J=1))[0]
    assert ScatteringNetwork(same, partial(meyer, J=1), 8).frames[0].is_parseval()


def test_dilation_norm_multiplies_pooled_maps():
    layer = ScatteringLayer(partial(polar, J=1, K0=4), pooling="subsample", factor=2)
    arguments = ([layer], partial(polar, J=1, K0=4), (4, 4))
    x = signal((4, 4))
    plain, scaled = ScatteringNetwork(*arguments)(x), ScatteringNetwork(*arguments, dilation_norm=True)(x)
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[1], 2 * plain[1])


@pytest.mark.parametrize(("nonlinearity", "values"), [*itertools.product(NONLINEARITIES, [0.3, 3.0])])
def test_lipschitz_constants(nonlinearity: str, values: float):
    entry = NONLINEARITIES[nonlinearity]
    a, b = (values * torch.randn(200, dtype=torch.complex128) for _ in range(2))
    slopes = (entry.function(a) - entry.function(b)).abs() / (a - b).abs()
    assert slopes.max() <= entry.lipschitz + 1e-12
    assert entry.lipschitz <= entry.paper
    small = entry.function(torch.full((1,), 1e-6, dtype=torch.complex128)) / 1e-6
    assert float(small.abs()) == pytest.approx(entry.lipschitz)
    assert not entry.function(torch.zeros(1, dtype=torch.complex128)).any()


def test_types_gradients_and_leading_axes():
    frame = partial(meyer, J=2)
    network = ScatteringNetwork([ScatteringLayer(frame, pooling="average", factor=2)], frame, 16)
    x = signal(16, 3, 1)
    exact = network(x)
    assert [part.shape for part in exact] == [(3, 1, 1, 16), (3, 1, 4, 8)]
    for dtype, like in ((torch.float32, torch.complex64), (torch.bfloat16, torch.complex64)):
        parts = network(x.to(dtype))
        assert all(part.dtype == like for part in parts)
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        assert all((a - b).abs().max() < tolerance for a, b in zip(parts, exact, strict=True))
    single = network.float()(x)
    torch.testing.assert_close(single, exact)  # filters are rounded only as the signal is
    assert not network.state_dict()
    zeros = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    sum(part.real.sum() for part in network(zeros)).backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()
    y = signal(16).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: torch.view_as_real(network(y)[1]), y)


def test_paths_are_in_lexicographic_order():
    layers = [ScatteringLayer(partial(meyer, J=1)), ScatteringLayer(partial(weyl_heisenberg, M=3))]
    network = ScatteringNetwork(layers, partial(meyer, J=1), 8)
    assert network.paths(0) == [()]
    assert network.paths(2) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert "modulus none 1" in repr(network)


def test_bad_arguments_are_named():
    frame = partial(meyer, J=1)
    with pytest.raises(ValueError, match="layers must hold at least one layer"):
        ScatteringNetwork([], frame, 8)
    with pytest.raises(ValueError, match=r"factor of layer 2 must divide the grid \(3,\), got 2"):
        ScatteringNetwork([ScatteringLayer(frame, pooling="max", factor=2)] * 2, frame, 6)
    with pytest.raises(UnknownName, match="unknown nonlinearity 'rleu': did you mean relu"):
        ScatteringLayer(frame, "rleu")
    with pytest.raises(UnknownName, match="unknown pooling 'mean'"):
        ScatteringLayer(frame, pooling="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="factor must be at least 1, and 1 with pooling 'none', got 2"):
        ScatteringLayer(frame, factor=2)
    network = ScatteringNetwork([ScatteringLayer(frame, "relu", "max", 2)], frame, 8)
    with pytest.raises(ValueError, match="max pooling needs a real non-linearity such as modulus, got complex maps in"):
        network(signal(8))
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 8\), got \(2, 9\)"):
        network(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"x must hold at least one signal, got \(0, 8\)"):
        network(torch.zeros(0, 8))
