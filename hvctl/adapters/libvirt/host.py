"""libvirt's domains as hvctl sees and moves them: the real implementation of ports.Domains.

Every effect looks at the domain first and observes the result after, so that doing it twice is doing it once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import libvirt

from hvctl.adapters.libvirt import agentcall, diskslot, domainxml, replug, tuning
from hvctl.adapters.libvirt.calls import Connection, clean, code_of, named, state_of, tolerant
from hvctl.adapters.libvirt.domainview import seen, with_balloons
from hvctl.adapters.libvirt.hostfacts import facts, qemu_owner
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.allocation import DiskLimit, Record
from hvctl.model.host import HostFacts
from hvctl.model.vm import Balloon, State, Vm, VmSpec
from hvctl.settings import Settings

T = TypeVar("T")

# libvirt takes its own time for these: to define and to start it may probe QEMU anew (4 to 20 s where /dev/kvm is not
# open to QEMU's user), and it waits 15 s for a process to end.
_PROCESS_SECONDS = 120.0
# All of the guest's memory goes to a disk.
_SAVE_SECONDS = 1800.0
# libvirt asks the guest agent first and waits for its word before it presses the power button.
_SHUTDOWN_SECONDS = 15.0
_REREAD = 1.0

_UNDEFINE = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)


class LibvirtDomains:
    """ports.Domains on one libvirt connection; safe to use from several threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection = Connection(settings.uri, settings.libvirt_deadline)

    @property
    def connection(self) -> Connection:
        """What a meter looks through: a host is spoken to over one connection."""
        return self._connection

    # --- what there is

    def facts(self) -> HostFacts:
        return facts(self._connection, self._settings.uri)

    def list(self) -> tuple[Vm, ...]:
        def look(connection: Any) -> tuple[Vm, ...]:
            persistent = {
                d.UUIDString() for d in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_PERSISTENT)
            }
            found = []
            for domain, stats in connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE):
                state = (stats["state.state"], stats["state.reason"])
                try:
                    found.append(seen(domain, state, domain.UUIDString() in persistent, self._connection.local))
                except libvirt.libvirtError as e:
                    if code_of(e) != libvirt.VIR_ERR_NO_DOMAIN:  # it may end while we look, and then it is gone
                        raise
            return tuple(sorted(found, key=lambda vm: vm.name))

        return with_balloons(self._connection, self._connection.call("list the VMs", look))

    def uuid(self, ref: str) -> str:
        return self._connection.call(f"look for {clean(ref, 80)}", lambda c: str(named(c, ref).UUIDString()))

    def get(self, ref: str) -> Vm:
        def look(connection: Any) -> Vm:
            domain = named(connection, ref)
            return seen(domain, tuple(domain.state()), bool(domain.isPersistent()), self._connection.local)

        found = self._connection.call(f"look at {clean(ref, 80)}", look)
        return with_balloons(self._connection, (found,))[0]

    def wait_state(self, uuid: str, wanted: frozenset[State], seconds: float) -> State:
        until = time.monotonic() + seconds
        with self._connection.events(uuid, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE) as event:
            while True:
                event.clear()
                state = self._state(uuid)
                left = until - time.monotonic()
                if state in wanted or left <= 0:
                    return state
                # Events are hints: one may be lost with a connection, so the state is read again now and then.
                event.wait(min(left, _REREAD))

    def _state(self, uuid: str) -> State:
        return self._connection.call(f"look at {uuid}", lambda c: state_of(c.lookupByUUIDString(uuid)))

    # --- its life

    def define(self, spec: VmSpec) -> None:
        def act(connection: Any) -> None:
            xml = domainxml.build(spec, qemu_owner(connection, self._connection.local))
            connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
            connection.lookupByUUIDString(spec.uuid)

        self._connection.call(f"define {spec.name}", act, _PROCESS_SECONDS)

    def undefine(self, uuid: str) -> None:
        def act(domain: Any) -> None:
            if domain.isActive():
                raise RefusedError(f"the VM {clean(domain.name(), 80)} is active.", "hvctl vm stop stops it")
            domain.undefineFlags(_UNDEFINE)

        self._if_there(uuid, "undefine", act)

    def start(self, uuid: str, *, paused: bool = False) -> None:
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0

        def act(domain: Any) -> None:
            if domain.isActive():
                return
            if paused and domain.hasManagedSaveImage():
                raise RefusedError(
                    f"libvirt holds a saved state of {clean(domain.name(), 80)}, and would go on with it.",
                    "virsh managedsave-remove, if it is not needed",
                )
            tolerant(lambda: domain.createWithFlags(flags), lambda: bool(domain.isActive()))

        self._effect(uuid, "start", act, seconds=_PROCESS_SECONDS)

    def shutdown(self, uuid: str) -> None:
        def act(domain: Any) -> None:
            if domain.isActive():
                tolerant(domain.shutdown, lambda: not domain.isActive())

        self._effect(uuid, "shut down", act, seconds=_SHUTDOWN_SECONDS)

    def destroy(self, uuid: str) -> None:
        def act(domain: Any) -> None:
            if domain.isActive():
                tolerant(domain.destroy, lambda: not domain.isActive())

        self._if_there(uuid, "destroy", act, seconds=_PROCESS_SECONDS)

    def save(self, uuid: str) -> None:
        def act(domain: Any) -> None:
            if not domain.isActive():
                return
            if not domain.isPersistent():
                raise RefusedError(f"{clean(domain.name(), 80)} is transient: libvirt saves none of those.")
            tolerant(lambda: domain.managedSave(0), lambda: not domain.isActive() and domain.hasManagedSaveImage())

        self._effect(uuid, "save", act, seconds=_SAVE_SECONDS)

    def pause(self, uuid: str) -> None:
        def act(domain: Any) -> None:
            if state_of(domain) is not State.PAUSED:
                tolerant(domain.suspend, lambda: state_of(domain) is State.PAUSED)

        self._effect(uuid, "pause", act)

    def resume(self, uuid: str) -> None:
        def act(domain: Any) -> None:
            if state_of(domain) is not State.RUNNING:
                tolerant(domain.resume, lambda: state_of(domain) is State.RUNNING)

        self._effect(uuid, "resume", act)

    # --- its definition

    def xml(self, uuid: str) -> str:
        def look(domain: Any) -> str:
            inactive = libvirt.VIR_DOMAIN_XML_INACTIVE if domain.isPersistent() else 0
            # With secrets: redefining from a document without them would drop a console's password.
            return str(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE | inactive))

        return self._effect(uuid, "print the definition of", look)

    def document(self, uuid: str) -> str:
        """What libvirt says of the running VM: with aliases and block nodes."""
        return self._effect(uuid, "print the document of", lambda domain: str(domain.XMLDesc(0)))

    def redefine(self, uuid: str, xml: str) -> None:
        if domainxml.read(xml).uuid != uuid:
            raise RefusedError(f"the document to define is not that of {uuid}.")

        def act(connection: Any) -> None:
            connection.lookupByUUIDString(uuid)
            connection.defineXMLFlags(xml, 0)

        self._connection.call(f"redefine {uuid}", act, seconds=_PROCESS_SECONDS)

    def set_record(self, uuid: str, record: Record | None) -> None:
        document = domainxml.record_xml(record) if record else None

        def act(domain: Any) -> None:
            for flags in tuning.both(domain):
                try:
                    domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, document, "hvctl", domainxml.HVCTL, flags)
                except libvirt.libvirtError as e:
                    # There is none to remove: as asked.
                    if record is not None or code_of(e) != libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                        raise
            if domainxml.read(domain.XMLDesc(0)).record != record:
                raise HvctlError(f"the record of {clean(domain.name(), 80)} reads back as another one.")

        self._effect(uuid, "write the record of", act)

    # --- a disk of it, while it runs

    def disk_xml(self, uuid: str, target: str) -> str:
        return diskslot.disk_xml(self.document(uuid), target)

    def unplug_disk(self, uuid: str, target: str) -> None:
        replug.unplug(self._connection, uuid, target)

    def plug_disk(self, uuid: str, target: str, xml: str) -> None:
        replug.plug(self._connection, uuid, target, xml)

    # --- its allocation

    def set_vcpus(self, uuid: str, count: int) -> None:
        tuning.set_vcpus(self._connection, uuid, count)

    def set_cpu_quota(self, uuid: str, percent: int | None) -> None:
        self._effect(uuid, "set the CPU quota of", lambda domain: tuning.set_quota(domain, percent))

    def set_cpu_weight(self, uuid: str, weight: int | None) -> None:
        self._effect(uuid, "set the CPU weight of", lambda domain: tuning.set_weight(domain, weight))

    def set_disk_limit(self, uuid: str, limit: DiskLimit) -> None:
        self._effect(uuid, "set the disk limit of", lambda domain: tuning.set_disk_limit(domain, limit))

    def balloon(self, uuid: str) -> Balloon:
        return self._effect(uuid, "read the balloon of", tuning.balloon)

    def set_balloon(self, uuid: str, target: int) -> int:
        return tuning.set_balloon(self._connection, uuid, target)

    # --- its guest

    def agent(self, uuid: str, command: str, arguments: dict[str, Any], seconds: float) -> Any:
        return agentcall.ask(self._connection, self._settings.uri, uuid, command, arguments, seconds)

    def console(self, uuid: str) -> str:
        def look(domain: Any) -> str:
            if not domain.isActive():
                raise RefusedError(f"the VM {clean(domain.name(), 80)} does not run.", "hvctl vm start starts it")
            path = domainxml.read(domain.XMLDesc(0)).console
            if path is None:
                raise RefusedError(f"the VM {clean(domain.name(), 80)} has no serial console on a pty.")
            return path

        return self._effect(uuid, "find the console of", look)

    def close(self) -> None:
        self._connection.close()

    # --- how

    def _effect(self, uuid: str, what: str, act: Callable[[Any], T], seconds: float | None = None) -> T:
        def work(connection: Any) -> T:
            return act(connection.lookupByUUIDString(uuid))

        return self._connection.call(f"{what} {uuid}", work, seconds)

    def _if_there(self, uuid: str, what: str, act: Callable[[Any], None], seconds: float | None = None) -> None:
        def work(connection: Any) -> None:
            try:
                act(connection.lookupByUUIDString(uuid))
            except libvirt.libvirtError as e:
                if code_of(e) != libvirt.VIR_ERR_NO_DOMAIN:
                    raise

        self._connection.call(f"{what} {uuid}", work, seconds)
