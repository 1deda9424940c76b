"""Plans for taking a snapshot, returning to it and deleting it. The order is the safety: reasons stand at each plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hvctl.decide.replug import replug_steps
from hvctl.decide.scope import classify, disk_of
from hvctl.model.allocation import Record
from hvctl.model.disksteps import CheckReleased, PrepareDisk, ReadyDisk, RestoreDisk
from hvctl.model.operation import Phase
from hvctl.model.plan import (
    ArmTracker,
    Audit,
    AwaitAgent,
    AwaitLife,
    CopyRam,
    DropCaches,
    DropQueues,
    DropSnapshot,
    Enter,
    ForgetFlows,
    LoadState,
    PatchRam,
    Pause,
    Plan,
    PrepareSnapshot,
    PublishSnapshot,
    Refusal,
    Reseed,
    RestoreBalloon,
    RestoreRam,
    Resume,
    RunInGuest,
    SaveState,
    SetClock,
    SetNicLimit,
    SetRecord,
    Step,
)
from hvctl.model.reset import Coherence, Scope, Wishes
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.tracker import TrackerKind, Tracking
from hvctl.model.vm import State, Vm
from hvctl.units import format_size

AGENT_SECONDS = 15.0
LIFE_SECONDS = 10.0
NAMED = (TrackerKind.UFFD, TrackerKind.SOFT_DIRTY)


def refuse_unready(vm: Vm) -> Refusal | None:
    """Why a VM cannot have warm snapshots now, or None."""
    if vm.state not in (State.RUNNING, State.PAUSED):
        return Refusal(f"{vm.name} is {vm.state}: a snapshot is of a running VM.", f"hvctl vm start {vm.name}")
    if vm.missing:
        return Refusal(
            f"{vm.name} lacks what warm resets need: {', '.join(vm.missing)}.",
            f"`hvctl vm adopt {vm.name}` shows the change; it takes effect at the next start",
        )
    if vm.state is State.PAUSED and vm.reason == "io-error":
        return Refusal(f"{vm.name} is paused by an I/O error.", "free space on the host, then resume it")
    return None


def parent_of(state: Tracking | None, taken: tuple[Snapshot, ...], now: Binding) -> str | None:
    """The snapshot whose RAM the next one is kept as a difference to: what RAM is of, or else the newest that fits."""
    fitting = [s.id for s in taken if s.binding.process == now.process]
    if state is not None and state.base in fitting:
        return state.base
    return fitting[-1] if fitting else None


def plan_take(
    vm: Vm, snapshot: Snapshot, need: int, free: int, taken: tuple[Snapshot, ...], tracking: Tracking | None,
    tracker: TrackerKind = TrackerKind.AUTO,
) -> Plan | Refusal:  # fmt: skip
    """Take a snapshot; need and free are bytes of the tmpfs that snapshots live on.

    RAM is stored while the guest runs, and under the pause only what it wrote meanwhile. A tracker is armed in a short
    pause of its own before it, since its probe writes into guest RAM what is there."""
    if any(s.name == snapshot.name for s in taken):
        return Refusal(
            f"{vm.name} has a snapshot {snapshot.name} already.", f"hvctl snapshot delete {vm.name} {snapshot.name}"
        )
    if need > free:
        return Refusal(
            f"no space for the snapshot: it needs {format_size(need)}, {format_size(max(0, free))} are free.",
            f"`hvctl snapshot list {vm.name}` shows what could go, `hvctl config show` the budget",
        )
    running = vm.state is State.RUNNING
    arm = tracking is None or tracking.base is None
    steps: list[Step] = [Enter(Phase.TOUCHING), PrepareSnapshot(snapshot, tracker if arm else None)]
    pause: tuple[Step, ...] = (Pause(vm.uuid),) if running else ()
    resume: tuple[Step, ...] = (Resume(vm.uuid),) if running else ()
    if arm:
        steps += [*pause, ArmTracker(vm.uuid, tracker), *resume]
    steps += [CopyRam(snapshot, live=True)] if running else []
    steps += [*pause, SaveState(snapshot), CopyRam(snapshot), PublishSnapshot(snapshot), Enter(Phase.COMMITTED)]
    return Plan(f"snapshot {vm.name} as {snapshot.name}", (*steps, *resume))


def binding_difference(snapshot: Binding, now: Binding) -> str | None:
    """In words, why a snapshot does not fit the VM as it is now; None when it fits."""
    if snapshot.process != now.process:
        return "its QEMU process is another one than when the snapshot was taken"
    return shape_difference(snapshot, now)


def shape_difference(snapshot: Binding, now: Binding) -> str | None:
    """In words, how the devices and disks differ, whatever process they are in; None when they do not."""
    # What stands of disks says itself whether it is a disk, a node, a job or a bitmap.
    for what, old, new in (("device ", snapshot.devices, now.devices), ("", snapshot.blocks, now.blocks)):
        gone = sorted(set(old) - set(new))
        come = sorted(set(new) - set(old))
        if gone or come:
            said = [f"{what}{g!r} is gone" for g in gone[:3]] + [f"{what}{c!r} is new" for c in come[:3]]
            return ", ".join(said)
    return None


def after_reset(vm: Vm, snapshot: Snapshot) -> Record:
    """What is promised after a reset of RAM and devices: the guest is back at the snapshot's vCPUs and balloon."""
    record = vm.record or Record(vm.allocation)
    allocation = replace(record.allocation, vcpus=snapshot.vcpus, memory=snapshot.balloon)
    return record.with_allocation(allocation)


def plan_reset(
    vm: Vm, snapshot: Snapshot, now: Binding, scope: Scope, wishes: Wishes,
    in_use: frozenset[str] | None = None, scratch: Snapshot | None = None, tracking: Tracking | None = None,
    plugs: Mapping[str, str] | None = None,
) -> tuple[Plan, Coherence] | Refusal:  # fmt: skip
    """A VM, or parts of it, back to a snapshot. in_use as in classify; scratch is the state as it is now, which parts
    of RAM or of the devices need; tracking tells which tracker is in use; wishes.audit is decided; plugs are what plugs
    disks again that are unplugged for it (replug_steps)."""
    # One that is asked for by name and does not work must be found out before anything is written.
    arm = wishes.tracker in NAMED and (tracking is None or tracking.kind is not wishes.tracker)
    difference = binding_difference(snapshot.binding, now)
    if difference:
        return Refusal(
            f"{snapshot.name} does not fit {vm.name} any more: {difference}.",
            f"take a new one: hvctl snapshot take {vm.name}",
        )
    for name in (*scope.keep, *(p.disk for p in scope.disks or ())):
        found = disk_of(vm, name)
        if isinstance(found, Refusal):
            return found
    if scope.disks and needs_scratch(scope):
        return Refusal("a part of the guest's memory and a disk cannot go back together.", "one after the other")
    if scope.ram and scope.devices and any(p.range for p in scope.disks or ()):
        return Refusal("a range of a disk goes back alone.", "name the whole disk beside ram and devices")
    # Hooks that have the guest let go of a disk run first: then it is asked.
    alone = bool(scope.disks) and not (scope.ram or scope.devices)
    released = alone and bool(wishes.hooks.before) and not wishes.replug
    coherence, why = classify(vm, snapshot, scope, frozenset() if released else in_use, replug=wishes.replug)
    if coherence is Coherence.INCOHERENT and not wishes.accept_incoherent:
        # libvirt has the agent's channel closed for about a second after each reset.
        unheard = bool(scope.disks) and in_use is None and vm.has_agent
        hint = "repeat it in a second, when the guest's agent is heard again" if unheard else "name more parts"
        return Refusal(
            f"the reset of {vm.name} would be incoherent: {'; '.join(why)}.",
            f"{hint}, have the guest release them, {'--replug, ' if alone else ''}or --accept-incoherent",
        )
    reasons = why if coherence is not Coherence.COHERENT or wishes.replug else ()
    resume = not (vm.state is State.PAUSED and vm.reason == "user")
    if not resume:
        reasons += ("it was paused by the operator and stays paused",)
    if scope.ram and scope.devices:
        if resume and (wishes.clock or wishes.reseed) and not vm.pulse and not (vm.has_agent and snapshot.agent):
            reasons += ("nobody in the guest is known to set its clock and to reseed its random generator",)
        steps = reset_steps(vm, snapshot, scope, wishes, after_reset(vm, snapshot), resume, arm)
    elif scope.ram or scope.devices or scope.ranges:
        assert scratch is not None
        steps = _partial(vm, snapshot, scratch, scope, wishes, resume, arm)
    elif plugs:
        steps = replug_steps(vm, snapshot, wishes.hooks, plugs)
    else:
        steps = disks_back(vm, snapshot, scope, wishes)
    return Plan(_goal(vm, snapshot, scope), (*steps, *around(vm, scope)), reasons), coherence


def _goal(vm: Vm, snapshot: Snapshot, scope: Scope) -> str:
    if scope.ram and scope.devices and scope.disks is None:
        return f"reset {vm.name} to {snapshot.name}" + (f" but for {', '.join(scope.keep)}" if scope.keep else "")
    return f"reset {', '.join(part_names(scope))} of {vm.name} to {snapshot.name}"


def part_names(scope: Scope) -> list[str]:
    """The parts in words, as --only takes them."""
    names = [n for n, on in (("ram", scope.ram), ("devices", scope.devices)) if on]
    names += [f"ram:{r.start:#x}-{r.end:#x}" for r in scope.ranges]
    names += (
        ["all disks" if not scope.keep else f"all disks but {', '.join(scope.keep)}"] if scope.disks is None else []
    )
    for p in scope.disks or ():
        names.append(f"disk:{p.disk}" + (f":{p.range.start:#x}-{p.range.end:#x}" if p.range else ""))
    return names + [n for n, on in (("cache", scope.cache), ("net", scope.net)) if on]


def nodes_back(vm: Vm, snapshot: Snapshot, scope: Scope) -> tuple[str, ...] | None:
    """The snapshot's block nodes that go back with RAM and devices; None for all."""
    if scope.disks is None and not scope.keep:
        return None
    writable = [d for d in vm.disks if d.writable]
    named = scope.keep if scope.disks is None else tuple(p.disk for p in scope.disks)
    chosen = [d for d in writable if (d.target in named or d.name in named) == (scope.disks is not None)]
    return tuple(snapshot.targets[d.target] for d in chosen if d.target in snapshot.targets)


def reset_steps(
    vm: Vm, snapshot: Snapshot, scope: Scope, wishes: Wishes, record: Record, resume: bool, arm: bool = False
) -> tuple[Step, ...]:
    """RAM, devices and disks; arm: with another tracker than the one in use. Repeating it from any point leads to the
    same state, since the snapshot never changes.

    RAM comes before the state load, because virtio reads its rings out of guest RAM while loading, and again after it,
    because the machine reset inside the load writes ROMs and tables."""
    nodes = nodes_back(vm, snapshot, scope)
    steps: list[Step] = [Pause(vm.uuid, LoadState(snapshot, nodes))]
    steps += [ArmTracker(vm.uuid, wishes.tracker)] if arm else []
    steps += [Enter(Phase.TOUCHING)]
    steps += _load(snapshot, snapshot, nodes, wishes)
    if not resume:
        return (*steps, SetRecord(vm.uuid, record))
    return (*steps, *going_on(vm, snapshot, wishes, record))


def going_on(vm: Vm, snapshot: Snapshot, wishes: Wishes, record: Record) -> tuple[Step, ...]:
    """From a valid state to a guest that works in the present."""
    steps: list[Step] = [DropQueues(vm.uuid)] if any(n.tap for n in vm.nics) else []
    steps += go_on(vm, wishes)
    steps += [RestoreBalloon(snapshot), SetRecord(vm.uuid, record)]
    agent = vm.has_agent and snapshot.agent
    if agent and (wishes.hooks.after or (not vm.pulse and (wishes.clock or wishes.reseed))):
        steps += [AwaitAgent(vm.uuid, AGENT_SECONDS)]
    if agent and not (vm.pulse and wishes.reseed):
        steps += [SetClock(vm.uuid)] if wishes.clock else []
        steps += [Reseed(vm.uuid)] if wishes.reseed else []
    return (*steps, *(RunInGuest(vm.uuid, argv) for argv in wishes.hooks.after))


def _load(ram: Snapshot, state: Snapshot, nodes: tuple[str, ...] | None, wishes: Wishes) -> list[Step]:
    steps: list[Step] = [
        RestoreRam(ram, tracker=wishes.tracker),
        LoadState(state, nodes),
        RestoreRam(ram, tries=2, tracker=wishes.tracker),
    ]
    return [*steps, *([Audit(ram, state, nodes)] if wishes.audit else []), Enter(Phase.COMMITTED)]


def _partial(
    vm: Vm, snapshot: Snapshot, scratch: Snapshot, scope: Scope, wishes: Wishes, resume: bool, arm: bool
) -> tuple[Step, ...]:
    """Part of RAM, or devices alone: the state as it is now is kept as a scratch snapshot without disks, the asked part
    is put into it, and the VM goes back to that. So the vCPUs' state is loaded anew (emulated, QEMU would run code
    that it translated from what was in RAM before), and every step may be repeated as those of a whole reset."""
    steps: list[Step] = [PrepareSnapshot(scratch), Pause(vm.uuid)]
    steps += [ArmTracker(vm.uuid, wishes.tracker)] if arm else []
    steps += [SaveState(scratch), CopyRam(scratch)]
    if scope.ram or scope.ranges:
        steps += [PatchRam(scratch, snapshot, scope.ranges)]
    steps += [PublishSnapshot(scratch), Enter(Phase.TOUCHING)]
    steps += partial_load(snapshot, scratch, scope, wishes)
    return (*steps, *(go_on(vm, wishes) if resume else ()), DropSnapshot(scratch))


def go_on(vm: Vm, wishes: Wishes) -> tuple[Step, ...]:
    """The guest goes on, and finds with its first instructions what a pause or a reset took from it."""
    resume = Resume(vm.uuid, greet=wishes.reseed, clock=wishes.clock)
    return (resume, AwaitLife(vm.uuid, LIFE_SECONDS)) if vm.pulse and wishes.reseed else (resume,)


def partial_load(snapshot: Snapshot, scratch: Snapshot, scope: Scope, wishes: Wishes) -> list[Step]:
    """What of a partial reset must be repeated if it was interrupted."""
    return _load(scratch, snapshot if scope.devices else scratch, (), wishes)


def disks_back(vm: Vm, snapshot: Snapshot, scope: Scope, wishes: Wishes) -> tuple[Step, ...]:
    """Disks that the guest has released: each is made ready beside the one in use, then they change places."""
    if not scope.disks:
        return ()
    targets = [(found.target, p.range) for p in scope.disks if not isinstance(found := disk_of(vm, p.disk), Refusal)]
    steps: list[Step] = [RunInGuest(vm.uuid, argv, required=True) for argv in wishes.hooks.before]
    if wishes.hooks.before and not wishes.accept_incoherent:
        steps += [CheckReleased(vm.uuid, tuple(target for target, _ in targets))]
    steps += [PrepareDisk(snapshot, target, part) for target, part in targets]
    steps += [Enter(Phase.TOUCHING), *(RestoreDisk(snapshot, target, part) for target, part in targets)]
    steps += [Enter(Phase.COMMITTED), *(RunInGuest(vm.uuid, argv) for argv in wishes.hooks.after)]
    return (*steps, *(ReadyDisk(snapshot, target) for target, part in targets if part is None))


def around(vm: Vm, scope: Scope) -> tuple[Step, ...]:
    """The parts that need no snapshot: the network path, and the guest's page cache."""
    steps: list[Step] = []
    if scope.net:
        steps += [DropQueues(vm.uuid), ForgetFlows(vm.uuid)]
        steps += [SetNicLimit(vm.uuid, vm.allocation.nic(n.mac), rebuild=True) for n in vm.nics if n.tap]
    return (*steps, *([DropCaches(vm.uuid)] if scope.cache else []))


def needs_scratch(scope: Scope) -> bool:
    return bool(scope.ram != scope.devices or scope.ranges)


def plan_drop(vm_name: str, snapshot: Snapshot) -> Plan:
    return Plan(f"delete snapshot {snapshot.name} of {vm_name}", (Enter(Phase.TOUCHING), DropSnapshot(snapshot)))
