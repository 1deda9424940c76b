"""Forecasts of demand as pure functions of numpy arrays: no library of models, no file and no clock."""
