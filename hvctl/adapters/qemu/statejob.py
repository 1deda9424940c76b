"""Saves and loads of device state and disks as jobs of QEMU, with guest RAM left out.

A load may be begun before it is due: QEMU reads commands byte by byte, some microseconds each, and the guest waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hvctl.adapters.qemu.inside import Inside, leave_out_ram
from hvctl.adapters.qemu.qmp import Ahead, Job
from hvctl.errors import RefusedError
from hvctl.model.snapshot import Snapshot

JOB_SECONDS: Final = 60.0


def save(held: Inside, snapshot: Snapshot) -> None:
    _run(held, "snapshot-save", snapshot, snapshot.nodes)


def load(held: Inside, snapshot: Snapshot, nodes: Sequence[str] | None) -> None:
    """nodes: the disks (None: all of the snapshot's). RefusedError: one does not hold it; GuestError: it failed, and
    the machine is dead."""
    chosen, lacking = _chosen(held, snapshot, nodes)
    if lacking:
        raise RefusedError(
            f"snapshot {snapshot.name} is damaged: {lacking[0]} of {held.name} does not hold it.",
            f"hvctl snapshot delete {held.name} {snapshot.name}",
        )
    _run(held, "snapshot-load", snapshot, chosen)


def delete_tag(held: Inside, tag: str) -> None:
    """From all nodes that hold it."""
    if holders := held.graph.tagged(tag):
        held.qmp.job("snapshot-delete", {"tag": tag, "devices": list(holders)}, JOB_SECONDS)


def ahead(held: Inside, snapshot: Snapshot, nodes: Sequence[str] | None) -> Ahead | None:
    """What can be said early of the `load` with these arguments; nothing of one that will be refused. Who dies before
    the end is said leaves the switch on, and a guest that is paused; the next one inside turns it off."""
    chosen, lacking = _chosen(held, snapshot, nodes)
    if lacking:
        return None
    return Ahead("snapshot-load", _arguments(snapshot, chosen), (leave_out_ram(True),), (leave_out_ram(False),))


def _run(held: Inside, job: Job, snapshot: Snapshot, nodes: Sequence[str]) -> None:
    """QEMU has the order to turn the switch off before it begins: hvctl may die at any moment."""
    off = (*held.counter, leave_out_ram(False))
    arguments = _arguments(snapshot, nodes)
    *counts, _ = held.qmp.job(job, arguments, JOB_SECONDS, before=(leave_out_ram(True),), after=off)
    held.counted(counts)


def _arguments(snapshot: Snapshot, nodes: Sequence[str]) -> dict[str, object]:
    node = snapshot.vmstate_node
    return {"tag": snapshot.tag, "vmstate": node, "devices": [node, *nodes]}


def _chosen(held: Inside, snapshot: Snapshot, nodes: Sequence[str] | None) -> tuple[Sequence[str], list[str]]:
    """The disks that are meant (None: all of the snapshot's), and the nodes that should hold it and do not."""
    chosen = snapshot.nodes if nodes is None else nodes
    return chosen, sorted({snapshot.vmstate_node, *chosen} - set(held.graph.tagged(snapshot.tag)))
