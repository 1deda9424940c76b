"""Disks that go back while the guest uses them: unplugged from it, and plugged again with what the snapshot has."""

from __future__ import annotations

from collections.abc import Mapping

from hvctl.decide.scope import disk_targets
from hvctl.model.disksteps import PlugDisk, PrepareDisk, ReadyDisk, RevertDisk, UnplugDisk
from hvctl.model.operation import Phase
from hvctl.model.plan import Enter, Refusal, RunInGuest, Step
from hvctl.model.reset import Hooks, Scope
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import State, Vm


def refuse_replug(vm: Vm, scope: Scope, systems: frozenset[str]) -> Refusal | None:
    """Why these parts cannot go back so, as far as the VM tells. systems are the targets of the disks that the guest
    says it runs from."""
    if not scope.disks or scope.ram or scope.devices or scope.ranges:
        return Refusal("only disks that go back alone are unplugged for it.", "--only disk:NAME --replug")
    if any(part.range for part in scope.disks):
        return Refusal("a disk that is unplugged goes back whole.", "--only disk:NAME --replug")
    if vm.state is not State.RUNNING:
        return Refusal(f"{vm.name} is {vm.state}: only a guest that runs lets go of a disk.", f"virsh resume {vm.name}")
    if root := sorted(systems.intersection(disk_targets(vm, scope))):
        return Refusal(f"the guest of {vm.name} runs from {', '.join(root)}.", "a whole reset brings all of it back")
    return None


def replug_steps(vm: Vm, snapshot: Snapshot, hooks: Hooks, plugs: Mapping[str, str]) -> tuple[Step, ...]:
    """plugs: what plugs each disk again, by target.

    What takes long is done before the guest is touched. Until it has let go of all disks, all can be plugged again as
    they were; then their images go back, which is done in one step each, and nobody has them open."""
    disks = tuple(plugs.items())
    steps: list[Step] = [RunInGuest(vm.uuid, argv, required=True) for argv in hooks.before]
    steps += [PrepareDisk(snapshot, target) for target, _ in disks]
    steps += [UnplugDisk(snapshot, target, xml) for target, xml in disks]
    steps += [Enter(Phase.TOUCHING), *(RevertDisk(snapshot, target) for target, _ in disks)]
    steps += [*(PlugDisk(snapshot, target, xml) for target, xml in disks), Enter(Phase.COMMITTED)]
    steps += [RunInGuest(vm.uuid, argv) for argv in hooks.after]
    return (*steps, *(ReadyDisk(snapshot, target) for target, _ in disks))
