"""Chooses the adapters: the fake host for fake:// URIs, libvirt with QEMU and the kernel for everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hvctl.engine.execute import Progress
from hvctl.engine.expected import Expected
from hvctl.engine.late import late
from hvctl.engine.operate import Engine
from hvctl.errors import RefusedError
from hvctl.ports import Archives, Host, Machine, Meter, Network
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
    from hvctl.adapters.disks.storage import FolderStorage
    from hvctl.adapters.libvirt.host import LibvirtDomains

    domains = LibvirtDomains(settings)
    facts = domains.facts()

    def traffic() -> Network:
        from hvctl.adapters.network.traffic import TrafficControl

        return TrafficControl()

    def machine() -> Machine:
        from hvctl.adapters.snapshots.machine import QemuMachine

        return QemuMachine(settings, facts, domains.document)

    def archives() -> Archives:
        from hvctl.adapters.snapshots.archives import LocalArchives

        return LocalArchives(settings, facts)

    def meter() -> Meter:
        from hvctl.adapters.libvirt.meter import LibvirtMeter

        return LibvirtMeter(domains.connection, settings.libvirt_deadline, facts.boot_id)

    storage = FolderStorage(settings, facts)
    return Host(domains, late(traffic), storage, late(machine), late(archives), late(meter))


@contextmanager
def open_engine(settings: Settings, progress: Progress = lambda _: None) -> Iterator[Engine]:
    """The engine on one host with its journal migrated to this version; both are closed at the end."""
    from hvctl.adapters.store.store import Store

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
