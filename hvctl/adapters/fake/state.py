"""What a fake host is: plain data that lives in one JSON file, so that it survives the death of hvctl as libvirt, QEMU
and the kernel do. Guests are data too: a Behaviour says how one answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hvctl.errors import NotFoundError, UnreachableError
from hvctl.model.allocation import Allocation, Record
from hvctl.model.host import HostFacts
from hvctl.model.snapshot import Range
from hvctl.model.tracker import TrackerKind, Tracking
from hvctl.model.vm import Accel, Disk, Nic, Process, State

RAM_BYTES = 256


@dataclass(slots=True)
class Part:
    """A part of a guest (RAM, device state, a disk) and the moment it is of. Parts of different moments are torn. size
    is what the image of a disk takes, in bytes."""

    text: str = ""
    moment: int = 0
    size: int = 0


@dataclass(slots=True)
class File:
    """A file of the host; tags are the internal snapshots of an overlay, most is the size of its disk in bytes."""

    part: Part = field(default_factory=Part)
    tags: dict[str, Part] = field(default_factory=dict)
    most: int = 1 << 30


@dataclass(slots=True)
class Prepared:
    """What is ready to be put in place of a disk: which internal snapshot, and which bytes of it (None: all). done: it
    is the image of a disk that was unplugged."""

    tag: str
    range: Range | None = None
    begun: bool = False
    done: bool = False


@dataclass(slots=True)
class Exec:
    """What a scripted guest-exec gives back."""

    status: int = 0
    out: str = ""
    err: str = ""


@dataclass(slots=True)
class Behaviour:
    """How a guest behaves.

    balloon_floor, used_memory and cache are bytes: the balloon driver gives nothing below the floor; statistics report
    actual - used_memory as usable, of which the cache is in use until the guest drops it. agent_gap is how many agent
    calls after a state load find it not connected.
    refuses are agent commands answered with an error, answers are ones answered with this value whatever was asked;
    trackers are those that pass their probe; tracker_misses are pages at the end of RAM that they do not see.
    mounted are targets of disks that the guest says it uses, and `umount TARGET` there has it let go of one.
    keeps_disks: it lets go of no disk that is unplugged.
    acknowledges: it says on its port that it is ready, as soon as it hears there of an interruption.
    exec maps a whole guest-exec command line to its result (others echo their arguments).
    """

    balloon_driver: bool = True
    balloon_stats: bool = True
    balloon_floor: int = 0
    used_memory: int = 64 << 20
    cache: int = 0
    agent: Literal["present", "absent", "silent", "hostile"] = "present"
    agent_gap: int = 1
    refuses: list[str] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    exec: dict[str, Exec] = field(default_factory=dict)
    onlines_vcpus: bool = True
    keeps_vcpus: bool = False
    ignores_shutdown: bool = False
    answers_pulse: bool = True
    acknowledges: bool = False
    mounted: list[str] = field(default_factory=list)
    keeps_disks: bool = False
    trackers: list[TrackerKind] = field(default_factory=lambda: [TrackerKind.UFFD])
    tracker_misses: int = 0


@dataclass(slots=True)
class Used:
    """What the counters of a QEMU process say; cpu and steal in nanoseconds, those of devices for each of them. dirty
    are bytes of RAM that a measurement of dirtied pages finds, resident those that the process has (None: all of what
    the balloon leaves the guest)."""

    cpu: int = 0
    steal: int = 0
    reads: int = 0
    writes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0
    rx_packets: int = 0
    tx_packets: int = 0
    dirty: int = 0
    resident: int | None = None


@dataclass(slots=True)
class Saved:
    """What libvirt keeps of a guest whose process ended: it goes on from there."""

    ram: Part
    devices: Part
    live: Allocation
    online: list[bool]


@dataclass(slots=True)
class FakeVm:
    """One domain with its QEMU process and guest. config is the persistent definition, live what is in force.

    ram is hexadecimal. dead: a state load failed in this process. torn: a guest ran whose parts were of different
    moments, which must never happen. ram_of: the folder of the snapshot that RAM equals since it was written to be so;
    None once the guest ran, or a load wrote into it. heard are lines that the guest took from its port, said those that
    it left there for the host.
    """

    uuid: str
    name: str
    folder: str
    config: Allocation
    max_vcpus: int
    max_memory: int
    accel: Accel = Accel.TCG
    disks: list[Disk] = field(default_factory=list)
    nics: list[Nic] = field(default_factory=list)
    record: Record | None = None
    monitor: str | None = None
    kernel: str = "/fake/kernel"
    initrd: str = "/fake/initrd"
    cmdline: str = ""
    xml: str = ""
    missing: list[str] = field(default_factory=list)
    config_missing: list[str] = field(default_factory=list)
    has_balloon: bool = True
    has_agent: bool = True
    has_pulse: bool = True
    persistent: bool = True
    behaviour: Behaviour = field(default_factory=Behaviour)
    state: State = State.OFF
    reason: str = "shutdown"
    process: Process | None = None
    live: Allocation | None = None
    ram: Part = field(default_factory=Part)
    devices: Part = field(default_factory=Part)
    online: list[bool] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    plugged: list[str] = field(default_factory=list)
    unplugged: list[Disk] = field(default_factory=list)
    asked: bool = False
    dead: bool = False
    torn: bool = False
    agent_gap: int = 0
    greeted: bool = False
    told_time: bool = False
    tracking: Tracking | None = None
    ram_of: str | None = None
    prepared: dict[str, Prepared] = field(default_factory=dict)
    guest_time: int | None = None
    executed: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    saved: Saved | None = None
    exits: dict[int, Exec] = field(default_factory=dict)
    used: Used = field(default_factory=Used)
    started: float = 0.0

    @property
    def allocation(self) -> Allocation:
        return self.live or self.config


@dataclass(slots=True)
class Tap:
    """A tap, as the kernel has it, with what shapes it; uuid is of the VM it goes with. waiting are packets for the
    guest; addresses are the guest's, disputed those that it claims and that are others' too."""

    uuid: str | None = None
    inbound: int | None = None
    outbound: int | None = None
    foreign: str | None = None
    waiting: int = 0
    addresses: list[str] = field(default_factory=list)
    disputed: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Ifb:
    """A device hvctl made for a tap with a limit; it does not go when the tap goes."""

    tap: str
    owner: str


@dataclass(slots=True)
class Script:
    """Something that will happen at a call: the nth from now, `times` times in a row.

    error is the name of a class of hvctl.errors, or "enospc"; after: the effect happens before the error comes, which
    is what an overrun deadline can mean. outside is what somebody else does to the VM just before. uuid limits it to
    one VM.
    """

    call: str
    error: str | None = None
    nth: int = 1
    times: int = 1
    after: bool = False
    outside: Literal["destroy", "pause", "resume"] | None = None
    uuid: str | None = None


def _facts() -> HostFacts:
    return HostFacts("fake", "fake://", 16, 64 << 30, "7.2.22", "9.0.0", "boot-1", 2, 64055, 108)


@dataclass(slots=True)
class World:
    """Everything there is on one fake host. clock counts moments and processes; room is bytes for snapshots,
    disk_room those for overlays, available those of memory that is free; flows are the two addresses of each tracked
    connection, None on a kernel that tracks none. seconds and wall are what its
    steady clock and its wall clock show, None where they are those of this machine; slow is how many seconds a look at
    the counters takes."""

    facts: HostFacts = field(default_factory=_facts)
    clock: int = 1000
    room: int = 16 << 30
    disk_room: int = 64 << 30
    available: int = 32 << 30
    libvirt_down: bool = False
    seconds: float | None = None
    wall: float | None = None
    slow: float = 0.0
    vms: dict[str, FakeVm] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    bridges: list[str] = field(default_factory=lambda: ["br0"])
    taps: dict[str, Tap] = field(default_factory=dict)
    ifbs: dict[str, Ifb] = field(default_factory=dict)
    flows: list[list[str]] | None = field(default_factory=list)
    scripts: list[Script] = field(default_factory=list)

    def libvirt_answers(self) -> None:
        """UnreachableError unless it does."""
        if self.libvirt_down:
            raise UnreachableError("libvirt of the fake host does not answer.", "hvctl doctor")

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def vm(self, ref: str) -> FakeVm:
        """By uuid or exact name; NotFoundError."""
        found = self.vms.get(ref) or next((v for v in self.vms.values() if v.name == ref), None)
        if found is None:
            raise NotFoundError(f"there is no VM {ref!r}.", "`hvctl vm list` shows what there is")
        return found
