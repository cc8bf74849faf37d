"""Attacks on image scaling: the optimum of the programmes, and what they do to pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from convatlas.robustness import scaling_attack
from convatlas.robustness.scaling_attack import PenaltyAttack, Scaler, ScalingAttack, least_change, planes


def pictures(channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    source = random.integers(30, 220, (36, 48, channels)).astype(np.uint8)
    return source, random.integers(30, 220, (8, 11, channels)).astype(np.uint8)


def optimum(x: np.ndarray, matrix: np.ndarray, target: np.ndarray, eps: float) -> np.ndarray:
    missing = target - matrix @ x
    limits = [
        {"type": "ineq", "fun": lambda d: eps - missing + matrix @ d, "jac": lambda d: matrix},
        {"type": "ineq", "fun": lambda d: eps + missing - matrix @ d, "jac": lambda d: -matrix},
    ]
    options = {"ftol": 1e-12, "maxiter": 500}
    start, bounds = np.zeros_like(x), np.stack([-x, 255 - x], 1)
    return minimize(
        lambda d: d @ d / 2, start, jac=lambda d: d, bounds=bounds, constraints=limits, method="SLSQP", options=options
    ).x


@pytest.mark.parametrize(
    ("library", "algorithm", "length", "size"),
    [("cv2", "nearest", 13, 4), ("cv2", "linear", 12, 5), ("cv2", "cubic", 16, 4), ("cv2", "cubic", 11, 6)],
)
def test_the_change_is_the_smallest_one(library: str, algorithm: str, length: int, size: int) -> None:
    matrix = Scaler.of(library, algorithm).matrix(length, size)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (length, 3), generator=generator).double()
    # A picture that exists, so that there is a solution; some pixels end at black or white.
    target = matrix @ torch.randint(0, 256, (length, 3), generator=generator).double()
    change = least_change(x, matrix, target, 1.0)
    for column in range(3):
        best = optimum(x[:, column].numpy(), matrix.numpy(), target[:, column].numpy(), 1.0)
        np.testing.assert_allclose(change[:, column].numpy(), best, atol=1e-4)


def test_both_solvers_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = Scaler.of("cv2", "linear").matrix(24, 6)
    x = torch.randint(0, 256, (2, 24, 5), generator=torch.Generator().manual_seed(0)).double()
    target = matrix @ x.flip(1)
    exact = least_change(x, matrix, target)
    monkeypatch.setattr(scaling_attack, "_MOST_TAPS", 0)
    torch.testing.assert_close(least_change(x, matrix, target), exact, atol=1e-6, rtol=0)


def test_columns_are_solved_in_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (30, 20), generator=generator).double()
    target = torch.randint(0, 256, (12, 20), generator=generator).double()
    matrix = Scaler.of("cv2", "linear").matrix(30, 12)
    matrix[3] = matrix[4]  # two outputs that are the same: without a solution where their targets are not
    target[3, :15] = target[4, :15]
    target[3, 15:] = (target[4, 15:] + 100) % 256
    monkeypatch.setattr(scaling_attack, "_STEPS", 500)
    whole = scaling_attack._by_alternating(x, matrix, target, 1.0)
    assert whole.failed.nonzero()[:, 0].tolist() == [15, 16, 17, 18, 19]
    reached = matrix @ (x + whole.change) - target
    assert float(reached[:, :15].abs().max()) < 1 + 1e-5
    monkeypatch.setattr(scaling_attack, "_AT_ONCE", 100)
    lots = scaling_attack._by_alternating(x, matrix, target, 1.0)
    assert torch.equal(lots.failed, whole.failed)
    torch.testing.assert_close(lots.change[:, ~whole.failed], whole.change[:, ~whole.failed], rtol=0, atol=1e-5)


def test_what_is_there_already_costs_nothing() -> None:
    scaler, x = Scaler.of("cv2", "cubic"), torch.randint(40, 200, (24, 4)).double()
    matrix = scaler.matrix(24, 5)
    assert least_change(x, matrix, matrix @ x).abs().max() < 1e-12


@pytest.mark.parametrize("algorithm", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("eps", [1.0, 2.0])
def test_scaled_attacks_are_the_target(algorithm: str, eps: float) -> None:
    source, target = pictures()
    scaler = Scaler.of("cv2", algorithm)
    attack = ScalingAttack(scaler, eps).generate(source, target)
    scaled = scaler.resize(planes(attack), (8, 11)).int()
    assert (scaled - planes(target).int()).abs().max() <= 2 * eps + 1
    assert attack.shape == source.shape
    assert attack.dtype == np.uint8
    # Grey pictures are the same as one channel.
    grey = ScalingAttack(scaler, eps).generate(source[..., 0], target[..., 0])
    assert np.array_equal(grey, attack[..., 0])


def test_columns_without_a_solution_are_named_and_a_larger_eps_is_tried() -> None:
    # Cubic weights below zero and above one: neighbours cannot be black and white for all outputs at once.
    matrix = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    x, target = torch.full((2, 2), 100.0), torch.tensor([[100.0, 0.0], [100.0, 60.0]])
    with pytest.raises(ValueError, match=r"could not solve at column 1 .*within 1 "):
        least_change(x, matrix, target, 1.0)
    change = least_change(x, matrix, target, (1.0, 40.0))
    torch.testing.assert_close(matrix @ (x + change), torch.tensor([[100.0, 40.0]] * 2).double(), atol=21.0, rtol=0)
    assert not change[:, 0].any()
    with pytest.raises(ValueError, match="column 0"):  # of one tap: exact
        least_change(torch.tensor([[5.0]]), torch.tensor([[0.5]]), torch.tensor([[200.0]]))


def test_the_penalty_form_comes_near_the_target() -> None:
    source, target = pictures()
    attack = PenaltyAttack(weight=10.0, steps=150).generate(source, target)
    scaled = Scaler().resize(planes(attack), (8, 11)).float()
    assert (
        (scaled - planes(target)).abs().mean()
        < 3
        < (Scaler().resize(planes(source), (8, 11)).float() - planes(target)).abs().mean()
    )
    # Pixels that the scaler does not look at stay as they are.
    assert np.median(np.abs(attack.astype(int) - source)) <= 1


def test_libraries_of_deep_learning_scale_as_opencv() -> None:
    x = torch.rand(1, 2, 23, 31, dtype=torch.float64)
    for algorithm, mode in (("linear", "bilinear"), ("cubic", "bicubic"), ("nearest", "nearest")):
        options = {} if mode == "nearest" else {"align_corners": False}
        theirs = torch.nn.functional.interpolate(x, (9, 12), mode=mode, **options)
        torch.testing.assert_close(Scaler.of("torch", algorithm).resize(x, (9, 12)), theirs)


def test_bad_input_is_named() -> None:
    source, target = pictures()
    attack = ScalingAttack()
    for given, error in (
        ((target, source), "target must be smaller than source, got 36 x 48 and 8 x 11"),
        ((source.astype(float), target), "source must be a uint8 image in 0..255, got float64"),
        ((source, target[..., 0]), "same channels, got 3 and 1"),
        ((np.zeros((9, 9, 4), np.uint8), target), "source must be .* without transparency"),
    ):
        with pytest.raises(ValueError, match=error):
            attack.generate(*given)
    with pytest.raises(ValueError, match="unknown library 'cvv'"):
        Scaler.of("cvv", "linear")
    with pytest.raises(ValueError, match="algorithm of torch 'area'"):
        Scaler.of("torch", "area")
    with pytest.raises(ValueError, match="eps must not be negative"):
        ScalingAttack(eps=-1.0).generate(source, target)
