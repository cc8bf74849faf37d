"""Layers of neural operators: weights, checkpoints, invariants, errors; the networks; the conversion; the sweep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convatlas import load_weights
from convatlas.analysis.resolution_sweep import (
    layer_sweep,
    monte_carlo_errors,
    resolution_errors,
    resolution_sweep,
    slope,
    smooth_field,
)
from convatlas.errors import UnknownName, Unsupported
from convatlas.networks.neural_operators.fno import FNOConfig, LocalNOConfig
from convatlas.networks.neural_operators.oformer import OFormerConfig
from convatlas.networks.neural_operators.unet import ModernUNetConfig
from convatlas.networks.neural_operators.vit import FieldViTConfig
from convatlas.networks.registry import create_model
from convatlas.nn.attention_integral import AttentionKernelIntegral, rotate_by_position
from convatlas.nn.conv.disco import DiscreteContinuousConv2d, PointDiscreteContinuousConv
from convatlas.nn.conv.finite_difference import FiniteDifferenceConv2d
from convatlas.nn.conv.kernel_interpolation import KernelInterpolatedConv2d, scale_kernel
from convatlas.nn.conv.spectral_conv import FactorizedSpectrum, SpectralConv
from convatlas.nn.fields import InputOutputInterpolate
from convatlas.nn.graph_integral import GNOBlock, IntegralTransform
from convatlas.nn.grid_window import GridPad, GridPool
from convatlas.ops.neighbours import radius_neighbors
from convatlas.surgery.neural_operator import to_neural_operator

PARAMETERS = {
    "fno_navier_stokes": 65_013_187,
    "local_no_disco_navier_stokes": 66_191_652,
    "local_no_difference_navier_stokes": 66_083_445,
    "modern_unet_navier_stokes": 65_492_469,
    "modern_unet_interpolated_navier_stokes": 65_492_469,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_numbers_of_parameters(name: str):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    if name == "fno_navier_stokes":  # complex numbers count once in the authors' files
        spectral = sum(p.numel() for key, p in model.named_parameters() if "convs" in key and "weight" in key)
        assert PARAMETERS[name] - spectral // 2 == 32_539_075


def field(*grid: int, channels: int = 1) -> Tensor:
    lines = [torch.arange(n, dtype=torch.float64) / n for n in grid]
    return smooth_field(channels)(torch.stack(torch.meshgrid(*lines, indexing="ij")))[None]


# Spectral convolution


def test_spectral_initialisation():
    torch.manual_seed(0)
    layer = SpectralConv(40, 60, (8, 9))
    expected = 2 / 100
    assert layer.as_spectrum(layer.weight).shape == (40, 60, 8, 5, 2)
    assert layer.weight.detach().square().mean() * 2 == pytest.approx(expected, rel=0.05)
    assert layer.bias is not None
    assert layer.bias.detach().square().mean() == pytest.approx(expected, rel=0.5)


def test_modes_that_are_stored_but_not_used():
    layer = SpectralConv(1, 1, (4, 4), max_modes=(8, 8), bias=False).double()
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    assert torch.fft.rfft2(layer(x))[..., 3:].abs().max() < 1e-9
    layer.n_modes = (8, 8)
    assert torch.fft.rfft2(layer(x))[..., 3:5].abs().min(-1).values.max() > 1e-3


def test_a_small_grid_warns_and_another_output_grid():
    layer = SpectralConv(1, 2, (6, 6), resolution_scaling=2).double()
    with pytest.warns(UserWarning, match="more than the grid"):
        layer(torch.randn(1, 1, 5, 5, dtype=torch.float64))
    y = layer(field(8, 8))
    assert y.shape == (1, 2, 16, 16)
    torch.testing.assert_close(layer(field(8, 8), (8, 8)), y[..., ::2, ::2])


@pytest.mark.parametrize(("kind", "ranks"), [("tucker", (2, 3, 4, 2)), ("cp", (5,)), ("tt", (2, 3, 2))])
def test_factorised_weights(kind: Any, ranks: tuple[int, ...]):
    shape = (3, 4, 6, 5)
    tensor = FactorizedSpectrum(shape, kind, ranks).double()
    tensor.reset_parameters(0.5)
    whole = torch.view_as_complex(tensor())
    factors = [torch.view_as_complex(factor) for factor in tensor.factors]
    if kind == "tucker":
        expected = torch.einsum("abcd,ia,jb,kc,ld->ijkl", torch.view_as_complex(tensor.core), *factors)
    elif kind == "cp":
        expected = torch.einsum("r,ir,jr,kr,lr->ijkl", torch.view_as_complex(tensor.weights), *factors)
    else:
        expected = torch.einsum("aib,bjc,ckd,dle->ijkl", *factors)
    torch.testing.assert_close(whole, expected)
    assert whole.shape == shape
    count = sum(p.numel() // 2 for p in FactorizedSpectrum((20, 20, 16, 9), kind, 0.1).parameters())
    assert count == pytest.approx(0.1 * 20 * 20 * 16 * 9, rel=0.15)
    layer = SpectralConv(3, 4, (6, 8), factorization=kind, rank=ranks).double()
    assert layer(torch.randn(1, 3, 9, 9, dtype=torch.float64)).shape == (1, 4, 9, 9)


def test_checkpoints_of_factorised_and_of_joint_weights():
    layer = SpectralConv(2, 2, (4, 4), factorization="tucker", rank=(1, 2, 2, 1))
    state = {f"weight.{key}": value for key, value in layer.factorized.state_dict().items()}
    state = {
        key.replace("factors.", "factors.factor_"): torch.view_as_complex(torch.randn(value.shape))
        for key, value in state.items()
    }
    load_weights(layer, {**state, "bias": torch.zeros(2, 1, 1)})
    assert torch.equal(torch.view_as_complex(layer.factorized.core), state["weight.core"])

    model = FNOConfig(n_modes=4, dim=3, depth=2).build()
    parts = {}
    for key, value in model.state_dict().items():
        name = (
            key.replace("blocks.", "fno_blocks.")
            .replace(".skips", ".fno_skips")
            .replace(".mlp_skips", ".channel_mlp_skips")
        )
        parts[name.replace(".mlps", ".channel_mlp")] = torch.randn_like(value)
    joint = torch.randn(2, 3, 3, 4, 3, dtype=torch.complex64)
    for index in range(2):
        del parts[f"fno_blocks.convs.{index}.weight"]
    biases = torch.stack([parts.pop(f"fno_blocks.convs.{index}.bias") for index in range(2)])
    load_weights(model, {**parts, "fno_blocks.convs.weight.tensor": joint, "fno_blocks.convs.bias": biases})
    for index, conv in enumerate(model.blocks.convs):
        assert torch.equal(torch.view_as_complex(conv.as_spectrum(conv.weight).contiguous()), joint[index])  # type: ignore[operator, arg-type]


# Points


@pytest.mark.parametrize("kind", ["linear", "linear_kernelonly", "nonlinear", "nonlinear_kernelonly"])
def test_graph_integral_is_a_mean_over_the_ball(kind: Any):
    torch.manual_seed(0)
    y, x, f = torch.rand(12, 2), torch.rand(5, 2), torch.randn(3, 12, 2)
    features = 4 + 2 * kind.startswith("nonlinear")
    layer = IntegralTransform((features, 5, 2), transform_type=kind)
    near = radius_neighbors(y, x, 0.5)
    weights = torch.rand(12)
    u, summed = layer(y, near, x, f), layer(y, near, x, f, quadrature=weights)
    for i in range(5):
        terms, total = [], torch.zeros(3, 2)
        for j in range(12):
            if torch.dist(x[i], y[j]) <= 0.5:
                pair = torch.cat([y[j], x[i]]).expand(3, 4)
                k = layer.kernel(torch.cat([pair, f[:, j]], 1) if "non" in kind else pair)
                term = k if kind.endswith("only") else k * f[:, j]
                terms.append(term)
                total = total + weights[j] * term
        mean = torch.stack(terms).mean(0) if terms else torch.zeros(3, 2)
        torch.testing.assert_close(u[:, i] if u.dim() == 3 else u[i].expand(3, 2), mean)
        torch.testing.assert_close(summed[:, i] if summed.dim() == 3 else summed[i].expand(3, 2), total)
    order = torch.randperm(12)
    again = layer(y[order], radius_neighbors(y[order], x, 0.5), x, f[:, order])
    torch.testing.assert_close(again, u)
    if not kind.startswith("non"):
        kept = layer.kernel_values(y, x, near)
        torch.testing.assert_close(layer(y, near, x, f, kernel=kept), u)


def test_local_integral_on_points_with_groups():
    layer = PointDiscreteContinuousConv(4, 2, (2, 3), 0.4, groups=2)
    points, f = torch.rand(30, 2), torch.randn(2, 30, 4)
    y = layer(f, points)
    assert y.shape == (2, 30, 2)
    apart = f.clone()
    apart[..., :2] = 0
    assert torch.equal(layer(apart, points)[..., 1], y[..., 1])  # its group did not change
    assert not torch.equal(layer(apart, points)[..., 0], y[..., 0])


def test_attention_integral():
    layer = AttentionKernelIntegral(6, 6, 2, 4, position="rotary").double()
    u, places = torch.randn(2, 7, 6, dtype=torch.float64), torch.rand(2, 7, 2, dtype=torch.float64)
    y = layer(u, places)
    torch.testing.assert_close(layer(u, places, associative=False), y)
    torch.testing.assert_close(layer(u, places, torch.full((7,), 1 / 7)), y)
    order = torch.randperm(7)
    torch.testing.assert_close(layer(u[:, order], places[:, order]), y[:, order])
    # A point that stands twice, with half the weight each time, changes nothing.
    doubled = torch.cat([torch.ones(6), torch.full((2,), 0.5)]).double() / 7
    again = layer(torch.cat([u, u[:, 6:]], 1), torch.cat([places, places[:, 6:]], 1), doubled)
    torch.testing.assert_close(again[:, :7], y)


def test_rotary_embedding_sees_differences_of_coordinates():
    q, k = torch.randn(2, 1, 1, 5, 8, dtype=torch.float64)
    places = torch.rand(1, 5, 2, dtype=torch.float64)
    scores = [rotate_by_position(q, p) @ rotate_by_position(k, p).transpose(-1, -2) for p in (places, places + 0.3)]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(rotate_by_position(q, places).norm(dim=-1), q.norm(dim=-1))


# Networks on other grids


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (FNOConfig(n_modes=5, dim=4, depth=2, embed_position=False), 0.02),
        (
            FNOConfig(n_modes=5, dim=4, dims=1, mlp=False, skip="soft-gating", lifting_ratio=0, embed_position=False),
            0.02,
        ),
        (FNOConfig(n_modes=3, dim=3, dims=3, depth=1, separable=True, embed_position=False), 0.05),
        (
            LocalNOConfig(
                n_modes=5,
                dim=4,
                depth=2,
                resolution=16,
                disco_layers=True,
                radius_cutoff=0.5,
                disco_padding="periodic",
                diff_layers=(False, True),
                embed_position=False,
            ),
            0.6,
        ),
        (OFormerConfig(dim=8, depth=1, num_heads=2, n_modes=3, resolution=16), 0.3),
        (ModernUNetConfig(dim=4, dim_mults=(1, 2), depth=1, resolution=16, kernel_size=3, follow_grid=True), 0.8),
        (FieldViTConfig(dim=8, depth=1, num_heads=2, mlp_dim=8, resolution=16, physical_patches=True), 0.6),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, float) else "",
)
def test_networks_give_nearly_the_same_on_a_finer_grid(config: Any, tolerance: float):
    torch.manual_seed(0)
    model = config.build().double().eval()
    coarse, fine = (model(field(*[n] * config.dims)) for n in (16, 32))
    every = (..., *[slice(None, None, 2)] * config.dims)
    assert (fine[every] - coarse).norm() / coarse.norm() < tolerance


def test_plain_networks_do_not():
    torch.manual_seed(0)
    model = ModernUNetConfig(
        dim=4, dim_mults=(1, 2), depth=1, resolution=16, kernel_size=5, embed_position=False
    ).build()
    coarse, fine = (model.double()(field(n, n)) for n in (16, 64))
    converted = to_neural_operator(model, 16, example_input=field(16, 16))
    assert not converted.skipped
    torch.testing.assert_close(converted.model(field(16, 16)), coarse)
    drift = [float((each[..., ::4, ::4] - coarse).norm()) for each in (fine, converted.model(field(64, 64)))]
    assert drift[1] < drift[0]


def test_domain_padding_and_stabilizer():
    model = FNOConfig(n_modes=4, dim=4, depth=1, domain_padding=0.25, stabilizer="tanh").build()
    assert model(torch.randn(2, 1, 8, 12)).shape == (2, 1, 8, 12)
    seen: list[torch.Size] = []
    model.blocks.convs[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    huge = model(1e4 * torch.randn(2, 1, 8, 12))
    assert seen == [torch.Size((2, 4, 12, 18))]
    assert huge.isfinite().all()


# The conversion and its layers


def test_interpolated_kernels_keep_their_sum_and_extent():
    weight = torch.rand(2, 3, 5, 3)
    for interpolation in ("bilinear", "fourier"):
        scaled = scale_kernel(weight, (2.0, 3.0), interpolation)  # type: ignore[arg-type]
        assert scaled.shape == (2, 3, 9, 7)
    flat = scale_kernel(torch.ones(1, 1, 3, 3), (2.5, 1.0), "bilinear")
    assert flat.shape == (1, 1, 6, 3)
    assert flat.sum() == pytest.approx(9)
    layer = KernelInterpolatedConv2d(1, 1, 3, padding=1, base_resolution=8)
    assert layer(torch.ones(1, 1, 4, 12)).shape == (1, 1, 4, 12)
    assert layer.to_conv() is None


@pytest.mark.parametrize(("rule", "close"), [("spectral", 1e-6), ("local_integral", 1e-5)])
def test_rules_start_from_the_kernel(rule: str, close: float):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.GELU()).double()
    x = field(24, 24, channels=2)
    result = to_neural_operator(net, 24, {nn.Conv2d: rule}, example_input=x)
    assert result.changed == ("0",)
    plain, new = net(x), result.model(x)
    assert (new - plain).norm() / plain.norm() < close
    fine = result.model(field(96, 96, channels=2))[..., ::4, ::4]
    assert (fine - new).norm() / new.norm() < 0.1


def test_conversion_of_all_kinds_of_layers():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(4, 4, 2, stride=2), nn.MaxPool2d(3, 2, 1)),
        *(nn.ReplicationPad2d(1), nn.Conv2d(4, 2, 3), nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Conv2d(2, 1, 1)),
    )
    x = torch.randn(1, 1, 16, 16)
    result = to_neural_operator(net, 16, {"0": "difference", "7": "keep"}, example_input=x)
    assert result.changed == ("0", "1", "2", "3", "4", "5", "6")
    assert isinstance(result.model[0], FiniteDifferenceConv2d)  # type: ignore[index]
    for size in (16, 32, 64):
        assert result.model(torch.randn(1, 1, size, size)).shape == net(torch.randn(1, 1, size, size)).shape
    constant = GridPool(nn.AvgPool2d(3, 2, 1, count_include_pad=False), (8, 8))(torch.ones(1, 1, 20, 16))
    torch.testing.assert_close(constant, torch.ones(1, 1, 10, 8))
    assert GridPad(nn.ZeroPad2d((1, 2, 0, 1)), (4, 4))(torch.ones(1, 1, 8, 4)).shape == (1, 1, 10, 7)


def test_input_and_output_interpolation():
    model = InputOutputInterpolate(nn.Conv2d(1, 1, 3, padding=1).double(), 8, "fourier")
    seen: list[torch.Size] = []
    model.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    torch.testing.assert_close(model(field(8, 8)), model.model(field(8, 8)))
    assert model(field(16, 24)).shape == (1, 1, 16, 24)
    assert set(seen) == {torch.Size((1, 1, 8, 8))}


# The sweep


def test_sweep_tells_operators_from_plain_convolutions():
    report = layer_sweep((16, 32, 64))
    assert {claim.verdict for claim in report.claims} == {"holds"}
    plain = resolution_sweep(nn.Conv2d(1, 1, 5, padding=2, padding_mode="circular"), smooth_field(1), (8, 16, 64))
    assert plain.claims[-1].statement.endswith("stays an operator of its neighbourhood")
    assert plain.claims[-1].verdict == "does not hold"
    assert slope([1, 2, 4], [8, 4, 2]) == pytest.approx(-1)
    assert len(monte_carlo_errors((16, 32), repeats=1)) == 2


def test_sweep_of_what_does_not_converge():
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(x.shape[-1]))

    sweep = resolution_errors(Noise(), smooth_field(1), (8, 16, 32, 64))
    assert not sweep.exact
    assert abs(sweep.order) < 0.3
    with pytest.raises(ValueError, match="divisors"):
        resolution_errors(Noise(), smooth_field(1), (8, 12, 16))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: SpectralConv(2, 3, (4, 4), separable=True), ValueError, "keep its channels"),
        (lambda: SpectralConv(2, 3, ()), ValueError, "one to three"),
        (lambda: SpectralConv(2, 3, (4,), max_modes=(3,)), ValueError, "at least n_modes"),
        (lambda: SpectralConv(2, 3, (4,), factorization="svd"), UnknownName, "factorization"),  # type: ignore[arg-type]
        (lambda: SpectralConv(2, 3, (4,), factorization="cp", rank=(1, 2)), ValueError, "rank must hold 1"),
        (lambda: SpectralConv(1, 1, (4,))(torch.ones(1, 1, 8).long()), ValueError, "floating point"),
        (lambda: DiscreteContinuousConv2d(1, 1, (1, 4), 0.1), ValueError, "at least 2 rings"),
        (lambda: DiscreteContinuousConv2d(1, 1, (2, 4), 0.0), ValueError, "radius must be positive"),
        (lambda: DiscreteContinuousConv2d(3, 1, 2, 0.1, groups=2), ValueError, "groups must divide"),
        (lambda: IntegralTransform((4, 1), transform_type="cubic"), UnknownName, "linear_kernelonly"),  # type: ignore[arg-type]
        (lambda: GNOBlock(1, 2, 2, 0.1), ValueError, "keeps its channels"),
        (lambda: GNOBlock(1, 1, 2, -1.0), ValueError, "radius must be positive"),
        (lambda: AttentionKernelIntegral(4, 4, 1, 6, position="rotary"), ValueError, "multiple of 4"),
        (lambda: FiniteDifferenceConv2d(1, 1, 4), ValueError, "should be odd"),
        (lambda: KernelInterpolatedConv2d(1, 1, 3, interpolation="cubic"), UnknownName, "interpolation"),  # type: ignore[arg-type]
        (lambda: KernelInterpolatedConv2d(1, 1, 3, dilation=2), ValueError, "dilation must be 1"),
        (lambda: InputOutputInterpolate(nn.Identity(), 0), ValueError, "train_resolution"),
        (lambda: GridPool(nn.ReLU(), (4,)), Unsupported, "pooling"),
        (lambda: to_neural_operator(nn.Conv2d(1, 1, 3), 8), Unsupported, "example_input"),
        (lambda: to_neural_operator(nn.Conv2d(1, 1, 3), 8, {"*": "magic"}), UnknownName, "conversion"),
        (lambda: to_neural_operator(nn.Conv2d(1, 1, 3), 8, example_input=torch.ones(1, 1, 9, 9)), ValueError, "grid"),
        (lambda: FNOConfig(n_modes=(4, 4, 4)), ValueError, "n_modes must be one number or 2"),
        (lambda: FNOConfig(skip="dense"), UnknownName, "skip"),  # type: ignore[arg-type]
        (lambda: LocalNOConfig(dims=1, disco_layers=True), ValueError, "dims 2 only"),
        (lambda: LocalNOConfig(diff_layers=(True,)), ValueError, "diff_layers must be one or 4"),
        (lambda: ModernUNetConfig(kernel_size=4), ValueError, "kernel_size must be odd, got 4"),
        (lambda: FieldViTConfig(resolution=30, patch_size=4), ValueError, "must divide"),
        (lambda: FieldViTConfig(resolution=8).build()(torch.ones(1, 1, 10, 8)), ValueError, "patches of 4"),
        (lambda: OFormerConfig(depth=0), ValueError, "at least 1"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        call()


def test_init_of_attention_near_the_identity():
    torch.manual_seed(0)
    layer = AttentionKernelIntegral(16, 16, 2, 16)
    diagonal = torch.stack([head.diagonal().mean() for head in layer.to_q.weight.split(16)])
    assert torch.allclose(diagonal, torch.full((2,), 1 / math.sqrt(16)), atol=0.1)
    assert isinstance(AttentionKernelIntegral(8, 8, 2, 4).to_out, nn.Identity)
