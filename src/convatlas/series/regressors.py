"""Regressors on a table: GRNN and GMDH with fit and predict as in scikit-learn, and those of scikit-learn by name.

Specht: "A general regression neural network", IEEE Trans. Neural Networks 2, 1991; Ivakhnenko: "The group method of
data handling", Soviet Automatic Control 13, 1968.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from convatlas.series.metrics import smape

__all__ = ["GRIDS", "GMDHRegressor", "GRNNRegressor", "Regressor", "make_regressor", "tuned"]

Array = npt.NDArray[np.float64]

#: Distances that are held at once.
_CHUNK = 2**21
#: Rows, spread evenly, that choose a width by leave-one-out: of more, the choice no longer changes.
_LEFT_OUT = 2000


class Regressor(Protocol):
    """What maps rows (n, columns) to values (n)."""

    def fit(self, x: Array, y: Array) -> Any:
        """Learn from rows and their values."""

    def predict(self, x: Array) -> Array:
        """Values of rows."""


def _checked(x: npt.ArrayLike, y: npt.ArrayLike | None = None) -> tuple[Array, Array]:
    rows = np.asarray(x, np.float64)
    values = np.zeros(len(rows)) if y is None else np.asarray(y, np.float64)
    if rows.ndim != 2 or values.shape != (len(rows),) or not rows.size:
        raise ValueError(f"x must be (n, columns) and y (n), got {rows.shape} and {values.shape}")
    if not (np.isfinite(rows).all() and np.isfinite(values).all()):
        raise ValueError("x and y must be finite, got NaN or infinity")
    return rows, values


class GRNNRegressor:
    """General regression network: the mean of the training values, weighted by exp(-d^2 / 2 sigma^2).

    Args:
        sigma: width; chosen by leave-one-out squared error on ``grid`` when left out.
        grid: widths to choose from.

    Raises:
        ValueError: a width is not positive.
    """

    def __init__(self, sigma: float | None = None, grid: Sequence[float] | None = None) -> None:
        self.grid = tuple(np.geomspace(0.05, 5, 20) if grid is None else grid)
        if min([*self.grid, *([] if sigma is None else [sigma])]) <= 0:
            raise ValueError(f"sigma must be positive, got {sigma} and grid {self.grid}")
        self.sigma = sigma

    def fit(self, x: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Keep the training rows (n, columns) and values (n), and choose the width."""
        self.rows, self.values = _checked(x, y)
        self.sigma_ = self.sigma if self.sigma is not None else self._leave_one_out()
        return self

    def predict(self, x: npt.ArrayLike) -> Array:
        """Values (n) of rows (n, columns)."""
        rows, _ = _checked(x)
        return np.concatenate([self._mean(self._squared(rows[part]), self.sigma_) for part in self._parts(len(rows))])

    def _parts(self, count: int) -> list[slice]:
        """Slices of so many rows, whose distances to all training rows fit in the memory."""
        size = max(1, _CHUNK // len(self.rows))
        return [slice(start, start + size) for start in range(0, count, size)]

    def _squared(self, rows: Array) -> Array:
        """Squared distances to the training rows, by one matrix product."""
        squares = (rows**2).sum(1)[:, None] + (self.rows**2).sum(1) - 2 * rows @ self.rows.T
        return np.maximum(squares, 0)

    def _mean(self, squared: Array, sigma: float) -> Array:
        # Without the largest exponent all weights of a far row would vanish.
        weights = np.exp(-(squared - squared.min(1, keepdims=True)) / (2 * sigma**2))
        return (weights @ self.values) / weights.sum(1)

    def _leave_one_out(self) -> float:
        if len(self.rows) < 2:
            raise ValueError(f"to choose sigma there must be at least 2 rows, got {len(self.rows)}")
        chosen = np.unique(np.linspace(0, len(self.rows) - 1, min(len(self.rows), _LEFT_OUT)).round().astype(np.int64))
        errors = np.zeros(len(self.grid))
        for part in self._parts(len(chosen)):
            own = chosen[part]
            squared = self._squared(self.rows[own])
            squared[np.arange(len(own)), own] = np.inf
            errors += [np.sum((self._mean(squared, sigma) - self.values[own]) ** 2) for sigma in self.grid]
        return float(self.grid[int(np.argmin(errors))])


class _Node(NamedTuple):
    """A quadratic of two features: their positions and the six coefficients."""

    first: int
    second: int
    weights: Array


class GMDHRegressor:
    """Group method of data handling: layers of quadratics of two features, the best of which feed the next layer.

    Args:
        keep: nodes of a layer that go on.
        max_layers: the most layers; fewer once the best criterion does not fall.
        val_fraction: share of the rows, the last ones, on which nodes are chosen, where `fit` is given no others.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, keep: int = 5, max_layers: int = 4, val_fraction: float = 0.2) -> None:
        if keep < 1 or max_layers < 1:
            raise ValueError(f"keep and max_layers must be at least 1, got {keep} and {max_layers}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
        self.keep, self.max_layers, self.val_fraction = keep, max_layers, val_fraction

    def fit(
        self, x: npt.ArrayLike, y: npt.ArrayLike, selection: tuple[npt.ArrayLike, npt.ArrayLike] | None = None
    ) -> Self:
        """Fit nodes on rows (n, columns) and values (n), choose among them on ``selection``.

        Afterwards ``criteria_`` holds the mean squared errors of the kept nodes of each layer, best first.

        Raises:
            ValueError: there are fewer than 2 columns or too few rows.
        """
        rows, values = _checked(x, y)
        if selection is None:
            cut = len(rows) - max(1, round(self.val_fraction * len(rows)))
            rows, values, chosen_rows, chosen = rows[:cut], values[:cut], rows[cut:], values[cut:]
        else:
            chosen_rows, chosen = _checked(*selection)
        if rows.shape[1] < 2 or len(rows) < 6 or chosen_rows.shape[1] != rows.shape[1]:
            raise ValueError(f"GMDH needs at least 2 columns and 6 rows to fit on, got {rows.shape}")
        self.layers_: list[list[_Node]] = []
        self.criteria_: list[Array] = []
        for _ in range(self.max_layers):
            found = []
            for first, second in itertools.combinations(range(rows.shape[1]), 2):
                weights: Array = np.asarray(
                    np.linalg.lstsq(_quadratic(rows, first, second), values, rcond=None)[0], np.float64
                )
                node = _Node(first, second, weights)
                found.append((float(np.mean((_output(node, chosen_rows) - chosen) ** 2)), node))
            found = sorted(found, key=lambda entry: entry[0])[: self.keep]
            if self.criteria_ and not found[0][0] < self.criteria_[-1][0]:
                break
            self.layers_.append([node for _, node in found])
            self.criteria_.append(np.array([criterion for criterion, _ in found]))
            rows, chosen_rows = (np.stack([_output(n, part) for _, n in found], 1) for part in (rows, chosen_rows))
            if rows.shape[1] < 2:
                break
        return self

    def predict(self, x: npt.ArrayLike) -> Array:
        """Values (n) of rows (n, columns): the best node of the last layer."""
        rows, _ = _checked(x)
        for layer in self.layers_:
            rows = np.stack([_output(node, rows) for node in layer], 1)
        return rows[:, 0]


def _quadratic(rows: Array, first: int, second: int) -> Array:
    a, b = rows[:, first], rows[:, second]
    return np.stack([np.ones_like(a), a, b, a * b, a**2, b**2], 1)


def _output(node: _Node, rows: Array) -> Array:
    return _quadratic(rows, node.first, node.second) @ node.weights


# -- by name -----------------------------------------------------------------------------------------------------------


def _forest(seed: int, **options: Any) -> Regressor:
    from sklearn.ensemble import RandomForestRegressor

    regressor: Regressor = RandomForestRegressor(
        **{"n_estimators": 500, "min_samples_leaf": 2, "random_state": seed, **options}
    )
    return regressor


def _support_vectors(seed: int, **options: Any) -> Regressor:
    from sklearn.svm import SVR

    regressor: Regressor = SVR(**{"C": 10.0, "epsilon": 0.01, "gamma": "scale", **options})
    return regressor


def _perceptron(seed: int, **options: Any) -> Regressor:
    from sklearn.neural_network import MLPRegressor

    settings = {"hidden_layer_sizes": (32,), "activation": "relu", "early_stopping": True, "max_iter": 2000}
    settings |= {"n_iter_no_change": 20, "learning_rate_init": 0.01, "random_state": seed}
    regressor: Regressor = MLPRegressor(**{**settings, **options})
    return regressor


_MAKERS: dict[str, Callable[..., Regressor]] = {
    "rf": _forest,
    "svr": _support_vectors,
    "mlp": _perceptron,
    "grnn": lambda seed, **options: GRNNRegressor(**options),
    "gmdh": lambda seed, **options: GMDHRegressor(**options),
}

#: What is tried for each regressor when it is tuned.
GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "rf": {"n_estimators": (200, 500), "max_features": ("sqrt", 1 / 3)},
    "svr": {"C": (1.0, 10.0, 100.0), "epsilon": (0.01, 0.1), "gamma": ("scale", 0.1, 0.01)},
    "mlp": {"hidden_layer_sizes": ((8,), (16,), (32,))},
    "grnn": {"sigma": tuple(float(width) for width in np.geomspace(0.05, 5, 20))},
    "gmdh": {"keep": (5, 10), "max_layers": (1, 2, 3, 4, 5)},
}


def make_regressor(name: str, seed: int = 0, **options: Any) -> Regressor:
    """A fresh regressor: ``rf``, ``svr``, ``mlp``, ``grnn`` or ``gmdh``, with options of its own.

    Raises:
        UnknownName: there is no such regressor.
        TypeError: it has no such option.
    """
    from convatlas.errors import unknown

    if name not in _MAKERS:
        raise unknown("regressor", name, _MAKERS)
    return _MAKERS[name](seed, **options)


def tuned(
    name: str, train: tuple[Array, Array], validation: tuple[Array, Array], seed: int, back: Callable[[Array], Array]
) -> Mapping[str, Any]:
    """The options of `GRIDS` with the least SMAPE on the validation rows; ``back`` gives values in their own unit."""
    grid = GRIDS[name]
    choices = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    errors = []
    for options in choices:
        regressor = make_regressor(name, seed, **options)
        regressor.fit(*train)
        errors.append(smape(back(validation[1]), back(regressor.predict(validation[0]))))
    return choices[int(np.argmin(errors))]
