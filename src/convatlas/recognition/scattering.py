"""Scattering in scikit-learn's pipelines: fixed features for few labels, and a linear classifier behind them."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, TransformerMixin

from convatlas.nn.scattering import HarmonicScattering3D, Scattering1D, Scattering2D

__all__ = ["ScatteringTransformer"]


class ScatteringTransformer(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Wavelet scattering of rows of samples, to stand before a classifier.

    ``make_pipeline(ScatteringTransformer(J=2, shape=(8, 8)), StandardScaler(), LinearSVC())``

    Args:
        J: log2 of the largest scale.
        shape: of one sample: a length, (H, W) or (D, H, W); rows are reshaped to it.
        options: other arguments of `Scattering1D`, `Scattering2D` or `HarmonicScattering3D`, such as ``{"L": 8}``.
        batch_size: samples that are transformed at a time.
    """

    def __init__(
        self,
        J: int = 2,
        shape: int | tuple[int, ...] = (28, 28),
        options: dict[str, Any] | None = None,
        batch_size: int = 64,
    ) -> None:
        self.J = J
        self.shape = shape
        self.options = options
        self.batch_size = batch_size

    def fit(self, X: npt.ArrayLike, y: object = None) -> Self:
        """Make the filters; nothing is learned from the samples but their number of values, which is checked.

        Raises:
            ValueError: the rows do not have the values of ``shape``, or an option is out of range.
        """
        shape = (self.shape,) if isinstance(self.shape, int) else tuple(self.shape)
        kinds: dict[int, Any] = {1: Scattering1D, 2: Scattering2D, 3: HarmonicScattering3D}
        if len(shape) not in kinds:
            raise ValueError(f"shape must be a length, (H, W) or (D, H, W), got {self.shape}")
        self.scattering_ = kinds[len(shape)](self.J, shape, **(self.options or {}))
        self.n_features_in_ = int(np.prod(shape))
        self._rows(X)
        return self

    def transform(self, X: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Features (rows, features) of samples (rows, values) or (rows, *shape).

        Raises:
            ValueError: the rows do not have the values of ``shape``.
        """
        rows = self._rows(X)
        parts = [self.scattering_(batch).flatten(1) for batch in rows.split(self.batch_size)]
        return torch.cat(parts).numpy()

    def _rows(self, X: npt.ArrayLike) -> torch.Tensor:
        values = np.asarray(X, dtype=np.float32)
        shape = (self.shape,) if isinstance(self.shape, int) else tuple(self.shape)
        if values.ndim < 2 or int(np.prod(values.shape[1:])) != self.n_features_in_:
            raise ValueError(f"X must be (rows, {self.n_features_in_}) or (rows, *{shape}), got {values.shape}")
        return torch.from_numpy(np.ascontiguousarray(values)).reshape(-1, *shape)
