"""The inside of a fake QEMU process: snapshots are files and tags of the fake host, and every part of a guest carries
the moment it is of, so that a wrong order of steps shows."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from hvctl import codec
from hvctl.adapters.fake import inner, life
from hvctl.adapters.fake.document import document
from hvctl.adapters.fake.file import WorldFile
from hvctl.adapters.fake.state import RAM_BYTES, FakeVm, File, Part, Prepared, World
from hvctl.adapters.libvirt.domainxml_read import board
from hvctl.errors import DeadlineError, GuestError, HvctlError, RefusedError
from hvctl.machineport import Load
from hvctl.model.archive import Difference, DiskDifference, Hardware, RegionDifference
from hvctl.model.snapshot import Binding, Range, Snapshot, StrayTag
from hvctl.model.tracker import Life, Restored, TrackerKind, Tracking
from hvctl.model.vm import State, Vm

TOUCHED_BY_LOAD = 8
KEPT_LINES = 20
HALF = RAM_BYTES


class FakeMachine:
    def __init__(self, file: WorldFile) -> None:
        self._file = file

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass

    def tracking(self, vm: Vm) -> Tracking | None:
        with self._file.call("tracking", vm.uuid, looks=True) as world:
            return inner.process_of(world, vm).tracking

    def ready(self, vm: Vm, snapshot: Snapshot | None = None) -> None:
        with self._file.call("ready", vm.uuid, looks=True) as world:
            inside = inner.process_of(world, vm)
            if inside.asked:
                raise RefusedError(f"the guest of {vm.name} was asked to let go of a disk, and has not.")
            if snapshot is not None:
                inner.refuse_unfit(inside, snapshot)

    def pause(self, vm: Vm, load: Load | None = None) -> None:  # noqa: ARG002
        with self._file.call("pause", vm.uuid) as world:
            life.pause(inner.process_of(world, vm))

    def resume(self, vm: Vm, *, greet: bool = False, clock: bool = False) -> float:
        with self._file.call("resume", vm.uuid) as world:
            inside = inner.process_of(world, vm)
            inside.greeted = greet and inside.state is State.PAUSED and inside.has_pulse
            inside.told_time = inside.greeted and clock
            if inside.greeted:
                inside.said.clear()
            life.resume(world, inside)
            return time.monotonic()

    def await_life(self, vm: Vm, seconds: float) -> Life:
        with self._file.call("await_life", vm.uuid) as world:
            inside = inner.process_of(world, vm)
            if not inside.greeted:
                return Life()
            if not inside.behaviour.answers_pulse:
                raise DeadlineError(f"the guest did not show a sign of life within {seconds:g} s.")
            inside.guest_time = world.clock if inside.told_time else None
            return Life(0.001, True, inside.told_time)

    def tell(self, vm: Vm, line: str) -> bool:
        with self._file.call("tell", vm.uuid) as world:
            inside = inner.process_of(world, vm)
            if vm.pulse is None or not inside.behaviour.answers_pulse or inside.state is not State.RUNNING:
                return False
            inside.heard = [*inside.heard, line][-KEPT_LINES:]
            if inside.behaviour.acknowledges and line.startswith("notice interruption "):
                inside.said.append(f"ready {line.split()[5]}")
            return True

    def hear(self, vm: Vm, line: str, seconds: float) -> bool:  # noqa: ARG002 - nothing moves by itself here
        with self._file.call("hear", vm.uuid) as world:
            inside = inner.process_of(world, vm)
            said = inside.said if vm.pulse is not None else []
            if line not in said:
                said.clear()
                return False
            del said[: said.index(line) + 1]
            return True

    def binding(self, vm: Vm) -> Binding:
        with self._file.call("binding", vm.uuid, looks=True) as world:
            return inner.binding(inner.process_of(world, vm))

    def nodes(self, vm: Vm) -> dict[str, str]:
        with self._file.call("nodes", vm.uuid, looks=True) as world:
            disks = [d for d in inner.process_of(world, vm).disks if d.writable]
            for disk in disks:
                if disk.format != "qcow2" or not disk.node:
                    raise RefusedError(f"disk {disk.target} of {vm.name} is {disk.format}: it cannot hold a snapshot.")
            return {d.target: str(d.node) for d in disks}

    def room(self, vm: Vm) -> tuple[int, int]:
        with self._file.call("room", vm.uuid, looks=True) as world:
            return inner.process_of(world, vm).allocation.memory, world.room

    def prepare(self, vm: Vm, snapshot: Snapshot, arm: TrackerKind | None = None) -> None:  # noqa: ARG002 - needs no room  # noqa: ARG002
        with self._file.call("prepare", vm.uuid) as world:
            inside = inner.process_of(world, vm)
            world.files.setdefault(inner.state_path(snapshot), File())
            if snapshot.vmstate_node not in inside.nodes:
                inside.nodes.append(snapshot.vmstate_node)

    def hardware(self, vm: Vm) -> Hardware:
        with self._file.call("hardware", vm.uuid, looks=True) as world:
            inside = inner.process_of(world, vm)
            machine, cpu, devices = board(document(inside))
            return Hardware(world.facts.hypervisor_version, machine, inside.accel.value, cpu, "", devices)

    def attach(self, vm: Vm, snapshot: Snapshot) -> None:
        with self._file.call("attach", vm.uuid) as world:
            inside = inner.process_of(world, vm)
            if inner.state_path(snapshot) not in world.files:
                raise HvctlError(f"{vm.name} has no device state of {snapshot.name}.")
            if snapshot.vmstate_node not in inside.nodes:
                inside.nodes.append(snapshot.vmstate_node)

    def difference(self, one: Snapshot, other: Snapshot) -> Difference:
        with self._file.call("difference", one.vm_uuid, looks=True) as world:
            ram = inner.ranges(*(bytes.fromhex(inner.stored(world, s).text) for s in (one, other)))
            overlays = {
                d.target: world.files[str(d.path)] for d in world.vms[one.vm_uuid].disks if d.path in world.files
            }
            disks = []
            for target in sorted(one.targets):
                found = inner.ranges(*(overlays[target].tags[s.tag].text.encode() for s in (one, other)))
                disks.append(DiskDifference(target, 1, sum(r.end - r.start for r in found), found))
            regions = (RegionDifference(one.regions[0].name, sum(r.end - r.start for r in ram), ram),)
            return Difference(regions, tuple(disks))

    def arm(self, vm: Vm, tracker: TrackerKind) -> Tracking:
        with self._file.call("arm", vm.uuid) as world:
            inside = inner.process_of(world, vm)
            if inside.state is not State.PAUSED:
                raise RefusedError(f"{vm.name} is {inside.state}, not paused.", f"virsh suspend {vm.name}")
            return inner.arm(inside, vm, tracker)

    def save_state(self, vm: Vm, snapshot: Snapshot) -> None:
        with self._file.call("save_state", vm.uuid) as world:
            inside = inner.paused(world, vm, snapshot)
            if snapshot.vmstate_node not in inside.nodes:
                raise HvctlError(f"{vm.name} has no node {snapshot.vmstate_node} for the device state.")
            world.files[inner.state_path(snapshot)] = File(inner.copy(inside.devices))
            for overlay in inner.overlays(world, inside, snapshot.nodes):
                overlay.tags[snapshot.tag] = inner.copy(overlay.part)

    def copy_ram(
        self, vm: Vm, snapshot: Snapshot, tracker: TrackerKind = TrackerKind.AUTO, *, live: bool = False
    ) -> int:
        with self._file.call("copy_ram", vm.uuid) as world:
            inside = inner.process_of(world, vm) if live else inner.paused(world, vm, snapshot)
            if inner.state_path(snapshot) not in world.files:
                raise HvctlError(f"there is no folder for snapshot {snapshot.name}.")
            parent = inner.stored(world, inner.parent(world, snapshot)).text if snapshot.parent else ""
            half = Part(inside.ram.text[:HALF])
            world.files[inner.ram_path(snapshot)] = File(half)
            if live:
                return inner.unlike(half.text, parent[:HALF])
        # Two changes, so that a death in between leaves half a copy, as it does of real RAM.
        with self._file.change() as world:
            inside = inner.process_of(world, vm)
            if inside.tracking is None:
                inner.arm(inside, vm, tracker)
            world.files[inner.ram_path(snapshot)] = File(inner.copy(inside.ram))
            inside.ram_of = snapshot.folder
            inner.settle(inside, snapshot)
            return inner.unlike(inside.ram.text, parent)

    def patch_ram(self, vm: Vm, scratch: Snapshot, source: Snapshot, ranges: Sequence[Range] | None) -> int:
        with self._file.call("patch_ram", vm.uuid) as world:
            inside = inner.paused(world, vm, scratch)
            mine, theirs = inner.stored(world, scratch), inner.stored(world, source)
            size = scratch.ram_size // RAM_BYTES
            for r in [Range(0, scratch.ram_size)] if ranges is None else ranges:
                if r.end > scratch.ram_size:
                    raise RefusedError(f"{r.start:#x} to {r.end:#x} is not one piece of guest RAM.")
                first, last = 2 * (r.start // size), 2 * -(-r.end // size)
                mine.text = mine.text[:first] + theirs.text[first:last] + mine.text[last:]
            # RAM is as it was, and so no more that of the copy.
            inside.ram_of = None
            return sum(r.end - r.start for r in ranges) if ranges else scratch.ram_size

    def publish(self, snapshot: Snapshot) -> None:
        with self._file.call("publish", snapshot.vm_uuid) as world:
            whole = replace(snapshot, stored=len(inner.stored(world, snapshot).text) // 2)
            world.files[inner.manifest_path(snapshot)] = File(Part(codec.dump_json(whole).decode()))

    def restore_ram(
        self, vm: Vm, snapshot: Snapshot, tracker: TrackerKind = TrackerKind.AUTO, *, after_load: bool = False
    ) -> Restored:
        with self._file.call("restore_ram", vm.uuid) as world:
            inside = inner.paused(world, vm, snapshot)
            stored, before, kind = inner.stored(world, snapshot), inside.ram.text, inner.tracked_by(inside, tracker)
            wanted = stored.text
            if kind is TrackerKind.COMPARE:
                inner.arm(inside, vm, tracker)
            elif inside.behaviour.tracker_misses:
                seen = len(wanted) - 2 * inside.behaviour.tracker_misses
                wanted = wanted[:seen] + before[seen:]
            inside.ram_of = None
            if before != wanted:
                inside.ram = Part(wanted[:HALF] + before[HALF:], world.tick())
        with self._file.change() as world:
            inside = inner.process_of(world, vm)
            inside.ram = Part(wanted, stored.moment)
            inside.ram_of = snapshot.folder
            state = inner.settle(inside, snapshot, reset=after_load)
        pages = inner.unlike(before, wanted)
        return Restored(pages, pages, kind, state.kind, state.reason)

    def audit(self, vm: Vm, snapshot: Snapshot) -> int:
        with self._file.call("audit", vm.uuid) as world:
            inside = inner.paused(world, vm, snapshot)
            missed = inner.unlike(inside.ram.text, inner.stored(world, snapshot).text)
            if missed and inside.tracking:
                disabled = {**inside.tracking.disabled, inside.tracking.kind.value: "an audit found what it had missed"}
                inside.tracking = replace(inside.tracking, kind=TrackerKind.COMPARE, base=None, disabled=disabled)
            return missed

    def load_state(self, vm: Vm, snapshot: Snapshot, nodes: Sequence[str] | None = None) -> None:
        with self._file.call("load_state", vm.uuid) as world:
            inside = inner.paused(world, vm, snapshot)
            state = world.files.get(inner.state_path(snapshot))
            overlays = inner.overlays(world, inside, snapshot.nodes if nodes is None else tuple(nodes))
            held = snapshot.vmstate_node in inside.nodes and all(snapshot.tag in o.tags for o in overlays)
            if state is None or not held:
                raise RefusedError(f"snapshot {snapshot.name} is damaged: {vm.name} does not hold all of it.")
            # Of the whole machine RAM must be that of the snapshot; of parts, all of it that of some snapshot.
            if inside.dead or inside.ram_of is None or (nodes is None and inside.ram_of != snapshot.folder):
                inside.dead = True
                raise GuestError(f"the state of {snapshot.name} could not be loaded: {vm.name} must not continue.")
            inside.devices = inner.copy(state.part)
            if nodes is not None:
                # What stays, stays of one moment with the rest: whoever asked for it has been told.
                for kept in life.parts(world, inside)[1:]:
                    kept.moment = inside.ram.moment
            for overlay in overlays:
                overlay.part = inner.copy(overlay.tags[snapshot.tag])
            # The machine reset inside a load writes ROMs and tables into RAM.
            inside.ram = Part("f0" * TOUCHED_BY_LOAD + inside.ram.text[2 * TOUCHED_BY_LOAD :], world.tick())
            inside.ram_of = None
            inside.agent_gap = inside.behaviour.agent_gap
            inside.guest_time = None
            inside.live = replace(inside.allocation, memory=snapshot.balloon)

    def prepare_disk(self, vm: Vm, snapshot: Snapshot, target: str, range: Range | None = None) -> None:
        with self._file.call("prepare_disk", vm.uuid) as world:
            inside = inner.process_of(world, vm)
            known = inside.prepared.get(target)
            if known is None or not known.begun:
                overlay = inner.overlay_of(world, inside, target)
                if snapshot.tag not in overlay.tags:
                    raise RefusedError(f"disk {target} of {vm.name} does not hold {snapshot.name}.")
                inside.prepared[target] = Prepared(snapshot.tag, range)

    def restore_disk(self, vm: Vm, snapshot: Snapshot, target: str, range: Range | None = None) -> dict[str, float]:
        with self._file.call("restore_disk", vm.uuid) as world:
            inside = inner.process_of(world, vm)
            ready = inside.prepared.get(target)
            if ready is None or (ready.tag, ready.range) != (snapshot.tag, range):
                raise RefusedError(f"nothing is prepared for disk {target} of {vm.name}.")
            ready.begun = True
        # Two changes, as of RAM.
        with self._file.change() as world:
            self._put_back(world, inner.process_of(world, vm), target)
            return {"away": 0.0}

    @staticmethod
    def _put_back(world: World, inside: FakeVm, target: str) -> None:
        """The guest has released it, so that it is of any moment."""
        overlay, ready = inner.overlay_of(world, inside, target), inside.prepared.pop(target)
        stored, range = overlay.tags[ready.tag], ready.range
        was, taken = stored.text, stored.size
        if range is not None:
            size = max(len(was), len(overlay.part.text))
            now, was = overlay.part.text.ljust(size, "\0"), was.ljust(size, "\0")
            was = (now[: range.start] + was[range.start : range.end] + now[range.end :]).rstrip("\0")
            taken = overlay.part.size
        overlay.part = Part(was, inside.devices.moment, taken)

    def disk_is_back(self, vm: Vm, target: str) -> bool:
        with self._file.call("disk_is_back", vm.uuid) as world:
            ready = inner.process_of(world, vm).prepared.get(target)
            return ready is None or ready.begun

    def finish_disk(self, vm: Vm, target: str) -> None:
        with self._file.call("finish_disk", vm.uuid) as world:
            inside = inner.process_of(world, vm)
            ready = inside.prepared.get(target)
            if ready is not None and ready.begun:
                self._put_back(world, inside, target)

    def revert_disk(self, vm: Vm, snapshot: Snapshot, target: str) -> None:
        with self._file.call("revert_disk", vm.uuid) as world:
            inside = inner.process_of(world, vm)
            if any(d.target == target for d in inside.disks):
                raise RefusedError(f"QEMU has the image of disk {target} of {vm.name} open.")
            ready = inside.prepared.get(target)
            if ready is None or (ready.tag, ready.range) != (snapshot.tag, None):
                raise RefusedError(f"nothing is prepared for disk {target} of {vm.name}.")
            if not ready.done:
                overlay = world.files[next(str(d.path) for d in inside.unplugged if d.target == target)]
                overlay.part, ready.done = inner.copy(overlay.tags[ready.tag]), True

    def disk_is_reverted(self, vm: Vm, snapshot: Snapshot, target: str) -> bool:
        with self._file.call("disk_is_reverted", vm.uuid) as world:
            ready = inner.process_of(world, vm).prepared.get(target)
            return ready is not None and ready.done and (ready.tag, ready.range) == (snapshot.tag, None)

    def rebind(self, vm: Vm, was: Binding) -> int:
        with self._file.call("rebind", vm.uuid) as world:
            return inner.rebind(world, inner.process_of(world, vm), was)

    def restore_balloon(self, vm: Vm, snapshot: Snapshot) -> None:
        with self._file.call("restore_balloon", vm.uuid) as world:
            inside = inner.process_of(world, vm)
            if not inside.has_balloon or inside.allocation.memory == snapshot.balloon:
                return
            if not inside.behaviour.balloon_driver:
                raise DeadlineError(f"the balloon of {vm.name} did not reach {snapshot.balloon} bytes in time.")
            inside.live = replace(inside.allocation, memory=snapshot.balloon)

    def stray_tags(self, vm: Vm) -> Sequence[StrayTag]:
        with self._file.call("stray_tags", vm.uuid, looks=True) as world:
            return inner.stray_tags(world, vm)

    def drop_tags(self, vm: Vm, tags: Collection[str]) -> Sequence[StrayTag]:
        with self._file.call("drop_tags", vm.uuid) as world:
            gone = [t for t in inner.stray_tags(world, vm) if t.tag in tags]
            for overlay in inner.own_overlays(world, vm):
                for one in gone:
                    overlay.tags.pop(one.tag, None)
            return gone

    def drop(self, vm: Vm | None, snapshot: Snapshot) -> None:
        with self._file.call("drop", snapshot.vm_uuid) as world:
            inner.drop(world, vm, snapshot)

    def snapshots(self, uuid: str | None = None, *, hidden: bool = False) -> Sequence[Snapshot]:
        with self._file.call("snapshots", uuid, looks=True) as world:
            return [s for s in inner.published(world, uuid) if hidden or not s.hidden]
