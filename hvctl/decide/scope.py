"""What `--only` and `--keep` name, and how coherent a guest is that goes back in only those parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hvctl.errors import UsageError
from hvctl.model.plan import Refusal
from hvctl.model.reset import WHOLE, Coherence, DiskPart, Scope
from hvctl.model.snapshot import Range, Snapshot
from hvctl.model.vm import Disk, Vm
from hvctl.units import parse_size

PARTS = "ram, devices, disks, ram:BASE-END, disk:NAME, disk:NAME:START-END, cache, net"


def parse_scope(only: Sequence[str], keep: Sequence[str] = ()) -> Scope:
    """The scope that these words name; UsageError."""
    kept = tuple(word.removeprefix("disk:") for part in keep for word in part.split(",") if word)
    words = [word for part in only for word in part.split(",") if word]
    if not words:
        return Scope(keep=kept) if kept else WHOLE
    if kept:
        raise UsageError("--only names what goes back, --keep what does not: give one of them.")
    ram = devices = all_disks = cache = net = False
    disks: list[DiskPart] = []
    ranges: list[Range] = []
    for word in words:
        kind, colon, rest = word.partition(":")
        match kind, colon + rest:
            case "ram", "":
                ram = True
            case "devices", "":
                devices = True
            case "disks", "":
                all_disks = True
            case "cache", "":
                cache = True
            case "net", "":
                net = True
            case "ram", _:
                ranges.append(parse_range(rest, word))
            case "disk", _ if rest:
                name, colon, part = rest.partition(":")
                # What follows the colon may be missing by mistake, which must not mean the whole disk.
                disks.append(DiskPart(name, parse_range(part, word) if colon else None))
            case _:
                raise UsageError(f"{word!r} is not a part of a VM.", f"parts: {PARTS}")
    if ram and ranges:
        raise UsageError("`ram` is all of it: a range beside it says nothing more.")
    if all_disks and disks:
        raise UsageError("`disks` is all of them: a disk beside it says nothing more.")
    return Scope(ram, devices, None if all_disks else tuple(disks), (), tuple(ranges), cache, net)


def parse_range(text: str, whole: str) -> Range:
    """START-END in bytes: hexadecimal (0x…), or sizes with units; UsageError."""
    start, dash, end = text.partition("-")
    try:
        found = Range(_offset(start), _offset(end))
    except (ValueError, UsageError) as e:
        raise UsageError(
            f"{whole!r} has no range of bytes.", "write START-END, like 0x10000000-0x18000000 or 0-64MiB"
        ) from e
    if not dash or not found.start < found.end:
        raise UsageError(f"{whole!r} has a range that ends before it starts.", "write START-END; END is not part of it")
    return found


def _offset(text: str) -> int:
    if text.startswith("0x"):
        return int(text, 16)
    return 0 if text == "0" else parse_size(text)


def disk_of(vm: Vm, name: str) -> Disk | Refusal:
    """A writable disk by target or serial."""
    for disk in vm.disks:
        if name in (disk.target, disk.name):
            if disk.writable:
                return disk
            return Refusal(f"disk {name} of {vm.name} is read-only: it never changes.")
    have = ", ".join(d.target for d in vm.disks if d.writable) or "none"
    return Refusal(f"{vm.name} has no disk {name}.", f"its writable disks: {have}")


def each_disk(vm: Vm, scope: Scope) -> Scope:
    """Without RAM and devices disks go back one by one: then all of them are named."""
    if scope.disks is not None or (scope.ram and scope.devices):
        return scope
    named = (d for d in vm.disks if d.writable and not {d.target, d.name} & set(scope.keep))
    return replace(scope, disks=tuple(DiskPart(d.target) for d in named), keep=())


def disk_targets(vm: Vm, scope: Scope) -> tuple[str, ...]:
    """Targets of the disks that are named one by one."""
    found = (disk_of(vm, part.disk) for part in scope.disks or ())
    return tuple(d.target for d in found if not isinstance(d, Refusal))


def classify(
    vm: Vm, snapshot: Snapshot, scope: Scope, in_use: frozenset[str] | None, *, replug: bool = False
) -> tuple[Coherence, tuple[str, ...]]:
    """How coherent the guest is after it, with reasons. in_use are the targets of disks that the guest says it uses
    now, None if it was not asked or did not answer: what is not known counts as in use. replug: disks are unplugged for
    it, and what the guest keeps of one that went can never reach the one that comes."""
    if scope.ram and scope.devices:
        left = _left_out(vm, scope)
        bad = [_kept(d, snapshot) for d in left if snapshot.mounted is None or d.target in snapshot.mounted]
        return (Coherence.INCOHERENT if bad else Coherence.COHERENT), tuple(bad)
    if scope.ram or scope.devices:
        one, other = ("RAM", "the devices' state") if scope.ram else ("the devices' state", "RAM")
        return Coherence.INCOHERENT, (f"{one} would be of another moment than {other}",)
    worst, reasons = Coherence.COHERENT, []
    for r in scope.ranges:
        if not any(owned.holds(r) for owned in snapshot.owned):
            worst = Coherence.INCOHERENT
            reasons.append(f"no application declared {r.start:#x}-{r.end:#x} its own when the snapshot was taken")
    for part in scope.disks or ():
        disk = disk_of(vm, part.disk)
        if isinstance(disk, Refusal):
            continue
        if replug:
            if snapshot.mounted is None or disk.target in snapshot.mounted:
                worst = max(worst, Coherence.CRASH_CONSISTENT, key=list(Coherence).index)
                reasons.append(f"{_used(disk, snapshot)}: what comes back on it is as after a power failure")
            if in_use is None or disk.target in in_use:
                how = "if the guest uses" if in_use is None else "the guest uses"
                reasons.append(f"{how} {disk.target}, its programs get I/O errors until they open the new one")
        elif in_use is None or disk.target in in_use:
            worst = Coherence.INCOHERENT
            how = "the guest does not say whether it uses" if in_use is None else "the guest uses"
            reasons.append(f"{how} {disk.target}")
        elif part.range is not None:
            worst = max(worst, Coherence.CRASH_CONSISTENT, key=list(Coherence).index)
            reasons.append(f"only part of {disk.target} goes back: what lies across the border is of two moments")
    return worst, tuple(reasons)


def _left_out(vm: Vm, scope: Scope) -> list[Disk]:
    """Writable disks that do not go back with RAM and devices."""
    writable = [d for d in vm.disks if d.writable]
    if scope.disks is None:
        return [d for d in writable if d.target in scope.keep or d.name in scope.keep]
    named = {p.disk for p in scope.disks}
    return [d for d in writable if d.target not in named and d.name not in named]


def _kept(disk: Disk, snapshot: Snapshot) -> str:
    used = _used(disk, snapshot)
    return used if snapshot.mounted is None else f"{used}, and it would stay as it is now"


def _used(disk: Disk, snapshot: Snapshot) -> str:
    how = "it is not known whether the guest used" if snapshot.mounted is None else "the guest used"
    return f"{how} {disk.target} when the snapshot was taken"
