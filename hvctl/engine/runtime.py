"""Chooses the adapters: the fake host for fake:// URIs, libvirt with QEMU and the kernel for everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hvctl.engine.execute import Progress
from hvctl.engine.expected import Expected
from hvctl.engine.operate import Engine
from hvctl.errors import RefusedError
from hvctl.ports import Host
from hvctl.settings import Settings


def open_host(settings: Settings) -> Host:
    """The hypervisor of settings.uri; UnreachableError when nobody answers there."""
    if settings.uri.startswith("fake://"):
        from hvctl.adapters.fake import open_fake

        return open_fake(settings.uri)
    if not settings.uri.startswith("qemu:///"):
        raise RefusedError(
            f"{settings.uri!r} is not a local QEMU hypervisor: hvctl shapes and resets VMs on their own host.",
            "run hvctl there, with qemu:///system",
        )
    from hvctl.adapters.archives import LocalArchives
    from hvctl.adapters.libvirt import LibvirtDomains
    from hvctl.adapters.libvirt_meter import LibvirtMeter
    from hvctl.adapters.machine import QemuMachine
    from hvctl.adapters.storage import FolderStorage
    from hvctl.adapters.traffic import TrafficControl

    domains = LibvirtDomains(settings)
    facts = domains.facts()
    return Host(
        domains,
        TrafficControl(),
        FolderStorage(settings, facts),
        QemuMachine(settings, facts, domains.document),
        LocalArchives(settings, facts),
        LibvirtMeter(domains.connection, settings.libvirt_deadline, facts.boot_id),
    )


@contextmanager
def open_engine(settings: Settings, progress: Progress = lambda _: None) -> Iterator[Engine]:
    """The engine on one host with its journal migrated to this version; both are closed at the end."""
    from hvctl.adapters.store import Store

    host = open_host(settings)
    try:
        with Store(settings.database) as store:
            store.migrate()
            engine = Engine(settings, host, store, progress)
            engine.needs = Expected(engine)
            yield engine
    finally:
        host.meter.close()
        host.machine.close()
        host.domains.close()
