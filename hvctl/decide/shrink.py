"""What neighbours can give without being interrupted, so that a victim can come back: memory above what they use and
are predicted to need, and CPU time above the latter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hvctl.decide.allocate import MIN_MEMORY, memory_floor
from hvctl.decide.victims import MIB, Seen
from hvctl.model.allocation import Allocation, Resources, resources
from hvctl.model.vm import State

_HEADROOM = 4
"""Where nobody predicts, a quarter more than what is used stays with the guest."""


@dataclass(frozen=True, slots=True)
class Shrink:
    """One neighbour, and what it is left with."""

    seen: Seen
    to: Allocation

    @property
    def gives(self) -> Resources:
        return self.seen.holds - resources(self.to)


def least(seen: Seen, margin: int) -> Allocation:
    """The least that a neighbour may be left with. What it says of its memory can only make that more."""
    has, need = seen.record.allocation, seen.need
    floor = memory_floor(seen.balloon, margin) if seen.balloon and seen.vm.has_balloon else None
    memory = has.memory
    if floor is not None:
        wanted = need.resources.memory if need.known else floor + floor // _HEADROOM
        memory = min(has.memory, -(-max(MIN_MEMORY, floor, wanted) // MIB) * MIB)
    quota = has.cpu_quota
    if need.known and need.resources.cpu < resources(has).cpu:
        quota = max(1, need.resources.cpu)
    return replace(has, memory=memory, cpu_quota=quota)


def shrinks(neighbours: Sequence[Seen], lacking: Resources, margin: int) -> tuple[tuple[Shrink, ...], Resources]:
    """Shrinks that give what lacks, lower priorities first, of no more neighbours than it takes; and what lacks
    still."""
    able = [
        s
        for s in neighbours
        if s.vm.state is State.RUNNING and s.vm.record and not s.vm.protected and not s.busy and s.had is None
    ]
    made: list[Shrink] = []
    for seen in sorted(able, key=lambda s: (s.record.priority, s.vm.name)):
        if not lacking.any:
            break
        has, low = seen.record.allocation, least(seen, margin)
        memory = max(low.memory, has.memory - -(-lacking.memory // MIB) * MIB)
        quota = has.cpu_quota
        if lacking.cpu and low.cpu_quota is not None:
            quota = max(low.cpu_quota, resources(has).cpu - lacking.cpu)
        shrink = Shrink(seen, replace(has, memory=memory, cpu_quota=quota))
        if (shrink.gives.least(lacking)).any:
            made.append(shrink)
            lacking -= shrink.gives
    return tuple(made), lacking
