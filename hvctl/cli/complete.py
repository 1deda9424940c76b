"""Completion of names, from what there is; silent when nobody answers, since completion may not complain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from hvctl.errors import HvctlError
from hvctl.settings import Settings, load_settings

if TYPE_CHECKING:
    from hvctl.ports import Domains


def vm_names(incomplete: str) -> list[str]:
    try:
        settings = load_settings()
        domains = _domains(settings)
        try:
            return [vm.name for vm in domains.list() if vm.name.startswith(incomplete)]
        finally:
            domains.close()
    except HvctlError:
        return []


def _domains(settings: Settings) -> Domains:
    """libvirt alone, without the kernel's traffic control and the insides of QEMU, which take longer to load."""
    if settings.uri.startswith("qemu:///"):
        from hvctl.adapters.libvirt.host import LibvirtDomains

        return LibvirtDomains(settings)
    from hvctl.engine.runtime import open_host

    return open_host(settings).domains


def snapshot_names(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the snapshots of the VM that stands before on the line."""
    from hvctl.engine.runtime import open_host

    vm = context.params.get("vm")
    if not vm:
        return []
    try:
        host = open_host(load_settings())
        try:
            names = [s.name for s in host.machine.snapshots(host.domains.get(vm).uuid)]
            return [n for n in names if n.startswith(incomplete)]
        finally:
            host.domains.close()
    except HvctlError:
        return []


def image_names(incomplete: str) -> list[str]:
    return [n for n in ("micro", "debian") if n.startswith(incomplete)]
