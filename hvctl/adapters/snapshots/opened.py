"""What is open of QEMU processes: monitors for the length of an operation, mapped RAM for longer.

A mapping that stays makes the next reset of the same process cheaper (its pages need not be found anew), and would keep
the RAM of a VM that ended: so those are looked for after every operation.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from typing import Final

from hvctl.adapters.kernel import process
from hvctl.adapters.qemu.inside import Inside, inside
from hvctl.adapters.ram.guestram import GuestRam
from hvctl.adapters.ram.layers import Chain
from hvctl.adapters.ram.tracking import RamTracking, known
from hvctl.adapters.snapshots import snapshotfolder, snapshotlayers
from hvctl.errors import HvctlError
from hvctl.model.tracker import Tracking
from hvctl.model.vm import Process, Vm
from hvctl.settings import Settings

_MAPPED: Final = 8


class Opened:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._insides: dict[Process, tuple[AbstractContextManager[Inside], Inside]] = {}
        self._rams: dict[Process, GuestRam] = {}
        self._trackings: dict[Process, RamTracking] = {}
        self._chains: dict[str, Chain] = {}

    def inside(self, vm: Vm) -> Inside:
        """The monitor of the very process that `vm` was observed with."""
        if vm.process is not None and vm.process in self._insides:
            found = self._insides[vm.process][1]
            found.alive()
            return found
        entered = inside(vm, self._settings.libvirt_deadline, self._settings.snapshots_dir)
        found = entered.__enter__()
        self._insides[found.process] = (entered, found)
        return found

    def ram(self, vm: Vm) -> GuestRam:
        held = self.inside(vm)
        ram = self._rams.get(held.process)
        if ram is None or ram.regions != vm.ram:
            if ram is not None:
                ram.close()
            ram = self._rams[held.process] = GuestRam(vm.ram, held.process.pid)
        return ram

    def tracking(self, vm: Vm) -> RamTracking:
        held = self.inside(vm)
        if held.process not in self._trackings:
            folder = snapshotfolder.vm_folder(self._settings.snapshots_dir, vm.uuid)
            tracking = self._trackings[held.process] = RamTracking(folder, held.process, self.ram(vm))
            if tracking.state.base is not None:
                with suppress(HvctlError):  # A base that is damaged is no reason to refuse another snapshot.
                    tracking.confine(self.chain(vm, tracking.state.base).used())
        return self._trackings[held.process]

    def end_tracking(self, vm: Vm) -> None:
        """The tracker leaves the process, and its file may go."""
        tracking = self.tracking(vm)
        tracking.end()
        tracking.close()
        del self._trackings[self.inside(vm).process]

    def known(self, vm: Vm) -> Tracking | None:
        """What there is to know of the writes to its RAM, without opening anything."""
        if vm.process in self._trackings:
            return self._trackings[vm.process].state
        return (
            known(snapshotfolder.vm_folder(self._settings.snapshots_dir, vm.uuid), vm.process) if vm.process else None
        )

    def chain(self, vm: Vm, identity: str) -> Chain:
        """The RAM of a snapshot, which never changes; open until the operation ends."""
        if identity not in self._chains:
            pages = self.ram(vm).pages
            self._chains[identity] = snapshotlayers.chain(self._settings.snapshots_dir, vm.uuid, identity, pages)
        return self._chains[identity]

    def release(self) -> None:
        """The operation is over: others may have the monitors, and what ended meanwhile is let go."""
        while self._chains:
            self._chains.popitem()[1].close()
        while self._trackings:
            self._trackings.popitem()[1].close()
        while self._insides:
            self._insides.popitem()[1][0].__exit__(None, None, None)
        for life in list(self._rams):
            if process.start_time(life.pid) != life.start_time or len(self._rams) > _MAPPED:
                self._rams.pop(life).close()

    def close(self) -> None:
        self.release()
        while self._rams:
            self._rams.popitem()[1].close()
