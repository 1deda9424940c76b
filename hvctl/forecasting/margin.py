"""Margins: a fixed one tuned on past cases, and one that follows each VM while it runs (quantile tracking in log
space). The latter only ever adds: a forecast is never shrunk below its raw quantile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, assert_never

import numpy as np

from hvctl.forecasting.score import pinball
from hvctl.forecasting.series import F32, F64, I64, Flags

MIN_CASES: Final = 24  # of one VM, before its own record counts
RATE: Final = 0.02
FLEET_RATE: Final = 0.15  # per hour in which all of a fleet of FLEET cases missed
FLEET: Final = 50
DEBT: Final = 0.2  # how far hits may carry a VM below its calibration, so that it does not creep up by chance
LARGEST: Final = 3.0  # e^3: twenty times the raw forecast


class Kind(StrEnum):
    TIMES = "times"
    PLUS = "plus"
    LEVEL = "level"


@dataclass(frozen=True, slots=True)
class Known:
    """What a margin may use of each case when it is asked: the size (NaN: nobody knows) and the largest demand seen."""

    size: F32
    largest: F32

    @property
    def unit(self) -> F32:
        return np.where(np.isfinite(self.size), self.size, self.largest).astype(np.float32)

    def take(self, rows: I64 | Flags) -> Known:
        return Known(self.size[rows], self.largest[rows])


@dataclass(frozen=True, slots=True)
class Margin:
    """(forecast + floor) * amount - floor, or forecast + amount in units of the VM (PLUS) or of the resource (LEVEL);
    never below 0, never above the VM's size."""

    kind: Kind = Kind.TIMES
    amount: float = 1.0

    def apply(self, forecast: F32, known: Known, floor: float) -> F32:
        match self.kind:
            case Kind.TIMES:
                raised = (forecast + floor) * self.amount - floor
            case Kind.PLUS:
                raised = forecast + self.amount * known.unit
            case Kind.LEVEL:
                raised = forecast + self.amount
            case _:
                assert_never(self.kind)
        return capped(raised, known.size)


def capped(forecast: F32, size: F32) -> F32:
    """Demand cannot exceed the size; an unknown size caps nothing."""
    return np.fmin(np.maximum(forecast, 0), size).astype(np.float32)


def quantile_of(values: F32, weights: F32, quantile: float) -> float:
    """The weighted quantile: what minimises the weighted pinball loss."""
    order = np.argsort(values)
    total = np.cumsum(weights[order], dtype=np.float64)
    return float(values[order[min(int(np.searchsorted(total, quantile * total[-1])), len(order) - 1)]])


def _candidates(
    actual: F32, forecast: F32, quantile: float, weight: F32, known: Known, floor: float, priced: bool
) -> list[Margin]:
    """Of each kind the margin that is the weighted quantile of what was missing. priced: with the weights under which
    that minimises the pinball loss; otherwise with equal ones, which gives it exactly this coverage."""
    unit, ones = known.unit + np.float32(floor), np.ones_like(actual)
    missing = actual - forecast
    return [
        Margin(
            Kind.TIMES,
            quantile_of(
                (actual + floor) / (forecast + floor), (forecast + floor) * weight if priced else ones, quantile
            ),
        ),
        Margin(Kind.PLUS, quantile_of(missing / unit, unit * weight if priced else ones, quantile)),
        Margin(Kind.LEVEL, quantile_of(missing, weight if priced else ones, quantile)),
    ]


def tune(actual: F32, forecast: F32, quantile: float, scale: F32, known: Known, floor: float) -> tuple[Margin, float]:
    """The margin, of all kinds, with the lowest pinball loss (in units of scale), and that loss."""
    found = _candidates(actual, forecast, quantile, np.float32(1) / scale, known, floor, priced=True)
    losses = (pinball(actual, m.apply(forecast, known, floor), quantile, scale) for m in found)
    return min(
        ((m, float(np.mean(x, dtype=np.float64))) for m, x in zip(found, losses, strict=True)), key=lambda f: f[1]
    )


def covering(
    actual: F32, forecast: F32, coverage: float, scale: F32, known: Known, floor: float
) -> tuple[Margin, float]:
    """The margin with exactly this coverage that reserves least, and what it reserves (mean, in units of scale)."""
    found = _candidates(actual, forecast, coverage, np.float32(1) / scale, known, floor, priced=False)
    reserved = ((m, float(np.mean(m.apply(forecast, known, floor) / scale, dtype=np.float64))) for m in found)
    return min(reserved, key=lambda f: f[1])


class OnlineMargin:
    """One logarithmic margin for the fleet and one per VM, of one resource and quantile, raised at a miss and lowered
    at a hit so that misses become as rare as stated. shift is the resource's, from its calibration."""

    def __init__(
        self, vms: int, quantile: float, shift: float = 0.0, rate: float = RATE, fleet_rate: float = FLEET_RATE
    ) -> None:
        self.quantile, self.rate, self.fleet_rate, self.shift = quantile, rate, fleet_rate, max(shift, 0.0)
        self.fleet = 0.0
        self.level: F64 = np.zeros(vms)
        self.seen: I64 = np.zeros(vms, np.int64)

    def of(self, vm: I64) -> F32:
        """What is added to log(forecast + floor), at least 0."""
        own = np.where(self.seen[vm] >= MIN_CASES, self.level[vm], 0.0)
        return np.clip(self.shift + self.fleet + own, 0, LARGEST).astype(np.float32)

    def apply(self, vm: I64, forecast: F32, floor: F32 | float, size: F32) -> F32:
        return capped((forecast + floor) * np.exp(self.of(vm)) - floor, size)

    def learn(self, vm: I64, missed: F32) -> None:
        """missed: 1 where the demand exceeded what was forecast with this margin, else 0; NaN teaches nothing. A VM
        may occur several times."""
        known = np.isfinite(missed)
        vm, missed = vm[known], missed[known]
        if not len(vm):
            return
        step = self.fleet_rate * min(1.0, len(vm) / FLEET) * (float(missed.mean()) - (1 - self.quantile))
        self.fleet = float(np.clip(self.fleet + step, -self.shift - DEBT, LARGEST))
        np.add.at(self.seen, vm, 1)
        np.add.at(self.level, vm, self.rate * (missed - (1 - self.quantile)))
        np.clip(self.level, -self.shift - DEBT, LARGEST, out=self.level)

    def drift(self) -> Mapping[str, float]:
        """How far the margins of the fleet and of its VMs have moved from the calibration, as factors."""
        known = self.level[self.seen >= MIN_CASES]
        if not len(known):
            return {"vms": 0.0, "fleet": float(np.exp(self.fleet)), "median": 1.0, "p90": 1.0, "max": 1.0}
        median, p90 = np.exp(np.quantile(known, (0.5, 0.9)))
        return {
            "vms": float(len(known)),
            "fleet": float(np.exp(self.fleet)),
            "median": float(median),
            "p90": float(p90),
            "max": float(np.exp(known.max())),
        }


def follow(
    margin: OnlineMargin,
    vm: I64,
    cut: I64,
    ends: I64,
    forecast: F32,
    actual: F32,
    floor: F32,
    size: F32,
    every: int = 12,
) -> F32:
    """What a fleet would have been told, hour by hour: each forecast with the margin of its time, which has learned
    only from outcomes that were complete by then. cut and ends (of the outcome) are slots; the order is free."""
    told = np.empty_like(forecast)
    hour = cut // every
    order = np.argsort(hour, kind="stable")
    starts = np.flatnonzero(np.diff(hour[order], prepend=-1))
    due = order[np.argsort(ends[order], kind="stable")]
    done = 0
    for first, last in zip(starts, [*starts[1:], len(order)], strict=True):
        rows = order[first:last]
        known = done + int(np.searchsorted(ends[due[done:]], hour[rows[0]] * every, side="right"))
        past, done = due[done:known], known
        # Every outcome that is complete by now was asked about in an earlier hour, so it has been told.
        margin.learn(
            vm[past], np.where(np.isfinite(actual[past]), actual[past] > told[past], np.nan).astype(np.float32)
        )
        told[rows] = margin.apply(vm[rows], forecast[rows], floor[rows], size[rows])
    return told
