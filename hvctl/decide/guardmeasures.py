"""CPU and memory of a VM as a guard measures them: when each counts as exhausted, and how far it may grow. The numbers
are those of whoever looks, be it a node with its samples or a replay with a trace."""

from __future__ import annotations

from collections.abc import Mapping

from hvctl.decide.growth import FULL
from hvctl.decide.victims import MIB
from hvctl.model.allocation import Resources
from hvctl.model.guard import Measure, Points
from hvctl.model.vm import Vm

Quantiles = tuple[tuple[float, float], ...]


def cpu(vm: Vm, points: Points, room: Resources, quantiles: Quantiles) -> Measure:
    """In cores. room: what the VM may have on its host in all; quantiles: of its forecast peak."""
    has = vm.allocation
    if has.cpu_quota is None:
        limit, most = float(has.vcpus), float(min(vm.max_vcpus, room.cpu // 100))
    else:
        limit, most = has.cpu_quota / 100, min(has.vcpus, room.cpu / 100)
    return Measure("cpu", "cores", points, limit * FULL, (), most * FULL, quantiles)


def memory(
    vm: Vm,
    points: Points,
    claimed: Points,
    room: Resources,
    margin: int,
    quantiles: Quantiles,
    after: Mapping[str, float] | None = None,
) -> Measure:
    """In bytes. margin: what a guest keeps above what it uses; after: by part, what it would use after a reset of it.
    It grows in whole MiB, so of the room only those count."""
    most = min(vm.max_memory, room.memory // MIB * MIB) - margin
    limit = vm.allocation.memory - margin
    return Measure("memory", "bytes", points, limit, claimed, most, quantiles, after or {})


def resident(points: Points, available: int, most: int | None, after: Mapping[str, float] | None = None) -> Measure:
    """What the VM holds of its host's memory, in bytes, against what the host has left and against `most`, its part.
    points: one at least."""
    limit = points[-1][1] + available
    return Measure("resident", "bytes", points, limit if most is None else min(limit, float(most)), after=after or {})
