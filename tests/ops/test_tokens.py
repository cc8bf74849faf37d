"""Maps as tokens and back, windows, attention on given queries, keys and values."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from convatlas.ops.attention import attention_weights, multi_head_attention
from convatlas.ops.tokens import map_to_tokens, prepend_tokens, tokens_to_map
from convatlas.ops.windows import merge_windows, partition_windows


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 4), (1, 1)])
def test_maps_are_read_row_by_row(grid: tuple[int, ...]) -> None:
    x = torch.randn(2, 6, *grid)
    tokens = map_to_tokens(x)
    assert tokens.shape == (2, x[0, 0].numel(), 6)
    assert torch.equal(tokens[1, -1], x[1].flatten(1)[:, -1])
    assert torch.equal(tokens_to_map(tokens, grid), x)


def test_channels_last_needs_no_copy() -> None:
    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=torch.channels_last)
    tokens = map_to_tokens(x)
    assert tokens.is_contiguous()
    back = tokens_to_map(tokens, (3, 4))
    assert tokens.data_ptr() == back.data_ptr() == x.data_ptr()
    assert back.is_contiguous(memory_format=torch.channels_last)


def test_prefix_tokens_stand_in_front_of_every_sample() -> None:
    prefix, tokens = torch.randn(1, 2, 4), torch.randn(3, 5, 4)
    together = prepend_tokens(prefix, tokens)
    assert together.shape == (3, 7, 4)
    assert torch.equal(together[2, :2], prefix[0])
    assert torch.equal(together[:, 2:], tokens)


@pytest.mark.parametrize(("grid", "window"), [((6, 8), (3, 4)), ((5, 7), (3, 3)), ((2, 2), (4, 3)), ((1, 1), (1, 1))])
def test_windows_tile_the_map_and_go_back(grid: tuple[int, int], window: tuple[int, int]) -> None:
    x = torch.randn(2, *grid, 3)
    windows = partition_windows(x, window)
    down, across = -(-grid[0] // window[0]), -(-grid[1] // window[1])
    assert windows.shape == (2 * down * across, window[0] * window[1], 3)
    padded = torch.zeros(2, down * window[0], across * window[1], 3)
    padded[:, : grid[0], : grid[1]] = x
    last = padded[1, -window[0] :, -window[1] :].reshape(-1, 3)
    assert torch.equal(windows[-1], last)
    assert torch.equal(merge_windows(windows, window, grid), x)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("queries", "keys", "heads"), [(5, 7, 2), (1, 9, 1), (4, 1, 3)])
def test_attention_is_its_definition(queries: int, keys: int, heads: int, scale: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, heads * width).double() for n, width in ((queries, 4), (keys, 4), (keys, 5)))
    y = multi_head_attention(q, k, v, heads, scale=scale)
    weights = attention_weights(q, k, heads, scale=scale)
    for head in range(heads):
        part = slice(4 * head, 4 * head + 4)
        scores = q[..., part] @ k[..., part].transpose(1, 2) * (4**-0.5 if scale is None else scale)
        torch.testing.assert_close(weights[:, head], scores.softmax(-1))
        torch.testing.assert_close(
            y[..., 5 * head : 5 * head + 5], scores.softmax(-1) @ v[..., 5 * head : 5 * head + 5]
        )


def test_attention_gradients() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4)]
    assert torch.autograd.gradcheck(lambda q, k, v: multi_head_attention(q, k, v, 2), tensors)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda q, k, v: multi_head_attention(q, k, v, 2), tensors)


def test_attention_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 4), torch.randn(1, 50, 4), torch.ones(1, 50, 4)
    samples = torch.cat([multi_head_attention(q, k, v, 2, dropout=0.5) for _ in range(300)])
    assert samples.std() > 0.01
    assert abs(samples.mean() - 1) < 0.05
