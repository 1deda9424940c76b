"""What a VM that was interrupted comes back with: its predicted need as an allocation that its machine can have."""

from __future__ import annotations

from dataclasses import replace

from hvctl.decide.allocate import MIN_MEMORY
from hvctl.decide.reservations import Wanted
from hvctl.decide.victims import MIB, Seen
from hvctl.model.allocation import Allocation, Resources
from hvctl.model.pool import Rung

HALF_LIFE = 3600.0
"""Room for a return has no end, since who comes back stays; of who does not come, half goes back in so many seconds."""


def wanted_return(uuid: str, size: Resources, at: float, why: str = "") -> Wanted:
    """The room that is to be kept for a VM that comes back at `at` (seconds since 1970)."""
    return Wanted(uuid, f"its return: {why}" if why else "its return", size, at, None, HALF_LIFE)


def returning(seen: Seen, rung: Rung) -> Allocation:
    """The predicted need, or what the VM is promised now where nobody predicts. A guest that keeps its RAM over the
    interruption comes back with no less memory than it had: only it can give that back."""
    has, need = seen.whole.allocation, seen.need
    if not need.known:
        return has
    memory = min(seen.vm.max_memory, max(MIN_MEMORY, -(-need.resources.memory // MIB) * MIB))
    if not rung.loses_work:
        memory = max(memory, has.memory)
    vcpus = min(seen.vm.max_vcpus, max(1, has.vcpus, -(-need.resources.cpu // 100)))
    quota = has.cpu_quota
    if quota is not None:
        quota = None if need.resources.cpu >= vcpus * 100 else max(quota, need.resources.cpu)
    return replace(has, vcpus=vcpus, memory=memory, cpu_quota=quota)
