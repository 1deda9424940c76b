"""What of a VM a reset brings back, how coherent that leaves the guest, and what a policy says about both."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hvctl.model.snapshot import Range
from hvctl.model.tracker import TrackerKind


class Coherence(StrEnum):
    """coherent: all that depends on each other is of one moment. crash-consistent: as after a power failure.
    incoherent: the guest would run on parts of different moments."""

    COHERENT = "coherent"
    CRASH_CONSISTENT = "crash-consistent"
    INCOHERENT = "incoherent"


@dataclass(frozen=True, slots=True)
class DiskPart:
    """One disk by its target (vda) or serial, or only a range of it in bytes."""

    disk: str
    range: Range | None = None


@dataclass(frozen=True, slots=True)
class Scope:
    """The parts of a reset. disks None: all writable ones but those to keep; ranges are guest-physical memory."""

    ram: bool = True
    devices: bool = True
    disks: tuple[DiskPart, ...] | None = None
    keep: tuple[str, ...] = ()
    ranges: tuple[Range, ...] = ()
    cache: bool = False
    net: bool = False

    @property
    def needs_snapshot(self) -> bool:
        return self.ram or self.devices or self.disks is None or bool(self.disks) or bool(self.ranges)


WHOLE = Scope()


@dataclass(frozen=True, slots=True)
class Hooks:
    """Programs in the guest, each an argument list; before and after are those of a disk that goes back alone."""

    before: tuple[tuple[str, ...], ...] = ()
    after: tuple[tuple[str, ...], ...] = ()


NO_HOOKS = Hooks()


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a reset is done: by which tracker, with an audit or not (None: as the settings say), whether an incoherent
    one may be done, whether the clock is set and the random generator reseeded after it, the guest's hooks, and whether
    disks that go back alone are unplugged from the guest for it, which may be using them."""

    tracker: TrackerKind = TrackerKind.AUTO
    audit: bool | None = None
    accept_incoherent: bool = False
    clock: bool = True
    reseed: bool = True
    hooks: Hooks = NO_HOOKS
    replug: bool = False


AS_USUAL = Wishes()
