"""Forecasting of time series: chaos analysis, state space, models side by side, evaluation."""
