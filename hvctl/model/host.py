"""A host, and what of it may be promised."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hvctl.model.allocation import Resources
from hvctl.model.pool import Reservation


@dataclass(frozen=True, slots=True)
class HostFacts:
    """One hypervisor as libvirt and the kernel show it; memory in bytes, versions as the tools print them."""

    name: str
    uri: str
    cpus: int
    memory: int
    hypervisor_version: str
    libvirt_version: str
    boot_id: str
    cgroup: int
    qemu_uid: int
    qemu_gid: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """What may be promised in total: physical x overcommit minus the host's reserve. None is not counted."""

    cpu: int
    memory: int
    network: int | None = None
    iops: int | None = None


@dataclass(frozen=True, slots=True)
class Promise:
    """What one VM was promised. holds: it counts against the host (the VM is meant to run). busy: an operation on it
    is open, and resources is the larger of before and after."""

    vm_uuid: str
    vm_name: str
    resources: Resources
    holds: bool
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Ledger:
    """All promises and reservations of one host at one moment, read under the lock that the next one needs."""

    promised: tuple[Promise, ...] = ()
    reservations: tuple[Reservation, ...] = ()


class Forget(Enum):
    """Stands for "this VM is promised nothing any more", where None means "what it was promised stays"."""

    FORGET = "forget"


FORGET = Forget.FORGET
