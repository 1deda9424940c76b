"""A host, and what of it may be promised."""

from __future__ import annotations

from dataclasses import dataclass


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
