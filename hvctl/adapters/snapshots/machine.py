"""Snapshots inside one QEMU process: device state and disks through its monitor, guest RAM through the files it maps.

Everything here that touches a guest refuses one that runs, and a snapshot that does not fit the process, its devices
and its disks any more. A process is opened at the first call of an operation, and let go at its end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from hvctl.adapters.disks import diskpart
from hvctl.adapters.guest.greeting import Greeting, quiet
from hvctl.adapters.guest.pulse import Hearing, tell
from hvctl.adapters.kernel import hostmemory
from hvctl.adapters.kernel.awake import awake
from hvctl.adapters.kernel.urgency import urgent, urgent_process
from hvctl.adapters.libvirt import domainxml_read
from hvctl.adapters.qemu import balloon, devicetree, heap, newprocess, qemuimg, statejob
from hvctl.adapters.qemu.inside import Inside
from hvctl.adapters.ram import pages, ramfile
from hvctl.adapters.snapshots import difference, snapshotfolder, snapshotlayers, straytags
from hvctl.adapters.snapshots.opened import Opened
from hvctl.adapters.snapshots.ramback import RamBack
from hvctl.adapters.snapshots.ramcopy import RamCopy
from hvctl.adapters.snapshots.snapshotdrop import Deletion, overlays
from hvctl.decide.reset import binding_difference
from hvctl.errors import DeadlineError, HvctlError, RefusedError, UnreachableError
from hvctl.machineport import Load
from hvctl.model.archive import Difference, Hardware
from hvctl.model.host import HostFacts
from hvctl.model.snapshot import Binding, Range, Snapshot, StrayTag
from hvctl.model.tracker import Life, Restored, TrackerKind, Tracking
from hvctl.model.vm import State, Vm
from hvctl.settings import Settings

# Virtual size of the image for device state; the state itself lies behind it and may be larger.
VMSTATE_SIZE: Final = 1 << 20


class QemuMachine:
    """ports.Machine on real QEMU. Files: settings.snapshots_dir/VM/{tracking.json,SNAPSHOT/{manifest.json,ram,…}}."""

    def __init__(self, settings: Settings, facts: HostFacts, document: Callable[[str], str]) -> None:
        """document: libvirt's of a running VM, by uuid."""
        self._settings = settings
        self._document = document
        self._facts = facts
        self._root = settings.snapshots_dir
        self._opened = Opened(settings)
        self._copy = RamCopy(settings, self._opened)
        self._back = RamBack(settings, self._opened)
        self._greeting = Greeting()
        self._hearing = Hearing()
        self._pause = ExitStack()  # what lasts as long as the guest stands still

    def release(self) -> None:
        self._pause.close()
        self._copy.close()
        self._back.forget()
        self._greeting.close()
        self._hearing.close()
        self._opened.release()

    def close(self) -> None:
        self.release()
        self._opened.close()

    # --- what there is

    def binding(self, vm: Vm) -> Binding:
        return self._opened.inside(vm).binding

    def nodes(self, vm: Vm) -> dict[str, str]:
        targets = {d.node: d.target for d in vm.disks}
        devices = self._opened.inside(vm).graph.writable()
        unknown = next((d for d in devices if d not in targets), None)
        if unknown:
            raise RefusedError(f"{vm.name} has a disk {unknown} that libvirt does not know.", "virsh domblklist")
        return {targets[device]: node for device, node in devices.items()}

    def room(self, vm: Vm) -> tuple[int, int]:
        free = min(snapshotlayers.free(self._root, self._settings.snapshot_budget), hostmemory.available())
        # With a parent it takes what was written since, which only the pause can tell: the layer's limit is the check.
        state = self.tracking(vm)
        need = VMSTATE_SIZE if state and state.base else sum(ramfile.resident(r.path) for r in vm.ram)
        return need + self._settings.memory_margin, free

    def tracking(self, vm: Vm) -> Tracking | None:
        return self._opened.known(vm)

    def snapshots(self, uuid: str | None = None, *, hidden: bool = False) -> Sequence[Snapshot]:
        return [s for s in self._layers(uuid) if hidden or not s.hidden]

    def _layers(self, uuid: str | None) -> list[Snapshot]:
        return sorted(snapshotfolder.published(self._root, uuid), key=lambda s: (s.created_at, s.id))

    def stray_tags(self, vm: Vm) -> Sequence[StrayTag]:
        return straytags.stray(self._root, self._opened, vm)

    def drop_tags(self, vm: Vm, tags: Collection[str]) -> Sequence[StrayTag]:
        return straytags.drop(self._root, self._opened, vm, frozenset(tags))

    # --- pausing

    def ready(self, vm: Vm, snapshot: Snapshot | None = None) -> None:
        held = self._opened.inside(vm)
        if snapshot is not None:
            self._back.foresee(vm, snapshot)
        heap.foresee(held.process.pid)
        self._pause.enter_context(awake())
        self._pause.enter_context(urgent_process(held.process.pid))
        self._pause.enter_context(pages.urgent_copies())
        held.look()

    def pause(self, vm: Vm, load: Load | None = None) -> None:
        held = self._opened.inside(vm)
        self._pause.enter_context(urgent())
        # Of one that stands still already QEMU is asked why before the load: what was ahead would be given up for that.
        early = statejob.ahead(held, *load) if load is not None and vm.state is State.RUNNING else None
        held.stop(early)

    def resume(self, vm: Vm, *, greet: bool = False, clock: bool = False) -> float:
        held = self._opened.inside(vm)
        if greet and vm.pulse is not None and held.is_paused():
            self._greeting.send(vm.pulse, clock=clock)
        continued = held.go_on()
        self._pause.close()
        return continued

    def await_life(self, vm: Vm, seconds: float) -> Life:  # noqa: ARG002 - the greeting knows its guest
        return self._greeting.await_life(seconds)

    def tell(self, vm: Vm, line: str) -> bool:
        return vm.pulse is not None and tell(vm.pulse, line)

    def hear(self, vm: Vm, line: str, seconds: float) -> bool:
        return vm.pulse is not None and self._hearing.hear(vm.pulse, line, seconds)

    # --- taking

    def prepare(self, vm: Vm, snapshot: Snapshot, arm: TrackerKind | None = None) -> None:
        folder = snapshotfolder.folder_of(self._root, snapshot)
        held = self._opened.inside(vm)
        held.graph.writable()
        devicetree.refuse_other_memory(held.qmp, {r.name: r.size for r in snapshot.regions})
        if snapshot.vmstate_node not in held.graph.own:
            snapshotfolder.make(self._root, folder)
            try:
                self._add_vmstate(held, snapshot, folder / snapshotfolder.VMSTATE)
            except (DeadlineError, UnreachableError):
                raise
            except (HvctlError, OSError):
                # QEMU has not got it, and no manifest will ever name it.
                snapshotfolder.remove(folder)
                raise
        if arm is not None:
            self._opened.tracking(vm).foresee(arm)

    def _add_vmstate(self, held: Inside, snapshot: Snapshot, image: Path) -> None:
        ramfile.wipe(image)
        qemuimg.create_empty(image, VMSTATE_SIZE)
        os.chown(image, self._facts.qemu_uid, self._facts.qemu_gid, follow_symlinks=False)
        newprocess.add_state_node(held, snapshot, image)

    def hardware(self, vm: Vm) -> Hardware:
        return newprocess.hardware(self._opened.inside(vm), vm, self._document(vm.uuid))

    def attach(self, vm: Vm, snapshot: Snapshot) -> None:
        held, folder = self._opened.inside(vm), snapshotfolder.folder_of(self._root, snapshot)
        devicetree.refuse_other_memory(held.qmp, {r.name: r.size for r in snapshot.regions})
        if snapshot.vmstate_node not in held.graph.own:
            newprocess.add_state_node(held, snapshot, folder / snapshotfolder.VMSTATE)

    def difference(self, one: Snapshot, other: Snapshot) -> Difference:
        return difference.difference(self._root, one, other)

    def arm(self, vm: Vm, tracker: TrackerKind) -> Tracking:
        held = self._opened.inside(vm)
        held.refuse_unless_paused()
        tracking = self._opened.tracking(vm)
        tracking.arm(tracker)
        return tracking.state

    def save_state(self, vm: Vm, snapshot: Snapshot) -> None:
        held = self._fitting(vm, snapshot)
        if not set(snapshot.nodes) <= set(held.graph.writable().values()):
            raise RefusedError(f"the disks of {vm.name} are not those of snapshot {snapshot.name}.")
        statejob.delete_tag(held, snapshot.tag)
        if vm.pulse is not None:
            quiet(vm.pulse, lambda: held.qmp.execute("query-status"))
        statejob.save(held, snapshot)
        if snapshot.nodes:
            diskpart.forget(overlays(snapshot), held.process)
        held.forget()

    def copy_ram(
        self, vm: Vm, snapshot: Snapshot, tracker: TrackerKind = TrackerKind.AUTO, *, live: bool = False
    ) -> int:
        if live:
            return self._copy.live(vm, snapshot, self._opened.inside(vm), tracker)
        return self._copy.rest(vm, snapshot, self._fitting(vm, snapshot), tracker)

    def patch_ram(self, vm: Vm, scratch: Snapshot, source: Snapshot, ranges: Sequence[Range] | None) -> int:
        return self._copy.patch(vm, scratch, source, ranges, self._fitting(vm, scratch))

    def publish(self, snapshot: Snapshot) -> None:
        folder = snapshotfolder.folder_of(self._root, snapshot)
        snapshotfolder.publish(folder, replace(snapshot, stored=snapshotfolder.stored(folder)))

    # --- going back

    def restore_ram(
        self, vm: Vm, snapshot: Snapshot, tracker: TrackerKind = TrackerKind.AUTO, *, after_load: bool = False
    ) -> Restored:
        return self._back.restore(vm, snapshot, self._fitting(vm, snapshot), tracker, after_load=after_load)

    def audit(self, vm: Vm, snapshot: Snapshot) -> int:
        return self._back.missed(vm, snapshot, self._fitting(vm, snapshot))

    def load_state(self, vm: Vm, snapshot: Snapshot, nodes: Sequence[str] | None = None) -> None:
        statejob.load(self._fitting(vm, snapshot), snapshot, nodes)

    def prepare_disk(self, vm: Vm, snapshot: Snapshot, target: str, range: Range | None = None) -> None:
        held, document = self._opened.inside(vm), self._document(vm.uuid)
        diskpart.prepare(held, vm, document, snapshot, target, range, self._settings.images_dir)

    def restore_disk(self, vm: Vm, snapshot: Snapshot, target: str, range: Range | None = None) -> dict[str, float]:
        return diskpart.restore(self._opened.inside(vm), vm, snapshot, target, range)

    def disk_is_back(self, vm: Vm, target: str) -> bool:
        return diskpart.is_back(self._opened.inside(vm), vm, target)

    def finish_disk(self, vm: Vm, target: str) -> None:
        diskpart.finish(self._opened.inside(vm), vm, target)

    def revert_disk(self, vm: Vm, snapshot: Snapshot, target: str) -> None:
        diskpart.revert(self._opened.inside(vm), vm, snapshot, target)

    def disk_is_reverted(self, vm: Vm, snapshot: Snapshot, target: str) -> bool:
        return diskpart.is_reverted(vm, snapshot, target)

    def rebind(self, vm: Vm, was: Binding) -> int:
        held = self._opened.inside(vm)
        held.forget()
        return snapshotfolder.rebind(self._root, vm.uuid, was, held.binding)

    def restore_balloon(self, vm: Vm, snapshot: Snapshot) -> None:
        if not vm.has_balloon:
            return
        told = domainxml_read.read(self._document(vm.uuid)).memory
        balloon.restore(self._opened.inside(vm), snapshot.balloon, told)

    def drop(self, vm: Vm | None, snapshot: Snapshot) -> None:
        self._copy.forget(snapshot)
        Deletion(self._root, self._opened).drop(vm, snapshot)

    # --- how

    def _fitting(self, vm: Vm, snapshot: Snapshot) -> Inside:
        """The inside of a paused VM that the snapshot fits."""
        held = self._opened.inside(vm)
        held.refuse_unless_paused()
        changed = binding_difference(snapshot.binding, held.binding)
        if changed:
            raise RefusedError(
                f"snapshot {snapshot.name} does not fit {vm.name} any more: {changed}.",
                f"take a new one: hvctl snapshot take {vm.name}",
            )
        return held
