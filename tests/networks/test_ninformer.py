"""NiNformer: counts, what the gate does, what the order of the tokens changes, layouts, refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas import load_weights
from convatlas.cost import cost
from convatlas.networks.base import Feature
from convatlas.networks.ninformer import (
    MixerBlock,
    MixerClassifier,
    MixerConfig,
    MixerGatingUnit,
    NiNBlock,
    NiNformer,
    NiNformerClassifier,
    NiNformerConfig,
)
from convatlas.networks.registry import create_model

TINY = NiNformerConfig().override(depth=2, dim=10, ffn_dim=14, patch_size=2, preprocess={"size": 8})


def stirred(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation mode, with weights that all matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def block(**options: Any) -> NiNBlock:
    return stirred(NiNBlock(10, MixerBlock(10, 6, 14, 14), 14, **options))  # type: ignore[return-value]


def zero(*linears: nn.Linear) -> None:
    with torch.no_grad():
        for linear in linears:
            linear.weight.zero_()
            linear.bias.zero_()


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("ninformer_cifar10", 2_652_170, 0.2189),
        ("ninformer_cifar100", 2_675_300, 0.2189),
        ("mixer_cifar10", 1_320_192 + 15_114, 0.1350),
    ],
)
def test_counts_are_the_published_ones(name: str, parameters: int, macs: float) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert cost(model, *model.example_inputs()).total.macs / 1e9 == pytest.approx(macs, abs=6e-5)


def test_counts_of_the_trunks() -> None:
    with torch.device("meta"):
        trunk, x = NiNformer(256, 512, 64, 4), torch.empty(1, 64, 256)
        mixers = nn.Sequential(*(MixerBlock(256, 64, 512, 512) for _ in range(4)))
    for model, parameters, macs in ((trunk, 2_637_056, 0.2181), (mixers, 1_320_192, 0.1342)):
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert cost(model, x).total.macs / 1e9 == pytest.approx(macs, abs=6e-5)


def test_formulas_of_a_block() -> None:
    n, d, f = 9, 10, 14
    model = NiNBlock(d, MixerBlock(d, n, f, f), f)
    mixing, feeding = n * f + f + f * n + n, d * f + f + f * d + d
    expected = 2 * d + (2 * d + mixing) + (2 * d + feeding) + (d * d + d) + feeding
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    macs = cost(model, torch.empty(1, n, d)).total.macs
    assert macs == 2 * n * f * d + 2 * n * d * f + n * d * d + 2 * n * d * f


def test_block_is_the_equations() -> None:
    model, x = block(), tokens(2, 6, 10)
    mixer = model.mgu.mixer

    def feed(mlp: Any, z: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(z, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias)

    def norm(layer: Any, z: Tensor) -> Tensor:
        return F.layer_norm(z, (10,), layer.weight, layer.bias, 1e-5)

    u = norm(model.norm, x)
    y = u + feed(mixer.mlp_tokens, norm(mixer.norm1, u).mT).mT
    gate = y + feed(mixer.mlp_channels, norm(mixer.norm2, y))
    x1 = x + F.linear(u, model.mgu.proj.weight, model.mgu.proj.bias) * gate
    torch.testing.assert_close(model(x), x1 + feed(model.ffn, norm(model.norm, x1)))


def test_without_a_projection_the_first_half_is_the_identity() -> None:
    model, x = block(), tokens(2, 6, 10)
    zero(model.mgu.proj)
    torch.testing.assert_close(model(x), x + model.ffn(model.norm(x)))


def test_constant_gate_leaves_the_projection() -> None:
    class Ones(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones_like(x)

    unit, x = MixerGatingUnit(10, Ones()).double(), tokens(2, 6, 10)
    torch.testing.assert_close(unit(x), unit.proj(x))


def test_unit_is_of_second_order_without_the_inner_mlps() -> None:
    unit, x = MixerGatingUnit(10, MixerBlock(10, 6, 14, 14)).double(), tokens(2, 6, 10)
    zero(unit.mixer.mlp_tokens.fc2, unit.mixer.mlp_channels.fc2)
    nn.init.zeros_(unit.proj.bias)
    torch.testing.assert_close(unit(x), unit.proj(x) * x)
    torch.testing.assert_close(unit(-3 * x), 9 * unit(x))


def test_order_of_the_tokens_matters_through_their_mixing_only() -> None:
    model, x = block(), tokens(2, 6, 10)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert not torch.isclose(model(x)[:, order], model(x[:, order])).all(-1).any()
    zero(model.mgu.mixer.mlp_tokens.fc2)
    torch.testing.assert_close(model(x)[:, order], model(x[:, order]))


def test_both_halves_read_one_norm() -> None:
    shared, apart = block(), block(shared_norm=False)
    assert [name for name in shared.state_dict() if re.match(r"\w*norm\.", name)] == ["norm.weight", "norm.bias"]
    assert "ffn_norm.weight" in apart.state_dict()
    x = tokens(2, 6, 10)
    apart.load_state_dict({**apart.state_dict(), **shared.state_dict()})
    assert not torch.allclose(apart(x), shared(x))
    apart.ffn_norm.load_state_dict(shared.norm.state_dict())
    torch.testing.assert_close(apart(x), shared(x))


def test_other_gates_can_be_passed() -> None:
    config = TINY.override(shared_norm=False, drop=0.0)
    model = NiNformerClassifier(config, mixer=lambda: nn.Sequential(nn.Linear(10, 10), nn.Sigmoid()))
    assert isinstance(model.blocks[1].mgu.mixer[1], nn.Sigmoid)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropout_stands_in_six_places_of_a_block() -> None:
    model = TINY.override(drop=0.25).build()
    rates = [mlp.drop.p for mlp in model.modules() if hasattr(mlp, "fc1")]
    assert rates == [0.25] * 3 * TINY.depth  # two in each
    assert NiNformerConfig().drop == 0.5


def test_initial_weights_are_the_frameworks() -> None:
    model = NiNformerConfig(depth=1).build()
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, name


def test_tokens_run_row_by_row_and_sizes_need_not_be_square() -> None:
    config = TINY.override(preprocess={"size": (4, 6)}, num_classes=5, drop=0.0)
    model = stirred(config.build())
    assert (config.grid, config.num_tokens) == ((2, 3), 6)
    assert model.feature_info == (Feature(10, 2),)
    x = tokens(2, 3, 4, 6)
    (feature,) = model.forward_features(x)
    rows = [model.stem(x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2])[..., 0, 0] for i in range(2) for j in range(3)]
    z = torch.stack(rows, dim=1)
    for each in model.blocks:
        z = each(z)
    torch.testing.assert_close(feature, z.mT.reshape(2, 10, 2, 3))
    torch.testing.assert_close(model(x), model.head(z.mean(1)))


def theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict as the authors' script names it."""
    names = {"blocks.": "model.", "stem.": "patcher.", "head.": "classifier."}
    names |= {"mixer.norm1": "Mixer.token_mix.0", "mixer.norm2": "Mixer.channel_mix.0"}
    names |= {"mixer.mlp_tokens": "Mixer.token_mix.2.net", "mixer.mlp_channels": "Mixer.channel_mix.1.net"}
    names |= {"ffn.": "ffn.net.", "fc1": "0", "fc2": "3"}
    foreign = {}
    for key, value in state.items():
        for ours, other in names.items():
            key = key.replace(ours, other)
        foreign[key] = value
    return foreign


def test_authors_layout_loads_completely() -> None:
    source, target = TINY.build(), TINY.build()
    foreign = theirs(source.state_dict())
    shapes = {key: tuple(value.shape) for key, value in foreign.items()}
    assert shapes["model.1.mgu.Mixer.token_mix.2.net.0.weight"] == (14, 16)
    assert shapes["model.0.mgu.Mixer.channel_mix.1.net.3.weight"] == (10, 14)
    assert shapes["model.0.mgu.proj.weight"] == (10, 10)
    assert shapes["model.0.ffn.net.3.bias"] == (10,)
    assert shapes["patcher.weight"] == (10, 3, 2, 2)
    report = load_weights(target, foreign)
    assert (report.layout, report.loaded, report.differences()) == ("authors", len(foreign), [])
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
    trunk = NiNformer(10, 14, 16, 2)
    report = load_weights(trunk, {key: value for key, value in foreign.items() if key.startswith("model.")})
    assert (report.layout, report.differences()) == ("authors", [])
    other = MixerClassifier(MixerConfig().override(depth=1, dim=10, ffn_dim=14, patch_size=2, preprocess={"size": 8}))
    mixer = theirs({key.replace("blocks.0.", "blocks.0.mixer."): v for key, v in other.state_dict().items()})
    report = load_weights(other, {key.replace("Mixer.", ""): value for key, value in mixer.items()})
    assert (report.layout, report.differences()) == ("authors", [])


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="NiNformer was built for 64 tokens, got 49"):
        NiNformer(8, 8, 64, 1)(torch.empty(1, 49, 8))
    with pytest.raises(ValueError, match=r"x must be \(B, 64, 8\), got \(1, 64, 9\)"):
        NiNformer(8, 8, 64, 1)(torch.empty(1, 64, 9))
    with pytest.raises(ValueError, match="was built for 16 tokens of 8 x 8 pixels, got 8 x 10"):
        TINY.build()(torch.empty(1, 3, 8, 10))
    with pytest.raises(ValueError, match="divisible into patches of 4, got 32 x 30"):
        NiNformerConfig().override(preprocess={"size": (32, 30)})
    for drop in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"drop must be in \[0, 1\), got {drop}"):
            NiNformerConfig(drop=drop)
        with pytest.raises(ValueError, match=rf"drop must be in \[0, 1\), got {drop}"):
            NiNformer(8, 8, 4, 1, drop=drop)
    with pytest.raises(ValueError, match="token_dim must be at least 1, got 0"):
        MixerConfig(token_dim=0)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        NiNformer(8, 8, 4, 0)
