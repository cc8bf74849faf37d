"""Nested operations on lists: their values and their random generation."""

from __future__ import annotations

import numpy as np
import pytest

from convatlas.data.list_operations import LIST_TOKENS, list_operations, list_value


def parse(text: str) -> list[int]:
    return [LIST_TOKENS.index(word) for word in text.split()]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("MAX 2 9 MIN 4 7 ] 0 ]", 9),
        ("MIN 3 MAX 1 2 ] 8 ]", 2),
        ("MED 1 9 4 ]", 4),
        ("MED 1 4 ]", 2),
        ("SM 7 8 SM 9 9 ] ]", 3),
    ],
)
def test_values(text: str, value: int):
    assert list_value(parse(text)) == value


@pytest.mark.parametrize("text", ["MAX 2 9", "MAX ]", "2 3", "]", "MAX 1 2 ] ]"])
def test_what_is_no_expression_is_refused(text: str):
    with pytest.raises(ValueError, match="tokens must be"):
        list_value(parse(text))


def test_random_lists_keep_their_bounds_and_repeat():
    tokens, lengths, values = list_operations(40, min_length=20, max_length=60, max_depth=4, seed=3)
    assert tokens.shape == (40, 60)
    assert lengths.min() >= 20
    assert lengths.max() <= 60
    assert len(set(values.tolist())) > 5
    for row, length, value in zip(tokens, lengths, values, strict=True):
        assert not row[length:].any()
        assert list_value(row[:length].tolist()) == value
        depth = np.cumsum(np.isin(row, range(11, 15)).astype(int) - (row == 15))
        assert depth.max() <= 4
    again = list_operations(40, min_length=20, max_length=60, max_depth=4, seed=3)[0]
    assert (again == tokens).all()
    with pytest.raises(ValueError, match="min_length must be from 1 to max_length"):
        list_operations(1, min_length=9, max_length=8)
