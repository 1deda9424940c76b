"""Two readings of a host into what each VM used between them, and what happened to VMs.

A gap and never a guess: where a counter went back, a process is another one, a cycle is missing or a clock jumped,
there is no sample. Rates are over the clock that never jumps; the wall clock only says when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvctl.model.meter import DiskCounters, NicCounters, Reading, VmReading
from hvctl.model.sample import EventKind, Sample, VmEvent

BLUR = 0.2
"""The longest that two looks may take together, as a share of the time between them: a counter is of any moment within
its look, so a rate is that much off at worst."""

JUMP = 2.0
"""Seconds by which the wall clock may differ from the steady one between two readings before it has jumped."""

Counts = tuple[float | None, float | None, float | None, float | None]
_UNKNOWN: Counts = (None, None, None, None)


@dataclass(frozen=True, slots=True)
class Used:
    """The samples, and why there are none (None: there is nothing to say)."""

    samples: tuple[Sample, ...]
    gap: str | None = None


def used(before: Reading | None, now: Reading, longest: float) -> Used:
    """What each VM used between two readings; longest is how many seconds may lie between them."""
    gap = _gap(before, now, longest)
    if before is None or gap:
        return Used((), gap)
    seconds = now.clock - before.clock
    known = {vm.uuid: vm for vm in before.vms}
    found = []
    for vm in now.vms:
        old = known.get(vm.uuid)
        if old is not None and old.life == vm.life:
            found.append(_sample(old, vm, int(now.at), seconds))
    return Used(tuple(found))


def _gap(before: Reading | None, now: Reading, longest: float) -> str | None:
    if before is None:
        return "there is no earlier reading"
    if before.boot_id != now.boot_id:
        return "the host was restarted"
    seconds = now.clock - before.clock
    if seconds <= 0:
        return "no time lies between two readings"
    if seconds > longest:
        return f"{seconds:.0f} s lie between two readings"
    if before.took + now.took > BLUR * seconds:
        return f"two readings {seconds:.1f} s apart took {before.took + now.took:.1f} s"
    if abs((now.at - before.at) - seconds) > JUMP:
        return f"the clock jumped by {now.at - before.at - seconds:+.0f} s"
    return None


def _sample(old: VmReading, now: VmReading, at: int, seconds: float) -> Sample:
    vcpus = _per_vcpu(old.vcpu_times, now.vcpu_times, seconds)
    disk = _devices(old.disks, now.disks, seconds)
    net = _devices(old.nics, now.nics, seconds)
    stalls: Sequence[float | None] = (None, None, None)
    if old.stalls is not None and now.stalls is not None:
        stalls = [_share(_grown(a, b), seconds) for a, b in zip(old.stalls, now.stalls, strict=True)]
    hardware: Sequence[float | None] = (None, None, None)
    if old.hardware is not None and now.hardware is not None:
        hardware = [_rate(_grown(a, b), seconds) for a, b in zip(old.hardware, now.hardware, strict=True)]
    inside = now.available is not None and now.usable is not None
    return Sample(
        now.uuid,
        now.name,
        at,
        round(seconds, 3),
        now.uptime if now.uptime is None else round(now.uptime),
        now.vcpus,
        _cores(_grown(old.cpu, now.cpu), seconds),
        max((used for _, used in vcpus), default=None),
        _cores(_grown(old.steal, now.steal), seconds),
        now.memory,
        max(0, now.available - now.usable) if inside else None,  # type: ignore[operator]
        now.unused,
        now.available,
        now.usable,
        now.rss,
        disk[0],
        disk[1],
        disk[2],
        disk[3],
        net[0],
        net[1],
        net[2],
        net[3],
        now.connections,
        stalls[0],
        stalls[1],
        stalls[2],
        hardware[0],
        hardware[1],
        hardware[2],
        vcpus,
    )


def _grown(old: int | None, now: int | None) -> int | None:
    """What a counter grew by; None if it is not known or began anew."""
    if old is None or now is None or now < old:
        return None
    return now - old


def _cores(nanoseconds: int | None, seconds: float) -> float | None:
    return None if nanoseconds is None else round(nanoseconds / (seconds * 1e9), 4)


def _share(microseconds: int | None, seconds: float) -> float | None:
    """At most 1: the kernel adds up a stall when it ends, so one of before may be counted now."""
    return None if microseconds is None else min(1.0, round(microseconds / (seconds * 1e6), 4))


def _rate(count: int | None, seconds: float) -> float | None:
    """Per second; whole where fractions say nothing, which takes half the room."""
    if count is None:
        return None
    rate = count / seconds
    return round(rate) if rate >= 100 else round(rate, 2)


def _per_vcpu(
    old: tuple[tuple[int, int], ...], now: tuple[tuple[int, int], ...], seconds: float
) -> tuple[tuple[int, float], ...]:
    before = dict(old)
    grown = ((number, _cores(_grown(before.get(number), time), seconds)) for number, time in now)
    return tuple((number, cores) for number, cores in grown if cores is not None)


def _devices(
    old: tuple[DiskCounters, ...] | tuple[NicCounters, ...] | None,
    now: tuple[DiskCounters, ...] | tuple[NicCounters, ...] | None,
    seconds: float,
) -> Counts:
    """The sums over all devices; a gap if one came, went or began anew, since its part is not known."""
    if old is None or now is None or len(old) != len(now):
        return _UNKNOWN
    first = second = third = fourth = 0
    for before, after in zip(old, now, strict=True):
        if before[0] != after[0]:
            return _UNKNOWN
        a, b, c, d = (y - x for x, y in zip(before[1:], after[1:], strict=True))
        if a < 0 or b < 0 or c < 0 or d < 0:
            return _UNKNOWN
        first += a
        second += b
        third += c
        fourth += d
    return _rate(first, seconds), _rate(second, seconds), _rate(third, seconds), _rate(fourth, seconds)


def happened(before: Reading | None, now: Reading) -> tuple[VmEvent, ...]:
    """VMs that started and stopped between two readings. Without an earlier one nothing is known to have happened; a
    restart of the host ended all that ran."""
    if before is None:
        return ()
    old = {vm.uuid: vm for vm in before.vms}
    new = {vm.uuid: vm for vm in now.vms}
    lost = "the host was restarted" if before.boot_id != now.boot_id else ""
    events = []
    for uuid, vm in old.items():
        after = new.get(uuid)
        if after is None or after.life != vm.life:
            events.append(VmEvent(uuid, vm.name, EventKind.STOP, now.at, lost))
    for uuid, vm in new.items():
        earlier = old.get(uuid)
        if earlier is None or earlier.life != vm.life:
            at = now.at if vm.uptime is None else now.at - vm.uptime
            events.append(VmEvent(uuid, vm.name, EventKind.START, at))
    return tuple(events)
