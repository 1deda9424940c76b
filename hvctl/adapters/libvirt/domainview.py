"""A domain as model.Vm: what libvirt's document says of it, what of that is in force now, and its QEMU process."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import libvirt

from hvctl.adapters.kernel import process
from hvctl.adapters.libvirt import domainxml, tuning
from hvctl.adapters.libvirt.calls import STATES, Connection, code_of
from hvctl.errors import DeadlineError, UnreachableError
from hvctl.model.allocation import Allocation, NicLimit
from hvctl.model.vm import State, Vm

_BALLOON_SECONDS: Final = 1.0


def seen(domain: Any, state: tuple[int, int], persistent: bool, local: bool) -> Vm:
    """The VM, looked at again if its process ended while it was being looked at. local: its process is on this host."""
    try:
        return _vm(domain, state, persistent, local)
    except libvirt.libvirtError as e:
        if code_of(e) != libvirt.VIR_ERR_OPERATION_INVALID:
            raise
        return _vm(domain, tuple(domain.state()), persistent, local)


def with_balloons(connection: Connection, vms: tuple[Vm, ...]) -> tuple[Vm, ...]:
    """With the balloons that QEMU has. A QEMU that hangs does not answer, and must not hide the other VMs of its host,
    nor be out of reach itself: its balloon is then what libvirt heard of it last."""
    told: dict[str, int] = {}

    def ask(c: Any) -> None:
        for vm in vms:
            if vm.state.active and vm.has_balloon:
                told.update(tuning.memory_in_force(c, vm.uuid))

    with suppress(DeadlineError, UnreachableError):
        connection.call("tell the balloons", ask, seconds=_BALLOON_SECONDS)
    return tuple(
        replace(vm, allocation=replace(vm.allocation, memory=told[vm.uuid])) if vm.uuid in told else vm for vm in vms
    )


def _vm(domain: Any, state: tuple[int, int], persistent: bool, local: bool) -> Vm:
    now, reasons = STATES.get(state[0], (State.OFF, ("unknown",)))
    parts = domainxml.read(domain.XMLDesc(0))
    active = now.active
    weight, quota = parts.cpu_shares, parts.cpu_quota
    if active:
        weight, quota = tuning.cpu_in_force(domain, parts.vcpus, (weight, quota))
    running = process.find(parts.name, parts.uuid) if active and local else None
    ram = process.ram_files(running, parts.max_memory) if running else ()
    lacks = parts.missing
    slow = next((r.path for r in ram if not process.on_tmpfs(r.path)), None)
    if running and not lacks and (not ram or slow):
        where = f"{slow} is not on one" if slow else "it has no file that can be found"
        lacks = (f"guest RAM on a tmpfs ({where}; set memory_backing_dir in qemu.conf and start it again)",)
    return Vm(
        uuid=parts.uuid,
        name=parts.name,
        state=now,
        reason=reasons[state[1]] if 0 <= state[1] < len(reasons) else "unknown",
        accel=parts.accel,
        persistent=persistent,
        process=running,
        allocation=Allocation(
            vcpus=parts.vcpus,
            memory=parts.memory,
            cpu_quota=quota,
            cpu_weight=tuning.weight_of(weight),
            nics=tuple(NicLimit(n.mac) for n in parts.nics),
            disks=parts.limits,
        ),
        max_vcpus=parts.max_vcpus,
        max_memory=parts.max_memory,
        disks=parts.disks,
        nics=parts.nics if active else tuple(replace(n, tap=None) for n in parts.nics),
        record=parts.record,
        missing=lacks,
        monitor=parts.monitor,
        pulse=parts.pulse,
        ram=ram,
        has_balloon=parts.has_balloon,
        has_agent=parts.has_agent,
        agent_connected=parts.agent_connected,
    )
