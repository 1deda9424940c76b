"""Snapshots inside one QEMU process: device state and disks through its monitor, guest RAM through the file it maps.

Pausing and resuming is libvirt's, so that its picture stays true: everything here that touches a guest refuses one
that runs, and a snapshot that does not fit the process, its devices and its disks any more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from hvctl.adapters import blockgraph, devicetree, guestram, qemuimg, snapshotfolder
from hvctl.adapters.blockgraph import Graph
from hvctl.adapters.processhold import held
from hvctl.adapters.qmp import Job, Qmp
from hvctl.errors import DeadlineError, HvctlError, RefusedError, UnreachableError
from hvctl.model.host import HostFacts
from hvctl.model.snapshot import Binding, Snapshot
from hvctl.model.vm import Process, Vm
from hvctl.settings import Settings

# A state load flushes every disk, so a slow disk under load decides; the guest is paused meanwhile.
JOB_SECONDS: Final = 60.0
BALLOON_SECONDS: Final = 5.0
# Virtual size of the image for device state; the state itself lies behind it and may be larger.
VMSTATE_SIZE: Final = 1 << 20
# What QEMU calls a guest that does not run and is whole: paused, or left so by a save or load that was interrupted.
_STOPPED: Final = frozenset({"paused", "save-vm", "restore-vm"})
_MIGRATING: Final = frozenset(
    {"setup", "active", "postcopy-active", "postcopy-paused", "pre-switchover", "device", "wait-unplug", "cancelling"}
)


class QemuMachine:
    """ports.Machine on real QEMU. Files: settings.snapshots_dir/VM/SNAPSHOT/{manifest.json,ram,vmstate.qcow2}."""

    def __init__(self, settings: Settings, facts: HostFacts) -> None:
        self._settings = settings
        self._facts = facts
        self._root = settings.snapshots_dir

    def binding(self, vm: Vm) -> Binding:
        with self._session(vm) as qmp:
            return self._binding(vm, qmp, self._graph(qmp))

    def nodes(self, vm: Vm) -> tuple[str, ...]:
        with self._session(vm) as qmp:
            return self._graph(qmp).writable()

    def room(self, vm: Vm) -> tuple[int, int]:
        _, ram_path = _running(vm)
        need = guestram.resident(ram_path) + self._settings.memory_margin
        folder = self._root
        while not folder.exists():
            folder = folder.parent
        status = os.statvfs(folder)
        return need, min(status.f_bavail * status.f_frsize, _available_memory())

    def prepare(self, vm: Vm, snapshot: Snapshot) -> None:
        folder = snapshotfolder.folder_of(self._root, snapshot)
        with self._session(vm) as qmp:
            graph = self._graph(qmp)
            graph.writable()
            devicetree.refuse_other_memory(qmp, snapshot.ram_size)
            if snapshot.vmstate_node in graph.own:
                return
            snapshotfolder.make(self._root, folder)
            try:
                self._add_vmstate(qmp, snapshot, folder / snapshotfolder.VMSTATE)
            except (DeadlineError, UnreachableError):
                raise
            except (HvctlError, OSError):
                # QEMU has not got it, and no manifest will ever name it.
                snapshotfolder.remove(folder)
                raise

    def _add_vmstate(self, qmp: Qmp, snapshot: Snapshot, image: Path) -> None:
        guestram.wipe(image)
        qemuimg.create_empty(image, VMSTATE_SIZE)
        os.chown(image, self._facts.qemu_uid, self._facts.qemu_gid, follow_symlinks=False)
        cache = {"direct": False, "no-flush": True}
        file = {"driver": "file", "filename": str(image), "cache": cache}
        qmp.execute(
            "blockdev-add", {"driver": "qcow2", "node-name": snapshot.vmstate_node, "file": file, "cache": cache}
        )

    def save_state(self, vm: Vm, snapshot: Snapshot) -> None:
        with self._paused(vm, snapshot) as (qmp, graph):
            if graph.writable() != tuple(sorted(snapshot.nodes)):
                raise RefusedError(f"the disks of {vm.name} are not those of snapshot {snapshot.name}.")
            self._delete_tag(qmp, graph, snapshot.tag)
            _state_job(qmp, "snapshot-save", snapshot)

    def copy_ram(self, vm: Vm, snapshot: Snapshot) -> int:
        folder = snapshotfolder.folder_of(self._root, snapshot)
        with self._paused(vm, snapshot), self._guest_ram(vm, snapshot) as guest:
            path = folder / snapshotfolder.RAM
            guestram.wipe(path)
            with guestram.stored_ram(path, snapshot.ram_size, create=True) as stored:
                return guestram.copy(guest, stored)

    def publish(self, snapshot: Snapshot) -> None:
        folder = snapshotfolder.folder_of(self._root, snapshot)
        snapshotfolder.publish(folder, replace(snapshot, stored=snapshotfolder.stored(folder)))

    def restore_ram(self, vm: Vm, snapshot: Snapshot) -> int:
        with self._both_rams(vm, snapshot) as (guest, stored):
            return guestram.restore(guest, stored)

    def difference(self, vm: Vm, snapshot: Snapshot) -> int:
        """Pages of guest RAM that are not as in the snapshot: the audit of a reset. The guest is paused."""
        with self._both_rams(vm, snapshot) as (guest, stored):
            return guestram.difference(guest, stored)

    def load_state(self, vm: Vm, snapshot: Snapshot) -> None:
        with self._paused(vm, snapshot) as (qmp, graph):
            lacking = sorted({snapshot.vmstate_node, *snapshot.nodes} - set(graph.tagged(snapshot.tag)))
            if lacking:
                raise RefusedError(
                    f"snapshot {snapshot.name} is damaged: {lacking[0]} of {vm.name} does not hold it.",
                    f"hvctl snapshot delete {vm.name} {snapshot.name}",
                )
            _state_job(qmp, "snapshot-load", snapshot)

    def restore_balloon(self, vm: Vm, snapshot: Snapshot) -> None:
        if not vm.has_balloon:
            return
        wanted = snapshot.balloon
        with self._session(vm) as qmp:
            # The balloon's size is device state: after a load it is the snapshot's, unless the guest moved on.
            if qmp.execute("query-balloon")["actual"] == wanted:
                return
            qmp.execute("balloon", {"value": wanted})
            if not qmp.until(
                "BALLOON_CHANGE", lambda: qmp.execute("query-balloon")["actual"] == wanted, BALLOON_SECONDS
            ):
                raise DeadlineError(
                    f"the balloon of {vm.name} did not reach the snapshot's {wanted} bytes"
                    f" within {BALLOON_SECONDS:g} s.",
                    f"hvctl vm show {vm.name}",
                )

    def drop(self, vm: Vm | None, snapshot: Snapshot) -> None:
        folder = snapshotfolder.folder_of(self._root, snapshot)
        snapshotfolder.unpublish(folder)
        if vm is not None and vm.process is not None:
            with self._session(vm) as qmp:
                # A killed hvctl may have left these two.
                _ignore_shared_ram(qmp, False)
                qmp.dismiss_jobs()
                graph = self._graph(qmp)
                self._delete_tag(qmp, graph, snapshot.tag)
                if snapshot.vmstate_node in graph.own:
                    qmp.execute("blockdev-del", {"node-name": snapshot.vmstate_node})
        else:
            for path in map(Path, blockgraph.overlays(snapshot.binding.blocks, snapshot.nodes)):
                if path.exists():
                    qemuimg.delete_internal_snapshot(path, snapshot.tag)
        snapshotfolder.remove(folder)

    def snapshots(self, uuid: str | None = None) -> Sequence[Snapshot]:
        return sorted(snapshotfolder.published(self._root, uuid), key=lambda s: (s.created_at, s.id))

    # --- sessions

    @contextmanager
    def _session(self, vm: Vm) -> Iterator[Qmp]:
        """A monitor of the very process that `vm` was observed with."""
        life, _ = _running(vm)
        if vm.monitor is None:
            raise RefusedError(f"{vm.name} has no monitor for hvctl.", f"hvctl vm adopt {vm.name}")
        with held(life, vm.name), Qmp(vm.monitor, self._settings.libvirt_deadline, life.pid) as qmp:
            yield qmp

    @contextmanager
    def _paused(self, vm: Vm, snapshot: Snapshot) -> Iterator[tuple[Qmp, Graph]]:
        """A session with a paused guest that the snapshot fits."""
        with self._session(vm) as qmp:
            status = qmp.execute("query-status")
            if status["running"] or status["status"] not in _STOPPED:
                raise RefusedError(f"{vm.name} is {status['status']}, not paused.", f"virsh suspend {vm.name}")
            graph = self._graph(qmp)
            changed = _changed(snapshot.binding, self._binding(vm, qmp, graph))
            if changed:
                raise RefusedError(
                    f"snapshot {snapshot.name} does not fit {vm.name} any more: {changed}.",
                    f"take a new one: hvctl snapshot take {vm.name}",
                )
            migration = qmp.execute("query-migrate").get("status")
            if migration in _MIGRATING:
                raise RefusedError(f"{vm.name} is being migrated or saved.", "wait for it: virsh domjobinfo")
            yield qmp, graph

    @contextmanager
    def _guest_ram(self, vm: Vm, snapshot: Snapshot) -> Iterator[int]:
        life, ram_path = _running(vm)
        with held(life, vm.name) as alive, guestram.guest_ram(ram_path, life.pid) as guest:
            if os.fstat(guest).st_size != snapshot.ram_size:
                raise RefusedError(f"the RAM of {vm.name} has another size than snapshot {snapshot.name}.")
            yield guest
            # A file outlives its process: without this, writes into a dead guest would pass for a reset.
            alive()

    @contextmanager
    def _both_rams(self, vm: Vm, snapshot: Snapshot) -> Iterator[tuple[int, int]]:
        path = snapshotfolder.folder_of(self._root, snapshot) / snapshotfolder.RAM
        with (
            self._paused(vm, snapshot),
            guestram.stored_ram(path, snapshot.ram_size) as stored,
            self._guest_ram(vm, snapshot) as guest,
        ):
            yield guest, stored

    def _graph(self, qmp: Qmp) -> Graph:
        return blockgraph.read(qmp, self._root)

    def _binding(self, vm: Vm, qmp: Qmp, graph: Graph) -> Binding:
        life, _ = _running(vm)
        return Binding(life, devicetree.read(qmp), graph.fingerprint())

    def _delete_tag(self, qmp: Qmp, graph: Graph, tag: str) -> None:
        holders = graph.tagged(tag)
        if holders:
            qmp.job("snapshot-delete", {"tag": tag, "devices": list(holders)}, JOB_SECONDS)


def _running(vm: Vm) -> tuple[Process, str]:
    if vm.process is None or vm.ram_path is None:
        raise RefusedError(f"{vm.name} has no QEMU process with RAM in a shared file.", f"hvctl vm show {vm.name}")
    return vm.process, vm.ram_path


def _state_job(qmp: Qmp, job: Job, snapshot: Snapshot) -> None:
    """Save or load with guest RAM left out. libvirt does not know of this switch, and would leave guest RAM out of its
    own saves and migrations with it on, so it is off again whatever happens."""
    arguments = {
        "tag": snapshot.tag,
        "vmstate": snapshot.vmstate_node,
        "devices": [snapshot.vmstate_node, *snapshot.nodes],
    }
    _ignore_shared_ram(qmp, True)
    try:
        qmp.job(job, arguments, JOB_SECONDS)
    finally:
        _ignore_shared_ram(qmp, False)


def _ignore_shared_ram(qmp: Qmp, on: bool) -> None:
    qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": "x-ignore-shared", "state": on}]})


def _changed(then: Binding, now: Binding) -> str | None:
    if then.process != now.process:
        return "its QEMU process is another one"
    old, new = {*then.devices, *then.blocks}, {*now.devices, *now.blocks}
    words = [f"{w} is gone" for w in sorted(old - new)] + [f"{w} is new" for w in sorted(new - old)]
    return ", ".join(words[:4]) or None


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise UnreachableError("/proc/meminfo does not say how much memory is available.")
