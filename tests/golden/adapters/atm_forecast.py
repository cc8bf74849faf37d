"""Chaos analysis, the table of delays and weekdays, GRNN, GMDH, errors of forecasts and tests of their difference."""

from __future__ import annotations

import re
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from convatlas.series.chaos import (
    LagRule,
    acf_lag,
    autocorrelation,
    cao_embedding,
    divergence_curve,
    rosenstein_lyapunov,
)
from convatlas.series.metrics import diebold_mariano, mae, mape, nrmse, smape, t_test, theil_u
from convatlas.series.regressors import GMDHRegressor, GRNNRegressor
from convatlas.series.state_space import Scaler, StateSpaceFeatures, one_hot
from golden.cases import Case


def run(case: Case) -> dict[str, Tensor]:
    results = _embedding(case) if "max_dim" in case.config else _forecast(case)
    return {name: _tensor(results[name], case) for name in case.outputs}


def _tensor(value: Any, case: Case) -> Tensor:
    tensor = torch.as_tensor(np.asarray(value))
    return tensor.to(case.dtype) if tensor.is_floating_point() else tensor


def _nested(case: Case, name: str, **known: Any) -> dict[str, Any]:
    """A nested configuration with its defaults; what is not known raises."""
    given = case.config.get(name, {})
    if left := set(given) - set(known):
        raise KeyError(f"{case.system}/{case.name}: the adapter does not handle {name} {sorted(left)}")
    return {**known, **given}


def _embedding(case: Case) -> dict[str, Any]:
    case.only("max_dim", "lyapunov", "cao")
    cao = _nested(case, "cao", metric="chebyshev", theiler_window=0, zero_distance="skipped")
    lyapunov = _nested(case, "lyapunov", m=4, theiler_window=10, maxt=12, metric="euclidean", fit="k=0..7")
    if cao["zero_distance"] != "skipped":
        raise KeyError(f"{case.system}/{case.name}: zero distances are skipped, not {cao['zero_distance']}")
    dim, window = lyapunov["m"], lyapunov["theiler_window"]
    first, last = map(int, re.fullmatch(r"k=(\d+)\.\.(\d+)", lyapunov["fit"]).groups())
    results: dict[str, Any] = {}
    for name in [name for name in case.inputs if not name.endswith("_tau")]:
        series, tau = case.inputs[name].double().numpy(), int(case.inputs[f"{name}_tau"])
        max_lag = len(case.outputs[f"{name}_acf"]) - 1 if f"{name}_acf" in case.outputs else 40
        results[f"{name}_acf"] = autocorrelation(series, max_lag)
        for rule in get_args(LagRule):
            results[f"{name}_lag_{rule}"] = acf_lag(series, rule, max_lag) or -1
        curves = cao_embedding(series, tau, case.config["max_dim"], window=cao["theiler_window"], metric=cao["metric"])
        for key, curve in zip(("E", "Estar", "E1", "E2"), curves, strict=True):
            results[f"{name}_{key}"] = curve
        results[f"{name}_divergence_m{dim}_w{window}"] = divergence_curve(
            series, dim, tau, window=window, steps=lyapunov["maxt"], metric=lyapunov["metric"]
        )
        results[f"{name}_lyap_slope_{first}_{last}"] = rosenstein_lyapunov(
            series, dim, tau, window=window, fit=(first, last), metric=lyapunov["metric"]
        )
    return results


def _forecast(case: Case) -> dict[str, Any]:
    case.only("m", "tau", "n_test", "n_val", "grnn_sigma", "gmdh_keep", "gmdh_max_layers")
    config, m = case.config, case.config["m"]
    series = case.inputs["series"].double().numpy()
    features = StateSpaceFeatures(tau=config["tau"], m=m)
    x, y = features.table(series, one_hot(case.inputs["day_of_week"].numpy(), 7))
    test, fit = len(y) - config["n_test"], len(y) - config["n_test"] - config["n_val"]
    z = np.concatenate([Scaler.fit(x[:test, :m]).apply(x[:, :m]), x[:, m:]], 1)
    gmdh = GMDHRegressor(config["gmdh_keep"], config["gmdh_max_layers"])
    gmdh.fit(z[:fit, :m], y[:fit], (z[fit:test, :m], y[fit:test]))
    forecasts = {
        "grnn": GRNNRegressor(config["grnn_sigma"]).fit(z[:test], y[:test]).predict(z[test:]),
        "gmdh": gmdh.predict(z[test:, :m]),
        "naive": x[test:, 0],
    }
    results: dict[str, Any] = {"X": x, "y": y, "Z_test": z[test:], "gmdh_best_val_mse": gmdh.criteria_[-1][0]}
    results |= {f"gmdh_layer{index}_val_mse": criteria for index, criteria in enumerate(gmdh.criteria_)}
    measures = {"smape": smape, "nrmse": nrmse, "mae": mae, "mape": mape, "theil_u": theil_u}
    for name, forecast in forecasts.items():
        results[name] = forecast
        results |= {f"{name}_{key}": measure(y[test:], forecast) for key, measure in measures.items()}
    errors = {name: forecast - y[test:] for name, forecast in forecasts.items()}
    for name in case.outputs:
        if match := re.fullmatch(r"dm_([a-z]+)_([a-z]+)_h(\d+)_p(\d+)", name):
            first, second, horizon, power = match.groups()
            pair = (errors[first], errors[second])
            results[name] = diebold_mariano(*pair, horizon=int(horizon), power=int(power))
    absolute = (np.abs(errors["grnn"]), np.abs(errors["naive"]))
    results["ttest_rel"], results["ttest_welch"] = t_test(*absolute), t_test(*absolute, paired=False)
    return results
