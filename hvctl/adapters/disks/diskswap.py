"""Puts the prepared image of one disk in the place of its overlay, in a QEMU that runs on.

The device changes over to a stand-in, which has the snapshot's content already, in one exchange with QEMU: that is all
that the guest notices. Everything else happens while it runs on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hvctl.adapters.disks import diskseat, diskstandin
from hvctl.adapters.disks.diskfiles import Files
from hvctl.adapters.disks.diskseat import Sight
from hvctl.adapters.disks.disksettle import settle
from hvctl.adapters.disks.diskspare import Plan, quiet_mark
from hvctl.adapters.disks.disksteps import At, Step, Steps, words
from hvctl.adapters.qemu.qmp import Qmp
from hvctl.errors import GuestError, HvctlError, RefusedError, UnreachableError

STOPPED: Final = frozenset({"paused", "save-vm", "restore-vm", "postmigrate"})


@dataclass(frozen=True, slots=True)
class Swapped:
    """How a swap went, in milliseconds: each stage in order; away, from the first command that keeps the guest from its
    old disk until QEMU's answer that it runs with the one that is back; paused, the same if its vCPUs had to be stopped
    for that. running: whether the guest runs now."""

    stages: tuple[tuple[str, float], ...]
    paused: float
    away: float
    running: bool


def restore_disk(qmp: Qmp, plan: Plan, *, at: At | None = None) -> Swapped:
    """Bring the disk of `plan` back. Repeatable, by any process, from wherever a call was interrupted; done once, it
    is not done again: the next reset needs a plan of its own.

    A guest that ran when this was called runs on, at most stopped for the exchange; one that was paused stays so, also
    by an interrupted call: the caller knows who paused it. What the guest writes from the exchange on is kept, unless
    this fails with HvctlError: then it has its old disk again. `at` hears of every step before it is done.

    RefusedError, HvctlError: the guest has the disk that it had. DeadlineError, UnreachableError: unknown, or it has
    what the disk goes back to, but not as libvirt knows it yet; repeat this when the cause is gone.
    """
    steps = Steps(qmp, at)
    seen = steps.look()
    _refuse(plan, seen)
    new = not diskstandin.is_exchanged(plan, seen)
    steps.lap("look")
    away, paused = _exchange(steps, plan, seen) if new else (0.0, 0.0)
    settle(steps, plan, turn_back=new)
    return Swapped(tuple(steps.stages), paused, away, seen.status == "running")


def withdraw(steps: Steps, plan: Plan, *, resume: bool = False) -> None:
    """End what was begun and has not come to the exchange: the guest keeps its disk. resume: it was stopped for it."""
    steps.send([("cont", "cont", {})] if resume else [])
    steps.send(diskstandin.removing(plan.seat, steps.look()))
    Files(Path(plan.seat.path)).over(durable=False)


def _refuse(plan: Plan, seen: Sight) -> None:
    """Before anything is touched: what was prepared does not fit any more, or the guest is in no state for it."""
    seat = plan.seat
    if seen.status != "running" and seen.status not in STOPPED:
        # After an I/O error QEMU would repeat the guest's request, on the disk of another time.
        raise RefusedError(f"the guest is {seen.status}: its disk {seat.target} cannot be reset.", "virsh domstate")
    if diskstandin.has_device(seat, seen):
        return
    node = seen.nodes.get(seat.nodes[0])
    fits = seen.devices.get(seat.device) == seat.nodes[0] and node and diskseat.tags(node["image"]) == seat.tags
    if not fits or plan.spare not in Files(Path(seat.path)).places():
        raise RefusedError(
            f"what was prepared for a reset of disk {seat.target} does not fit any more.", "repeat the command"
        )


def _exchange(steps: Steps, plan: Plan, seen: Sight) -> tuple[float, float]:
    """The device has the stand-in after it; how long that took, and the pause for it, in milliseconds. Whatever fails,
    it has the old disk."""
    seat, files, stopped = plan.seat, Files(Path(plan.seat.path)), False
    try:
        steps.tell("keep")
        files.keep_old()
        files.lend()
        threads = steps.send([*diskstandin.adding(seat, seen), ("iothreads", "query-iothreads", {})])[-1]
        # QEMU waits for the requests that it has and holds back new ones, so the guest may run on. But a disk must not
        # be written to after it was looked at for a range, and one that has a thread (which QEMU does not tell; so if
        # there is any) is with QEMU's main one only while the guest is stopped.
        stops = seen.status == "running" and (plan.quiet is not None or bool(threads))
        stop: list[Step] = [("stop", "stop", {})] if stops else []
        cont: list[Step] = [("cont", "cont", {})] if stops else []
        change = [diskstandin.give_device(seat, seat.standin), *cont]
        steps.lap("ready")
        stopped = stops
        if plan.quiet is None:
            steps.send([*stop, *change])
        else:
            _refuse_written(plan, steps.send([*stop, ("count", "query-blockstats", {})])[-1])
            steps.send(change)
    except (RefusedError, GuestError, OSError) as e:
        raise _stayed(steps, plan, stopped, e) from e
    away = steps.lap("exchange")
    return away, away if stops else 0.0


def _refuse_written(plan: Plan, stats: Any) -> None:
    if quiet_mark(stats, plan.seat) != plan.quiet:
        raise RefusedError(
            f"somebody wrote to disk {plan.seat.target} after its range was prepared.",
            "unmount it in the guest, or pause the guest first: virsh suspend",
        )


def _stayed(steps: Steps, plan: Plan, stopped: bool, cause: HvctlError | OSError) -> HvctlError:
    """Nothing was exchanged, and nothing is left of the attempt. What to raise."""
    target = plan.seat.target
    try:
        withdraw(steps, plan, resume=stopped)
    except (GuestError, OSError) as e:
        return UnreachableError(f"disk {target} is not reset, and what was begun is left: {words(e)}.", "hvctl recover")
    if isinstance(cause, RefusedError):
        return cause
    return HvctlError(f"disk {target} was not reset: {words(cause)}.", "hvctl vm show")
