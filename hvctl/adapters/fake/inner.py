"""What the calls of a fake QEMU process are made of: where a snapshot's files are, what is tracked, what goes."""

from __future__ import annotations

from dataclasses import replace

from hvctl import codec
from hvctl.adapters.fake.state import FakeVm, File, Part, World
from hvctl.decide.rebind import rebound, renamed
from hvctl.errors import HvctlError, NotFoundError, RefusedError, UnreachableError
from hvctl.model.snapshot import Binding, Range, Snapshot, StrayTag
from hvctl.model.tracker import TrackerKind, Tracking
from hvctl.model.vm import State, Vm

FAST = (TrackerKind.UFFD, TrackerKind.SOFT_DIRTY)


def state_path(snapshot: Snapshot) -> str:
    return f"{snapshot.folder}/state"


def ram_path(snapshot: Snapshot) -> str:
    return f"{snapshot.folder}/ram"


def manifest_path(snapshot: Snapshot) -> str:
    return f"{snapshot.folder}/manifest.json"


def process_of(world: World, vm: Vm) -> FakeVm:
    """The VM while the QEMU process that the caller saw is still there."""
    if vm.process is None:
        raise RefusedError(f"{vm.name} has no QEMU process.", f"hvctl vm start {vm.name}")
    inside = world.vms.get(vm.uuid)
    if inside is None or inside.process != vm.process:
        raise UnreachableError(f"the QEMU process {vm.process.pid} of {vm.name} is gone.", f"hvctl vm show {vm.name}")
    return inside


def paused(world: World, vm: Vm, snapshot: Snapshot) -> FakeVm:
    """The VM while it is paused and the snapshot fits it."""
    inside = process_of(world, vm)
    if inside.state is not State.PAUSED:
        raise RefusedError(f"{vm.name} is {inside.state}, not paused.", f"virsh suspend {vm.name}")
    refuse_unfit(inside, snapshot)
    return inside


def refuse_unfit(inside: FakeVm, snapshot: Snapshot) -> None:
    if binding(inside) != snapshot.binding:
        raise RefusedError(
            f"snapshot {snapshot.name} does not fit {inside.name} any more.",
            f"take a new one: hvctl snapshot take {inside.name}",
        )


def binding(inside: FakeVm) -> Binding:
    assert inside.process is not None
    devices = [f"vcpu {i}" for i in range(len(inside.online))] + [n.mac for n in inside.nics] + inside.plugged
    devices += ["balloon"] if inside.has_balloon else []
    blocks = [f"node {d.node} {d.format} {'rw' if d.writable else 'ro'} {d.path}" for d in inside.disks]
    blocks += [f"disk {d.target} {d.node}" for d in inside.disks if d.writable]
    return Binding(inside.process, tuple(sorted(devices)), tuple(sorted(blocks)))


def rebind(world: World, inside: FakeVm, was: Binding) -> int:
    names, changed = renamed(was, binding(inside)), 0
    for snapshot in published(world, inside.uuid):
        new = rebound(snapshot, names)
        if snapshot.binding.process == inside.process and new != snapshot:
            world.files[manifest_path(new)] = File(Part(codec.dump_json(new).decode()))
            changed += 1
    return changed


def ranges(one: bytes, other: bytes) -> tuple[Range, ...]:
    """Where they differ, byte by byte; behind the end of the shorter one they do."""
    size = max(len(one), len(other))
    unequal = [n for n in range(size) if one[n : n + 1] != other[n : n + 1]]
    starts = [n for n in unequal if n - 1 not in unequal]
    return tuple(Range(n, next(e for e in range(n, size + 1) if e not in unequal)) for n in starts)


def copy(part: Part) -> Part:
    return Part(part.text, part.moment, part.size)


def overlays(world: World, inside: FakeVm, nodes: tuple[str, ...]) -> list[File]:
    return [world.files[d.path] for d in inside.disks if d.writable and d.path in world.files and d.node in nodes]


def stored(world: World, snapshot: Snapshot) -> Part:
    stored = world.files.get(ram_path(snapshot))
    if stored is None:
        raise NotFoundError(f"the RAM of snapshot {snapshot.name} is not there.", "hvctl snapshot list")
    return stored.part


def overlay_of(world: World, inside: FakeVm, target: str) -> File:
    path = next((d.path for d in inside.disks if d.target == target and d.writable), None)
    if path is None or path not in world.files:
        raise NotFoundError(f"{inside.name} has no disk {target}.", f"hvctl vm show {inside.name}")
    return world.files[path]


def unlike(one: str, other: str) -> int:
    """Bytes in which two texts of hexadecimal differ."""
    a, b = bytes.fromhex(one), bytes.fromhex(other)
    return sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))


def tracked_by(inside: FakeVm, wanted: TrackerKind) -> TrackerKind:
    """What can tell which pages were written; compare if nobody noted them."""
    state = inside.tracking
    if state is None or state.base is None or wanted not in (TrackerKind.AUTO, state.kind):
        return TrackerKind.COMPARE
    return state.kind


def arm(inside: FakeVm, vm: Vm, wanted: TrackerKind) -> Tracking:
    assert inside.process is not None
    state = inside.tracking or Tracking(inside.process, vm.ram)
    chosen, why = TrackerKind.COMPARE, []
    for kind in FAST if wanted is TrackerKind.AUTO else (wanted,):
        if kind in FAST and kind in inside.behaviour.trackers and kind.value not in state.disabled:
            chosen, why = kind, ["it passed its probe on this VM"]
            break
        why.append(f"{kind}: {state.disabled.get(kind.value, 'it does not work here')}")
    if wanted in FAST and chosen is not wanted:
        raise RefusedError(f"the tracker {wanted} cannot be used: {why[0]}", "--tracker auto takes what works")
    inside.tracking = replace(state, kind=chosen, reason="; ".join(why), base=None)
    return inside.tracking


def settle(inside: FakeVm, snapshot: Snapshot, *, reset: bool = False) -> Tracking:
    assert inside.tracking is not None
    base = snapshot.id if inside.tracking.kind in FAST else None
    inside.tracking = replace(inside.tracking, base=base, resets=inside.tracking.resets + reset)
    return inside.tracking


def published(world: World, uuid: str | None) -> list[Snapshot]:
    found = []
    for path, file in world.files.items():
        if not path.endswith("/manifest.json"):
            continue
        try:
            found.append(codec.load_json(Snapshot, file.part.text))
        except HvctlError:
            continue
    return sorted((s for s in found if uuid in (None, s.vm_uuid)), key=lambda s: (s.created_at, s.id))


def parent(world: World, snapshot: Snapshot) -> Snapshot:
    found = next((s for s in published(world, snapshot.vm_uuid) if s.id == snapshot.parent), None)
    if found is None:
        raise RefusedError(f"what snapshot {snapshot.name} builds on is not there: it is damaged.")
    return found


def own_overlays(world: World, vm: Vm) -> list[File]:
    inside = world.vms.get(vm.uuid)
    return [world.files[d.path] for d in inside.disks if d.path in world.files] if inside else []


def stray_tags(world: World, vm: Vm) -> list[StrayTag]:
    """A tag holds as many bytes as its content has."""
    known = {s.tag for s in published(world, vm.uuid)}
    held: dict[str, int] = {}
    for overlay in own_overlays(world, vm):
        for tag, part in overlay.tags.items():
            if tag.startswith("hvctl-") and tag not in known:
                held[tag] = held.get(tag, 0) + len(part.text)
    return [StrayTag(tag, size) for tag, size in sorted(held.items())]


def drop(world: World, vm: Vm | None, snapshot: Snapshot) -> None:
    inside, every = world.vms.get(snapshot.vm_uuid), published(world, snapshot.vm_uuid)
    built_on = any(s.parent == snapshot.id for s in every)
    if inside and vm and snapshot.vmstate_node in inside.nodes:
        inside.nodes.remove(snapshot.vmstate_node)
    for overlay in overlays(world, inside, snapshot.nodes) if inside else ():
        overlay.tags.pop(snapshot.tag, None)
    if inside and snapshot.nodes:
        inside.prepared = {t: p for t, p in inside.prepared.items() if p.begun}
    if built_on and manifest_path(snapshot) in world.files:
        hidden = replace(snapshot, hidden=True)
        world.files[manifest_path(snapshot)] = File(Part(codec.dump_json(hidden).decode()))
        world.files.pop(state_path(snapshot), None)
        return
    world.files = {p: f for p, f in world.files.items() if not p.startswith(f"{snapshot.folder}/")}
    left = [s for s in every if s.id != snapshot.id]
    if inside and inside.tracking and inside.tracking.base == snapshot.id:
        inside.tracking = replace(inside.tracking, base=snapshot.parent)
    if inside and not left:
        inside.tracking = None
    for parent in (s for s in left if s.id == snapshot.parent and s.hidden):
        drop(world, vm, parent)
