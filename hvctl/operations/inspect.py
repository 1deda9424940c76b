"""Reading: what a VM and a snapshot are, for people and programs. Nothing here changes anything."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hvctl import codec
from hvctl.decide.reset import binding_difference
from hvctl.engine.observe import observe, promised_vcpus
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_host
from hvctl.errors import NotFoundError
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import Accel, Vm
from hvctl.operations.vm import adoption
from hvctl.ports import Host
from hvctl.settings import Settings

# What a definition says of consoles: passwd='…'
_PASSWORD = re.compile(r"""(passwd=["'])[^"']*""")


@contextmanager
def _host(settings: Settings) -> Iterator[Host]:
    host = open_host(settings)
    try:
        yield host
    finally:
        host.domains.close()


def vms(settings: Settings) -> list[dict[str, Any]]:
    """One flat row per VM, from libvirt alone: bandwidth, which costs a kernel question each, stands in show."""
    with _host(settings) as host:
        return [_row(promised_vcpus(vm)) for vm in host.domains.list()]


def _row(vm: Vm) -> dict[str, Any]:
    return {
        "name": vm.name,
        "uuid": vm.uuid,
        "state": vm.state.value,
        "accel": vm.accel.value,
        "vcpus": vm.allocation.vcpus,
        "memory": vm.allocation.memory,
        "cpu_quota": vm.allocation.cpu_quota,
        "image": vm.record.image if vm.record else None,
        "managed": vm.record is not None,
        "warm": not vm.missing,
        "protected": vm.protected,
        "labels": vm.labels,
    }


def vm(settings: Settings, ref: str) -> dict[str, Any]:
    """Everything observed of one VM, and what was promised to it."""
    with _host(settings) as host:
        found = observe(host, ref, guest=True)
        data: dict[str, Any] = codec.dump(found)
        record = data.pop("record")
        data["promised"] = record["allocation"] if record else None
        data["protected"] = found.protected
        data["priority"] = found.record.priority if found.record else None
        data["interruptible"] = bool(found.record and found.record.interruptible)
        data["labels"] = found.labels
        data["image"] = found.record.image if found.record else None
        data["console"] = host.domains.console(found.uuid) if found.state.active else None
        data["accel_reason"] = _accel_reason(settings, found)
        return data


def _accel_reason(settings: Settings, found: Vm) -> str:
    if settings.uri.startswith("fake://"):
        return "a fake host"
    if found.accel is Accel.KVM:
        return "hardware virtualization"
    from hvctl.adapters.node.kvmprobe import kvm_works

    works, reason = kvm_works(settings)
    return "software emulation, though KVM works here now" if works else f"software emulation: {reason}"


def snapshots(settings: Settings, ref: str) -> list[dict[str, Any]]:
    """A VM's snapshots, each with `status`: ready, or in words why it does not fit any more."""
    with _host(settings) as host:
        return [_described(s, status) for s, status in _listed(host, host.domains.get(ref))]


def snapshot(settings: Settings, ref: str, name: str) -> dict[str, Any]:
    with _host(settings) as host:
        found = host.domains.get(ref)
        for taken, status in _listed(host, found):
            if name in (taken.name, taken.id):
                return _described(taken, status)
    raise NotFoundError(f"{found.name} has no snapshot {name}.", f"hvctl snapshot list {found.name}")


def _listed(host: Host, found: Vm) -> list[tuple[Snapshot, str]]:
    taken = host.machine.snapshots(found.uuid)
    if not taken:
        return []
    if not found.state.active:
        return [(s, "the QEMU process has ended") for s in taken]
    now = host.machine.binding(found)
    return [(s, binding_difference(s.binding, now) or "ready") for s in taken]


def _described(taken: Snapshot, status: str) -> dict[str, Any]:
    return {**codec.dump(taken), "status": status}


def adoption_diff(engine: Engine, ref: str) -> str:
    """The change to the definition as a unified diff, without passwords; empty if nothing has to change."""
    xml, adopted = (_PASSWORD.sub(r"\1…", text) for text in adoption(engine, engine.host.domains.get(ref)))
    lines = difflib.unified_diff(xml.splitlines(), adopted.splitlines(), "as it is", "for warm resets", lineterm="")
    return "\n".join(lines)
