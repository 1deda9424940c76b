"""Where the host keeps what hvctl probes and prepares. One place, so that tests point it at copies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HostPaths:
    """Files and folders that belong to the kernel, libvirt or systemd."""

    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")
    kvm: Path = Path("/dev/kvm")
    tun: Path = Path("/dev/net/tun")
    qemu_conf: Path = Path("/etc/libvirt/qemu.conf")
    libvirtd_pid: Path = Path("/run/libvirtd.pid")
    virtlogd_pid: Path = Path("/run/virtlogd.pid")
    tmpfiles: Path = Path("/etc/tmpfiles.d/hvctl.conf")
    apparmor: Path = Path("/sys/module/apparmor/parameters/enabled")
    apparmor_local: Path = Path("/etc/apparmor.d/local/abstractions/libvirt-qemu")
    qemu: str = "qemu-system-x86_64"


HOST = HostPaths()
