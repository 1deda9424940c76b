"""From a resource that is to have more to the change of the allocation that gives it, and what of a limit counts as
used up."""

from __future__ import annotations

import math
from typing import Final

from hvctl.decide.victims import MIB
from hvctl.model.allocation import Change, DiskChange, NicChange
from hvctl.model.vm import Vm

FULL: Final = 0.95
"""The share of a rate's limit from which on it counts as exhausted: what is throttled never quite reaches it."""


def growth(vm: Vm, resource: str, limit: float, margin: int) -> Change:
    """limit: what the resource, as a guard measures it, is to have; margin: bytes that a guest keeps above what it
    uses. Rates of several disks or NICs grow by the same share."""
    has = vm.allocation
    match resource:
        case "memory":
            return Change(memory=min(vm.max_memory, math.ceil((limit + margin) / MIB) * MIB))
        case "cpu" if has.cpu_quota is None:
            return Change(vcpus=min(vm.max_vcpus, math.ceil(limit / FULL - 1e-9)))
        case "cpu":
            return Change(cpu_quota=math.ceil(limit / FULL * 100 - 1e-6))
        case "iops" | "disk-rate":
            name = "iops" if resource == "iops" else "rate"
            now = {d.target: value for d in has.disks if (value := getattr(d, name)) is not None}
            share = limit / FULL / sum(now.values())
            return Change(disks=tuple(DiskChange(t, **{name: math.ceil(v * share)}) for t, v in now.items()))
        case "net-in" | "net-out":
            name = "inbound" if resource == "net-in" else "outbound"
            now = {n.mac: value for n in has.nics if (value := getattr(n, name)) is not None}
            share = limit / FULL / sum(now.values())
            return Change(nics=tuple(NicChange(m, **{name: math.ceil(v * share)}) for m, v in now.items()))
    return Change()
