"""Deletes a snapshot: out of the QEMU process, out of the disks, and its layer, unless another one builds on that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hvctl.adapters.disks import diskpart
from hvctl.adapters.qemu import blockgraph, qemuimg
from hvctl.adapters.qemu.statejob import delete_tag
from hvctl.adapters.ram import layers, ramfile
from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram.pages import PAGE
from hvctl.adapters.snapshots import snapshotfolder
from hvctl.adapters.snapshots.opened import Opened
from hvctl.errors import HvctlError
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import Vm

# A state load flushes every disk, so a slow disk under load decides; the guest is paused meanwhile.


def overlays(snapshot: Snapshot) -> list[Path]:
    """The images that hold its tag."""
    return [Path(path) for path in blockgraph.overlays(snapshot.binding.blocks, snapshot.nodes)]


class Deletion:
    """Of one or more snapshots: what was only kept for the last one that built on it goes with that."""

    def __init__(self, root: Path, opened: Opened) -> None:
        self._root = root
        self._opened = opened

    def drop(self, vm: Vm | None, snapshot: Snapshot) -> None:
        self._drop(vm, snapshot)
        self._collect(vm, snapshot.vm_uuid)
        snapshotfolder.remove_vm_folder(self._root, snapshot.vm_uuid)

    def _collect(self, vm: Vm | None, uuid: str) -> None:
        """What nothing builds on any more, and what a delete that was killed here has left without its manifest."""
        while True:
            every = list(snapshotfolder.published(self._root, uuid))
            parents = {s.parent for s in every}
            unused = next((s for s in every if s.hidden and s.id not in parents), None)
            if unused is None:
                break
            self._drop(vm, unused)
        snapshotfolder.remove_unpublished(self._root, uuid)

    def _drop(self, vm: Vm | None, snapshot: Snapshot) -> None:
        folder = snapshotfolder.folder_of(self._root, snapshot)
        every = list(snapshotfolder.published(self._root, snapshot.vm_uuid))
        children = [s for s in every if s.parent == snapshot.id and s.id != snapshot.id]
        if children and (folder / snapshotfolder.MANIFEST).exists():
            snapshotfolder.publish(folder, replace(snapshot, hidden=True))
        else:
            snapshotfolder.unpublish(folder)
        if vm is not None and vm.process is not None:
            self._drop_inside(vm, snapshot, keep=bool(children))
        else:
            diskpart.forget(overlays(snapshot), None)
            for path in overlays(snapshot):
                if path.exists():
                    qemuimg.delete_internal_snapshot(path, snapshot.tag)
        if children:
            ramfile.wipe(folder / snapshotfolder.VMSTATE)
            layers.wipe_unseen(folder, [Path(c.folder) for c in children], snapshot.ram_size // PAGE)
            return
        snapshotfolder.remove(folder)

    def _drop_inside(self, vm: Vm, snapshot: Snapshot, *, keep: bool) -> None:
        held = self._opened.inside(vm)
        if snapshot.nodes:
            diskpart.forget(overlays(snapshot), held.process)
        held.forget()
        delete_tag(held, snapshot.tag)
        if snapshot.vmstate_node in held.graph.own:
            held.qmp.execute("blockdev-del", {"node-name": snapshot.vmstate_node})
        held.forget()
        if not keep and vm.process == snapshot.binding.process:
            self._rebase(vm, snapshot)

    def _rebase(self, vm: Vm, snapshot: Snapshot) -> None:
        """RAM may be that of the snapshot that goes: it is then described by its parent."""
        state = self._opened.known(vm)
        if state is None:
            return
        tracking, parent, own = self._opened.tracking(vm), snapshot.parent, pg.NONE
        if state.base == snapshot.id and parent is not None:
            try:
                layer = layers.Layer(Path(snapshot.folder), snapshot.ram_size // PAGE)
                own = layer.own()
                layer.close()
            except HvctlError:
                parent = None  # It was not whole yet: what RAM is is not known.
        tracking.rebase(snapshot.id, parent, own)
        if not any(s.id != snapshot.id for s in snapshotfolder.published(self._root, vm.uuid)):
            self._opened.end_tracking(vm)
