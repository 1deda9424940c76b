"""After a disk was exchanged for its stand-in: makes its own nodes again over the new file, as libvirt knows them, and
has the device take them up. The guest runs on meanwhile."""

from __future__ import annotations

from pathlib import Path

from hvctl.adapters.disks import diskmirror, diskseat, diskstandin
from hvctl.adapters.disks.diskfiles import Files, has_open, identity
from hvctl.adapters.disks.diskseat import Sight
from hvctl.adapters.disks.diskspare import Plan
from hvctl.adapters.disks.disksteps import Step, Steps, words
from hvctl.errors import GuestError, HvctlError, UnreachableError


def settle(steps: Steps, plan: Plan, *, turn_back: bool = False) -> None:
    """Repeatable, by any process, from wherever it was interrupted. turn_back: the exchange was just now, and if QEMU
    does not take the new file the guest has its old disk again, without what it wrote in these milliseconds; else it
    stays on the stand-in, where it may have worked for long.

    HvctlError: it has its old disk again. UnreachableError: it has what the disk goes back to, but QEMU does not make
    it as libvirt knows it; repeat this when the cause is gone. DeadlineError: unknown; repeat this."""
    _Settling(steps, plan).run(turn_back)


class _Settling:
    def __init__(self, steps: Steps, plan: Plan) -> None:
        self._steps = steps
        self._plan = plan
        self._seat = plan.seat
        self._files = Files(Path(plan.seat.path))

    def run(self, turn_back: bool) -> None:
        self._steps.qmp.dismiss_jobs()
        seen = self._steps.look()
        if diskstandin.has_device(self._seat, seen):
            try:
                self._renew(seen)
            except (GuestError, OSError) as e:
                raise (self._turned_back(e) if turn_back else self._unsettled(e)) from e
            self._steps.lap("nodes")
        try:
            if diskstandin.has_device(self._seat, seen):
                diskmirror.carry_over(self._steps, self._seat, seen.status == "running")
                self._steps.lap("mirror")
            self._verify_device(seen, self._steps.look(diskstandin.removing(self._seat, seen)))
            self._steps.tell("clean")
            self._files.over(durable=self._seat.flushes)
        except (GuestError, OSError) as e:
            raise self._unsettled(e) from e
        self._steps.lap("clean")

    # --- the disk's own nodes

    def _renew(self, seen: Sight) -> None:
        if identity(self._files.overlay) != self._plan.spare:
            self._steps.send(self._removing(seen))
            self._steps.tell("rename")
            self._files.spare.replace(self._files.overlay)
            seen = Sight(seen.status, seen.devices, {n: v for n, v in seen.nodes.items() if n not in self._seat.nodes})
        self._verify_nodes(self._steps.look(self._adding(seen)))

    def _removing(self, seen: Sight) -> list[Step]:
        steps: list[Step] = []
        for name, node in zip(("del-format", "del-storage"), self._seat.nodes, strict=True):
            if node in seen.nodes:
                steps.append((name, "blockdev-del", {"node-name": node}))
        return steps

    def _adding(self, seen: Sight) -> list[Step]:
        format, storage = self._seat.nodes
        steps: list[Step] = []
        if storage not in seen.nodes:
            steps.append(("add-storage", "blockdev-add", self._seat.storage))
        if format not in seen.nodes:
            steps.append(("add-format", "blockdev-add", self._seat.format))
        for node, offset in self._seat.thresholds.items():
            arguments = {"node-name": node, "write-threshold": offset}
            steps.append(("set-threshold", "block-set-write-threshold", arguments))
        return steps

    # --- looking

    def _verify_nodes(self, seen: Sight) -> None:
        """Before the guest has them."""
        format, storage = (seen.nodes.get(n) for n in self._seat.nodes)
        if format is None or storage is None:
            raise GuestError("it has not got its block nodes.")
        if diskseat.look(format, storage) != self._seat.look:
            raise GuestError("its block nodes are not as before.")
        if diskseat.tags(format["image"]) != self._seat.tags:
            raise GuestError("its snapshots are not as before.")
        if not has_open(self._seat.life.pid, self._files.overlay):
            raise GuestError("QEMU has another file open.")

    def _verify_device(self, before: Sight, now: Sight) -> None:
        device = self._seat.device
        if now.devices.get(device) != self._seat.nodes[0]:
            raise GuestError("its device has not taken up its own block nodes.")
        if now.limits[device] != before.limits[device]:
            raise GuestError("its limits are not as before.")
        if diskstandin.removing(self._seat, now):
            raise GuestError("block nodes of its stand-in are left.")

    # --- when something fails

    def _turned_back(self, cause: GuestError | OSError) -> HvctlError:
        """QEMU does not let go of the old file or does not take the new one. What to raise."""
        try:
            if identity(self._files.old) != identity(self._files.overlay):
                self._steps.send(self._removing(self._steps.look()))
                self._files.put_back_old()
            seen = self._steps.look()
            change = [diskstandin.give_device(self._seat, self._seat.nodes[0])]
            if seen.status == "running":
                change = [("stop", "stop", {}), *change, ("cont", "cont", {})]
            self._steps.send([*self._adding(seen), *change, *diskstandin.removing(self._seat, seen)])
            self._files.over(durable=self._seat.flushes)
        except (GuestError, OSError) as e:
            return self._unsettled(e)
        return HvctlError(f"disk {self._seat.target} was not reset: {words(cause)}.", "hvctl vm show")

    def _unsettled(self, cause: GuestError | OSError) -> UnreachableError:
        return UnreachableError(
            f"disk {self._seat.target} has gone back, but is not in its own place yet: {words(cause)}.", "hvctl recover"
        )
