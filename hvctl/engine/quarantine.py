"""Guests that may not go on: an operation left memory or disks of two moments, or nobody can say whose they are. Only
another QEMU process ends that, so a later operation that was undone does not."""

from __future__ import annotations

from collections.abc import Sequence

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
    return last if last and _is_of(last, vm.process) else None


def quarantines(site: Site, vms: Sequence[Vm]) -> list[tuple[Vm, Operation]]:
    """Those of them whose process is so, with that operation: one question to the journal."""
    last: dict[str, Operation] = {}
    for operation in site.store.operations(site.facts.name, state=OpState.QUARANTINED):
        last.setdefault(operation.vm_uuid, operation)
    return [(vm, o) for vm in vms if vm.process and (o := last.get(vm.uuid)) and _is_of(o, vm.process)]


def _is_of(operation: Operation, process: Process) -> bool:
    before, found = codec.load(Before, operation.before), (operation.result or {}).get("process")
    return process in (before.vm and before.vm.process, found and codec.load(Process, found))


def refuse_quarantined(site: Site, kind: Kind, vm: Vm | None) -> None:
    """RefusedError for all but what ends the process."""
    if kind not in _ENDING and vm is not None and (last := quarantine(site, vm)):
        raise RefusedError(f"{vm.name} is quarantined since operation {last.id}: {last.reason}", way_out(vm.name))


def way_out(name: str) -> str:
    return f"hvctl vm stop {name} --force, then start it"
