"""Position embeddings on another grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from convatlas.ops.position import resize_position_embedding


def test_prefix_is_kept_and_patches_are_bicubic() -> None:
    embedding = torch.randn(1, 2 + 16, 5)
    resized = resize_position_embedding(embedding, (3, 6), num_prefix_tokens=2)
    maps = embedding[0, 2:].reshape(4, 4, 5).permute(2, 0, 1)[None]
    expected = F.interpolate(maps, size=(3, 6), mode="bicubic", align_corners=False)
    assert resized.shape == (1, 2 + 18, 5)
    assert torch.equal(resized[:, :2], embedding[:, :2])
    torch.testing.assert_close(resized[0, 2:].reshape(3, 6, 5), expected[0].permute(1, 2, 0))


def test_the_same_grid_changes_nothing() -> None:
    embedding = torch.randn(1, 17, 3).half()
    assert torch.equal(resize_position_embedding(embedding, (4, 4), num_prefix_tokens=1), embedding)


def test_constants_are_kept_and_mirrors_stay_mirrors() -> None:
    maps = torch.randn(1, 2, 4, 4)
    mirrored = resize_position_embedding(maps.flip(3), (7, 9))
    torch.testing.assert_close(mirrored.flip(3), resize_position_embedding(maps, (7, 9)))
    constant = torch.full((1, 9, 2), 3.0)
    torch.testing.assert_close(resize_position_embedding(constant, (7, 5)), torch.full((1, 35, 2), 3.0))


def test_maps_of_any_shape() -> None:
    maps = torch.randn(1, 3, 4, 6)
    assert resize_position_embedding(maps, (8, 8)).shape == (1, 3, 8, 8)


def test_bilinear_from_a_grid_that_is_no_square() -> None:
    embedding = torch.randn(1, 1 + 6, 4)
    resized = resize_position_embedding(embedding, (4, 5), num_prefix_tokens=1, source_grid=(2, 3), mode="bilinear")
    maps = embedding[:, 1:].transpose(1, 2).reshape(1, 4, 2, 3)
    expected = F.interpolate(maps, size=(4, 5), mode="bilinear", align_corners=False)
    assert torch.equal(resized[:, 0], embedding[:, 0])
    torch.testing.assert_close(resized[:, 1:], expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    embedding = torch.randn(1, 16, 4).to(dtype)
    resized = resize_position_embedding(embedding, (5, 5))
    exact = resize_position_embedding(embedding.double(), (5, 5))
    assert resized.dtype == dtype
    torch.testing.assert_close(resized, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_flow() -> None:
    embedding = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize_position_embedding(x, (3, 3), num_prefix_tokens=1), embedding)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="square grid of patches, got 15 after the prefix tokens"):
        resize_position_embedding(torch.zeros(1, 16, 2), (4, 4), num_prefix_tokens=1)
    with pytest.raises(ValueError, match=r"must hold \(2, 7\) patches after the prefix tokens, got 16"):
        resize_position_embedding(torch.zeros(1, 16, 2), (4, 4), source_grid=(2, 7))
    with pytest.raises(ValueError, match="num_prefix_tokens must be 0 to 15, got 16"):
        resize_position_embedding(torch.zeros(1, 16, 2), (4, 4), num_prefix_tokens=16)
    with pytest.raises(ValueError, match=r"must be \(1, N, C\) or \(1, C, H, W\), got \(2, 16, 2\)"):
        resize_position_embedding(torch.zeros(2, 16, 2), (4, 4))
    with pytest.raises(ValueError, match="must be 0 for an embedding"):
        resize_position_embedding(torch.zeros(1, 2, 4, 4), (4, 4), num_prefix_tokens=1)
    with pytest.raises(ValueError, match=r"grid must be positive, got \(0, 4\)"):
        resize_position_embedding(torch.zeros(1, 16, 2), (0, 4))
