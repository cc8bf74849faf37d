"""Small networks that foretell the next value of a series from a row of lags and calendar features.

Vangala, Ravi: "ATM Cash demand forecasting in an Indian Bank with chaos and deep learning", arXiv 2008.10365: an LSTM
and a 1-D CNN; its follow-up joins both. There is no code of the authors: sizes are this library's. Training: mean
squared error of standardised values, Adam with lr 1e-3, batches of 32, at most 200 epochs, stopped after 20 without
improvement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from convatlas.errors import unknown
from convatlas.networks.base import NetworkConfig

__all__ = [
    "VARIANTS",
    "CNN1DForecaster",
    "CNNLSTMForecaster",
    "ForecasterConfig",
    "ForecasterStack",
    "LSTMForecaster",
]

Kind = Literal["lstm", "cnn", "cnn_lstm"]


@dataclass(frozen=True, kw_only=True)
class ForecasterConfig(NetworkConfig):
    """Config of the three networks.

    Attributes:
        kind: ``lstm``, ``cnn`` or ``cnn_lstm``.
        lags: m of the paper: values of the past in a row, the most recent first.
        calendar: columns behind them, which tell of the target's time.
        hidden_channels: of the LSTM.
        num_layers: of the LSTM.
        channels: filters of the convolution.
        fc_channels: of the CNN's hidden linear layer.

    Raises:
        ValueError: a value is out of range, or a row is too short for the convolution.
    """

    kind: Kind = "lstm"
    lags: int = 4
    calendar: int = 7
    hidden_channels: int = 32
    num_layers: int = 1
    channels: int = 64
    fc_channels: int = 50

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown("kind", str(self.kind), get_args(Kind))
        for name in ("lags", "hidden_channels", "num_layers", "channels", "fc_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.calendar < 0:
            raise ValueError(f"calendar must be at least 0, got {self.calendar}")
        if self.kind == "cnn" and self.lags + self.calendar < 3:
            raise ValueError(f"the cnn needs rows of at least 3 columns, got {self.lags} lags and {self.calendar}")
        if self.kind == "cnn_lstm" and self.lags < 2:
            raise ValueError(f"the cnn_lstm needs at least 2 lags, got {self.lags}")

    def build(self) -> nn.Module:
        kinds = {"lstm": LSTMForecaster, "cnn": CNN1DForecaster, "cnn_lstm": CNNLSTMForecaster}
        return kinds[self.kind](self)


class _RowNetwork(nn.Module):
    """What the networks share: the row that they take.

    Args:
        config: what to build.
    """

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__()
        self.config = config

    def check(self, rows: Tensor) -> None:
        """Refuse what is no batch of rows (B, lags + calendar)."""
        columns = self.config.lags + self.config.calendar
        if rows.dim() != 2 or rows.shape[1] != columns:
            raise ValueError(f"rows must be (B, {columns}), got {tuple(rows.shape)}")

    def sequence(self, rows: Tensor) -> Tensor:
        """Rows (B, lags + calendar) as steps from the oldest on, each with the calendar: (B, lags, 1 + calendar)."""
        values = rows[:, : self.config.lags].flip(1).unsqueeze(2)
        calendar = rows[:, self.config.lags :].unsqueeze(1).expand(-1, self.config.lags, -1)
        return torch.cat([values, calendar], 2)

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Random lags and the one-hot of a weekday, or of as many columns as there are."""
        config = self.config
        calendar = torch.eye(config.calendar)[torch.arange(batch) % max(1, config.calendar)] if config.calendar else ()
        lags = torch.randn(batch, config.lags)
        return (torch.cat([lags, calendar], 1) if isinstance(calendar, Tensor) else lags,)


class LSTMForecaster(_RowNetwork):
    """An LSTM over the lags, whose last state a linear layer reads.

    Args:
        config: what to build.
    """

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__(config)
        self.lstm = nn.LSTM(1 + config.calendar, config.hidden_channels, config.num_layers, batch_first=True)
        self.head = nn.Linear(config.hidden_channels, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """Next values (B) of rows (B, lags + calendar)."""
        self.check(rows)
        states, _ = self.lstm(self.sequence(rows))
        return self.head(states[:, -1]).squeeze(1)


class CNN1DForecaster(_RowNetwork):
    """The row as a sequence of one channel: convolution, ReLU, max pooling, two linear layers.

    Args:
        config: what to build.
    """

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__(config)
        self.conv = nn.Conv1d(1, config.channels, 2)
        self.fc1 = nn.Linear(config.channels * ((config.lags + config.calendar - 1) // 2), config.fc_channels)
        self.fc2 = nn.Linear(config.fc_channels, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """Next values (B) of rows (B, lags + calendar)."""
        self.check(rows)
        maps = torch.max_pool1d(self.conv(rows.unsqueeze(1)).relu(), 2)
        return self.fc2(self.fc1(maps.flatten(1)).relu()).squeeze(1)


class CNNLSTMForecaster(_RowNetwork):
    """Features of neighbouring lags by a convolution, read by an LSTM in order.

    Args:
        config: what to build.
    """

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__(config)
        self.conv = nn.Conv1d(1 + config.calendar, config.channels, 2)
        self.lstm = nn.LSTM(config.channels, config.hidden_channels, config.num_layers, batch_first=True)
        self.head = nn.Linear(config.hidden_channels, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """Next values (B) of rows (B, lags + calendar)."""
        self.check(rows)
        features = self.conv(self.sequence(rows).transpose(1, 2)).relu().transpose(1, 2)
        states, _ = self.lstm(features)
        return self.head(states[:, -1]).squeeze(1)


class ForecasterStack(nn.Module):
    """Several networks of one config as one, for a series each: the same numbers by batched matrix products.

    Args:
        networks: of one config; their weights are copied, and given back by `unstack`.

    Raises:
        ValueError: there is none, or they differ in their config.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not networks or any(network.config != networks[0].config for network in networks):
            raise ValueError(f"networks must be at least one, all of one config, got {len(networks)}")
        self.config: ForecasterConfig = networks[0].config  # type: ignore[assignment]
        self.names = [name for name, _ in networks[0].named_parameters()]
        every = [dict(network.named_parameters()) for network in networks]
        self.weights = nn.ParameterList(torch.stack([own[name].detach() for own in every]) for name in self.names)

    def unstack(self, networks: Sequence[nn.Module]) -> None:
        """Copy the weights into networks, in the order in which they were stacked."""
        with torch.no_grad():
            for index, network in enumerate(networks):
                own = dict(network.named_parameters())
                for name, weight in zip(self.names, self.weights, strict=True):
                    own[name].copy_(weight[index])

    def forward(self, rows: Tensor) -> Tensor:
        """Next values (N, B) of rows (N, B, lags + calendar), a network for each of the N."""
        w, lags = dict(zip(self.names, self.weights, strict=True)), self.config.lags
        if self.config.kind == "cnn":
            maps = _convolved(rows.unsqueeze(3), w)
            pooled = torch.maximum(maps[:, :, : maps.shape[2] // 2 * 2 : 2], maps[:, :, 1::2]).relu()
            hidden = _linear(pooled.transpose(2, 3).flatten(2), w, "fc1").relu()
            return _linear(hidden, w, "fc2").squeeze(2)
        values = rows[:, :, :lags].flip(2).unsqueeze(3)
        steps = torch.cat([values, rows[:, :, None, lags:].expand(-1, -1, lags, -1)], 3)
        if self.config.kind == "cnn_lstm":
            steps = _convolved(steps, w).relu()
        for layer in range(self.config.num_layers):
            steps = _recurrent(steps, w, layer)
        return _linear(steps[:, :, -1], w, "head").squeeze(2)


Weights = Mapping[str, Tensor]


def _linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """Features (N, B, D) of inputs (N, B, C)."""
    return torch.baddbmm(w[f"{name}.bias"].unsqueeze(1), x, w[f"{name}.weight"].mT)


def _convolved(steps: Tensor, w: Weights) -> Tensor:
    """Maps (N, B, T - 1, D) of the convolution of two neighbouring steps (N, B, T, C)."""
    pairs = torch.stack([steps[:, :, :-1], steps[:, :, 1:]], 4).flatten(3)  # as the weights lie: channels, then taps
    maps = torch.baddbmm(w["conv.bias"].unsqueeze(1), pairs.flatten(1, 2), w["conv.weight"].flatten(2).mT)
    return maps.unflatten(1, pairs.shape[1:3])


def _recurrent(steps: Tensor, w: Weights, layer: int) -> Tensor:
    """States (N, B, T, D) of one layer of the LSTM."""
    weight, state_weight = w[f"lstm.weight_ih_l{layer}"], w[f"lstm.weight_hh_l{layer}"].mT
    bias = (w[f"lstm.bias_ih_l{layer}"] + w[f"lstm.bias_hh_l{layer}"]).unsqueeze(1)
    gates = torch.baddbmm(bias, steps.flatten(1, 2), weight.mT).unflatten(1, steps.shape[1:3]).unbind(2)
    state = cell = None
    states = []
    for gate in gates:
        if state is not None:
            gate = torch.baddbmm(gate, state, state_weight)
        inner, forget, new, outer = gate.chunk(4, 2)
        kept = 0 if cell is None else forget.sigmoid() * cell
        cell = kept + inner.sigmoid() * new.tanh()
        state = outer.sigmoid() * cell.tanh()
        states.append(state)
    return torch.stack(states, 2)


VARIANTS: dict[str, ForecasterConfig] = {
    "forecast_lstm": ForecasterConfig(),
    "forecast_cnn": ForecasterConfig(kind="cnn"),
    "forecast_cnn_lstm": ForecasterConfig(kind="cnn_lstm"),
}
