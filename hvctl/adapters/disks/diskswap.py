"""Puts the prepared image of one disk in the place of its overlay, in a QEMU that runs on.

The device, its throttling, the names and options of its block nodes and the path stay what libvirt knows: for a few
milliseconds the device has another node, and its own two are made again over the new file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hvctl.adapters.disks import diskseat
from hvctl.adapters.disks.diskfiles import Files, has_open, identity
from hvctl.adapters.disks.diskseat import Sight
from hvctl.adapters.disks.diskspare import Plan, quiet_mark
from hvctl.adapters.qemu.qmp import Qmp, Query
from hvctl.errors import GuestError, HvctlError, NotUndoneError, RefusedError

STOPPED: Final = frozenset({"paused", "save-vm", "restore-vm", "postmigrate"})

_Step = tuple[str, Query, Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Swapped:
    """How a swap went: milliseconds of each stage in order, how long the vCPUs stood still and the disk was away, and
    whether the guest runs now."""

    stages: tuple[tuple[str, float], ...]
    paused: float
    away: float
    running: bool


def restore_disk(qmp: Qmp, plan: Plan, *, pause: bool = True, at: Callable[[str], None] | None = None) -> Swapped:
    """Bring the disk of `plan` back. Repeatable, by any process, from wherever a call was interrupted; done once, it
    is not done again: the next reset needs a plan of its own.

    pause: the vCPUs stand still while the disk is away, and run again if they ran when this was called; they stay
    paused if they were, also by an interrupted call: the caller knows who paused them. Without it, the guest gets
    I/O errors from a disk that it should have let go. `at` hears of every step before it is done.

    RefusedError, HvctlError: nothing was changed, the guest has the disk that it had. NotUndoneError: the disk is away
    or not what it was, and the guest is paused; repeat this when the cause is gone. DeadlineError, UnreachableError:
    unknown; repeat this.
    """
    swap = _Swap(qmp, plan, at)
    try:
        return swap.run(pause)
    except OSError as e:
        raise HvctlError(f"disk {plan.seat.target} cannot be reset: {e.filename}: {e.strerror}.") from e


class _Swap:
    def __init__(self, qmp: Qmp, plan: Plan, at: Callable[[str], None] | None) -> None:
        self._qmp = qmp
        self._plan = plan
        self._seat = plan.seat
        self._files = Files(Path(plan.seat.path))
        self._at = at
        self._resume = False
        self._last = time.perf_counter()
        self._stages: list[tuple[str, float]] = []

    def run(self, pause: bool) -> Swapped:
        seen = self._look()
        self._refuse(seen)
        replaced = identity(self._files.overlay) == self._plan.spare
        self._resume = pause and seen.status == "running" and not (replaced and not self._coming(seen))
        self._lap("look")
        if replaced:
            now = seen
            self._send([("stop", "stop", {})] if self._resume else [])
        else:
            now = self._replace(seen)
        try:
            answers = self._send([*self._coming(now), *((c, c, a) for c, a in diskseat.QUESTIONS[1:])])
        except GuestError as e:
            raise self._turned_back(e) from e
        self._verify(seen, diskseat.sight([{"status": now.status}, *answers[-2:]]))
        self._lap("back")
        self._send([("cont", "cont", {})] if self._resume else [])
        self._lap("cont")
        self._tell("clean")
        self._files.over(durable=self._seat.flushes)
        self._lap("clean")
        took = dict(self._stages)
        away = took.get("gone", 0.0) + took["back"]
        paused = away + took["cont"] if self._resume else 0.0
        return Swapped(tuple(self._stages), paused, away, seen.status == "running")

    # --- the disk goes away, another file takes the place, the disk comes back

    def _replace(self, seen: Sight) -> Sight:
        """What QEMU has after it; whatever fails, the disk comes back as it was."""
        try:
            self._tell("keep")
            self._files.keep_old()
            self._send(self._standing_in(seen))
            self._lap("ready")
            stop: list[_Step] = [("stop", "stop", {})] if self._resume else []
            if self._plan.quiet is None:
                self._send([*stop, *self._leaving(seen)])
            else:
                self._refuse_written(self._send([*stop, ("count", "query-blockstats", {})])[-1])
                self._send(self._leaving(seen))
            self._tell("rename")
            self._files.spare.replace(self._files.overlay)
        except (RefusedError, GuestError, OSError) as e:
            raise self._stayed(e) from e
        self._lap("gone")
        nodes = {n: v for n, v in seen.nodes.items() if n not in self._seat.nodes}
        nodes[self._seat.away] = {}
        return Sight(seen.status, {**seen.devices, self._seat.device: self._seat.away}, nodes)

    def _standing_in(self, seen: Sight) -> list[_Step]:
        if self._seat.away in seen.nodes:
            return []
        node = {
            "driver": "blkdebug",  # whoever asks it gets an error: never zeroes, never a write that vanishes
            "node-name": self._seat.away,
            "inject-error": [{"event": "none"}],
            "image": {"driver": "null-co", "size": self._seat.size},
        }
        return [("add-away", "blockdev-add", node)]

    def _leaving(self, seen: Sight) -> list[_Step]:
        steps: list[_Step] = []
        if seen.devices.get(self._seat.device) != self._seat.away:
            steps.append(("set-away", "qom-set", self._drive(self._seat.away)))
        for name, node in zip(("del-format", "del-storage"), self._seat.nodes, strict=True):
            if node in seen.nodes:
                steps.append((name, "blockdev-del", {"node-name": node}))
        return steps

    def _coming(self, seen: Sight) -> list[_Step]:
        format, storage = self._seat.nodes
        steps: list[_Step] = []
        if storage not in seen.nodes:
            steps.append(("add-storage", "blockdev-add", self._seat.storage))
        if format not in seen.nodes:
            steps.append(("add-format", "blockdev-add", self._seat.format))
        for node, offset in self._seat.thresholds.items():
            arguments = {"node-name": node, "write-threshold": offset}
            steps.append(("set-threshold", "block-set-write-threshold", arguments))
        if seen.devices.get(self._seat.device) != format:
            steps.append(("set-back", "qom-set", self._drive(format)))
        if self._seat.away in seen.nodes:
            steps.append(("del-away", "blockdev-del", {"node-name": self._seat.away}))
        return steps

    # --- looking

    def _look(self) -> Sight:
        return diskseat.sight(self._qmp.execute_all(diskseat.QUESTIONS))

    def _refuse(self, seen: Sight) -> None:
        """Before anything is touched: what was prepared does not fit any more, or the guest is in no state for it."""
        seat, format = self._seat, self._seat.nodes[0]
        if seen.status != "running" and seen.status not in STOPPED:
            # After an I/O error QEMU would repeat the guest's request, on the disk of another time.
            raise RefusedError(f"the guest is {seen.status}: its disk {seat.target} cannot be reset.", "virsh domstate")
        on = seen.devices.get(seat.device)
        node = seen.nodes.get(format)
        if on not in (format, seat.away) or (
            on == format and (node is None or diskseat.tags(node["image"]) != seat.tags)
        ):
            raise self._stale()
        if self._plan.spare in self._files.places():
            return
        if on == seat.away:
            raise self._stayed(self._stale())
        raise self._stale()

    def _stale(self) -> RefusedError:
        return RefusedError(
            f"what was prepared for a reset of disk {self._seat.target} does not fit any more.", "repeat the command"
        )

    def _refuse_written(self, stats: Any) -> None:
        if quiet_mark(stats, self._seat) != self._plan.quiet:
            raise RefusedError(
                f"somebody wrote to disk {self._seat.target} after its range was prepared.",
                "unmount it in the guest, or pause the guest first: virsh suspend",
            )

    def _verify(self, before: Sight, after: Sight) -> None:
        format, storage = self._seat.nodes
        top, below = after.nodes.get(format), after.nodes.get(storage)
        attached = before.devices.get(self._seat.device) == format
        if top is None or below is None or after.devices.get(self._seat.device) != format:
            wrong = "it has not got its block nodes"
        elif self._seat.away in after.nodes:
            wrong = f"the node {self._seat.away} is left"
        elif diskseat.look(top, below) != self._seat.look:
            wrong = "its block nodes are not as before"
        elif diskseat.tags(top["image"]) != self._seat.tags:
            wrong = "its snapshots are not as before"
        elif attached and diskseat.limits(top) != diskseat.limits(before.nodes[format]):
            wrong = "its limits are not as before"
        elif identity(self._files.overlay) != self._plan.spare or not has_open(
            self._seat.life.pid, self._files.overlay
        ):
            wrong = "QEMU has another file open"
        else:
            return
        raise self._stranded(GuestError(f"{wrong}."))

    # --- when something fails

    def _stayed(self, cause: HvctlError | OSError) -> HvctlError:
        """Nothing was replaced: the disk comes back as it is, and the guest goes on. What to raise."""
        try:
            self._send(self._coming(self._look()))
            self._files.drop_plan()
            self._send([("cont", "cont", {})] if self._resume else [])
        except (GuestError, OSError) as e:
            return self._stranded(e)
        if isinstance(cause, RefusedError):
            return cause
        return HvctlError(f"disk {self._seat.target} was not reset: {_words(cause)}.", "hvctl vm show")

    def _turned_back(self, cause: GuestError) -> HvctlError:
        """QEMU does not take the new file: the old one takes its place again. What to raise."""
        try:
            seen = self._look()
            self._send([*self._standing_in(seen), *self._leaving(seen)])
            self._files.old.replace(self._files.overlay)
        except (GuestError, OSError) as e:
            return self._stranded(e)
        return self._stayed(cause)

    def _stranded(self, cause: GuestError | OSError) -> NotUndoneError:
        """Nobody may go on with this disk: the guest is paused, whoever paused it. What to raise."""
        self._qmp.execute("stop")
        return NotUndoneError(
            f"disk {self._seat.target} is not reset and not as it was, and its guest is paused: {_words(cause)}.",
            "hvctl recover",
        )

    # --- doing

    def _send(self, steps: Sequence[_Step]) -> list[Any]:
        """All at once, since every exchange with QEMU costs a millisecond; one by one where somebody listens."""
        if self._at is None:
            return self._qmp.execute_all([(command, arguments) for _, command, arguments in steps]) if steps else []
        answers = []
        for name, command, arguments in steps:
            self._tell(name)
            answers.append(self._qmp.execute(command, arguments))
        return answers

    def _tell(self, step: str) -> None:
        if self._at is not None:
            self._at(step)

    def _drive(self, node: str) -> dict[str, object]:
        return {"path": self._seat.device, "property": "drive", "value": node}

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self._stages.append((name, (now - self._last) * 1e3))
        self._last = now


def _words(cause: HvctlError | OSError) -> str:
    if isinstance(cause, HvctlError):
        return cause.message.rstrip(".")
    return f"{cause.filename}: {cause.strerror}"
