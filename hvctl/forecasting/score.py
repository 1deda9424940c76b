"""How good forecasts are: every figure is per case first and then over virtual machines, because cases of one VM are
no independent witnesses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvctl.forecasting.series import F32, F64, I64

BOOTSTRAPS = 400


def pinball(actual: F32, forecast: F32, quantile: float, scale: F32) -> F32:
    """Loss of each case, in units of scale (the VM's size)."""
    short = (actual - forecast) / scale
    return np.asarray(np.maximum(quantile * short, (quantile - 1) * short), np.float32)


@dataclass(frozen=True, slots=True)
class Score:
    """Of one predictor on one set of cases; pinball, reserved and actual are means in units of the size.

    vm_coverage_p10: the coverage of the VM that nine of ten exceed. unserved: demand above the forecast as a share of
    all demand, averaged in units of the size. calibration_error: |coverage - quantile|.
    """

    cases: int
    pinball: float
    coverage: float
    vm_coverage_p10: float
    reserved: float
    actual: float
    unserved: float
    calibration_error: float


def score(actual: F32, forecast: F32, quantile: float, scale: F32, vm: I64) -> Score:
    covered = actual <= forecast
    used = actual / scale
    coverage = float(covered.mean())
    total = float(np.mean(used, dtype=np.float64))
    missing = float(np.mean(np.maximum(actual - forecast, 0) / scale, dtype=np.float64))
    return Score(
        cases=len(actual),
        pinball=float(np.mean(pinball(actual, forecast, quantile, scale), dtype=np.float64)),
        coverage=coverage,
        vm_coverage_p10=float(np.quantile(per_vm(covered.astype(np.float32), vm), 0.1)),
        reserved=float(np.mean(forecast / scale, dtype=np.float64)),
        actual=total,
        unserved=missing / total if total else 0.0,
        calibration_error=abs(coverage - quantile),
    )


def per_vm(values: F32, vm: I64) -> F64:
    """The mean of each VM's cases."""
    _, index = np.unique(vm, return_inverse=True)
    return np.bincount(index, values.astype(np.float64)) / np.bincount(index)


def gain_interval(ours: F32, theirs: F32, vm: I64, seed: int = 1) -> tuple[float, float]:
    """95 % interval of 1 - mean(ours) / mean(theirs): whole VMs are drawn again and again."""
    _, index = np.unique(vm, return_inverse=True)
    sums = np.stack([np.bincount(index, v.astype(np.float64)) for v in (ours, theirs)])
    draws = np.random.default_rng(seed).integers(0, sums.shape[1], (BOOTSTRAPS, sums.shape[1]))
    mine, other = sums[0][draws].sum(axis=1), sums[1][draws].sum(axis=1)
    low, high = np.quantile(1 - mine / np.maximum(other, 1e-30), (0.025, 0.975))
    return float(low), float(high)
