"""Each rule: y = A x0 + r, products with A and A^T agree, the scope agrees, and the tangent is the Jacobian."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.analysis.linear_interpreter import (
    Call,
    Frozen,
    LinearInterpreter,
    LinearScope,
    register_rule,
)
from convatlas.analysis.linear_interpreter.rules import REGISTERED
from convatlas.errors import Unsupported


class Uses(nn.Module):
    """Calls a function with the input and some modules."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


def maps() -> Tensor:
    return torch.randn(2, 4, 6, 6, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64)


def volume() -> Tensor:
    return torch.randn(1, 2, 4, 5, 6, dtype=torch.float64)


def assigned(t: Tensor) -> Tensor:
    y = t * 2
    y[:, 0] = t[:, 1].relu()
    y[:, :, ::2] += t[:, :, 1::2]
    return y


def written_through_a_view(t: Tensor) -> Tensor:
    y = t * 3
    y.view(2, -1).relu_()
    return y + 1


def written_into_constants(t: Tensor) -> Tensor:
    out = t.new_ones(2, 4, 8, 8)
    out[:, :, 1:-1, 1:-1] = t
    return out * 2


def written_after_use(t: Tensor) -> Tensor:
    gate = torch.sigmoid(t)
    y = t * gate
    gate.add_(5.0)
    return y + gate


def part_overwritten_by_constants(t: Tensor) -> Tensor:
    y = t * 2
    part = y[:, :2]
    y[:, 1] = 0
    return part + 1


def turned_in_place(t: Tensor) -> Tensor:
    return (t * 2).transpose_(1, 2).unsqueeze_(0).squeeze_()


def weighted(t: Tensor) -> Tensor:
    return torch.linspace(-1, 1, t.shape[-1], dtype=t.dtype) * t


def window(t: Tensor) -> Tensor:
    return torch.stft(t.flatten(1), 16, return_complex=True, window=torch.ones(16, dtype=t.dtype)).abs()


UNITS = (
    *("ReLU", "ReLU6", "LeakyReLU", "Hardswish", "Hardsigmoid", "Hardtanh", "RReLU", "SELU", "CELU", "ELU", "GELU"),
    *(
        "SiLU",
        "Mish",
        "Softplus",
        "Sigmoid",
        "Tanh",
        "LogSigmoid",
        "Softshrink",
        "Hardshrink",
        "Tanhshrink",
        "Softsign",
    ),
)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[[], Tensor]]] = {
    "max": (lambda t: t.max(1)[0] + t.amax(1) + t.max() + t.sort(1)[0][:, 0] + t.topk(2, 1)[0][:, 1], maps),
    "min": (lambda t: t.min(1)[0] + t.amin((1, 2)).unsqueeze(1) + t.median(1)[0] + t.cummax(1)[0][:, 2], maps),
    "larger": (lambda t: torch.maximum(t, -t) + torch.minimum(t, torch.ones_like(t)) + torch.minimum(-t * 0, t), maps),
    "where": (lambda t: torch.where(t > 0, t, -0.1 * t) + t.clamp(-0.5, 0.5) + t.clamp_min(0.2) + t.clamp_max(1), maps),
    "masked_fill": (lambda t: t.masked_fill(t < 0, -2.0) * 2, maps),
    "lerp": (lambda t: torch.lerp(t, torch.ones_like(t), 0.3), maps),
    "sums": (lambda t: 1 - t + (2 - t) * (t - 3) / 7 + torch.rsub(t, t, alpha=2), maps),
    "broadcast": (lambda t: t.mean(1, keepdim=True) + torch.ones(4, 1, 1, dtype=t.dtype), maps),
    "quotients": (lambda t: t / (1 + t.abs()) + 1 / (2 + t * t), maps),
    "powers": (
        lambda t: t**2 + t.abs() ** 1.5 + (t.abs() + 1).sqrt() + (1 + t * t).rsqrt() + (t * t + 1).reciprocal(),
        maps,
    ),
    "exponentials": (lambda t: t.exp() + t.expm1() + t.abs().log1p() + (t * t + 1).log() + (t.abs() + 1).log2(), maps),
    "waves": (lambda t: t.sin() + t.cos() + t.erf() + t.atan() + t.sinh() + t.cosh() + t.asinh() + (t / 4).tan(), maps),
    "fused": (
        lambda t: (
            torch.addmm(t[0, 0], t[0, 1], t[0, 2], beta=2, alpha=3)
            + torch.baddbmm(t[0], t[1], t[0].relu())[0]
            + torch.addbmm(t[0, 0], t[0], t[1])
            + torch.addcmul(t[0, 0], t[0, 1], t[1, 1], value=2)
            + torch.addmv(t[0, 0, 0], t[0, 1], t[0, 2, 0])
            + torch.addmm(t[0, 0], t[0, 1].detach().new_ones(6, 6), t.new_ones(6, 6), alpha=2)
        ),
        maps,
    ),
    "einsum": (lambda t: torch.einsum("bchw,bdhw->bcd", t, t), maps),
    "kernel from the input": (
        lambda t: F.conv2d(t[:1], torch.sigmoid(t[:, :, :3, :3]), t.mean((1, 2, 3))),
        maps,
    ),
    "kernel from the input, constant signal": (
        lambda t: F.conv2d(torch.ones(1, 4, 6, 6, dtype=t.dtype), t[:, :, :3, :3], t.mean((1, 2, 3))),
        maps,
    ),
    "statistics": (
        lambda t: t.var((2, 3)) + t.std(1).mean((1, 2))[:, None] + sum(torch.std_mean(t, (1, 2, 3)))[:, None],
        maps,
    ),
    "normalize": (lambda t: F.normalize(t, dim=1) + F.normalize(t, p=1, dim=2), maps),
    "cosine": (lambda t: F.cosine_similarity(t, t.flip(2)), maps),
    "softmax as a gate": (lambda t: t * t.mean((2, 3)).softmax(1)[..., None, None] + t.log_softmax(1), maps),
    "causal attention": (lambda t: F.scaled_dot_product_attention(t, t * 2, t, is_causal=True), tokens),
    "constant values": (
        lambda t: t + F.scaled_dot_product_attention(t, t, torch.ones_like(t) * torch.arange(5).view(5, 1)),
        tokens,
    ),
    "pad": (lambda t: F.pad(t, (1, 2), value=3.0) * t.mean(), maps),
    "order": (
        lambda t: t.cumsum(1).roll(1, 2).flip(3).rot90(1, (2, 3)).tril() + t.repeat(1, 2, 1, 1)[:, 4:].triu(),
        maps,
    ),
    "scatter": (
        lambda t: (
            t[:, [0, 2]]
            .index_add(1, torch.tensor([0, 1]), t[:, 1:3])
            .scatter_add(1, torch.zeros(2, 1, 6, 6, dtype=torch.long), t[:, :1])
        ),
        maps,
    ),
    "gather": (lambda t: t.gather(1, t.argsort(1)) + t.index_select(1, torch.tensor([3, 1, 1, 0])), maps),
    "fold": (lambda t: F.fold(F.unfold(t, 3), (6, 6), 3) + t.unfold(2, 1, 1).mean(-1), maps),
    "unbind": (lambda t: sum(t.unbind(1)) + torch.stack(t.split(2, 1)).sum((0, 2)), maps),
    "shuffle": (lambda t: F.pixel_unshuffle(F.pixel_shuffle(t, 2), 3), maps),
    "spectrum": (lambda t: torch.fft.irfft2(torch.fft.rfft2(t) * torch.fft.rfft2(t.flip(1)).conj()), maps),
    "complex": (lambda t: torch.view_as_real(torch.complex(t, t.flip(1)) * torch.exp(torch.complex(t * 0, t))), maps),
    "imaginary part": (lambda t: torch.fft.fft(t).imag + torch.fft.fft(t).conj().imag.relu(), maps),
    "spectrogram": (window, maps),
    "warp": (lambda t: F.grid_sample(t, torch.tanh(t[:, :2].permute(0, 2, 3, 1)), align_corners=False), maps),
    "assigned": (assigned, maps),
    "written through a view": (written_through_a_view, maps),
    "written into constants": (written_into_constants, maps),
    "part overwritten by constants": (part_overwritten_by_constants, maps),
    "turned in place": (turned_in_place, maps),
    "a constant factor before": (weighted, maps),
    "input written": (lambda t: F.relu_(t) + 1, maps),
    "a number read": (lambda t: t * t.max().item(), maps),
    **{
        f"resized {mode}": (lambda t, mode=mode: F.interpolate(t, scale_factor=2, mode=mode), maps)
        for mode in ("nearest", "bilinear", "bicubic", "area")
    },
    "antialiased": (lambda t: F.interpolate(t, size=(4, 7), mode="bilinear", antialias=True), maps),
    "trilinear": (lambda t: F.interpolate(t, scale_factor=2, mode="trilinear"), volume),
}
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{name: (getattr(nn, name), maps) for name in UNITS},
    "GELU tanh": (lambda: nn.GELU("tanh"), maps),
    "GLU": (lambda: nn.GLU(1), maps),
    "PReLU": (lambda: nn.PReLU(4), maps),
    "Linear": (lambda: nn.Linear(8, 3), tokens),
    "Linear, turned": (lambda: Uses(lambda t, linear: linear(t.transpose(0, 1)), nn.Linear(8, 3)), tokens),
    "Bilinear": (lambda: Uses(lambda t, part: part(t, t.relu()), nn.Bilinear(8, 8, 3)), tokens),
    "Conv1d": (lambda: nn.Conv1d(5, 4, 3, stride=2, bias=False), tokens),
    "Conv2d": (lambda: nn.Conv2d(4, 8, 3, dilation=2, groups=4), maps),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=1), volume),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), maps),
    **{
        f"Conv2d {mode}": (lambda mode=mode: nn.Conv2d(4, 3, 3, padding=1, padding_mode=mode), maps)
        for mode in ("circular", "reflect", "replicate")
    },
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), maps),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), maps),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), maps),
    "LayerNorm": (lambda: nn.LayerNorm(8), tokens),
    "LayerNorm of maps": (lambda: nn.LayerNorm((6, 6), elementwise_affine=False), maps),
    "RMSNorm in one operation": (
        lambda: Uses(lambda t: torch.ops.aten._fused_rms_norm(t, [8], t.new_ones(8) * 1.5, 1e-6)[0]),
        tokens,
    ),
    "RMSNorm": (lambda: nn.RMSNorm(8), tokens),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), maps),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), maps),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), tokens),
    "MaxPool3d": (lambda: nn.MaxPool3d(2, 1), volume),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), maps),
    "AvgPool2d": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), maps),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(4), maps),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), maps),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), maps),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), tokens),
    "TransformerDecoderLayer": (
        lambda: Uses(lambda t, layer: layer(t, t), nn.TransformerDecoderLayer(8, 2, 16, activation="gelu")),
        tokens,
    ),
    "MultiheadAttention": (lambda: Uses(lambda t, part: part(t, t, t)[0], nn.MultiheadAttention(8, 2)), tokens),
    "LSTM": (lambda: Uses(lambda t, part: part(t)[0], nn.LSTM(8, 3, 2, bidirectional=True)), tokens),
    "GRU": (lambda: Uses(lambda t, part: part(t)[0], nn.GRU(8, 3, batch_first=True)), tokens),
    "shared layer": (
        lambda: Uses(lambda t, conv: conv(F.relu(conv(t), inplace=True)), nn.Conv2d(4, 4, 3, padding=1)),
        maps,
    ),
    "layers in place": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(True), nn.Hardswish(), nn.Flatten(), nn.Linear(144, 3)),
        lambda: maps().to(memory_format=torch.channels_last),
    ),
    **{name: (lambda function=function: Uses(function), make) for name, (function, make) in FUNCTIONS.items()},
    # What torch itself cannot differentiate in place.
    "written after use": (lambda: Uses(written_after_use), maps),
}


@pytest.mark.parametrize("mode", ["mask", "tangent"])
@pytest.mark.parametrize("name", MODULES)
def test_rule(name: str, mode: str):
    make, inputs = MODULES[name]
    model, x0 = make().double().eval(), inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        y = model(x0.clone())
        li = LinearInterpreter(model, mode)(x0)
        torch.testing.assert_close(li.output, y, rtol=1e-13, atol=1e-13)
        assert li.error < 1e-12
        z, c = torch.randn(2, *x0.shape, dtype=x0.dtype), torch.randn(2, *y.shape, dtype=y.dtype)
        responses, transposed = li.apply(z), li.apply_transpose(c)
        for probe in range(2):
            torch.testing.assert_close(li.apply(z[probe]), responses[probe])
            torch.testing.assert_close(li.apply_transpose(c[probe]), transposed[probe])
            torch.testing.assert_close((c[probe] * responses[probe]).sum(), (transposed[probe] * z[probe]).sum())
        torch.testing.assert_close(li.apply(2 * z[0] - z[1]), 2 * responses[0] - responses[1])
        with LinearScope(model, mode):
            first, second = model(torch.cat([x0, z[0]])).chunk(2)
        torch.testing.assert_close(first, y, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(second, responses[0])
    if mode == "tangent" and name != "written after use":
        leaf = x0.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf.clone()), leaf, c[0])
        torch.testing.assert_close(transposed[0], gradient)


def test_gates_of_an_lstm_are_seen_in_single_precision():
    # Where torch would run the layer as one operation.
    model = Uses(lambda t, part: part(t)[0], nn.LSTM(8, 3)).eval()
    li = LinearInterpreter(model)(tokens().float())
    assert li.error < 1e-6
    torch.testing.assert_close(li.output, model(li.x0))
    assert torch.backends.mkldnn.enabled


def test_secants_of_the_paper():
    x0 = torch.tensor([[-1.5, 0.0, 0.5, 2.0]], dtype=torch.float64)
    for unit, mask in (
        (nn.ReLU(), [0.0, 0.0, 1.0, 1.0]),
        (nn.LeakyReLU(0.1), [0.1, 0.1, 1.0, 1.0]),
        (nn.Tanh(), [torch.tanh(torch.tensor(1.5)).item() / 1.5, 1.0, 0.924234, 0.482014]),
    ):
        li = LinearInterpreter(unit.eval())(x0)
        torch.testing.assert_close(
            li.matrix().diagonal(), torch.tensor(mask, dtype=torch.float64), rtol=1e-6, atol=1e-6
        )
        assert li.residual.abs().max() == 0
    li = LinearInterpreter(nn.Sigmoid().eval())(x0)
    torch.testing.assert_close(li.matrix().diagonal()[2:], x0[0, 2:].sigmoid() / x0[0, 2:])
    assert li.residual.tolist() == [[0, 0.5, 0, 0]]  # where the secant has no say, at 0
    assert li.error == 0


def test_normalisation_freezes_its_statistics():
    x0 = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    li = LinearInterpreter(nn.InstanceNorm2d(2).eval())(x0)
    z = torch.randn_like(x0)
    deviation = (x0.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(li.apply(z), z / deviation)
    torch.testing.assert_close(li.residual, (-x0.mean((2, 3), keepdim=True) / deviation).expand_as(x0))


def test_gates_are_frozen():
    class SqueezeExcite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def gate(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.fc(x.mean((2, 3))))[..., None, None]

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(x) * x

    x0 = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    z, model = torch.randn_like(x0), SqueezeExcite().double().eval()
    torch.testing.assert_close(LinearInterpreter(model)(x0).apply(z), model.gate(x0) * z)
    gated = Uses(lambda x: x[:, :1] * F.gelu(x[:, 1:2]))
    torch.testing.assert_close(LinearInterpreter(gated.eval())(x0).apply(z), z[:, :1] * F.gelu(x0[:, 1:2]))
    swapped = Uses(lambda x: F.gelu(x[:, 1:2]) * x[:, :1])
    torch.testing.assert_close(LinearInterpreter(swapped.eval())(x0).apply(z), z[:, :1] * F.gelu(x0[:, 1:2]))


def test_attention_map_is_frozen():
    x0 = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = (torch.randn(8, 8, dtype=torch.float64) for _ in range(3))
    z, attention = torch.randn_like(x0), (x0 @ q @ (x0 @ k).mT / 8**0.5).softmax(-1)
    for model in (
        Uses(lambda x: F.scaled_dot_product_attention(x @ q, x @ k, x @ v)),
        Uses(lambda x: (x @ q @ (x @ k).mT / 8**0.5).softmax(-1) @ (x @ v)),
    ):
        torch.testing.assert_close(LinearInterpreter(model.eval())(x0).apply(z), attention @ z @ v)


def test_operations_without_a_rule_are_named():
    model = nn.Sequential(nn.Linear(3, 3), Uses(lambda x: x.cumprod(1))).eval()
    x0 = torch.rand(1, 3) + 1
    message = r"LinearScope has no rule for aten::cumprod \(in '1'\); register one with register_rule, or use mode='tan"
    with pytest.raises(NotImplementedError, match=message):
        LinearInterpreter(model)(x0)
    jacobian = torch.func.jacrev(model)(x0).reshape(3, 3)
    li = LinearInterpreter(model, "tangent")(x0)
    torch.testing.assert_close(li.matrix(), jacobian)
    assert li.error < 1e-6
    with LinearScope(model, "tangent"), pytest.raises(NotImplementedError, match="has no tangent of aten::cumprod"):
        model(torch.cat([x0, x0]))
    with pytest.raises(NotImplementedError, match="LinearScope has no rule for aten::resize_;"):
        LinearInterpreter(Uses(lambda x: (x * 2).resize_(1, 2)).eval())(x0)
    several = Uses(lambda x: torch._foreach_add_([x * 2], 1.0) or x).eval()
    with pytest.raises(NotImplementedError, match=r"LinearScope cannot follow what aten::_foreach_add_\.Scalar"):
        LinearInterpreter(several)(x0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Softmax(1), "the output comes from aten::_softmax, which is not interpreted: analyse what goes into it"),
        (Uses(lambda x: x.softmax(1) * 2 + 1), "the output comes from aten::_softmax"),
        (Uses(lambda x: x.round() * 2), "the output comes from aten::round"),
        (Uses(lambda x: x.argmax(1).to(x.dtype)), "the output comes from aten::argmax"),
        (Uses(lambda x: torch.ones(1)), "the output does not depend on x0"),
        (Uses(lambda x: {"y": x}), r"the output must be a tensor, got dict: choose one with output=lambda result"),
    ],
)
def test_outputs_that_cannot_be_interpreted(model: nn.Module, message: str):
    with pytest.raises(Unsupported, match=message):
        LinearInterpreter(model.eval())(torch.randn(1, 3))


# -- rules of one's own


@pytest.fixture(autouse=True)
def _no_rules_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in list(REGISTERED):
        monkeypatch.delitem(REGISTERED, key)
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


class Halving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumprod(1) / 2 + 1


class Quartering(Halving):
    pass


def test_rule_of_a_module_type():
    @register_rule(Halving)
    def halving(call: Call) -> Callable[[Tensor], Tensor]:
        (h,) = call.args
        scale = h.detach() + 1
        return lambda z: z * scale

    model = nn.Sequential(nn.Linear(3, 3), Quartering(), nn.ReLU()).double().eval()
    x0 = torch.randn(2, 3, dtype=torch.float64)
    for mode in ("mask", "tangent"):
        li = LinearInterpreter(model, mode)(x0)
        h, z = model[0](x0), torch.randn_like(x0)
        expected = (z @ model[0].weight.T) * (h + 1) * (model[1](h) > 0)
        torch.testing.assert_close(li.apply(z), expected)
        assert li.error < 1e-12
    with LinearScope(model):
        first, second = model(torch.cat([x0, z])).chunk(2)
    assert torch.equal(first, model(x0))
    torch.testing.assert_close(second, expected)
    assert "forward" not in model[1].__dict__
    assert halving is REGISTERED[Halving]


def test_rules_of_functions_and_operations():
    x0 = torch.rand(1, 3, dtype=torch.float64) + 1
    register_rule(F.softmin, lambda call: lambda z: 2 * z)
    li = LinearInterpreter(Uses(lambda x: F.softmin(x, dim=1)).eval())(x0)
    assert torch.equal(li.matrix(), 2 * torch.eye(3, dtype=torch.float64))
    assert li.error < 1e-15
    register_rule(torch.ops.aten.cumprod, lambda call: lambda z: 3 * z)
    model = Uses(lambda x: x.clone().cumprod_(1)).eval()
    assert torch.equal(LinearInterpreter(model)(x0).matrix(), 3 * torch.eye(3, dtype=torch.float64))
    register_rule(torch.ops.aten.relu.default, lambda call: None)
    with pytest.raises(Unsupported, match="the output comes from aten::relu"):
        LinearInterpreter(nn.ReLU().eval())(x0)
    register_rule(torch.ops.aten.tanh, lambda call: Frozen(lambda z: z, bias=7.0))
    assert LinearInterpreter(nn.Tanh().eval())(x0).residual.tolist() == [[7.0] * 3]


def test_rule_of_a_module_with_several_outputs():
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.cumprod(1), x.sum(1, keepdim=True)

    register_rule(Two, lambda call: lambda z: (z, z.sum(1, keepdim=True)))
    model = Uses(lambda x, two: two(x)[0] * 2 + two(x)[1], Two()).eval()
    li = LinearInterpreter(model)(torch.rand(1, 3, dtype=torch.float64))
    torch.testing.assert_close(li.matrix(), 2 * torch.eye(3, dtype=torch.float64) + 1)
    assert li.error < 1e-14


def test_bad_rules():
    x0 = torch.rand(1, 3)
    for target in (3, nn.ReLU(), Tensor, "relu"):
        with pytest.raises(TypeError, match="target must be a module type, a function or an operation, got"):
            register_rule(target, lambda call: None)
    register_rule(nn.ReLU, lambda call: 3)
    with pytest.raises(TypeError, match="the rule of ReLU must return a function, a Frozen or None, got 3"):
        LinearInterpreter(nn.ReLU().eval())(x0)
    register_rule(nn.ReLU6, lambda call: lambda z: z)
    with pytest.raises(Unsupported, match="ReLU6 changes its input in place, so it cannot have a rule"):
        LinearInterpreter(nn.ReLU6(inplace=True).eval())(torch.full((1, 3), 9.0))


def test_a_failing_model_is_left_as_it_was():
    register_rule(Halving, lambda call: lambda z: z)
    model = nn.Sequential(Halving(), Uses(lambda x: x.cumprod(1))).eval()
    before = copy.copy(model[0].__dict__)
    with pytest.raises(NotImplementedError):
        LinearInterpreter(model)(torch.rand(1, 3))
    assert model[0].__dict__.keys() == before.keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
