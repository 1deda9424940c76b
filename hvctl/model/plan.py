"""A plan is data: a frozen list of steps with a goal and reasons, printed by --dry-run, stored by the journal,
compared by tests. What a step does stands in engine/hands.py; its inverse comes back from there."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hvctl.model.allocation import DiskLimit, NicLimit, Record
from hvctl.model.operation import Phase
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import VmSpec


@dataclass(frozen=True, slots=True)
class Enter:
    """Not an effect: the operation passes into the next phase (operations.md)."""

    phase: Phase


# --- the life of a VM


@dataclass(frozen=True, slots=True)
class MakeDisks:
    spec: VmSpec


@dataclass(frozen=True, slots=True)
class RemoveFiles:
    """Remove the state folder of a VM, its overlays included."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Define:
    spec: VmSpec


@dataclass(frozen=True, slots=True)
class Undefine:
    uuid: str


@dataclass(frozen=True, slots=True)
class Redefine:
    """Replace the persistent definition; `xml` is the whole new document."""

    uuid: str
    xml: str


@dataclass(frozen=True, slots=True)
class Start:
    uuid: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Ask the guest to power off and wait `seconds` for it."""

    uuid: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Destroy:
    uuid: str


# --- allocation


@dataclass(frozen=True, slots=True)
class SetVcpus:
    uuid: str
    count: int


@dataclass(frozen=True, slots=True)
class SetCpuQuota:
    uuid: str
    percent: int | None


@dataclass(frozen=True, slots=True)
class SetCpuWeight:
    uuid: str
    weight: int | None


@dataclass(frozen=True, slots=True)
class SetMemory:
    """Move the balloon to `target` bytes. force: shrink without the guest's statistics. best_effort: keep what
    was reached when the guest gives less than asked."""

    uuid: str
    target: int
    force: bool = False
    best_effort: bool = False


@dataclass(frozen=True, slots=True)
class SetDiskLimit:
    uuid: str
    limit: DiskLimit


@dataclass(frozen=True, slots=True)
class SetNicLimit:
    uuid: str
    limit: NicLimit


@dataclass(frozen=True, slots=True)
class ClearNics:
    """Take hvctl's shaping off the VM's taps (they may be gone with the VM: then its ifb devices)."""

    uuid: str


@dataclass(frozen=True, slots=True)
class SetRecord:
    """Write what is promised into the domain's metadata; None removes it."""

    uuid: str
    record: Record | None


# --- snapshots and resets


@dataclass(frozen=True, slots=True)
class Pause:
    uuid: str


@dataclass(frozen=True, slots=True)
class Resume:
    uuid: str


@dataclass(frozen=True, slots=True)
class PrepareSnapshot:
    """Make the snapshot's folder and its node for device state, while the guest runs."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class SaveState:
    """Device and CPU state, and the disks, at one moment; the guest is paused."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class CopyRam:
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class PublishSnapshot:
    """Write the manifest, last: a snapshot exists if and only if its manifest does."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class DropSnapshot:
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class RestoreRam:
    """Write every page of guest RAM that differs from the snapshot. tries counts the passes of one reset:
    the first makes RAM right for the state load, the second takes back what the load touched."""

    snapshot: Snapshot
    tries: int = 1


@dataclass(frozen=True, slots=True)
class LoadState:
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class RestoreBalloon:
    """Ask for the balloon target of the snapshot, so that guest and host agree again."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class AwaitAgent:
    uuid: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SetClock:
    uuid: str


@dataclass(frozen=True, slots=True)
class Reseed:
    """Give the guest's random generator fresh entropy, since a reset repeats its state."""

    uuid: str


Step = (
    Enter | MakeDisks | RemoveFiles | Define | Undefine | Redefine | Start | Shutdown | Destroy
    | SetVcpus | SetCpuQuota | SetCpuWeight | SetMemory | SetDiskLimit | SetNicLimit | ClearNics | SetRecord
    | Pause | Resume | PrepareSnapshot | SaveState | CopyRam | PublishSnapshot | DropSnapshot
    | RestoreRam | LoadState | RestoreBalloon | AwaitAgent | SetClock | Reseed
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done, in order, and why. Empty steps: everything is as asked already."""

    goal: str
    steps: tuple[Step, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def effects(self) -> tuple[Step, ...]:
        return tuple(s for s in self.steps if not isinstance(s, Enter))


def step_name(step: Step) -> str:
    """The step's name in journals and fault points: SetVcpus is set_vcpus."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(step).__name__).lstrip("_")


def step_detail(step: Step) -> str:
    """The step's arguments in one line for people; names instead of whole documents."""
    shown: list[str] = []
    for f in fields(step):
        value: Any = getattr(step, f.name)
        if f.name == "uuid":
            continue
        if isinstance(value, Snapshot | VmSpec):
            value = value.name
        if f.name == "xml":
            value = f"{len(value)} characters"
        if isinstance(value, Record):
            value = f"vcpus={value.allocation.vcpus} memory={value.allocation.memory}"
        if isinstance(value, NicLimit | DiskLimit):
            shown += [f"{g.name}={getattr(value, g.name)}" for g in fields(value) if getattr(value, g.name) is not None]
            continue
        shown.append(f"{f.name}={value}")
    return " ".join(shown)
