"""The small shared layers: drop path, scales, norms, squeeze and excitation, the parts of transformer blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.cost import cost
from convatlas.nn.activation import QuickGELU, ScalarPReLU
from convatlas.nn.attention import SelfAttention
from convatlas.nn.drop import DropPath, drop_path_rates
from convatlas.nn.embedding import PatchEmbed
from convatlas.nn.init import init_linear
from convatlas.nn.mixers.squeeze_excite import SqueezeExcite
from convatlas.nn.mlp import Mlp
from convatlas.nn.norm import ChannelLayerNorm, Float32LayerNorm
from convatlas.nn.scale import LayerScale


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    y = DropPath(0.25)(torch.ones(4000, 2, 3, 3))
    kept = y.flatten(1).amax(1)
    assert torch.equal(y, kept.reshape(-1, 1, 1, 1).expand_as(y))
    assert set(kept.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((kept > 0).float().mean().item() - 0.75) < 0.03


def test_drop_path_is_the_identity_in_evaluation_and_at_rate_zero():
    x = torch.randn(3, 4)
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_path_rate_is_checked(rate: float):
    with pytest.raises(ValueError, match=rf"drop path rate must be in \[0, 1\), got {rate}"):
        DropPath(rate)


@pytest.mark.parametrize("depths", [(3, 3, 9, 3), (1, 2), (1,), (2, 0, 1)])
def test_drop_path_rates_rise_linearly_over_all_blocks(depths: tuple[int, ...]):
    rates = drop_path_rates(0.3, depths)
    assert tuple(len(stage) for stage in rates) == depths
    flat = torch.tensor([rate for stage in rates for rate in stage], dtype=torch.float64)
    torch.testing.assert_close(flat, torch.linspace(0, 0.3, sum(depths), dtype=torch.float64))


def test_layer_scale_multiplies_the_channels_of_its_axis():
    x = torch.randn(2, 3, 4, 5)
    scale = LayerScale(3, 0.5)
    assert torch.equal(scale(x), 0.5 * x)
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(scale(x)[:, 2], 3 * x[:, 2])
    last = LayerScale(3, channel_dim=-1)
    last.load_state_dict(scale.state_dict())
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), scale(x))


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (1, 6, 3, 1), (2, 6, 2, 3, 4)])
def test_channel_layer_norm_normalises_each_position(shape: tuple[int, ...]):
    torch.manual_seed(0)
    norm = ChannelLayerNorm(6, eps=1e-6).double()
    x = torch.randn(shape, dtype=torch.float64)
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-6).sqrt())
    assert set(norm.state_dict()) == set(nn.LayerNorm(6).state_dict())


def test_squeeze_excite_is_a_gate_of_the_channel_means():
    torch.manual_seed(0)
    layer = SqueezeExcite(16, reduction=4)
    x = torch.randn(2, 16, 3, 5)
    means = x.mean((2, 3))
    hidden = torch.relu(means @ layer.fc1.weight.T + layer.fc1.bias)
    gate = torch.sigmoid(hidden @ layer.fc2.weight.T + layer.fc2.bias)
    torch.testing.assert_close(layer(x), x * gate[:, :, None, None])
    assert sum(weight.numel() for weight in layer.parameters()) == 2 * 16 * 4 + 4 + 16


@pytest.mark.parametrize("reduction", [32, 0, -1])
def test_squeeze_excite_needs_a_bottleneck(reduction: int):
    with pytest.raises(ValueError, match=rf"channels // reduction must be at least 1, got 16 // {reduction}"):
        SqueezeExcite(16, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_float32_layer_norm_computes_in_float32_and_keeps_the_dtype(dtype: torch.dtype):
    torch.manual_seed(0)
    norm = Float32LayerNorm(6).to(dtype)
    x = (100 + torch.randn(2, 5, 6)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.layer_norm(x.to(wide), (6,), norm.weight.to(wide), norm.bias.to(wide), 1e-5).to(dtype)
    assert torch.equal(norm(x), expected)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert norm.float()(x).dtype == torch.bfloat16


def test_quick_gelu():
    x = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)))
    assert (QuickGELU()(x) - F.gelu(x)).abs().max() < 0.021


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scalar_prelu_is_that_of_torch(dtype: torch.dtype):
    ours, theirs = ScalarPReLU(0.3).to(dtype), nn.PReLU(1, 0.3).to(dtype)
    inputs = [torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2)]
    inputs[0][0, 0, :3] = inputs[1][0, 0, :3] = 0
    for x, layer in zip(inputs, (ours, theirs), strict=True):
        x.requires_grad_()
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours(inputs[0]), theirs(inputs[1]))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ScalarPReLU().double(), (x,))


def test_mlp_is_two_linears_around_an_activation():
    torch.manual_seed(0)
    mlp = Mlp(4, 10, act=nn.ReLU)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(mlp(x), mlp.fc2(torch.relu(mlp.fc1(x))))
    assert set(mlp.state_dict()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


def test_mlp_hands_context_to_what_lies_between():
    class Between(nn.Module):
        def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
            assert grid == (2, 3)
            return -x

    torch.manual_seed(0)
    mlp = Mlp(4, 10, between=Between())
    x = torch.randn(2, 6, 4)
    torch.testing.assert_close(mlp(x, (2, 3)), mlp.fc2(F.gelu(-mlp.fc1(x))))


def test_mlp_drops_after_the_activation_and_at_the_end():
    torch.manual_seed(0)
    mlp = Mlp(200, 200, act=nn.Identity, drop=0.25)
    for layer in (mlp.fc1, mlp.fc2):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    y = mlp(torch.ones(50, 200))
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / 0.75**2]))
    assert abs((y > 0).double().mean() - 0.75**2) < 0.02
    assert torch.equal(mlp.eval()(torch.ones(2, 200)), torch.ones(2, 200))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(4, None, 0), (7, 4, 2), (3, 2, 1)])
def test_patch_embedding_is_a_convolution_and_a_norm_of_each_token(kernel: int, stride: int | None, padding: int):
    torch.manual_seed(0)
    embed = PatchEmbed(3, 8, kernel, stride=stride, padding=padding)
    x = torch.randn(2, 3, 21, 18)
    conv = F.conv2d(x, embed.proj.weight, embed.proj.bias, stride=stride or kernel, padding=padding)
    expected = F.layer_norm(conv.permute(0, 2, 3, 1), (8,), eps=1e-5).permute(0, 3, 1, 2)
    torch.testing.assert_close(embed(x), expected)
    assert [name for name, _ in embed.named_children()] == ["proj", "norm"]
    bare = PatchEmbed(3, 8, kernel, stride=stride, padding=padding, norm=None)
    bare.load_state_dict(embed.state_dict(), strict=False)
    torch.testing.assert_close(bare(x), conv)


def test_self_attention_is_torchs():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    theirs.in_proj_weight.data.copy_(ours.qkv.weight.data)
    theirs.in_proj_bias.data.copy_(ours.qkv.bias.data)
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_self_attention_drops_in_training_only():
    torch.manual_seed(0)
    layer, x = SelfAttention(4, 2, attn_drop=0.5, drop=0.5), torch.randn(1, 6, 4)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(("channels", "heads"), [(12, 5), (12, 0), (2, 4)])
def test_heads_must_divide_the_channels(channels: int, heads: int):
    with pytest.raises(ValueError, match=f"channels must be divisible by num_heads, got {channels} and {heads}"):
        SelfAttention(channels, heads)


def test_attention_is_counted():
    counted = cost(SelfAttention(8, 2), torch.randn(3, 5, 8))
    assert counted.total.macs == 3 * (5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8)
    assert sum(macs for name, macs in counted.operations.items() if "attention" in name) == 3 * 2 * 5 * 5 * 8


def test_init_linear_leaves_other_layers_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.Conv2d(3, 4, 3))
    before = model[1].weight.clone()
    model.apply(init_linear)
    assert abs(model[0].weight.std().item() - 0.02) < 0.001
    assert not model[0].bias.any()
    assert torch.equal(model[1].weight, before)
