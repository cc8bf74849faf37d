"""The small networks that foretell a series."""

from __future__ import annotations

import torch

from battery.subjects import Network


def _rows(model, batch):
    return (torch.randn(batch, model.config.lags + model.config.calendar),)


_COMPILES = "torch.compile does not trace torch's own LSTM without a break"
_SCOPE = "the LSTM's kernels round a doubled batch differently"

NETWORKS = [
    Network(
        "forecast_lstm",
        {"hidden_channels": 5},
        _rows,
        exempt={"compiles_without_a_break": _COMPILES},
    ),
    Network("forecast_cnn", {"channels": 5, "fc_channels": 7}, _rows),
    Network(
        "forecast_cnn_lstm",
        {"channels": 5, "hidden_channels": 3},
        _rows,
        exempt={"linear_scope_runs_beside_the_network": _SCOPE},
    ),
]
