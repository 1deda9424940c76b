"""A plan is data: a frozen list of steps with a goal and reasons, printed by --dry-run, stored by the journal,
compared by tests. What a step does stands in engine/hands.py; its inverse comes back from there."""

from __future__ import annotations

from dataclasses import dataclass

from hvctl.model.allocation import DiskLimit, NicLimit, Record
from hvctl.model.archivesteps import ArchiveStep
from hvctl.model.awaysteps import AwayStep
from hvctl.model.disksteps import DiskStep
from hvctl.model.operation import Phase
from hvctl.model.snapshot import Range, Snapshot
from hvctl.model.tracker import TrackerKind
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
    """paused: the guest's first instruction waits for Resume."""

    uuid: str
    paused: bool = False


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
    """rebuild: with new, full buckets, whatever is in force."""

    uuid: str
    limit: NicLimit
    rebuild: bool = False


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
    """toward: the load that the guest is paused for; all is made ready for it before, and QEMU hears of it early."""

    uuid: str
    toward: LoadState | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    """Let the guest go on. greet: after a reset, with fresh entropy and the question for its first sign of life;
    clock: and with the time."""

    uuid: str
    greet: bool = False
    clock: bool = False


@dataclass(frozen=True, slots=True)
class AwaitLife:
    """Wait for the guest's answer to the greeting."""

    uuid: str
    seconds: float


@dataclass(frozen=True, slots=True)
class PrepareSnapshot:
    """Make the snapshot's folder and its node for device state, while the guest runs. arm: the tracker that is armed
    next."""

    snapshot: Snapshot
    arm: TrackerKind | None = None


@dataclass(frozen=True, slots=True)
class ArmTracker:
    uuid: str
    tracker: TrackerKind


@dataclass(frozen=True, slots=True)
class SaveState:
    """Device and CPU state, and the disks, at one moment; the guest is paused."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class CopyRam:
    """live: before the pause, all that is to be stored; then, under it, only what was written meanwhile."""

    snapshot: Snapshot
    live: bool = False


@dataclass(frozen=True, slots=True)
class PatchRam:
    """Put ranges of another snapshot's RAM (none: all of it) into the copy that the scratch snapshot has."""

    scratch: Snapshot
    source: Snapshot
    ranges: tuple[Range, ...] = ()


@dataclass(frozen=True, slots=True)
class PublishSnapshot:
    """Write the manifest, last: a snapshot exists if and only if its manifest does."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class DropSnapshot:
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class DropTags:
    """Out of the VM's disks, those that are still stray."""

    uuid: str
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RestoreRam:
    """Write every page of guest RAM that differs from the snapshot. tries counts the passes of one reset:
    the first makes RAM right for the state load, the second takes back what the load touched."""

    snapshot: Snapshot
    tries: int = 1
    tracker: TrackerKind = TrackerKind.AUTO


@dataclass(frozen=True, slots=True)
class LoadState:
    """nodes: the disks that go back too; None means all of the snapshot's."""

    snapshot: Snapshot
    nodes: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Audit:
    """Compare all RAM with the snapshot; if the tracker missed something, do the reset again by comparing."""

    snapshot: Snapshot
    state: Snapshot
    nodes: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class RestoreBalloon:
    """Ask for the balloon target of the snapshot, so that guest and host agree again."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class DropQueues:
    """Packets that wait on the host for the guest are of a time that the guest has not seen."""

    uuid: str


@dataclass(frozen=True, slots=True)
class ForgetFlows:
    """Delete the host's conntrack entries of the guest."""

    uuid: str


@dataclass(frozen=True, slots=True)
class DropCaches:
    """Have the guest drop its page cache, take the freed memory back, and give the allocation again."""

    uuid: str


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


@dataclass(frozen=True, slots=True)
class RunInGuest:
    """A hook: a program in the guest, through its agent. required: the operation fails with it."""

    uuid: str
    argv: tuple[str, ...]
    seconds: float = 30.0
    required: bool = False


Step = (
    Enter | MakeDisks | MakeMonitorFolder | RemoveFiles | Define | Undefine | Redefine | Start | Shutdown | Destroy
    | SetVcpus | SetCpuQuota | SetCpuWeight | SetMemory | SetDiskLimit | SetNicLimit | ClearNics | SetRecord
    | Pause | Resume | AwaitLife | PrepareSnapshot | ArmTracker | SaveState | CopyRam | PatchRam | PublishSnapshot
    | DropSnapshot | DropTags | RestoreRam | LoadState | Audit | RestoreBalloon
    | DropQueues | ForgetFlows | DropCaches | AwaitAgent | SetClock | Reseed | RunInGuest
    | DiskStep
    | ArchiveStep
    | AwayStep
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
