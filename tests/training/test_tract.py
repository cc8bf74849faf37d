"""The gradient of a TrAct weight is on purpose not the derivative of the loss: it is held against its formula."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import convatlas
from convatlas.errors import UnknownName, Unsupported
from convatlas.networks.registry import create_model
from convatlas.training import tract as module
from convatlas.training.tract import (
    TrAct,
    TrActConv2d,
    TrActConv3d,
    TrActLinear,
    apply_tract,
    tract,
    tract_weight_grad,
    without_tract,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def formula(a: Tensor, g: Tensor, lam: float) -> Tensor:
    """The definition, by a general inverse in float64."""
    a, g = a.double(), g.double()
    return g.T @ a @ torch.linalg.inv(a.T @ a / len(a) + lam * torch.eye(a.shape[1], dtype=torch.float64))


def conv_formula(conv: nn.Module, x: Tensor, cotangent: Tensor, lam: float) -> Tensor:
    """The same for a convolution: patch k of the input is what makes outputs when the kernel is the k-th unit."""
    taps = conv.weight[0].numel()
    groups = []
    for x_part, g_part in zip(x.chunk(conv.groups, 1), cotangent.chunk(conv.groups, 1), strict=True):
        kernels = torch.eye(taps, dtype=x.dtype).reshape(taps, *conv.weight.shape[1:])
        single = type(conv)(
            x_part.shape[1],
            taps,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            1,
            False,
            conv.padding_mode,
            dtype=x.dtype,
        )
        single.weight.data.copy_(kernels)
        a = single(x_part).detach().movedim(1, -1).reshape(-1, taps)
        groups.append(formula(a, g_part.movedim(1, -1).reshape(len(a), -1), lam))
    return torch.cat(groups).reshape(conv.weight.shape)


def backward(layer: nn.Module, x: Tensor, cotangent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    (y * cotangent).sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return y.detach(), {"input": x.grad, **grads}


# The function


@pytest.mark.parametrize("solver", ["cholesky", "inverse", "eigh"])
@pytest.mark.parametrize(("rows", "features"), [(20, 7), (6, 7), (7, 7), (8, 7), (1, 12)])
def test_weight_grad_is_the_formula(solver: str, rows: int, features: int):
    a, g = torch.randn(rows, features, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)
    torch.testing.assert_close(tract_weight_grad(a, g, 0.2, solver=solver), formula(a, g, 0.2), **EXACT)


def test_large_lambda_gives_the_ordinary_direction():
    a, g = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    torch.testing.assert_close(1e9 * tract_weight_grad(a, g, 1e9), g.T @ a, rtol=1e-6, atol=1e-6)


def test_whitened_inputs_only_change_the_length():
    q, _ = torch.linalg.qr(torch.randn(30, 4, dtype=torch.float64))
    a, g = q * 30**0.5, torch.randn(30, 2, dtype=torch.float64)
    torch.testing.assert_close(tract_weight_grad(a, g, 0.25), g.T @ a / 1.25, **EXACT)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_change_of_outputs_does_not_depend_on_contrast(factor: float):
    a, g = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    change = a @ tract_weight_grad(a, g, 1e-9).T
    torch.testing.assert_close(factor * a @ tract_weight_grad(factor * a, g, 1e-9).T, change, rtol=1e-5, atol=1e-6)


def test_weight_grad_refuses():
    a, g = torch.randn(5, 3), torch.randn(5, 2)
    with pytest.raises(ValueError, match="lam must be positive, got 0"):
        tract_weight_grad(a, g, 0)
    with pytest.raises(ValueError, match=r"must be \(N, n\) and \(N, m\), got \(5, 3\) and \(4, 2\)"):
        tract_weight_grad(a, g[1:])
    with pytest.raises(UnknownName, match="unknown solver 'choleski': did you mean cholesky"):
        tract_weight_grad(a, g, solver="choleski")  # type: ignore[arg-type]


# The layers

CONVS = {
    "1d": (nn.Conv1d(2, 4, 3, padding=1), (3, 2, 9)),
    "1d_dilated": (nn.Conv1d(2, 4, 3, dilation=2, stride=2), (5, 2, 12)),
    "2d": (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 5, 7)),
    "2d_no_bias": (nn.Conv2d(2, 3, 3, bias=False), (2, 2, 7, 5)),
    "2d_uneven": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 3)), (4, 2, 8, 7)),
    "2d_groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 6)),
    "2d_depthwise": (nn.Conv2d(3, 6, 3, groups=3, stride=2), (2, 3, 9, 9)),
    "2d_few_rows": (nn.Conv2d(3, 5, 4, stride=4), (1, 3, 8, 8)),
    "2d_groups_few_rows": (nn.Conv2d(6, 4, 4, stride=4, groups=2), (2, 6, 9, 8)),
    "2d_reflect": (nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), (2, 2, 5, 7)),
    "2d_circular": (nn.Conv2d(2, 3, 5, padding=2, padding_mode="circular"), (2, 2, 8, 7)),
    "2d_same": (nn.Conv2d(2, 3, (5, 3), padding="same", dilation=(1, 2)), (2, 2, 8, 7)),
    "2d_same_even": (nn.Conv2d(2, 3, 4, padding="same", padding_mode="reflect"), (2, 2, 8, 7)),
    "2d_valid": (nn.Conv2d(2, 3, 2, padding="valid"), (2, 2, 5, 7)),
    "3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (2, 2, 3, 4, 5)),
    "3d_replicate": (nn.Conv3d(1, 3, (2, 1, 3), padding=(1, 0, 1), padding_mode="replicate"), (2, 1, 3, 4, 5)),
}


@pytest.mark.parametrize("piece", [1, 200, 1 << 20], ids=["sample", "some", "whole"])
@pytest.mark.parametrize("name", CONVS)
def test_convolution(name: str, piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_PIECE", piece)
    plain, shape = CONVS[name][0].double(), CONVS[name][1]
    layer = tract(plain, 0.2)
    x = torch.randn(shape, dtype=torch.float64)
    cotangent = torch.randn_like(plain(x))
    expected_y, expected = backward(plain, x, cotangent)
    assert layer.weight is plain.weight
    y, found = backward(layer, x, cotangent)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=0)
    torch.testing.assert_close(found["weight"], conv_formula(plain, x, cotangent, 0.2), **EXACT)
    assert not torch.allclose(found["weight"], expected["weight"])
    for key in found.keys() - {"weight"}:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(20, 7), (4, 7), (2, 9, 7), (7,), (2, 3, 2, 7)])
def test_linear(shape: tuple[int, ...]):
    plain = nn.Linear(7, 5, dtype=torch.float64)
    layer = tract(plain, 0.05)
    x, cotangent = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], 5, dtype=torch.float64)
    expected_y, expected = backward(plain, x, cotangent)
    y, found = backward(layer, x, cotangent)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=0)
    torch.testing.assert_close(found["weight"], formula(x.reshape(-1, 7), cotangent.reshape(-1, 5), 0.05), **EXACT)
    torch.testing.assert_close([found["input"], found["bias"]], [expected["input"], expected["bias"]], rtol=0, atol=0)


def test_patch_embedding_as_linear_and_as_convolution():
    conv = TrActConv2d(3, 5, 4, stride=4, dtype=torch.float64)
    linear = TrActLinear(48, 5, dtype=torch.float64)
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(3, 16, 48)
    cotangent = torch.randn(3, 16, 5, dtype=torch.float64)
    _, by_linear = backward(linear, patches, cotangent)
    _, by_conv = backward(conv, x, cotangent.mT.reshape(3, 5, 4, 4))
    torch.testing.assert_close(by_conv["weight"].flatten(1), by_linear["weight"], **EXACT)


def test_unbatched_and_transposed_inputs():
    layer = TrActConv2d(2, 3, 3, dtype=torch.float64)
    x, cotangent = torch.randn(2, 8, 7, dtype=torch.float64), torch.randn(3, 6, 5, dtype=torch.float64)
    _, expected = backward(layer, x[None], cotangent[None])
    _, found = backward(layer, x, cotangent)
    torch.testing.assert_close(found["weight"], expected["weight"], **EXACT)
    x_last = x[None].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(backward(layer, x_last, cotangent[None])[1]["weight"], expected["weight"], **EXACT)


def test_empty_batch_gives_zeros():
    for layer, shape in [(TrActLinear(3, 2), (0, 3)), (TrActConv2d(1, 2, 3), (0, 1, 5, 5))]:
        layer(torch.empty(shape)).sum().backward()
        assert layer.weight.grad.eq(0).all()


def test_layer_called_twice_adds_one_gradient_a_call():
    layer = TrActLinear(3, 2, dtype=torch.float64)
    x, z = torch.randn(2, 9, 3, dtype=torch.float64)
    g = torch.randn(9, 2, dtype=torch.float64)
    ((layer(x) + layer(z)) * g).sum().backward()
    torch.testing.assert_close(layer.weight.grad, formula(x, g, 0.1) + formula(z, g, 0.1), **EXACT)


def test_frozen_weight_gets_none_and_the_input_its_own():
    layer = TrActLinear(3, 2)
    layer.weight.requires_grad_(False)
    _, found = backward(layer, torch.randn(5, 3), torch.randn(5, 2))
    assert found["weight"] is None
    assert found["input"] is not None


def test_double_backward_is_refused():
    layer = TrActLinear(3, 2)
    (gradient,) = torch.autograd.grad(layer(torch.randn(5, 3)).square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inverts_in_float32(dtype: torch.dtype):
    layer, x, cotangent = TrActConv2d(2, 3, 3), torch.randn(4, 2, 9, 9), torch.randn(4, 3, 7, 7)
    _, expected = backward(layer, x, cotangent)
    with torch.autocast("cpu", dtype=dtype):
        y, found = backward(layer, x, cotangent)  # the backward pass too is within autocast
        assert y.dtype == dtype
    assert found["weight"].dtype == torch.float32
    assert (found["weight"] - expected["weight"]).norm() < 0.01 * expected["weight"].norm()
    _, found = backward(layer.to(dtype), x.to(dtype), cotangent.to(dtype))
    assert found["weight"].dtype == dtype
    assert (found["weight"].float() - expected["weight"]).norm() < 0.02 * expected["weight"].norm()


def test_gradient_checkpointing():
    layer, x, cotangent = TrActConv2d(2, 3, 3), torch.randn(4, 2, 9, 9), torch.randn(4, 3, 7, 7)
    _, expected = backward(layer, x, cotangent)
    layer.zero_grad()
    (checkpoint(layer, x, use_reentrant=False) * cotangent).sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected["weight"])


def test_compiled():
    layer, x, cotangent = TrActConv2d(2, 3, 3), torch.randn(4, 2, 9, 9), torch.randn(4, 3, 7, 7)
    _, expected = backward(layer, x, cotangent)
    _, found = backward(torch.compile(layer, backend="aot_eager", fullgraph=True), x, cotangent)
    torch.testing.assert_close(found["_orig_mod.weight"], expected["weight"])


def test_exported_layer_is_the_plain_one():
    layer, x = TrActConv2d(2, 3, 3).eval(), torch.randn(1, 2, 9, 9)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_large_inputs_are_warned_of_once():
    layer, x = TrActConv2d(3, 2, 3), 100 * torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"up to .*e\+06 times lam: standardise the input"):
        layer(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x).sum().backward()
        TrActConv2d(3, 2, 3)(x / 100).sum().backward()
        TrActConv2d(3, 2, 3, dtype=torch.float64)(x.double()).sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lam": 0.0}, ValueError, "lam must be positive, got 0.0"),
        ({"lam": float("nan")}, ValueError, "lam must be positive, got nan"),
        ({"solver": "qr"}, UnknownName, "unknown solver 'qr': known: cholesky, eigh, inverse"),
        ({"distributed": "global"}, UnknownName, "unknown distributed 'global': did you mean local"),
        ({"dtype": torch.complex64}, Unsupported, "real weights, got torch.complex64"),
    ],
)
def test_layers_refuse(options: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        TrActLinear(3, 2, **options)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        TrActConv3d(3, 2, 1, **options)  # type: ignore[arg-type]


# On a network


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_tract_keeps_parameters_geometry_and_mode(kind: type[nn.Module]):
    plain = kind(4, 6, 3, stride=2, padding=1, groups=2, bias=False, padding_mode="circular").eval()  # type: ignore[call-arg]
    plain.weight.requires_grad_(False)
    layer = tract(plain, 0.3)
    assert layer.weight is plain.weight
    assert not layer.weight.requires_grad
    assert isinstance(layer, kind)
    assert not layer.training
    assert list(layer.state_dict()) == ["weight"]
    assert repr(layer) == f"TrAct{repr(plain)[:-1]}, lam=0.3)"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LayerNorm(3), r"TrAct needs torch.nn.Linear, .* got torch.nn.modules.normalization.LayerNorm"),
        (nn.ConvTranspose2d(3, 2, 1), "got .*ConvTranspose2d"),
        (nn.LazyLinear(3), "got .*LazyLinear"),
        (TrActLinear(3, 2), "got convatlas.training.tract.TrActLinear"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "got .*ParametrizedLinear"),
        (prune.random_unstructured(nn.Linear(3, 2), "weight", 1), "Linear has hooks"),
    ],
)
def test_tract_refuses(layer: nn.Module, message: str):
    with pytest.raises(Unsupported, match=message):
        tract(layer)


class Reversed(nn.Module):
    """Registers its head before its first layer, which it calls under a second name as well."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 4))
        self.alias = self.body[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def names(model: nn.Module) -> list[str]:
    layers = model.named_modules(remove_duplicate=False)
    return [name for name, layer in layers if type(layer).__name__.startswith("TrAct")]


def test_first_layer_is_the_first_registered_or_the_first_called():
    assert names(apply_tract(Reversed())) == ["head"]
    model = Reversed()
    assert apply_tract(model, example_input=torch.randn(1, 2, 3)) is model
    assert names(model) == ["body.2", "alias"]
    assert model.training
    assert model.body[2] is model.alias
    assert names(apply_tract(Reversed(), "alias", example_input=torch.randn(1, 2, 3))) == ["body.2", "alias"]


def test_every_stem_is_a_first_layer():
    class TwoStems(nn.Module):
        stem_modules = ("small", "large")

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.small, self.large = nn.Conv2d(3, 4, 2), nn.Conv2d(3, 4, 4)

    assert names(apply_tract(TwoStems())) == ["small", "large"]


def test_layer_alone_is_replaced():
    layer = nn.Linear(3, 2)
    assert apply_tract(layer).weight is layer.weight


def test_networks_of_the_library():
    for name, first in [("resnet18", "conv1"), ("inceptionnext_atto", "stem.0"), ("convnext_tiny", None)]:
        with torch.device("meta"):
            model = create_model(name)
        keys, example = list(model.state_dict()), torch.empty(1, 3, 64, 64, device="meta")
        apply_tract(model, example_input=example)
        (found,) = names(model)
        assert found == first or first is None
        with torch.device("meta"):
            assert names(TrAct().prepare(create_model(name))) == [found]
        assert list(model.state_dict()) == keys
        assert model(example).shape == (1, 1000)


def test_apply_refuses():
    with pytest.raises(UnknownName, match="unknown layer 'haed': did you mean head"):
        apply_tract(Reversed(), "haed")
    with pytest.raises(Unsupported, match="Sequential has no linear or convolutional layer"):
        apply_tract(nn.Sequential(nn.ReLU()))
    with pytest.raises(Unsupported, match=r"got .*ConvTranspose1d"):
        apply_tract(nn.Sequential(nn.ConvTranspose1d(2, 2, 1), nn.Linear(2, 2)))


def test_switched_off_it_is_the_plain_layer():
    model = nn.Sequential(TrActLinear(3, 2), TrActLinear(2, 2))
    plain = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    plain.load_state_dict(model.state_dict())
    x, cotangent = torch.randn(9, 3), torch.randn(9, 2)
    model[1].enabled = False
    with without_tract(model):
        _, found = backward(model, x, cotangent)
    torch.testing.assert_close(found, backward(plain, x, cotangent)[1], rtol=0, atol=0)
    assert [layer.enabled for layer in model] == [True, False]
    assert not torch.allclose(backward(model, x, cotangent)[1]["0.weight"], found["0.weight"])


def test_method_trains_dark_images_as_fast_as_bright_ones():
    torch.manual_seed(0)
    x = torch.randn(64, 6, dtype=torch.float64)
    target = torch.randn(64, 1, dtype=torch.float64)

    def outputs(factor: float, method: TrAct | None) -> Tensor:
        model: nn.Module = nn.Sequential(nn.Linear(6, 1, bias=False)).double()
        nn.init.zeros_(model[0].weight)
        model = method.prepare(model) if method else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(model(factor * x), target).backward()
            optimizer.step()
        return model(factor * x).detach()

    method = TrAct(lam=1e-6, layer="0")
    torch.testing.assert_close(outputs(0.05, method), outputs(1.0, method), rtol=1e-3, atol=1e-4)
    assert outputs(0.05, None).norm() < 0.01 * outputs(1.0, None).norm()


TWO_PROCESSES = """
import sys
import torch, torch.distributed as dist
from convatlas.training.tract import TrActConv2d

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
torch.manual_seed(0)
x, cotangent = torch.randn(5, 2, 6, 6).double(), torch.randn(5, 3, 4, 4).double()
layer = TrActConv2d(2, 3, 3, dtype=torch.float64, distributed="allreduce")
(layer(x) * cotangent).sum().backward()  # the whole batch in both, which does not change the second moment
whole, layer.weight.grad = layer.weight.grad, None
mine = slice(0, 2) if rank == 0 else slice(2, 5)

def summed():
    layer.weight.grad = None
    (layer(x[mine]) * cotangent[mine]).sum().backward()
    dist.all_reduce(layer.weight.grad)
    return layer.weight.grad

torch.testing.assert_close(summed(), whole, rtol=1e-10, atol=1e-12)
layer.distributed = "local"
assert not torch.allclose(summed(), whole)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_second_moment_over_two_processes(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(convatlas.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TWO_PROCESSES]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in processes:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint
