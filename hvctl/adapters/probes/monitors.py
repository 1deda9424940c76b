"""The QMP monitors that hvctl has in running VMs: there, out of others' reach, and greeting."""

from __future__ import annotations

import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from hvctl.errors import HvctlError
from hvctl.model.finding import Finding, degraded, failing, ok
from hvctl.model.vm import Vm
from hvctl.settings import Settings

NAME = "qmp-monitors"
GREETING_SECONDS = 2.0
REACH = stat.S_IWGRP | stat.S_IWOTH
PASS = stat.S_IXGRP | stat.S_IXOTH


def _vms(settings: Settings) -> Sequence[Vm]:
    from hvctl.adapters.libvirt.host import LibvirtDomains

    domains = LibvirtDomains(settings)
    try:
        return domains.list()
    finally:
        domains.close()


def probe(settings: Settings, vms: Callable[[Settings], Sequence[Vm]] = _vms) -> Finding:
    try:
        running = [vm for vm in vms(settings) if vm.state.active and vm.monitor]
    except HvctlError as e:
        remedy = e.hint or "virsh list --all"
        return degraded(NAME, f"unknown: {e.message.removesuffix('.')}", "the check of the monitors", remedy)
    silent: list[str] = []
    for vm in running:
        monitor = Path(vm.monitor or "")
        try:
            if others := _reachable_by_others(monitor):
                return failing(
                    NAME,
                    f"{vm.name}: {others}",
                    "the guest's isolation from other users",
                    f"chmod go-rwx {monitor.parent}",
                )
            if not _greets(monitor):
                silent.append(vm.name)
        except OSError as e:
            detail = f"{vm.name}: {monitor}: {e.strerror}"
            return failing(
                NAME, detail, "snapshots and resets of this VM", f"hvctl vm stop {vm.name}; hvctl vm start {vm.name}"
            )
    if silent:
        detail = f"no greeting from {', '.join(silent)}: an operation uses it, or QEMU hangs"
        return degraded(NAME, detail, "snapshots and resets of these VMs at this moment", "hvctl operation list")
    return ok(NAME, f"{len(running)} of {len(running)} running VMs greet" if running else "no VM of hvctl is running")


def _reachable_by_others(monitor: Path) -> str | None:
    status, folder = monitor.lstat(), monitor.parent.lstat()
    if not stat.S_ISSOCK(status.st_mode):
        return f"{monitor} is not a socket"
    if status.st_mode & REACH and folder.st_mode & PASS:
        return f"{monitor} has mode {stat.S_IMODE(status.st_mode):04o} in a folder that others can pass"
    return None


def _greets(monitor: Path) -> bool:
    """Whether QEMU greets a new client; it serves one at a time, so silence is no proof of a fault."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(GREETING_SECONDS)
        try:
            client.connect(str(monitor))
            return client.recv(64).startswith(b'{"QMP"')
        except TimeoutError:
            return False
