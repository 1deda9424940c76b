"""Disks that a guest let go of after hvctl had given up waiting for it: nothing can take that request back, and no
operation is open that would plug them again."""

from __future__ import annotations

from dataclasses import replace

from hvctl import codec
from hvctl.engine.site import Site
from hvctl.model.operation import Before, Kind, OpState
from hvctl.model.vm import Vm

_LOOKED_AT = 50  # of a VM's operations


def lost_disks(site: Site, vm: Vm) -> Before | None:
    """The reset that a running guest went on from without a disk, with what plugs only these again; None if it has all.
    The newest operation with a disk tells: once it is plugged again, whoever unplugs it then wants that."""
    there = {d.target for d in vm.disks}
    told: set[str] = set()
    for operation in site.store.operations(site.facts.name, vm.uuid, limit=_LOOKED_AT):
        if operation.kind is not Kind.RESET or not operation.before.get("plugs"):
            continue
        before = codec.load(Before, operation.before)
        if before.vm is None or before.vm.process != vm.process:
            return None
        gone = {t: xml for t, xml in before.plugs.items() if t not in there and t not in told}
        if gone and operation.state in (OpState.UNDONE, OpState.FAILED):
            return replace(before, plugs=gone, was_running=False)
        told |= set(before.plugs)
    return None
