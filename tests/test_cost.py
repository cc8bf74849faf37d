from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convatlas.cost import Cost, cost, trace
from convatlas.errors import Unsupported
from convatlas.networks.registry import create_model


class Call(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def of(function: Any, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Cost:
    return cost(Call(function), *(torch.empty(shape, dtype=dtype) for shape in shapes))


# Multiply-adds


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
        (nn.Linear(5, 7, bias=False), (2, 3, 5), 2 * 3 * 5 * 7),
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9), 2 * 9 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, (3, 2), stride=2, dilation=2), (2, 4, 9, 8), 2 * (3 * 3) * 6 * 4 * (3 * 2)),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5), (3 * 3) * 6 * 2 * 9),
        (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (1, 4, 5, 6), 30 * 8 * 9),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 27 * 3 * 2 * 8),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 9), 2 * 9 * 4 * 6 * 3),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=3, padding=1), (1, 4, 5, 6), 30 * 4 * 3 * 9),
        (nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3), 27 * 2 * 3 * 8),
        (nn.LSTM(3, 5, 2), (7, 2, 3), 7 * 2 * 4 * 5 * ((3 + 5) + (5 + 5))),
        (nn.GRU(3, 5, batch_first=True, bidirectional=True), (2, 7, 3), 2 * 7 * 2 * 3 * 5 * (3 + 5)),
        (nn.RNN(3, 5), (7, 2, 3), 7 * 2 * 5 * (3 + 5)),
        (nn.Embedding(9, 4), (3,), 0),
        (nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2)), (1, 2, 4, 4), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers(module: nn.Module, shape: tuple[int, ...], macs: int):
    dtype = torch.int64 if isinstance(module, nn.Embedding) else torch.float32
    counted = cost(module, torch.zeros(shape, dtype=dtype)).total
    assert counted.macs == macs
    assert counted.flops == 2 * macs
    assert counted.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert counted.norm_macs == counted.mean_macs == 0


@pytest.mark.parametrize(
    ("function", "shapes", "macs"),
    [
        (torch.matmul, [(3, 4), (4, 5)], 60),
        (torch.matmul, [(2, 3, 4), (4, 5)], 120),
        (torch.matmul, [(6, 2, 3, 4), (2, 4, 5)], 6 * 120),
        (torch.matmul, [(3, 4), (4,)], 12),
        (torch.matmul, [(4,), (4,)], 4),
        (torch.bmm, [(2, 3, 4), (2, 4, 5)], 120),
        (torch.addmm, [(5,), (3, 4), (4, 5)], 60),
        (lambda y, a, b: y.baddbmm_(a, b), [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 120),
        (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], 120),
        (torch.addmv, [(3,), (3, 4), (4,)], 12),
        (lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), [(2, 3, 4, 5), (2, 3, 6, 5)], 6 * 4 * 6 * 5),
        (lambda a, b: torch.einsum("bi,bj->bij", a, b), [(2, 3), (2, 4)], 0),
        (lambda a: torch.tensordot(a, a, 2), [(3, 4)], 12),
        (F.bilinear, [(2, 3), (2, 4), (5, 3, 4)], 2 * 5 * 3 * 4),
        (torch.cdist, [(3, 4), (5, 4)], 60),
        (lambda x, w: F.conv2d(x, w), [(1, 2, 5, 5), (3, 2, 3, 3)], 9 * 3 * 2 * 9),
        (lambda x: x * x + x.exp().softmax(-1), [(3, 4)], 0),
    ],
)
def test_functions(function: Any, shapes: list[tuple[int, ...]], macs: int):
    assert of(function, *shapes).total.macs == macs
    with torch.inference_mode():
        assert of(function, *shapes).total.macs == macs


def test_inference_mode_within_the_model():
    assert of(torch.inference_mode()(F.linear), (2, 3, 4), (5, 4)).total.macs == 120


def test_complex_products_take_several_real_ones():
    assert of(torch.matmul, (3, 4), (4, 5), dtype=torch.complex64).total.macs == 240
    assert of(F.conv1d, (1, 2, 5), (3, 2, 3), dtype=torch.complex64).total.macs == 3 * 3 * 3 * 2 * 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention(device: str, masked: bool):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(5, 6, dtype=torch.bool, device=q.device) if masked else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked)

    inputs = [torch.empty(2, 3, length, 8, device=device) for length in (5, 6, 6)]
    counted = cost(Call(attend), *inputs)
    assert counted.total.macs == 2 * 3 * 5 * 6 * (8 + 8)
    if not masked:
        assert counted.total.activations == 2 * 3 * 5 * 8  # the scores are not written
        assert counted.total.bytes_read == 4 * sum(x.numel() for x in inputs)


def test_attention_layers():
    attention = 3 * 4 * 8 * 8 * 5 + 2 * 3 * 5 * 5 * 8
    inputs = (torch.empty(3, 5, 8),) * 3
    assert cost(nn.MultiheadAttention(8, 2, batch_first=True), *inputs).total.macs == attention
    assert cost(nn.MultiheadAttention(8, 2, batch_first=True), *inputs, need_weights=False).total.macs == attention
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert cost(layer, inputs[0]).total.macs == attention + 2 * 3 * 5 * 8 * 16
    assert cost(layer, inputs[0]).total.norm_macs == 2 * 2 * 3 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize(
    ("function", "shape", "dtype", "points", "factor"),
    [
        (torch.fft.fft, (3, 16), torch.complex64, 16, 2.5),
        (torch.fft.ifft2, (3, 8, 16), torch.complex128, 128, 2.5),
        (torch.fft.rfft, (3, 16), torch.float32, 16, 1.25),
        (torch.fft.rfftn, (3, 4, 8), torch.float32, 96, 1.25),
        (torch.fft.irfft, (3, 9), torch.complex64, 16, 1.25),
        (torch.fft.irfft2, (3, 8, 9), torch.complex64, 128, 1.25),
        (torch.fft.rfft, (3, 15), torch.float64, 15, 1.25),
        (torch.fft.fft, (3, 1), torch.complex64, 1, 2.5),
    ],
)
def test_fourier(function: Any, shape: tuple[int, ...], dtype: torch.dtype, points: int, factor: float):
    transforms = 1 if function is torch.fft.rfftn else 3
    assert of(function, shape, dtype=dtype).total.macs == round(factor * transforms * points * math.log2(points))


def test_norms_and_means_stand_apart():
    for norm in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm([5, 6]), nn.InstanceNorm2d(4)):
        counted = cost(norm, torch.empty(2, 4, 5, 6)).total
        assert (counted.macs, counted.norm_macs, counted.mean_macs) == (0, 2 * 240, 0), norm
    for mean in (nn.AvgPool2d(3), nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d(1), Call(lambda x: x.mean((2, 3)))):
        counted = cost(mean, torch.empty(2, 4, 6, 6)).total
        assert (counted.macs, counted.norm_macs, counted.mean_macs) == (0, 0, 288), mean


def test_gradients_within_a_forward_pass():
    def energy_gradient(x: Tensor, w: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            return torch.autograd.grad(F.conv2d(x, w).sum(), x)[0]

    forward = 9 * 3 * 2 * 9
    assert of(energy_gradient, (1, 2, 5, 5), (3, 2, 3, 3)).total.macs == 2 * forward


def test_operators_bring_their_own_formula():
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    @torch.library.custom_op("convatlas_test::triple_product", mutates_args=())
    def triple_product(x: Tensor) -> Tensor:
        return x @ x @ x

    triple_product.register_fake(lambda x: torch.empty_like(x))
    operator = torch.ops.convatlas_test.triple_product
    assert of(operator, (4, 4)).total.macs == 0
    register_flop_formula(operator)(lambda shape, *args, out_shape=None, **kwargs: 2 * 2 * shape[0] ** 3)
    try:
        counted = of(operator, (4, 4))
    finally:
        del flop_registry[operator]
    assert counted.total.macs == 2 * 4**3
    assert counted.operations == {"triple_product": 2 * 4**3}


# Activations and bytes


def test_elements_and_bytes():
    counted = of(lambda x: (x.relu() + 1).transpose(0, 1).reshape(-1), (3, 4)).total
    assert counted.activations == 3 * 12  # relu, sum and the copy that the reshape of a transposed tensor makes
    assert counted.bytes_read == counted.bytes_written == 4 * 36
    assert counted.bytes == 8 * 36


@pytest.mark.parametrize("view", [lambda x: x.view(-1), lambda x: x[1:].mT, lambda x: x.unsqueeze(0).expand(5, 3, 4)])
def test_views_are_free(view: Any):
    counted = of(view, (3, 4)).total
    assert (counted.activations, counted.bytes) == (0, 0)


def test_operations_in_place_write_and_expanded_tensors_are_read_once():
    counted = of(lambda x: x.relu_(), (3, 4)).total
    assert (counted.activations, counted.bytes_read, counted.bytes_written) == (12, 48, 48)
    counted = of(lambda x: x.expand(5, 4) + 1, (1, 4)).total
    assert (counted.bytes_read, counted.bytes_written) == (16, 80)


def test_bytes_follow_the_dtype():
    layer = nn.Linear(5, 7)
    full, half = (
        cost(layer.to(dtype), torch.empty(3, 5, dtype=dtype)).total for dtype in (torch.float64, torch.bfloat16)
    )
    assert full.bytes_read == 8 * (15 + 35 + 7)
    assert full.bytes == 4 * half.bytes
    assert full.activations == half.activations == 21


# Modules


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.second = nn.Sequential(self.first[0], nn.BatchNorm1d(4))
        self.unused = nn.Linear(4, 9)

    def forward(self, x: Tensor, *, again: bool = False) -> Tensor:
        x = self.second(self.first(x)) @ self.first[0].weight
        return self.first(x) if again else x


def test_rows_count_what_their_calls_took():
    counted = cost(Shared(), torch.empty(3, 4))
    assert [row.name for row in counted.modules] == ["", "first", "first.0", "first.1", "second", "second.1"]
    once = 3 * 4 * 4
    assert counted.total.macs == 3 * once  # two calls of the layer, and a product of the whole itself
    assert (counted["first"].macs, counted["second"].macs) == (once, once)
    assert (counted["first.0"].macs, counted["first.0"].calls) == (2 * once, 2)
    assert counted["second"].norm_macs == counted.total.norm_macs == 24
    assert counted.total.parameters == 20 + 8 + 45
    assert counted["second"].parameters == 28
    assert counted.operations == {"addmm": 2 * once, "mm": once}
    assert cost(Shared(), torch.empty(3, 4), again=True).total.macs == 4 * once
    with pytest.raises(KeyError, match="third"):
        counted["third"]


def test_module_within_itself_is_counted_once():
    class Nested(nn.Linear):
        def forward(self, x: Tensor, depth: int = 2) -> Tensor:  # type: ignore[override]
            return super().forward(x if depth == 1 else self(x, depth - 1))

    counted = cost(Nested(4, 4), torch.empty(3, 4)).total
    assert (counted.macs, counted.calls) == (2 * 48, 2)


def test_model_is_left_as_it_was():
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.constant = torch.ones(4)
            self.cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.cache = x * self.constant
            return self.norm(self.cache)

    model = Caching().train()
    model.norm.eval()
    cost(model, torch.randn(3, 4))
    assert model.cache is None
    assert model.training
    assert not model.norm.training
    assert model.norm.num_batches_tracked == 0
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    model.norm(torch.randn(3, 4))


def test_values_decide_what_is_run():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.layer(x[x[:, 0] > 0])

    model, x = Routed(), torch.tensor([1.0, -1, 2, -2, 3])[:, None].expand(5, 4)
    counted = cost(model, x)
    assert counted.total.macs == 3 * 4 * 2
    assert counted["layer"].calls == 1
    assert model.norm.num_batches_tracked == 0
    with pytest.raises(Unsupported, match=r"of Routed depends on values: .* must not be on the meta device"):
        cost(model.to("meta"), x.to("meta"))


def test_parametrized_and_normalised_weights():
    plain = cost(nn.Linear(4, 6), torch.empty(2, 4)).total.macs
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal):
        assert cost(wrap(nn.Linear(4, 6)), torch.empty(2, 4)).total.macs >= plain


# Published figures: multiply-adds of convolutions, linear layers and norms, in 10^9


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("inceptionnext_atto", 0.505),
        ("inceptionnext_tiny", 4.195),
        ("inceptionnext_small", 8.364),
        ("inceptionnext_base", 14.853),
        ("inceptionnext_base_384", 43.636),
    ],
)
def test_inceptionnext(model: str, published: float):
    total = on_meta(model).total
    assert round((total.macs + total.norm_macs) / 1e9, 3) == published


@pytest.mark.parametrize(
    ("model", "published"), [("eca_resnet18", 1.820), ("eca_resnet50", 4.117), ("eca_mobilenet_v2", 0.315)]
)
def test_eca(model: str, published: float):
    total = on_meta(model).total  # here the means of the attention are among the figures as well
    assert round((total.macs + total.norm_macs + total.mean_macs) / 1e9, 3) == published


def test_resnet18():
    counted = on_meta("resnet18")
    assert counted.total.macs == 1_814_073_344
    assert counted.total.parameters == 11_689_512
    assert counted["conv1"].macs == 112 * 112 * 64 * 3 * 49
    assert counted.operations == {"convolution": 1_813_561_344, "addmm": 512_000}
    assert (
        sum(counted[f"layer{stage}"].macs for stage in range(1, 5))
        == counted.total.macs - counted["conv1"].macs - counted["fc"].macs
    )


def on_meta(name: str) -> Cost:
    size = 384 if name.endswith("384") else 224
    with torch.device("meta"):
        return cost(create_model(name), torch.empty(1, 3, size, size))


def test_table():
    counted = cost(Shared(), torch.empty(3, 4))
    table = counted.table()
    assert table.columns[:6] == ("module", "kind", "calls", "parameters", "MACs", "FLOPs")
    assert table.rows[0][:6] == ("(all)", "Shared", 1, 73, 144, 288)
    assert table.rows[2][:6] == ("first.0", "Linear", 2, 20, 96, 192)
    assert table.rows[0][-2:] == (counted.total.activations, counted.total.bytes)
    assert [row[0] for row in counted.table(depth=1).rows] == ["(all)", "first", "second"]
    assert len(counted.table(depth=0).rows) == 1


def test_a_trace_lists_operations_and_calls_in_order():
    model = nn.Sequential(nn.Conv2d(3, 8, (3, 5), stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 3, 2)).train()
    x = torch.randn(2, 3, 9, 9)
    for timed in (False, True):
        found = trace(model, x, timed=timed)
        products = [operation for operation in found.operations if operation.macs]
        assert [(operation.module, operation.macs) for operation in products] == [
            ("0", 2 * 8 * 12 * 3 * 15),
            ("3", 2 * 96 * 2),
        ]
        assert (products[0].kernel_size, products[0].stride) == ((3, 5), (2, 2))
        assert [(part.elements, part.bytes, part.weight) for part in products[0].read] == [
            (2 * 3 * 81, 8 * 3 * 81, False),
            (8 * 45, 4 * 8 * 45, True),
            (8, 32, True),
        ]
        assert sum(part.weight for part in products[1].read) == 2  # the kernel comes as a view
        assert sum(operation.macs for operation in products) == cost(model, x).total.macs
        calls = {call.name: call for call in found.calls}
        assert [call.name for call in found.calls] == ["0", "1", "2", "3", ""]
        assert (calls[""].first, calls[""].last) == (0, len(found.operations))
        assert [part.elements for part in calls["1"].written] == [2 * 96]
        assert all((operation.seconds or 0) > 0 for operation in found.operations) is timed
    assert model.training
