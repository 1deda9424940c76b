"""What the steps of a disk that goes back alone do: changed under its guest, or unplugged and plugged again."""

from __future__ import annotations

from collections.abc import Callable

from hvctl.engine.applied import Applied
from hvctl.engine.diskuse import disks_in_use
from hvctl.errors import RefusedError
from hvctl.model import disksteps as d
from hvctl.model import plan as p
from hvctl.model.vm import Vm
from hvctl.ports import Host


def disk_hand(host: Host, step: p.Step, vm: Callable[[str], Vm]) -> Applied | None:
    """None: it is another one's step."""
    machine = host.machine
    match step:
        case d.CheckReleased(uuid, targets):
            _check_released(host, vm(uuid), targets)
            return Applied()
        case d.PrepareDisk(snapshot, target, part):
            machine.prepare_disk(vm(snapshot.vm_uuid), snapshot, target, part)
            return Applied()
        case d.RestoreDisk(snapshot, target, part):
            return Applied(facts=dict(machine.restore_disk(vm(snapshot.vm_uuid), snapshot, target, part)))
        case d.FinishDisk(uuid, target):
            machine.finish_disk(vm(uuid), target)
            return Applied()
        case d.ReadyDisk(snapshot, target):
            machine.prepare_disk(vm(snapshot.vm_uuid), snapshot, target)
            return Applied()
        case d.UnplugDisk(snapshot, target, xml):
            host.domains.unplug_disk(snapshot.vm_uuid, target)
            return Applied(d.PlugDisk(snapshot, target, xml))
        case d.RevertDisk(snapshot, target):
            machine.revert_disk(vm(snapshot.vm_uuid), snapshot, target)
            return Applied()
        case d.PlugDisk(snapshot, target, xml):
            host.domains.plug_disk(snapshot.vm_uuid, target, xml)
            return Applied(facts={"rebound": machine.rebind(vm(snapshot.vm_uuid), snapshot.binding)})
        case _:
            return None


def _check_released(host: Host, vm: Vm, targets: tuple[str, ...]) -> None:
    in_use = disks_in_use(host, vm)
    if in_use is None:
        raise RefusedError(f"the guest of {vm.name} does not say whether it uses {', '.join(targets)}.")
    if used := sorted(in_use & set(targets)):
        raise RefusedError(
            f"the guest of {vm.name} still uses {', '.join(used)} after its hooks.", f"hvctl vm exec {vm.name} -- mount"
        )
