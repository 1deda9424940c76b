"""Demand of many VMs on one regular grid of time: what forecasts are made from, in training and in serving alike.
A gap is NaN, and so is a size or a start that nobody knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from hvctl.errors import UsageError
from hvctl.model.sample import UNITS as UNITS

F32: TypeAlias = npt.NDArray[np.float32]
F64: TypeAlias = npt.NDArray[np.float64]
I64: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]

STEP: Final = 300
RESOURCES: Final = ("cpu", "memory", "disk", "network")
TARGETS: Final = ("peak", "mean")  # over the horizon
# Below this a demand is noise: it is added to both sides of every ratio, in the unit of the resource.
FLOOR: Final[Mapping[str, float]] = {"cpu": 0.005, "memory": 4.0, "disk": 1.0, "network": 0.01, "iops": 0.1}


@dataclass(frozen=True, slots=True)
class Series:
    """vms are ids; start is the epoch of slot 0 and step the length of a slot, in seconds.

    values: resource to [vms, slots], the mean over each slot in the unit of UNITS. sizes: resource to [vms], what the
    VM may use at most. starts: epoch of each VM's last start. restarts: resource to [vms], the peak of the first hour
    after its last restart.
    """

    vms: tuple[str, ...]
    start: int
    values: Mapping[str, F32]
    sizes: Mapping[str, F32] = field(default_factory=dict)
    starts: F64 | None = None
    restarts: Mapping[str, F32] = field(default_factory=dict)
    step: int = STEP

    def __post_init__(self) -> None:
        if self.step != STEP:
            raise UsageError(f"a series of {self.step} s is none that forecasts know.", f"roll it up to {STEP} s")
        for name, found in self.values.items():
            if name not in UNITS or found.ndim != 2 or found.dtype != np.float32 or len(found) != len(self.vms):
                raise UsageError(f"the values of {name!r} are not float32 in [VMs, slots].")
        if len({found.shape for found in self.values.values()}) > 1:
            raise UsageError("the resources of a series have different lengths.")

    @property
    def slots(self) -> int:
        return next((found.shape[1] for found in self.values.values()), 0)

    def size(self, resource: str) -> F32:
        """[vms], NaN where it is unknown."""
        found = self.sizes.get(resource)
        return np.full(len(self.vms), np.nan, np.float32) if found is None else found

    def restart(self, resource: str) -> F32:
        found = self.restarts.get(resource)
        return np.full(len(self.vms), np.nan, np.float32) if found is None else found

    def take(self, rows: Sequence[int] | I64) -> Series:
        """The same grid for some of the VMs."""
        index = np.asarray(rows, np.int64)
        return Series(
            tuple(self.vms[i] for i in index),
            self.start,
            {n: v[index] for n, v in self.values.items()},
            {n: v[index] for n, v in self.sizes.items()},
            None if self.starts is None else self.starts[index],
            {n: v[index] for n, v in self.restarts.items()},
        )

    def until(self, slots: int) -> Series:
        """Without what came at slot `slots` and later."""
        return Series(
            self.vms,
            self.start,
            {n: v[:, :slots] for n, v in self.values.items()},
            self.sizes,
            self.starts,
            self.restarts,
        )


@dataclass(frozen=True, slots=True)
class Cases:
    """Questions, one a row: a VM (index), the first slot that is not seen, and in slots the gap after it, the horizon,
    and how much of the history may be used."""

    vm: I64
    cut: I64
    gap: I64
    horizon: I64
    history: I64

    def __len__(self) -> int:
        return len(self.vm)

    def take(self, rows: I64 | Flags) -> Cases:
        return Cases(self.vm[rows], self.cut[rows], self.gap[rows], self.horizon[rows], self.history[rows])

    def at(self, horizon: int) -> Cases:
        """The same questions about another horizon."""
        return Cases(self.vm, self.cut, self.gap, np.full_like(self.horizon, horizon), self.history)

    @classmethod
    def now(cls, vms: int, cut: int, gap: int, horizon: int, history: int) -> Cases:
        """One question about each VM, all at the same time."""
        return cls(np.arange(vms), *(np.full(vms, v, np.int64) for v in (cut, gap, horizon, history)))


def outcomes(series: Series, resource: str, cases: Cases) -> tuple[F32, F32]:
    """What came: peak and mean over the horizon after the gap; NaN where under three quarters of it were measured."""
    peak = np.full(len(cases), np.nan, np.float32)
    mean = np.full(len(cases), np.nan, np.float32)
    values = series.values[resource]
    for horizon in np.unique(cases.horizon):
        rows = np.flatnonzero((cases.horizon == horizon) & (cases.cut + cases.gap + horizon <= values.shape[1]))
        if not len(rows):
            continue
        windows = np.lib.stride_tricks.sliding_window_view(values, int(horizon), axis=1)
        seen = windows[cases.vm[rows], cases.cut[rows] + cases.gap[rows]]
        known = np.isfinite(seen)
        count = known.sum(axis=1)
        enough = count >= 0.75 * horizon
        peak[rows] = np.where(enough, np.where(known, seen, -np.inf).max(axis=1), np.nan)
        mean[rows] = np.where(enough, np.where(known, seen, 0).sum(axis=1) / np.maximum(count, 1), np.nan)
    return peak, mean
