from __future__ import annotations

from typing import Any

import lightning.pytorch
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from convatlas.networks.registry import create_model
from convatlas.networks.transform_once.dfpnet import DFPNetConfig
from convatlas.networks.transform_once.fno import FFNOConfig, FNOConfig
from convatlas.networks.transform_once.spectral import coordinates
from convatlas.networks.transform_once.t1 import T1Config
from convatlas.networks.transform_once.t1u import T1PlusConfig
from convatlas.ops.dct import dct
from convatlas.ops.forecast_errors import spectral_relative_l2
from convatlas.ops.relative_error import relative_l2
from convatlas.training.devices import fully_sharded
from convatlas.weights import load_weights

SMALL: dict[str, Any] = {"modes": (4, 3), "width": 4, "depth": 2, "resolution": (9, 8)}


def stirred(config: Any) -> Any:
    """A network in double precision with weights that matter."""
    torch.manual_seed(0)
    network = config.build().double().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in ("fc1", "fc2"):
                parameter.normal_(std=0.3)
            if "mixing" in name:
                parameter.mul_(0.3)
    return network


def smooth(*grid: int) -> Tensor:
    """A function of few cosines at the middles of the cells of a grid, (1, 1, *grid)."""
    places = torch.meshgrid(*[(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid], indexing="ij")
    waves = [torch.cos(torch.pi * (axis + 1) * place) for axis, place in enumerate(places)]
    return (torch.stack(waves).sum(0) + torch.stack(waves).prod(0))[None, None]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("t1_navier_stokes", 11_065_664),
        ("t1_airfoil", 58_989_216),
        ("t1u_navier_stokes", 2_568_013),
        ("t1_fno_navier_stokes", 31_871_201),
    ],
)
def test_published_parameters(name: str, count: int):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in create_model(name).parameters()) == count


def test_parameters_of_a_layer():
    width, (m1, m2) = SMALL["width"], SMALL["modes"]
    layer = T1Config(**SMALL).build().blocks[0]
    assert sum(each.numel() for each in layer.parameters()) == width**2 * m1 * m2 + width * (m1**2 + m2**2)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("transform", ["dct", "dft"])
@pytest.mark.parametrize("keep_high", [False, True])
def test_the_lifting_may_come_after_the_transform(keep_high: bool, transform: str, padding: int):
    config = T1Config(**SMALL, keep_high=keep_high, transform=transform, act="sin", padding=padding)
    network = stirred(config)
    x = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    # As the paper has it: lift, pad, transform everything, then the layers.
    places = coordinates((9, 8), x).expand(2, -1, -1, -1)
    lifted = network.fc0(torch.cat([x, places], 1).movedim(1, -1)).movedim(-1, 1)
    lifted = F.pad(lifted, (0, padding, 0, padding))
    axes = (-2, -1)
    z = dct(lifted, axes) if transform == "dct" else torch.fft.rfftn(lifted, dim=axes, norm="ortho")
    for layer in network.blocks:
        z = layer(z)
    torch.testing.assert_close(network(x), network._head(z))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_answers_are_band_limited_and_come_back(dims: int):
    grid = (7, 6, 5)[:dims]
    config = T1Config(dims=dims, resolution=grid, modes=3, width=3, depth=2)
    network = stirred(config)
    x = torch.randn(2, 1, *grid, dtype=torch.float64)
    answer = network(x)
    assert answer.shape == x.shape
    inside = answer[(..., *[slice(3)] * dims)]
    assert inside.abs().min() > 0
    torch.testing.assert_close(answer.square().sum(), inside.square().sum(), rtol=1e-12, atol=0)
    field = network.as_field(answer, grid)
    torch.testing.assert_close(network.as_answer(field), answer)
    torch.testing.assert_close(spectral_relative_l2(answer, x), relative_l2(field, x))
    on_grid = stirred(config.override(output_space="grid"))
    torch.testing.assert_close(on_grid(x), field)
    assert on_grid.as_field(x, grid) is x
    assert on_grid.as_answer(x) is x


def test_an_answer_on_the_grid_is_cut_to_it():
    config = T1Config(**SMALL, padding=3, output_space="grid")
    whole, cut = stirred(config.override(crop=False)), stirred(config)
    x = torch.randn(1, 1, 9, 8, dtype=torch.float64)
    assert whole(x).shape == (1, 1, 12, 11)
    torch.testing.assert_close(cut(x), whole(x)[..., :9, :8])


@pytest.mark.parametrize("transform", ["dct", "dft"])
def test_finer_grids_show_the_same_function(transform: str):
    config = T1Config(**{**SMALL, "resolution": (24, 20)}, transform=transform, act="sin", output_space="grid")
    network = stirred(config)
    with torch.no_grad():  # the sine of complex numbers grows without bound
        network.fc0.weight.mul_(0.02)
        network.fc0.bias.mul_(0.02)
    # Every third or ninth point is the same.
    coarse, fine, finest = (smooth(*grid) for grid in ((24, 20), (72, 60), (216, 180)))
    limit = network(finest)[..., 4::9, 4::9]
    errors = [relative_l2(network(coarse), limit), relative_l2(network(fine)[..., 1::3, 1::3], limit)]
    assert errors[0] < 0.2
    assert errors[1] < 0.5 * errors[0]


def test_a_coarse_grid_has_no_more_modes_than_points():
    network = stirred(T1Config(**SMALL))
    x = torch.randn(1, 1, 3, 2, dtype=torch.float64)
    assert network(x).shape == x.shape
    assert network(x).isfinite().all()


def test_t1_plus_leaves_modes_beyond_the_square_zero():
    config = T1PlusConfig(resolution=(26, 25), channel_exponent=1, in_channels=2, out_channels=3)
    network, bare = stirred(config), stirred(config.override(op_layer=False))
    x = torch.randn(2, 2, 26, 25, dtype=torch.float64)
    answer = network(x)
    assert answer.shape == (2, 3, 26, 25)
    assert answer[..., 24:, :].abs().max() == answer[..., 24:].abs().max() == 0 < answer.abs().max()
    assert not any(name.startswith("op_layer") for name in bare.state_dict())
    assert bare(x).shape == answer.shape


@pytest.mark.parametrize("side", [24, 36, 64, 128, 224])
def test_the_unet_meets_itself_at_every_level(side: int):
    with torch.device("meta"):
        network = DFPNetConfig(resolution=side, channel_exponent=0, out_channels=2).build()
        assert network(torch.zeros(2, 1, side, side)).shape == (2, 2, side, side)
        lowest = torch.zeros(2, 1, side, side)
        for name in ("1", "2", "2b", "3", "4", "5", "6"):
            lowest = network.get_submodule(f"layer{name}")(lowest)
        assert lowest.shape[2:] == (1, 1)


def by_hand(layer: Any, x: Tensor) -> Tensor:
    """The spectral convolution of FNO in two dimensions, written out."""
    m1, m2 = layer.modes
    spectrum = torch.fft.rfft2(x, norm="ortho")
    y = torch.zeros_like(spectrum)
    for rows, weight in ((slice(m1), layer.weights1), (slice(-m1, None), layer.weights2)):
        mixed = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, rows, :m2], torch.view_as_complex(weight.contiguous()))
        y[:, :, rows, :m2] = mixed
    return torch.fft.irfft2(y, s=x.shape[2:], norm="ortho")


@pytest.mark.parametrize("parts", [(True, True), (False, True), (True, False)])
def test_a_layer_of_fno_is_a_sum(parts: tuple[bool, bool]):
    config = FNOConfig(**SMALL, residual=parts[0], conv_residual=parts[1], init="vp")
    network = stirred(config)
    layer = network.blocks[0]
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    expected = by_hand(layer.conv, x)
    expected = expected + x if parts[0] else expected
    expected = expected + layer.w(x) if parts[1] else expected
    torch.testing.assert_close(layer(x), F.gelu(expected))


def test_ffno_subtracts_and_answers_from_the_last_output():
    network = stirred(FFNOConfig(**SMALL))
    x = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    z = network.in_proj(torch.cat([x, coordinates((9, 8), x).expand(2, -1, -1, -1)], 1).movedim(1, -1))
    for layer in network.spectral_layers:
        total = torch.zeros_like(z)
        for weight, axis in zip(layer.fourier_weight, (2, 1), strict=True):
            spectrum = torch.fft.rfft(z, dim=axis, norm="ortho").movedim(axis, -1)  # (B, other, width, frequencies)
            low = torch.einsum(
                "byik,iok->byok", spectrum[..., : weight.shape[2]], torch.view_as_complex(weight.detach())
            )
            full = torch.zeros_like(spectrum)
            full[..., : weight.shape[2]] = low
            total = total + torch.fft.irfft(full, z.shape[axis], norm="ortho").movedim(-1, axis)
        first, second = layer.backcast_ff.layers
        b = second(torch.relu(first[0](total)))
        z = z - b
    torch.testing.assert_close(network(x), network.out(b).movedim(-1, 1))


@pytest.mark.parametrize("config", [FNOConfig, FFNOConfig])
@pytest.mark.parametrize("dims", [1, 3])
def test_baselines_in_other_dimensions_and_on_other_grids(config: Any, dims: int):
    network = stirred(config(dims=dims, resolution=8, modes=3, width=3, depth=2))
    fine = [network(smooth(*[points] * dims)) for points in (8, 5, 16)]
    assert [y.shape[2] for y in fine] == [8, 5, 16]
    fine[0].square().sum().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in network.parameters())


def test_checkpoints_of_lightning_load(tmp_path: Any):
    for config in (T1Config(**SMALL), FNOConfig(**SMALL)):
        network, other = stirred(config), config.build().double()
        authors = {name.replace("blocks.", "layers."): tensor for name, tensor in network.state_dict().items()}
        state = {f"model.{name}": tensor for name, tensor in authors.items()}
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
        load_weights(other, str(tmp_path / "last.ckpt"))
        x = torch.randn(1, 1, 9, 8, dtype=torch.float64)
        torch.testing.assert_close(other.eval()(x), network(x), rtol=0, atol=0)


def test_weights_keep_the_order_of_memory_that_is_fast():
    for config, name in ((T1Config, "blocks.0.ch_mixing_1"), (FNOConfig, "blocks.0.conv.weights1")):
        network = config(**SMALL).build()
        load_weights(network, {key: tensor.contiguous() for key, tensor in network.state_dict().items()})
        weight = network.get_parameter(name)
        assert weight.movedim((2, 3), (0, 1)).is_contiguous()


def test_bad_input():
    for make, message in (
        (
            lambda: T1Config(modes=13, resolution=12),
            r"modes \(13, 13\) must not exceed the padded resolution \(12, 12\)",
        ),
        (
            lambda: T1Config(modes=8, resolution=12, transform="dft", act="sin"),
            r"must not exceed the padded resolution \(12, 7\)",
        ),
        (lambda: T1Config(transform="wavelet"), "unknown transform 'wavelet'"),
        (lambda: T1Config(transform="dft"), "act must be one of sin, tanh with dft, got 'gelu'"),
        (lambda: T1Config(init="xavier").build(), "unknown init 'xavier'"),
        (lambda: T1Config(modes=(4, 3, 2)), r"modes must be one number or 2, at least 1, got \(4, 3, 2\)"),
        (lambda: T1Config(width=0), "width and depth must be at least 1, got 0 and 8"),
        (lambda: T1PlusConfig(modes=20), "resolution must be one of 24, 36, 64, 128, 224 on both of two axes"),
        (lambda: T1PlusConfig(dims=1), "dims, transform and keep_high must be 2, 'dct' and False"),
        (lambda: FNOConfig(modes=7, resolution=12), r"modes \(7, 7\) must not exceed those of the resolution"),
        (lambda: stirred(T1Config(**SMALL))(torch.zeros(1, 2, 9, 8)), r"x must be \(B, 1, H, W\), got \(1, 2, 9, 8\)"),
        (lambda: stirred(T1Config(**SMALL))(torch.zeros(1, 1, 9, 8, dtype=torch.cfloat)), "x must be floating point"),
        (
            lambda: DFPNetConfig(resolution=24).build()(torch.zeros(1, 1, 24, 25)),
            "x must have 24 x 24 points, got 24 x 25",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_convolutions_that_are_multiplied_by_zero_are_left_out():
    full, bare = stirred(FNOConfig(**SMALL)), FNOConfig(**SMALL, conv_residual=False).build().double()
    load_weights(bare, full.state_dict())
    x = torch.randn(1, 1, 9, 8, dtype=torch.float64)
    for layer in full.blocks:
        torch.nn.init.zeros_(layer.w.weight), torch.nn.init.zeros_(layer.w.bias)
    torch.testing.assert_close(bare(x), full(x))


class _Whole(lightning.pytorch.LightningModule):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def training_step(self, x: Tensor) -> Tensor:
        return self.network(x).square().sum()

    def validation_step(self, x: Tensor) -> Tensor:
        return self.network(x).clone()


def test_weights_in_any_order_of_memory_can_be_shared_out(tmp_path: Any):
    x = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        for config in (T1Config(**SMALL), FNOConfig(**SMALL)):
            network = stirred(config)
            expected = network(x).detach()
            module = _Whole(network)
            fully_sharded(module, network, dist.device_mesh.init_device_mesh("cpu", (1,)))
            torch.testing.assert_close(module.validation_step(x), expected)
            module.training_step(x).backward()
            module.reshard()  # type: ignore[operator]
            assert all(each.grad is not None for each in module.parameters())
    finally:
        dist.destroy_process_group()
