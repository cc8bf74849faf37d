"""Fused blocks beyond what the battery tests: tiles, memory, choice of the backend, the kernel for GPUs, bad input."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convatlas.cost import cost
from convatlas.errors import Unsupported
from convatlas.ops.backend import chosen
from convatlas.ops.block_fusion import fused_convfirst, fused_mbconv
from convatlas.training.measure import peak_bytes

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [part for shape in shapes for part in (random(*shape) / shape[1] ** 0.5, random(shape[0]))]


def convfirst(channels: int, hidden: int, out: int, width: int, kernel_size: int = 3) -> list[Tensor]:
    return weights((channels, width, kernel_size, kernel_size), (hidden, channels, 1, 1), (out, hidden, 1, 1))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("tile", [(1, 1), (2, 5), (4, 3), (64, 64)])
def test_tiles_of_any_size_give_the_same(tile: tuple[int, int], stride: int):
    x = random(2, 6, 9, 7)
    first = (x, *convfirst(6, 70, 6, 2, 5), stride, 3)
    second = (x, *weights((12, 6, 1, 1), (12, 4, 5, 5), (6, 12, 1, 1)), stride, 3)
    for operator, arguments in ((fused_convfirst, first), (fused_mbconv, second)):
        expected = operator(*arguments, backend="naive")  # type: ignore[operator]
        result = operator(*arguments, tile)  # type: ignore[operator]
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


def test_the_result_lies_in_memory_as_the_input():
    arguments = convfirst(8, 16, 8, 8)
    for x in (random(2, 8, 5, 4), random(2, 8, 5, 4).contiguous(memory_format=torch.channels_last)):
        for backend in ("naive", "tiles", "chunks"):
            y = fused_convfirst(x, *arguments, backend=backend)
            assert y.stride() == x.stride(), backend


def test_expanded_features_are_never_whole():
    x = torch.randn(1, 16, 64, 64)
    arguments = [tensor.float() for tensor in convfirst(16, 256, 16, 8)]
    peaks = {}
    for backend in ("naive", "chunks"):
        with torch.inference_mode():
            peaks[backend] = peak_bytes(lambda backend=backend: fused_convfirst(x, *arguments, 1, 2, backend=backend))
    whole = 4 * 256 * 64 * 64
    assert peaks["naive"] >= 2 * whole
    assert peaks["chunks"] < whole


def test_auto_goes_by_size_and_use():
    def choice(x: Tensor, hidden: int, **tensors: Any) -> str:
        return chosen(
            "fused_convfirst",
            x,
            *(torch.empty(0),) * 2,
            torch.empty(hidden, 8, 1, 1),
            *(torch.empty(0),) * 3,
            1,
            1,
            None,
        )

    large = torch.empty(1, 8, 128, 128)
    assert choice(large, 256) == "chunks"
    assert choice(large, 1024) == "chunks"
    assert choice(large[..., :8], 256) == "naive"
    assert choice(torch.empty(1, 256, 40, 40), 1024) == "naive"
    assert choice(large.double(), 256) == "naive"
    assert choice(large.clone().requires_grad_(), 256) == "naive"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choice(large, 256) == "naive"


def test_export_serves_every_batch():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(convfirst(8, 16, 8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return fused_convfirst(x, *self.weights, 1, 2)

    block = Block()
    program = torch.export.export(block, (random(2, 8, 5, 4),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    other = random(3, 8, 5, 4)
    torch.testing.assert_close(program.module()(other), block(other))


@interpreted
@pytest.mark.parametrize(
    ("channels", "out", "hidden", "width", "kernel_size", "stride", "dtype", "tolerance"),
    [
        (24, 20, 70, 8, 3, 2, torch.float32, 1e-5),
        (16, 16, 64, 16, 1, 1, torch.float64, 1e-12),
        (12, 12, 20, 1, 5, 1, torch.bfloat16, 2e-2),
        (16, 16, 40, 8, 3, 1, torch.float16, 2e-2),
    ],
)
def test_the_kernel_in_the_interpreter(
    channels: int,
    out: int,
    hidden: int,
    width: int,
    kernel_size: int,
    stride: int,
    dtype: torch.dtype,
    tolerance: float,
):
    x, arguments = random(2, channels, 5, 3), convfirst(channels, hidden, out, width, kernel_size)
    tensors = [tensor.to(dtype) for tensor in (x, *arguments)]
    y = fused_convfirst(*tensors, stride, channels // width, backend="triton")
    exact = fused_convfirst(*(tensor.double() for tensor in tensors), stride, channels // width, backend="naive")
    assert y.dtype == dtype
    assert (y - exact).norm() < tolerance * exact.norm()


@interpreted
def test_the_kernel_keeps_the_rules_of_torch_library():
    from convatlas.ops.kernels.block_fusion import convfirst_block

    tensors = [tensor.requires_grad_() for tensor in (random(1, 4, 3, 3), *convfirst(4, 6, 4, 2, 1))]
    torch.library.opcheck(convfirst_block, (*tensors, 1, 2, True))
    empty = convfirst_block(random(0, 4, 3, 3), *tensors[1:], 1, 2, True)
    assert empty.shape == (0, 4, 3, 3)


@interpreted
def test_the_kernel_is_counted():
    from convatlas.ops.kernels.block_fusion import convfirst_block

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            arguments = [tensor.to("meta") for tensor in convfirst(16, 32, 24, 8)]
            return convfirst_block(x, *arguments, 2, 2, False)

    counted = cost(Block(), torch.empty(3, 16, 7, 5, dtype=torch.float64, device="meta")).total.macs
    assert counted == 3 * 4 * 3 * (16 * 8 * 9 + 16 * 32 + 32 * 24)


def test_empty_batches():
    x = random(0, 8, 5, 4)
    for backend in ("auto", "naive", "tiles", "chunks"):
        assert fused_convfirst(x, *convfirst(8, 16, 6, 8), 2, backend=backend).shape == (0, 6, 3, 2)


def test_wrong_arguments_are_named():
    x = random(1, 8, 5, 4)
    wg, bg, w2, b2, w3, b3 = convfirst(8, 16, 8, 4)
    for change, message in (
        ({"x": x[0]}, r"x must be \(B, C, H, W\), got 3 dimensions"),
        ({"x": x.long()}, "x must be float16, bfloat16, float32 or float64, got torch.int64"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"tile": (0, 2)}, r"tile must be a height and a width of at least 1, got \(0, 2\)"),
        ({"bg": None}, "wg and bg must be given both or none"),
        ({"wg": None, "bg": None, "stride": 2}, "stride must be 1 where there is no spatial convolution, got 2"),
        ({"groups": 3}, "groups must divide the 8 channels and the 8 kernels, got 3"),
        ({"groups": 1}, r"wg must be \(M, 8, R, R\), got \(8, 4, 3, 3\)"),
        ({"wg": wg[..., :2, :2]}, "kernel size of wg must be odd, got 2"),
        ({"bg": bg[:4]}, r"bg must be \(8,\), got \(4,\)"),
        ({"wg": wg[:4], "bg": bg[:4]}, r"wg must keep the 8 channels of x, got \(4, 4, 3, 3\)"),
        ({"w2": w2[:, :4]}, r"w2 must be \(M, 8, 1, 1\), got \(16, 4, 1, 1\)"),
        ({"b3": b3[:4]}, r"b3 must be \(8,\), got \(4,\)"),
    ):
        given = {"x": x, "wg": wg, "bg": bg, "w2": w2, "b2": b2, "w3": w3, "b3": b3, "groups": 2, **change}
        with pytest.raises(ValueError, match=message):
            fused_convfirst(**given)
    w1, b1, wg, bg, w3, b3 = weights((12, 8, 1, 1), (12, 4, 3, 3), (8, 12, 1, 1))
    with pytest.raises(ValueError, match="w1 and b1 must be given both or none"):
        fused_mbconv(x, w1, None, wg, bg, w3, b3, 1, 3)
    with pytest.raises(ValueError, match=r"wg must keep the 12 expanded channels, got \(6, 4, 3, 3\)"):
        fused_mbconv(x, w1, b1, wg[:6], bg[:6], w3[:, :6], b3, 1, 3)


@interpreted
def test_triton_says_what_it_cannot_serve(monkeypatch: pytest.MonkeyPatch):
    arguments = convfirst(264, 4, 8, 8)
    with pytest.raises(Unsupported, match="it takes up to 256 channels, got 264"):
        fused_convfirst(random(1, 264, 1, 1), *arguments, 1, 33, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(Unsupported, match="x must be on a CUDA device"):
        fused_convfirst(random(1, 8, 2, 2), *convfirst(8, 4, 8, 8), backend="triton")
