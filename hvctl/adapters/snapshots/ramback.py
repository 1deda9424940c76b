"""Guest RAM on its way back to a snapshot: what to write is worked out while the guest still runs, and in the pause
only what it wrote since then."""

from __future__ import annotations

from hvctl.adapters.qemu.inside import Inside
from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram import ramcompare
from hvctl.adapters.ram.guestram import GuestRam
from hvctl.adapters.ram.pages import PAGE, Pages
from hvctl.adapters.ram.ramcompare import NOTHING, Patch
from hvctl.adapters.ram.tracking import RamTracking
from hvctl.adapters.snapshots import snapshotlayers
from hvctl.adapters.snapshots.opened import Opened
from hvctl.model.snapshot import Snapshot
from hvctl.model.tracker import Restored, TrackerKind
from hvctl.model.vm import Vm
from hvctl.settings import Settings


class RamBack:
    """For one snapshot of one VM at a time; what is foreseen holds until `forget`."""

    def __init__(self, settings: Settings, opened: Opened) -> None:
        self._root = settings.snapshots_dir
        self._opened = opened
        self._foreseen: tuple[str, Patch] | None = None

    def foresee(self, vm: Vm, snapshot: Snapshot) -> None:
        """What a reset to the snapshot would write now, mapped, so that the pause is not spent on page faults."""
        chain, ram, tracking = self._opened.chain(vm, snapshot.id), self._opened.ram(vm), self._opened.tracking(vm)
        expected = tracking.expected(TrackerKind.AUTO)
        tracking.claim()
        if expected is not None:
            pages, exist = self._differing(vm, snapshot, expected, ram)
            self._foreseen = snapshot.id, ramcompare.foresee(ram, chain, pages, exist=exist)

    def forget(self) -> None:
        self._foreseen = None

    def restore(self, vm: Vm, snapshot: Snapshot, held: Inside, tracker: TrackerKind, *, after_load: bool) -> Restored:
        """RAM as the snapshot has it; the guest is paused, and the snapshot fits it."""
        ram, tracking, chain = self._opened.ram(vm), self._opened.tracking(vm), self._opened.chain(vm, snapshot.id)
        inflations, kind = held.inflations(), tracking.state.kind
        if after_load and (again := tracking.again()) is not None:
            written = again
            ramcompare.write(ram, chain, again, exist=True)
        else:
            known, written = self._first(vm, snapshot, ram, tracking, tracker, inflations)
            if not known:
                kind = TrackerKind.COMPARE
                tracking.arm(tracker)
                written = pg.union(written, ramcompare.restore(ram, chain))
        # A file outlives its process: without this, writes into a dead guest would pass for a reset.
        held.alive()
        tracking.settle(snapshot.id, inflations=inflations, reset=after_load)
        return Restored(written.size, written.size * PAGE, kind, tracking.state.kind, tracking.state.reason)

    def _first(
        self, vm: Vm, snapshot: Snapshot, ram: GuestRam, tracking: RamTracking, tracker: TrackerKind,
        inflations: int | None,
    ) -> tuple[bool, Pages]:  # fmt: skip
        """Whether it is known what the guest wrote, which then is as the snapshot has it; and the pages written here.

        What was foreseen is written while the tracker is asked: right for these pages, whatever it will tell, since all
        of RAM will be as in the snapshot."""
        identity, patch = self._foreseen or ("", NOTHING)
        self._foreseen = None
        with ramcompare.writing(ram, patch if identity == snapshot.id else NOTHING) as done:
            found = tracking.written(tracker, inflations)
        if found is None:
            return False, done
        pages, exist = self._differing(vm, snapshot, found, ram)
        ramcompare.write(ram, self._opened.chain(vm, snapshot.id), pg.without(pages, done, ram.pages), exist=exist)
        return True, pages

    def _differing(self, vm: Vm, snapshot: Snapshot, found: tuple[str, Pages], ram: GuestRam) -> tuple[Pages, bool]:
        """The pages that differ from the snapshot's, and whether the guest wrote all of them."""
        base, written = found
        apart = snapshotlayers.apart(self._root, vm.uuid, base, snapshot.id, ram.pages)
        return pg.union(written, apart), not apart.size

    def missed(self, vm: Vm, snapshot: Snapshot, held: Inside) -> int:
        """Pages that are not as in the snapshot after a reset to it; the tracker is not believed any more."""
        ram = self._opened.ram(vm)
        missed = ramcompare.difference(ram, self._opened.chain(vm, snapshot.id))
        held.alive()
        if missed.size:
            self._opened.tracking(vm).distrust(f"an audit found {missed.size} pages that it had missed")
        return missed.size
