"""How far a guest may be squeezed so that the memory which its page cache held goes back to the host, and what must be
there before that is tried. The balloon is what gives pages back; it is let go at once after."""

from __future__ import annotations

from hvctl.decide.allocate import MIN_MEMORY, memory_floor
from hvctl.model.plan import Refusal
from hvctl.model.vm import Balloon, State, Vm

_STEP = 1 << 20


def reclaim_refusal(vm: Vm) -> Refusal | None:
    """Why the page cache of a VM cannot be taken back, as far as can be told before anything is touched."""
    if vm.state is not State.RUNNING:
        return Refusal(
            f"{vm.name} is {vm.state}: only a guest that runs can drop its page cache.", f"hvctl vm start {vm.name}"
        )
    if not vm.has_agent:
        return Refusal(
            f"{vm.name} has no guest agent, and nobody else can have its guest drop the page cache.",
            f"hvctl vm adopt {vm.name} adds its channel",
        )
    if not vm.has_balloon:
        return Refusal(
            f"{vm.name} has no balloon device, so what its guest frees stays with QEMU.",
            f"virsh edit {vm.name}: add <memballoon model='virtio'/>, then start it anew",
        )
    return None


def squeeze_target(name: str, balloon: Balloon, memory: int, margin: int) -> int | Refusal:
    """The balloon target in bytes that takes what the guest does not use, in whole MiB: at least what it uses plus
    `margin` (memory_floor), at most `memory`, its allocation, which means that there is nothing to take.

    `balloon` has to be reported after the cache was dropped; an older report names the cache as usable too, and is no
    reason to give more, but it may miss what the guest took since.
    """
    floor = memory_floor(balloon, margin)
    if floor is None:
        return Refusal(
            f"{name} reports no memory statistics, so nobody knows what it can give.",
            "check the guest's balloon driver",
        )
    return min(memory, max(MIN_MEMORY, -(-floor // _STEP) * _STEP))
