"""A plan is data: a frozen list of steps with a goal and reasons, printed by --dry-run, stored by the journal,
compared by tests. What a step does stands in engine/hands.py; its inverse comes back from there."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hvctl.model.allocation import DiskLimit, NicLimit, Record
from hvctl.model.operation import Phase
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import VmSpec
from hvctl.units import format_rate, format_size


@dataclass(frozen=True, slots=True)
class Enter:
    """Not an effect: the operation passes into the next phase (operations.md)."""

    phase: Phase


# --- the life of a VM


@dataclass(frozen=True, slots=True)
class MakeDisks:
    spec: VmSpec


@dataclass(frozen=True, slots=True)
class MakeMonitorFolder:
    """The folder in which QEMU makes the socket of hvctl's monitor, for a VM that somebody else defined."""

    uuid: str


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
    Enter | MakeDisks | MakeMonitorFolder | RemoveFiles | Define | Undefine | Redefine | Start | Shutdown | Destroy
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


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a plan cannot be made: a foreseeable answer, so a value. The verb turns it into RefusedError (exit 5)."""

    message: str
    hint: str | None = None


def step_name(step: Step) -> str:
    """The step's name in journals and fault points: SetVcpus is set_vcpus."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(step).__name__).lstrip("_")


def step_detail(step: Step) -> str:
    """The step's arguments in one line for people: names instead of whole documents, sizes and rates with units."""
    return " ".join(text for f in fields(step) if (text := _shown(f.name, getattr(step, f.name))))


def _shown(name: str, value: Any) -> str:
    match value:
        case NicLimit():
            return f"{value.mac} in {format_rate(value.inbound)} out {format_rate(value.outbound)}"
        case DiskLimit():
            given = ((f.name, getattr(value, f.name)) for f in fields(value) if f.name != "target")
            limits = " ".join(f"{n} {v}" for n, v in given if v is not None)
            return f"{value.target} {limits or 'no limit'}"
        case Snapshot() | VmSpec():
            return value.name
        case Record():
            return f"{value.allocation.vcpus} vCPUs {format_size(value.allocation.memory)}"
        case bool():
            return name.replace("_", " ") if value else ""
    match name:
        case "uuid":
            return ""
        case "xml":
            return f"{len(value)} characters"
        case "target":
            return format_size(value)
        case "tries":
            return f"pass {value}"
        case "seconds":
            return f"at most {value:g} s"
        case "percent":
            return "no quota" if value is None else f"{value}%"
        case "weight":
            return "default" if value is None else str(value)
    return str(value)
