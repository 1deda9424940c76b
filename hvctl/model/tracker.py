"""How hvctl learns which pages of a guest's RAM were written, and what it knows of one QEMU process."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from hvctl.model.vm import Process, Region


class TrackerKind(StrEnum):
    """auto: the best that passes its probe on this very VM. compare reads all resident RAM, and always works."""

    AUTO = "auto"
    UFFD = "uffd"
    SOFT_DIRTY = "soft-dirty"
    COMPARE = "compare"


@dataclass(frozen=True, slots=True)
class Tracking:
    """What is known of the guest RAM of one process.

    RAM is that of snapshot `base`, but for the pages that the tracker `kind` reports, and those that are noted beside
    this (they were taken from the tracker before, `carried` of them); base None: nothing is known, all of RAM must be
    compared. token is with what another hvctl goes on with the tracker; inflations is Machine.inflations when it was
    armed. disabled names trackers that must not be used for this process, and why; reason is why `kind` was chosen;
    resets counts them for the audits.
    """

    process: Process
    regions: tuple[Region, ...]
    kind: TrackerKind = TrackerKind.COMPARE
    reason: str = ""
    token: str = ""
    base: str | None = None
    carried: int = 0
    inflations: int | None = None
    disabled: dict[str, str] = field(default_factory=dict)
    resets: int = 0


@dataclass(frozen=True, slots=True)
class Restored:
    """What one pass over guest RAM wrote, how it found that, and which tracker notes writes from now on."""

    pages: int
    bytes: int
    found_by: TrackerKind
    tracker: TrackerKind
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Life:
    """A guest's first sign of life: seconds after it went on, and what it says that it did with fresh entropy and the
    time; all empty for a guest without the port for it."""

    seconds: float | None = None
    reseeded: bool = False
    clock_set: bool = False
