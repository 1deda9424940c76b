"""The page cache of a guest goes back to the host: dropped in the guest, taken by the balloon, and the allocation given
again. The guest's word sets how far it is squeezed, and the file of its RAM tells what was won."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from hvctl.adapters.guest import agent as guest
from hvctl.decide.reclaim import reclaim_refusal, squeeze_target
from hvctl.engine.applied import agent_call
from hvctl.errors import GuestError, RefusedError
from hvctl.model.plan import Refusal
from hvctl.model.vm import Balloon, Vm
from hvctl.ports import Host
from hvctl.units import format_size

# A guest reports once a second, and the report's time is in whole seconds.
_REPORT_SECONDS: Final = 10.0
_REPORT_POLL: Final = 0.1


@dataclass(frozen=True, slots=True)
class Reclaimed:
    """Bytes. before and after are of guest RAM on the host (None: it is in no file that can be read, so nobody can
    tell); target is what the balloon was asked to leave the guest, reached what it left."""

    before: int | None
    after: int | None
    target: int
    reached: int

    @property
    def won(self) -> int | None:
        """Negative where the guest touched more meanwhile than came back."""
        return None if self.before is None or self.after is None else self.before - self.after


def reclaim(host: Host, vm: Vm, margin: int, seconds: float = 30.0) -> Reclaimed:
    """Drop, squeeze, and give `vm.allocation.memory` again, the last whatever became of the squeeze.

    `seconds` are for the guest to drop its cache (it writes back what is dirty first). RefusedError: it cannot be
    tried. GuestError: the guest refuses, does not report, or does not take its memory back; but for the last its memory
    is as before. Killed in between, the guest is left with less than its allocation, which is to be given again.
    """
    refusal = reclaim_refusal(vm)
    if refusal:
        raise RefusedError(refusal.message, refusal.hint)
    memory = vm.allocation.memory
    before = held(vm)
    guest.drop_caches(agent_call(host, vm.uuid), seconds)
    target = squeeze_target(vm.name, fresh_balloon(host, vm), memory, margin)
    if isinstance(target, Refusal):
        raise RefusedError(target.message, target.hint)
    if target == memory:
        return Reclaimed(before, held(vm), target, memory)
    try:
        reached = host.domains.set_balloon(vm.uuid, target)
    finally:
        restored = host.domains.set_balloon(vm.uuid, memory)
    if restored != memory:
        raise GuestError(
            f"the guest of {vm.name} has {format_size(restored)} and does not take the rest of its "
            f"{format_size(memory)} back.",
            f"hvctl allocate {vm.name} --memory {format_size(memory)}",
        )
    return Reclaimed(before, held(vm), target, reached)


def held(vm: Vm) -> int | None:
    """Bytes of guest RAM that the host has; None where it is in no file that can be read."""
    # It brings numpy, and every command that changes something imports this module.
    from hvctl.adapters.ram.ramfile import resident

    try:
        return sum(resident(region.path) for region in vm.ram) if vm.ram else None
    except RefusedError:
        return None


def fresh_balloon(host: Host, vm: Vm) -> Balloon:
    """The guest's next report of its memory; GuestError if none comes. libvirt has no event for reports, so they are
    looked for."""
    asked = time.monotonic()
    while True:
        # Before the look: then a report that is younger than this has surely come since.
        waited = time.monotonic() - asked
        balloon = host.domains.balloon(vm.uuid)
        if balloon.reported and balloon.age is not None and balloon.age < waited:
            return balloon
        if waited >= _REPORT_SECONDS:
            raise GuestError(
                f"the guest of {vm.name} did not report its memory within {_REPORT_SECONDS:g} s, so nobody knows what "
                "it can give.",
                "check the guest's balloon driver",
            )
        time.sleep(_REPORT_POLL)
