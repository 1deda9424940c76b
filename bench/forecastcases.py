"""Which questions a forecasting benchmark asks: virtual machines and days split so that nothing is judged on a VM, or on
a day, that it has seen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np

from hvctl.errors import UsageError
from hvctl.forecasting.lessons import GAPS, HISTORIES, LONGEST
from hvctl.forecasting.series import I64, Cases, Series

DAY: Final = 288
HISTORY_NAMES: Final = {12: "1 h", 72: "6 h", 288: "1 day", 2016: "7 days"}


@dataclass(frozen=True, slots=True)
class Split:
    """VMs (indexes) and slots: training up to `train_end`, calibration up to `calibration_end`, then the test."""

    train: I64
    calibration: I64
    test: I64
    train_end: int
    calibration_end: int
    end: int


def split(series: Series, text: str) -> Split:
    """text: shares of VMs for training, calibration and test, and the days in percent at which training and
    calibration end, as in 60/15/25@66/78. VMs are drawn by a hash of their names, so that adding one moves no other."""
    try:
        vms, days = ([float(n) for n in part.split("/")] for part in text.split("@"))
        a, b, c = vms
        d, e = days
    except ValueError as error:
        raise UsageError(f"{text!r} is no split.", "write shares of VMs and days, as in 60/15/25@66/78") from error
    if min(a, b, c) < 0 or not 0 < a + b + c <= 100 or not 0 <= d < e < 100 or b <= 0 or c <= 0:
        raise UsageError(f"the split {text!r} leaves a part empty.", "write shares of VMs and days, as in 60/15/25@66/78")
    place = np.array([int(hashlib.sha256(v.encode()).hexdigest()[:8], 16) / 2**32 for v in series.vms]) * 100
    first, second = (round(series.slots * share / 100) // DAY * DAY for share in (d, e))
    return Split(
        np.flatnonzero(place < a),
        np.flatnonzero((place >= a) & (place < a + b)),
        np.flatnonzero((place >= a + b) & (place < a + b + c)),
        first,
        second,
        series.slots,
    )


def hourly(vms: I64, first: int, last: int, horizon: int, seed: int, every: int = 12) -> Cases:
    """One case for each VM and hour, at a random minute, with a random gap and history, in the order of time."""
    rng = np.random.default_rng(seed)
    steps = np.arange(first, last - LONGEST - every, every)
    cut = np.repeat(steps, len(vms)) + rng.integers(0, every, len(steps) * len(vms))
    vm = np.tile(vms, len(steps))
    return Cases(
        vm, cut, rng.choice(GAPS, len(cut)), np.full(len(cut), horizon), rng.choice(HISTORIES, len(cut))
    )
