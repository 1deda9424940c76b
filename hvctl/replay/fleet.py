"""The VMs of a trace as a node would know them, on hosts that fit a share of their sizes; what no trace tells (hosts,
priorities, who is guaranteed) is drawn by a seed."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from hvctl.decide.allocate import MIN_MEMORY
from hvctl.decide.victims import MIB
from hvctl.errors import UsageError
from hvctl.forecasting.series import F32, STEP, Series
from hvctl.model.allocation import Allocation, Resources, resources
from hvctl.model.host import Capacity

COUNTED: Final = ("cpu", "memory")
PRIORITIES: Final = (100, 300, 500, 500, 500, 700, 900)
GUARANTEED: Final = 0.3
"""The share of a host's sizes up to which its VMs are guaranteed; the others are interruptible."""
VMS_OF_A_HOST: Final = 30
SHORTEST: Final = 24
"""Slots of history before the replay begins: of less nothing can be forecast."""


@dataclass(frozen=True, slots=True)
class Member:
    """A VM of the fleet; number is its row in the series. It is there from slot `first` to before slot `last`. A
    guaranteed one always has its size, and is never interrupted."""

    number: int
    uuid: str
    name: str
    host: int
    size: Allocation
    priority: int
    guaranteed: bool
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Fleet:
    """demand: resource to [VMs, slots], never above the size, 0 where nothing was measured, in the units of forecasts.
    Sizes are the most that the trace shows of a VM. The replay begins at slot `begin`."""

    members: tuple[Member, ...]
    capacities: tuple[Capacity, ...]
    series: Series
    demand: dict[str, F32]
    begin: int

    @property
    def seconds(self) -> int:
        return (self.series.slots - self.begin) * STEP


def fleet_of(
    series: Series, *, begin: int, fit: float, hosts: int | None = None, vms: int | None = None, seed: int = 1
) -> Fleet:
    """begin: the first slot that is replayed. fit: the share of the sizes of its VMs that each host has. vms: so many,
    drawn by the seed (None: all). UsageError for a trace without CPU and memory and their sizes, and for one that is
    too short."""
    missing = [r for r in COUNTED if r not in series.values or not np.isfinite(series.size(r)).any()]
    if missing:
        raise UsageError(
            f"the trace has no {' and '.join(missing)} of VMs with their sizes.",
            "columns: vm, slot, cores, mem_cap_mb, cpu_cores, mem_active_mb",
        )
    if not SHORTEST <= begin < series.slots:
        raise UsageError(
            f"a trace of {series.slots} slots cannot be replayed from slot {begin} on.",
            f"{SHORTEST} slots of history come before, and one at least after",
        )
    if not 0 < fit <= 10:
        raise UsageError(f"hosts that fit {fit:g} of the sizes.", "--fit 0.6")
    usable = np.flatnonzero(np.isfinite(series.size("cpu")) & np.isfinite(series.size("memory")))
    rng = np.random.default_rng(seed)
    if vms is not None:
        if not 1 <= vms <= len(usable):
            raise UsageError(f"the trace has {len(usable)} VMs with sizes, not {vms}.", "--vms names fewer")
        usable = np.sort(rng.permutation(usable)[:vms])
    number = max(1, len(usable) // VMS_OF_A_HOST) if hosts is None else hosts
    if not 1 <= number <= len(usable):
        raise UsageError(f"{len(usable)} VMs do not need {number} hosts.", "--hosts names fewer")
    taken = series.take(usable)
    taken = Series(taken.vms, taken.start, {r: taken.values[r] for r in COUNTED}, {r: taken.size(r) for r in COUNTED})
    sizes = [_size(float(taken.size("cpu")[i]), float(taken.size("memory")[i])) for i in range(len(usable))]
    place = _spread([resources(s) for s in sizes], number)
    known = np.isfinite(taken.values["cpu"]) | np.isfinite(taken.values["memory"])
    order = rng.choice(PRIORITIES, len(usable))
    safe = _guaranteed([resources(s) for s in sizes], place, [int(i) for i in rng.permutation(len(usable))])
    members = tuple(
        Member(
            i, hashlib.sha256(name.encode()).hexdigest()[:32], name, place[i], sizes[i], int(order[i]), i in safe,
            int(known[i].argmax()) if known[i].any() else taken.slots,
            taken.slots - int(known[i, ::-1].argmax()),
        )
        for i, name in enumerate(taken.vms)
    )  # fmt: skip
    totals = [sum((resources(m.size) for m in members if m.host == h), Resources()) for h in range(number)]
    capacities = tuple(Capacity(int(t.cpu * fit), int(t.memory * fit)) for t in totals)
    demand = {
        r: np.minimum(np.nan_to_num(np.maximum(taken.values[r], 0)), taken.size(r)[:, None]).astype(np.float32)
        for r in COUNTED
    }
    return Fleet(members, capacities, taken, demand, begin)


def _size(cores: float, memory: float) -> Allocation:
    return Allocation(max(1, math.ceil(cores)), max(MIN_MEMORY, math.ceil(memory) * MIB))


def _spread(sizes: list[Resources], hosts: int) -> list[int]:
    """The host of each: the largest first, each to where least is so far, by the share of the scarcer resource."""
    total = sum(sizes, Resources())
    load = np.zeros((hosts, len(COUNTED)))
    share = np.array([[s.cpu / total.cpu, s.memory / total.memory] for s in sizes])
    place = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-share[i].max(), i)):
        place[i] = int(np.argmin((load + share[i]).max(axis=1)))
        load[place[i]] += share[i]
    return place


def _guaranteed(sizes: list[Resources], place: list[int], order: list[int]) -> set[int]:
    """In this order, as long as they are no more than their share of their host in both resources."""
    totals = [
        sum((s for s, h in zip(sizes, place, strict=True) if h == host), Resources()) for host in range(max(place) + 1)
    ]
    taken = [Resources()] * len(totals)
    chosen = set()
    for i in order:
        more, most = taken[place[i]] + sizes[i], totals[place[i]]
        if more.cpu <= GUARANTEED * most.cpu and more.memory <= GUARANTEED * most.memory:
            taken[place[i]] = more
            chosen.add(i)
    return chosen
