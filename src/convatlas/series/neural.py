"""Networks as models of a series: small ones on the table of lags, many of which train as one, and UniRepLKNet's path.

Vangala, Ravi: "ATM Cash demand forecasting in an Indian Bank with chaos and deep learning", arXiv 2008.10365; Ding et
al.: "UniRepLKNet", arXiv 2311.15599, section 3.3.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convatlas.errors import DataError
from convatlas.networks.forecasters import ForecasterStack
from convatlas.networks.registry import create_model
from convatlas.series.forecaster import Array, Forecaster, Index, Rows, TableForecaster
from convatlas.series.state_space import Scaler
from convatlas.training.progress import progress

__all__ = ["NetworkFit", "NetworkForecaster", "UniRepLKNetForecaster", "train_networks"]

#: Origins that UniRepLKNet answers at once.
_ORIGINS = 256


@dataclass(kw_only=True)
class NetworkFit:
    """A network with what it is to learn, and how: Adam on the mean squared error, the best epoch stays.

    Attributes:
        network: is changed in place.
        train, validation: tensors whose first axis counts rows; the last is the target, the others go into the
            network. Where there are no validation rows, the training rows choose the epoch.
        seed: of the order of the rows, and of dropout.
        epochs, batch_size, patience, lr: of the training; after ``patience`` epochs without improvement it stops.
        loss: of the epoch that stays, once it is trained.
    """

    network: nn.Module
    train: tuple[Tensor, ...]
    validation: tuple[Tensor, ...]
    seed: int = 0
    epochs: int = 200
    batch_size: int = 32
    patience: int = 20
    lr: float = 1e-3
    loss: float = field(default=float("inf"), init=False)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Those that are alike in this can train as one."""
        how = (self.epochs, self.batch_size, self.patience, self.lr)
        return (self.network.config, len(self.train[-1]), len(self.validation[-1]), *how)

    @property
    def checked(self) -> tuple[Tensor, ...]:
        """The rows that choose the epoch."""
        return self.validation if len(self.validation[-1]) else self.train


def train_networks(fits: Sequence[NetworkFit]) -> None:
    """Train networks of rows; those of one kind train as one, each as it would alone but for rounding."""
    groups: dict[tuple[Any, ...], list[NetworkFit]] = {}
    for fit in fits:
        groups.setdefault(fit.kind, []).append(fit)
    for group in groups.values():
        if len(group) == 1:
            _train_alone(group[0])
        else:
            _train_as_one(group)


def _train_alone(fit: NetworkFit) -> None:
    network, train, checked = fit.network, fit.train, fit.checked
    optimizer = torch.optim.Adam(network.parameters(), fit.lr)
    order = torch.Generator().manual_seed(fit.seed)
    best, waited = copy.deepcopy(network.state_dict()), 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)  # of dropout
        for _ in range(fit.epochs):
            network.train()
            for batch in torch.randperm(len(train[-1]), generator=order).split(fit.batch_size):
                *inputs, target = (part[batch] for part in train)
                optimizer.zero_grad()
                (network(*inputs) - target).square().mean().backward()
                optimizer.step()
            network.eval()
            with torch.inference_mode():
                loss = float((network(*checked[:-1]) - checked[-1]).square().mean())
            waited += 1
            if loss < fit.loss:
                fit.loss, best, waited = loss, copy.deepcopy(network.state_dict()), 0
            if waited >= fit.patience:
                break
    network.load_state_dict(best)
    network.eval()


def _train_as_one(group: Sequence[NetworkFit]) -> None:
    first, count = group[0], len(group)
    stack = ForecasterStack([one.network for one in group])
    optimizer = torch.optim.Adam(stack.parameters(), first.lr)
    orders = [torch.Generator().manual_seed(one.seed) for one in group]
    rows, targets = (torch.stack(parts) for parts in zip(*(one.train for one in group), strict=True))
    checked, goals = (torch.stack(parts) for parts in zip(*(one.checked for one in group), strict=True))
    each = torch.arange(count)[:, None]
    best = [parameter.detach().clone() for parameter in stack.parameters()]
    least, waited = torch.full((count,), torch.inf), torch.zeros(count)
    with progress(f"training {count} networks", first.epochs) as advance:
        for _ in range(first.epochs):
            order = torch.stack([torch.randperm(targets.shape[1], generator=generator) for generator in orders])
            for batch in order.split(first.batch_size, 1):
                optimizer.zero_grad()
                (stack(rows[each, batch]) - targets[each, batch]).square().mean(1).sum().backward()
                optimizer.step()
            with torch.no_grad():
                loss = (stack(checked) - goals).square().mean(1)
                better = (loss < least) & (waited < first.patience)  # one that has stopped alone improves no more
                for kept, parameter in zip(best, stack.parameters(), strict=True):
                    kept[better] = parameter[better]
            least = torch.where(better, loss, least)
            waited = torch.where(better, 0.0, waited + 1)
            advance()
            if bool((waited >= first.patience).all()):
                break
    with torch.no_grad():
        for kept, parameter in zip(best, stack.parameters(), strict=True):
            parameter.copy_(kept)
    stack.unstack([one.network for one in group])
    for one, loss in zip(group, least.tolist(), strict=True):
        one.loss = loss
        one.network.eval()


def _tensors(*parts: Array) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.ascontiguousarray(part)).float() for part in parts)


def _split(options: dict[str, Any], **defaults: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the network, and those of its training."""
    given = {**defaults, **options}
    names = ("epochs", "batch_size", "patience", "lr")
    return (
        {name: value for name, value in given.items() if name not in names},
        {name: given[name] for name in names if name in given},
    )


class NetworkForecaster(TableForecaster):
    """A small network; options are fields of its config, ``epochs``, ``batch_size``, ``patience``, ``lr``, ``seeds``.

    Of several ``seeds`` (a number of repetitions) the one with the least validation loss stays.
    """

    @property
    def refits(self) -> bool:
        """False: the validation part has stopped the training."""
        return False

    @property
    def networks(self) -> list[nn.Module]:
        """The best of the seeds, one for each step that is learned."""
        return [_best(step.model).network for step in self.steps]

    def fit(self, values: Array, calendar: Array, cut: int) -> None:
        """Train what `prepare` makes."""
        train_networks(self.prepare(values, calendar, cut))

    def prepare(self, values: Array, calendar: Array, cut: int) -> list[NetworkFit]:
        """What is to be trained before the model is fitted: one network for each seed and step."""
        super().fit(values, calendar, cut)
        return [fit for step in self.steps for fit in step.model]

    def learn(self, train: Rows, validation: Rows, target: Scaler) -> list[NetworkFit]:
        """Networks of all seeds, not trained yet."""
        options, how = _split(self.options)
        lags, fits = self.features.m, []
        for seed in range(self.seed, self.seed + int(options.pop("seeds", 1))):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = create_model(f"forecast_{self.name}", lags=lags, calendar=train[0].shape[1] - lags, **options)
            seen, checked = _tensors(*train), _tensors(*validation)
            fits.append(NetworkFit(network=network, train=seen, validation=checked, seed=seed, **how))
        return fits

    @torch.inference_mode()
    def apply(self, model: list[NetworkFit], rows: Array) -> Array:
        """Standardised targets (n) of standardised rows by the best seed."""
        return _best(model).network(*_tensors(rows)).double().numpy()


def _best(fits: Sequence[NetworkFit]) -> NetworkFit:
    return min(fits, key=lambda fit: fit.loss)


class UniRepLKNetForecaster(Forecaster):
    """UniRepLKNet's path for time series: a window of values as an image, all steps at once.

    Of the options, ``length`` is that of the window and ``dim`` the width of the embedding: their product is a square.
    """

    @property
    def reach(self) -> int:
        """The window that it sees."""
        return int(self.options.get("length", 32))

    @property
    def refits(self) -> bool:
        """False: the validation part has stopped the training."""
        return False

    @property
    def networks(self) -> list[nn.Module]:
        """The one network."""
        return [self.network]

    def fit(self, values: Array, calendar: Array, cut: int) -> None:
        """Train on windows that end before ``cut``."""
        options, how = _split(self.options, epochs=30, patience=5)
        length, dim = options.pop("length", 32), options.pop("dim", 32)
        if cut < length + self.horizon + 8:
            raise DataError(f"unireplknet needs {length + self.horizon + 8} training points, got {cut}")
        encoder = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, dim), "kernel_sizes": ((3,),) * 4, "drop_path": 0.0}
        config = {"network": encoder, "tree": (1,), "node_series": 1, "length": length, "label_length": length // 2}
        config |= {"horizon": self.horizon, "dim": dim, "num_heads": 4, "hidden_channels": 64, "num_layers": 1}
        config |= {"window": 7, "time_features": max(1, calendar.shape[1]), "dropout": 0.0}
        self.target = Scaler.fit(values[:cut])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network: Any = create_model("unireplknet_s_weather", **{**config, **options})
        series = self.target.apply(values)
        origins = (np.arange(length, cut - self.horizon + 1), np.arange(cut, len(series) - self.horizon + 1))
        train, validation = (self._windows(series, calendar, which) for which in origins)
        _train_alone(NetworkFit(network=self.network, train=train, validation=validation, seed=self.seed, **how))

    def _windows(self, series: Array, calendar: Array, origins: Index, targets: bool = True) -> tuple[Tensor, ...]:
        """Known values, their times, the times to come and, where wanted, the values to come."""
        times = calendar if calendar.shape[1] else np.zeros((len(calendar), 1))
        past, future = origins[:, None] - self.reach + np.arange(self.reach), origins[:, None] + np.arange(self.horizon)
        parts = [series[past][..., None], times[past], times[future]]
        parts += [series[future][..., None]] if targets else []
        return _tensors(*parts)

    @torch.inference_mode()
    def rolling(self, values: Array, calendar: Array, origins: Index) -> Array:
        """Forecasts (origins, horizon), some hundred origins at once."""
        series = self.target.apply(values)
        found = []
        for part in np.array_split(origins, 1 + len(origins) // _ORIGINS):
            inputs = self._windows(series, calendar, part, targets=False)
            found.append(self.network(*inputs)[..., 0].double().numpy())
        return self.target.inverse(np.concatenate(found))
