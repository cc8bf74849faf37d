"""Nested operations on lists of digits, the ListOps task: a long sequence of tokens whose value is one of ten classes.

Nangia, Bowman: "ListOps: A Diagnostic Dataset for Latent Tree Learning", NAACL 2018, arXiv 1804.06028; long lists as in
Tay et al.: "Long Range Arena", ICLR 2021, arXiv 2011.04006.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LIST_TOKENS", "list_operations", "list_value"]

#: Token names in the order of their numbers: one to fill up, digits, operators, the end of an operation.
LIST_TOKENS = ("", *"0123456789", "MIN", "MAX", "MED", "SM", "]")

_FIRST_DIGIT, _FIRST_OPERATOR, _END = 1, 11, 15
_NEST = 0.25


def list_operations(
    count: int,
    *,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_arguments: int = 10,
    seed: int = 0,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Random expressions such as ``MAX 2 9 MIN 4 7 ] 0 ]``: minimum, maximum, median and sum modulo 10, nested.

    Args:
        count: number of expressions N.
        min_length, max_length: tokens of an expression; others are drawn again.
        max_depth: of nested operations.
        max_arguments: of an operation; at least 2.
        seed: of the random numbers.

    Returns:
        Tokens (N, max_length), filled up with 0, the length of each (N) and its value (N) from 0 to 9.

    Raises:
        ValueError: the bounds contradict each other.
    """
    if not 1 <= min_length <= max_length or max_depth < 1 or max_arguments < 2 or count < 0:
        raise ValueError(
            "min_length must be from 1 to max_length, max_depth at least 1, max_arguments at least 2 and count at "
            f"least 0, got {min_length}, {max_length}, {max_depth}, {max_arguments} and {count}"
        )
    random = np.random.default_rng(seed)
    tokens = np.zeros((count, max_length), np.int64)
    lengths, values = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for row in range(count):
        expression: list[int] = []
        while not min_length <= len(expression) <= max_length:
            expression = []
            _grow(expression, random, 1, max_depth, max_arguments, max_length)
        tokens[row, : len(expression)] = expression
        lengths[row], values[row] = len(expression), list_value(expression)
    return tokens, lengths, values


def _grow(tokens: list[int], random: Any, depth: int, max_depth: int, max_arguments: int, limit: int) -> None:
    """Append one operation, and stop early beyond the limit, where the expression will be thrown away."""
    tokens.append(_FIRST_OPERATOR + int(random.integers(4)))
    for _ in range(int(random.integers(2, max_arguments + 1))):
        if len(tokens) > limit:
            return
        if depth < max_depth and random.random() < _NEST:
            _grow(tokens, random, depth + 1, max_depth, max_arguments, limit)
        else:
            tokens.append(_FIRST_DIGIT + int(random.integers(10)))
    tokens.append(_END)


def list_value(tokens: list[int]) -> int:
    """Value of one expression, 0 to 9.

    Raises:
        ValueError: the tokens are no expression.
    """
    stack: list[list[int]] = [[]]
    for token in tokens:
        if _FIRST_DIGIT <= token < _FIRST_OPERATOR:
            stack[-1].append(token - _FIRST_DIGIT)
        elif _FIRST_OPERATOR <= token < _END:
            stack.append([token])
        elif token == _END and len(stack) > 1 and len(stack[-1]) > 1:
            operator, *arguments = stack.pop()
            results = (min, max, statistics.median, lambda values: sum(values) % 10)
            stack[-1].append(int(results[operator - _FIRST_OPERATOR](arguments)))
        else:
            raise ValueError(f"tokens must be a nested expression, got {token} out of place")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError("tokens must be one whole expression")
    return stack[0][0]
