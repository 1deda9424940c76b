"""The seams between decisions and the world. The real host (libvirt, QEMU, kernel) and the fake one both obey these,
and one contract suite (tests/contract) checks both.

Rules for every implementation: an effect is idempotent (doing it twice is doing it once), returns only after the effect
was observed, and raises only errors of hvctl.errors: NotFoundError for a VM that is surely absent, DeadlineError where
the result is unknown, UnreachableError where nobody answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hvctl.machineport import Machine as Machine
from hvctl.model.allocation import DiskLimit, NicLimit, Record
from hvctl.model.archive import Archive, Backing, Hardware, Placement, Room, Saved
from hvctl.model.flows import Forgotten
from hvctl.model.host import HostFacts
from hvctl.model.meter import Reading
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import Balloon, Disk, Nic, Space, State, Vm, VmSpec


class Domains(Protocol):
    """libvirt's view. `Vm.allocation.nics` is left unlimited here: the kernel knows better (Network)."""

    def facts(self) -> HostFacts: ...

    def list(self) -> tuple[Vm, ...]:
        """Every domain, active or not, hvctl's or not, sorted by name; complete or an error, never partial."""
        ...

    def uuid(self, ref: str) -> str:
        """Of a domain by exact name or UUID; NotFoundError."""
        ...

    def get(self, ref: str) -> Vm:
        """One domain by exact name or UUID; NotFoundError."""
        ...

    def define(self, spec: VmSpec) -> None: ...

    def undefine(self, uuid: str) -> None:
        """Forget the definition; absent already is fine. RefusedError while it is active."""
        ...

    def start(self, uuid: str, *, paused: bool = False) -> None:
        """paused: with a guest that has not run yet; RefusedError if libvirt holds a saved state that it would go on
        with. One that is active stays as it is."""
        ...

    def shutdown(self, uuid: str) -> None:
        """Ask the guest; returns at once."""
        ...

    def destroy(self, uuid: str) -> None:
        """End the QEMU process; off or absent already is fine."""
        ...

    def pause(self, uuid: str) -> None: ...

    def resume(self, uuid: str) -> None: ...

    def save(self, uuid: str) -> None:
        """RAM and devices into a file that the next start goes on from; the QEMU process ends. Off already is fine,
        RefusedError for a transient domain."""
        ...

    def wait_state(self, uuid: str, wanted: frozenset[State], seconds: float) -> State:
        """The state once it is one of `wanted`, or the last one seen when the time is over (no error)."""
        ...

    def set_vcpus(self, uuid: str, count: int) -> None:
        """Plug or unplug until the domain has `count`; GuestError if the guest keeps a vCPU it should give."""
        ...

    def set_cpu_quota(self, uuid: str, percent: int | None) -> None: ...

    def set_cpu_weight(self, uuid: str, weight: int | None) -> None: ...

    def balloon(self, uuid: str) -> Balloon:
        """Of a domain that is off, or has no balloon, what it has, and nothing is reported."""
        ...

    def set_balloon(self, uuid: str, target: int) -> int:
        """Ask for `target` bytes and follow the driver until it is reached or stops moving; bytes then actual."""
        ...

    def set_disk_limit(self, uuid: str, limit: DiskLimit) -> None: ...

    def set_record(self, uuid: str, record: Record | None) -> None: ...

    def xml(self, uuid: str) -> str:
        """The persistent definition (of a transient domain: the live one)."""
        ...

    def redefine(self, uuid: str, xml: str) -> None: ...

    def disk_xml(self, uuid: str, target: str) -> str:
        """What plug_disk needs to plug a disk of a running guest as it is now. RefusedError: it cannot be unplugged
        while the guest runs, or is the one that it was booted from. NotFoundError: there is no such disk."""
        ...

    def unplug_disk(self, uuid: str, target: str) -> None:
        """Take a disk from a running guest, whether it uses it or not, and wait until QEMU has closed its image; the
        definition keeps it. Gone already is fine. GuestError: the guest does not let go, and has it."""
        ...

    def plug_disk(self, uuid: str, target: str, xml: str) -> None:
        """Give it back, in the slot and with the limits that it had, in the running guest alone; there already is fine,
        once nobody is about to take it. HvctlError: it came to be another device."""
        ...

    def agent(self, uuid: str, command: str, arguments: dict[str, Any], seconds: float) -> Any:
        """One guest agent command's return value. GuestError: the agent says no; DeadlineError: it says nothing;
        UnreachableError: it is not connected. The answer is the guest's claim, never a fact."""
        ...

    def console(self, uuid: str) -> str:
        """The pty device of the first serial console of a running VM."""
        ...

    def close(self) -> None: ...


class Network(Protocol):
    """The kernel's traffic control on taps. Bits per second, directions as the guest sees them."""

    def bridge(self, name: str) -> bool:
        """Whether the host has a bridge of that name, which taps can be put on."""
        ...

    def limit(self, tap: str, mac: str) -> NicLimit:
        """What is in force on a tap; unlimited where nothing is, or the tap is gone."""
        ...

    def foreign(self, tap: str) -> str | None:
        """What somebody else put on the tap ("htb 1: root"), None if nothing."""
        ...

    def set_limit(self, tap: str, limit: NicLimit, owner: str) -> None:
        """Make the limit hold; RefusedError if a foreign qdisc is in the way. owner is the VM's uuid."""
        ...

    def rebuild(self, tap: str, limit: NicLimit, owner: str) -> None:
        """set_limit with new buckets, full and with nothing waiting in them, whatever is in force: what was altered
        beside the rates comes back, and packets of both directions from before are gone. The limit holds throughout;
        no limit leaves nothing of hvctl's. RefusedError as set_limit."""
        ...

    def drop_queue(self, tap: str) -> int:
        """Drop the packets that wait for the guest: in the tap's own queue and in what shapes it (also somebody
        else's, whose settings stay). How many waited in the latter: the kernel does not count those in the first. The
        one packet that QEMU takes from the tap of a paused guest is out of reach, and the guest gets it when it is
        resumed. NotFoundError without the tap, RefusedError if its queue has no length: it drops everything already."""
        ...

    def forget_flows(self, nics: Sequence[Nic], claims: Mapping[str, Sequence[str]]) -> Forgotten:
        """Delete what the host tracks of the connections of a guest, IPv4 and IPv6, both directions. nics are all of
        the VM's, claims are addresses by MAC in lower case that somebody (the guest) names in addition to those that
        the host saw. It takes up to a second: others on the bridge are asked whether an address is theirs."""
        ...

    def clear(self, owner: str) -> None:
        """Remove everything that belongs to a VM, whether its taps are still there or not."""
        ...

    def owners(self) -> dict[str, tuple[str, ...]]:
        """VM uuid to the devices hvctl made for it: what doctor compares with the VMs there are."""
        ...


class Storage(Protocol):
    """Overlays and state folders on the host."""

    def make_disks(self, spec: VmSpec) -> None: ...

    def make_monitor_folder(self, uuid: str) -> None:
        """The VM's folder with the one in it where only QEMU makes its socket; the monitor's path leads there."""
        ...

    def remove(self, uuid: str) -> None:
        """Remove the folder of a VM; absent already is fine."""
        ...

    def folders(self) -> tuple[str, ...]:
        """UUIDs that have a folder."""
        ...

    def place_disks(self, uuid: str, load: str, disks: Sequence[Placement]) -> None:
        """Of a VM that is off: saved disks take the place of its overlays, which are kept until return_disks or
        release_disks. All of them or none."""
        ...

    def return_disks(self, uuid: str, load: str, overlays: Sequence[str]) -> None:
        """Of a VM that is off: the overlays are those from before the load."""
        ...

    def release_disks(self, uuid: str, load: str, overlays: Sequence[str]) -> None:
        """The overlays from before the load go, all at one moment as far as return_disks is concerned."""
        ...

    def kept_disks(self, uuid: str) -> str | None:
        """The load that keeps overlays of a VM now."""
        ...

    def space(self, disk: Disk, tag: str | None = None) -> Space:
        """Of a disk in use, too. tag: that of the snapshot which it might go back to. NotFoundError without its image,
        RefusedError if that is no file."""
        ...


class Archives(Protocol):
    """Saved snapshots on disks of the host: each a folder that is whole or not there. What is wrong with one is a
    RefusedError, that there is none a NotFoundError."""

    def room(self, snapshot: Snapshot, folder: str) -> Room:
        """What saving it may take, and what there is."""
        ...

    def write(self, vm_name: str, snapshot: Snapshot, hardware: Hardware, folder: str) -> Saved:
        """Write all of it beside its name. What fails half-way leaves nothing."""
        ...

    def publish(self, snapshot: Snapshot, folder: str) -> None: ...

    def drop(self, snapshot: Snapshot, folder: str) -> None:
        """Remove what was written and not published; absent already is fine."""
        ...

    def published(self, snapshot: Snapshot, folder: str) -> bool: ...

    def read(self, folder: str) -> Archive:
        """The manifest, after all files were compared with it."""
        ...

    def backing(self, overlay: str) -> Backing | None:
        """The image below an overlay."""
        ...

    def load_rooms(self, archive: Archive) -> tuple[Room, ...]:
        """What loading it takes of tmpfs, memory and disks."""
        ...

    def import_snapshot(self, snapshot: Snapshot, folder: str) -> int:
        """RAM and device state into the snapshot's own folder, which is not published yet; bytes of RAM."""
        ...

    def remove_import(self, snapshot: Snapshot) -> None:
        """Remove what was imported; absent already is fine. Disks are not looked at."""
        ...


class Meter(Protocol):
    """What running VMs use, in counters. Reads only; keeps what it needs open until close()."""

    def read(self) -> Reading:
        """All active VMs in one look, sorted by name, each with what the host tells of it: complete in its VMs or an
        error, never partial. Of a balloon that moves its memory may be a second old. While an earlier look has not
        ended, DeadlineError at once."""
        ...

    def dirty_rate(self, uuid: str, seconds: int) -> int:
        """Bytes of guest RAM that are dirtied per second, found by looking at it for whole `seconds` (1 to 60).
        RefusedError of a VM that does not run."""
        ...

    def available(self) -> int:
        """Bytes of the host's memory that new pages may take."""
        ...

    def lacks(self) -> tuple[str, ...]:
        """What this machine cannot tell, each with the reason, in words; it is then None in every reading."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Host:
    """Everything one hypervisor offers, as the engine sees it."""

    domains: Domains
    network: Network
    storage: Storage
    machine: Machine
    archives: Archives
    meter: Meter
