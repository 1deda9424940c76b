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

from hvctl.model.allocation import DiskLimit, NicLimit, Record
from hvctl.model.flows import Forgotten
from hvctl.model.host import HostFacts
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.vm import Balloon, Nic, State, Vm, VmSpec


class Domains(Protocol):
    """libvirt's view. `Vm.allocation.nics` is left unlimited here: the kernel knows better (Network)."""

    def facts(self) -> HostFacts: ...

    def list(self) -> tuple[Vm, ...]:
        """Every domain, active or not, hvctl's or not, sorted by name; complete or an error, never partial."""
        ...

    def get(self, ref: str) -> Vm:
        """One domain by exact name or UUID; NotFoundError."""
        ...

    def define(self, spec: VmSpec) -> None: ...

    def undefine(self, uuid: str) -> None:
        """Forget the definition; absent already is fine. RefusedError while it is active."""
        ...

    def start(self, uuid: str) -> None: ...

    def shutdown(self, uuid: str) -> None:
        """Ask the guest; returns at once."""
        ...

    def destroy(self, uuid: str) -> None:
        """End the QEMU process; off or absent already is fine."""
        ...

    def pause(self, uuid: str) -> None: ...

    def resume(self, uuid: str) -> None: ...

    def wait_state(self, uuid: str, wanted: frozenset[State], seconds: float) -> State:
        """The state once it is one of `wanted`, or the last one seen when the time is over (no error)."""
        ...

    def set_vcpus(self, uuid: str, count: int) -> None:
        """Plug or unplug until the domain has `count`; GuestError if the guest keeps a vCPU it should give."""
        ...

    def set_cpu_quota(self, uuid: str, percent: int | None) -> None: ...

    def set_cpu_weight(self, uuid: str, weight: int | None) -> None: ...

    def balloon(self, uuid: str) -> Balloon: ...

    def set_balloon(self, uuid: str, target: int) -> int:
        """Ask for `target` bytes and follow the driver until it is reached or stops moving; bytes then actual."""
        ...

    def set_disk_limit(self, uuid: str, limit: DiskLimit) -> None: ...

    def set_record(self, uuid: str, record: Record | None) -> None: ...

    def xml(self, uuid: str) -> str:
        """The persistent definition (of a transient domain: the live one)."""
        ...

    def redefine(self, uuid: str, xml: str) -> None: ...

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
        else's, whose settings stay). How many waited in the latter; the kernel does not count those in the first, nor
        can be reached what QEMU took already (at most one packet). NotFoundError without the tap, RefusedError for one
        whose queue has no length: it drops everything already."""
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


class Machine(Protocol):
    """The inside of one QEMU process: device state, disks' internal snapshots and guest RAM."""

    def binding(self, vm: Vm) -> Binding: ...

    def nodes(self, vm: Vm) -> tuple[str, ...]:
        """Block nodes of the writable disks; RefusedError if one cannot hold a snapshot."""
        ...

    def room(self, vm: Vm) -> tuple[int, int]:
        """Bytes a snapshot of this VM needs now, and bytes there are for it."""
        ...

    def prepare(self, vm: Vm, snapshot: Snapshot) -> None: ...

    def save_state(self, vm: Vm, snapshot: Snapshot) -> None:
        """The guest is paused."""
        ...

    def copy_ram(self, vm: Vm, snapshot: Snapshot) -> int:
        """Bytes stored. The guest is paused."""
        ...

    def publish(self, snapshot: Snapshot) -> None: ...

    def restore_ram(self, vm: Vm, snapshot: Snapshot) -> int:
        """Make guest RAM equal to the snapshot; bytes written. The guest is paused."""
        ...

    def load_state(self, vm: Vm, snapshot: Snapshot) -> None:
        """Device state and disks. GuestError: the load failed and the machine is dead: never continue it."""
        ...

    def restore_balloon(self, vm: Vm, snapshot: Snapshot) -> None: ...

    def drop(self, vm: Vm | None, snapshot: Snapshot) -> None:
        """Remove a snapshot, complete or partial: tags, node, files. vm None: its QEMU process is gone."""
        ...

    def snapshots(self, uuid: str | None = None) -> Sequence[Snapshot]:
        """Published snapshots (of one VM), oldest first; a corrupt manifest is skipped and is doctor's finding."""
        ...


@dataclass(frozen=True, slots=True)
class Host:
    """Everything one hypervisor offers, as the engine sees it."""

    domains: Domains
    network: Network
    storage: Storage
    machine: Machine
