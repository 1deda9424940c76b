"""Guests that may not go on: an operation left memory or disks of two moments, or nobody can say whose they are. Only
another QEMU process ends that, so a later operation that was undone does not."""

from __future__ import annotations

from hvctl import codec
from hvctl.engine.site import Site
from hvctl.errors import RefusedError
from hvctl.model.operation import Before, Kind, Operation, OpState
from hvctl.model.vm import Process, Vm

_ENDING = (Kind.STOP, Kind.DELETE)


def quarantine(site: Site, vm: Vm) -> Operation | None:
    """The operation that left this VM's process so."""
    if vm.process is None:
        return None
    last = next(iter(site.store.operations(site.facts.name, vm.uuid, OpState.QUARANTINED, limit=1)), None)
    if last is None:
        return None
    before, found = codec.load(Before, last.before), (last.result or {}).get("process")
    return last if vm.process in (before.vm and before.vm.process, found and codec.load(Process, found)) else None


def refuse_quarantined(site: Site, kind: Kind, vm: Vm | None) -> None:
    """RefusedError for all but what ends the process."""
    if kind not in _ENDING and vm is not None and (last := quarantine(site, vm)):
        raise RefusedError(f"{vm.name} is quarantined since operation {last.id}: {last.reason}", way_out(vm.name))


def way_out(name: str) -> str:
    return f"hvctl vm stop {name} --force, then start it"
