"""Guest RAM on its way into the layer of a snapshot: most of it while the guest runs, the rest under the pause."""

from __future__ import annotations

from collections.abc import Sequence

from hvctl.adapters.qemu import devicetree
from hvctl.adapters.qemu.inside import Inside
from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram import ramcompare
from hvctl.adapters.ram.layers import Writer
from hvctl.adapters.ram.pages import PAGE, Pages
from hvctl.adapters.ram.tracking import RamTracking
from hvctl.adapters.snapshots import snapshotfolder, snapshotlayers
from hvctl.adapters.snapshots.opened import Opened
from hvctl.errors import HvctlError
from hvctl.model.snapshot import Range, Snapshot
from hvctl.model.tracker import TrackerKind
from hvctl.model.vm import Vm
from hvctl.settings import Settings


class RamCopy:
    """One layer at a time; what is begun is open until `close`, or until it is finished under the pause."""

    def __init__(self, settings: Settings, opened: Opened) -> None:
        self._settings = settings
        self._root = settings.snapshots_dir
        self._opened = opened
        self._writer: tuple[str, Writer] | None = None
        self._inflations: int | None = None  # when that writer began

    def close(self) -> None:
        if self._writer is not None:
            self._writer[1].close()
        self._writer = None

    def forget(self, snapshot: Snapshot) -> None:
        """The snapshot is to be deleted."""
        if self._writer_of(snapshot):
            self.close()

    def live(self, vm: Vm, snapshot: Snapshot, held: Inside, tracker: TrackerKind) -> int:
        """Bytes: all that is to be stored. The guest runs, and what it writes meanwhile is stored again by `rest`."""
        if held.graph.bypasses_cache:
            return 0  # A disk read may still be on its way into pages that look clean already.
        self._inflations, tracking = held.inflations(), self._opened.tracking(vm)
        writer, ram = self._new_writer(snapshot), self._opened.ram(vm)
        writer.store(ram, self._differing(vm, snapshot, held, tracking, tracker))
        return writer.rows * PAGE

    def rest(self, vm: Vm, snapshot: Snapshot, held: Inside, tracker: TrackerKind) -> int:
        """Bytes that the layer then has in all. Of a paused guest."""
        tracking = self._opened.tracking(vm)
        writer, ram, inflations = self._writer_of(snapshot), self._opened.ram(vm), held.inflations()
        # Pages that went to the balloon since they were copied are zero now, and no tracker says so.
        quiet = inflations is not None and inflations == self._inflations
        pages = tracking.again() if writer is not None and quiet else None
        if writer is None or pages is None:
            writer = self._new_writer(snapshot)
            pages = self._differing(vm, snapshot, held, tracking, tracker)
        writer.store(ram, pages)
        held.alive()
        stored = writer.finish()
        tracking.settle(snapshot.id, inflations=inflations)
        return stored

    def patch(self, vm: Vm, scratch: Snapshot, source: Snapshot, ranges: Sequence[Range] | None, held: Inside) -> int:
        """Bytes. Before anything is restored: the scratch layer gets these ranges (None: all) of `source`'s RAM."""
        ram = self._opened.ram(vm)
        with snapshotlayers.chain(self._root, vm.uuid, source.id, ram.pages) as chain:
            pages = pg.span(0, ram.pages)
            if ranges is not None:
                spans = [devicetree.host_range(held.qmp, r) for r in ranges]
                pages = pg.union(*(ram.pages_at(first, last) for first, last in spans))
            writer = self._writer_of(scratch)
            if writer is None:
                raise HvctlError("the scratch copy of RAM is not there.")
            writer.put(pages, chain.locate(pages))
        writer.finish()
        # RAM is as before, and so no more that of the layer.
        self._opened.tracking(vm).settle(scratch.id, pages, inflations=held.inflations())
        return pages.size * PAGE

    def _differing(
        self, vm: Vm, snapshot: Snapshot, held: Inside, tracking: RamTracking, tracker: TrackerKind
    ) -> Pages:
        """The pages in which RAM differs, or may differ, from the snapshot's parent; all that exist without one."""
        ram = self._opened.ram(vm)
        found = tracking.written(tracker, held.inflations())
        if found is not None and snapshot.parent is not None:
            base, pages = found
            return pg.union(pages, snapshotlayers.apart(self._root, vm.uuid, base, snapshot.parent, ram.pages))
        if found is None:
            tracking.again()
        if snapshot.parent is None:
            data = ram.data()
            return pg.union(*(pg.span(first, last) for first, last in data)) if data else pg.NONE
        with snapshotlayers.chain(self._root, vm.uuid, snapshot.parent, ram.pages) as chain:
            return ramcompare.difference(ram, chain)

    def _new_writer(self, snapshot: Snapshot) -> Writer:
        self.close()
        folder = snapshotfolder.folder_of(self._root, snapshot)
        pages, based = snapshot.ram_size // PAGE, snapshot.parent is not None
        limit = snapshotlayers.free(self._root, self._settings.snapshot_budget) - self._settings.memory_margin
        writer = Writer(folder, pages, base=based, limit=limit)
        self._writer = (snapshot.id, writer)
        return writer

    def _writer_of(self, snapshot: Snapshot) -> Writer | None:
        return self._writer[1] if self._writer is not None and self._writer[0] == snapshot.id else None
