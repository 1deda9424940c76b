"""The node that a device has while the disk's own two are made again over another file.

A thin image over one that holds what the disk goes back to: with it the disk is back, whatever becomes of its own
nodes. It is made while the guest runs on with the old disk, and so costs the guest one exchange with QEMU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hvctl.adapters.disks.diskfiles import Files, identity
from hvctl.adapters.disks.diskseat import Seat, Sight
from hvctl.adapters.disks.diskspare import Plan
from hvctl.adapters.disks.disksteps import Step


def nodes(seat: Seat) -> dict[str, dict[str, Any]]:
    """The arguments of blockdev-add by the end of the step's name, in the order to add. They are those of the disk's
    own nodes, apart from names, files and what is below."""
    files, top, back = Files(Path(seat.path)), seat.standin, f"{seat.standin}-back"
    return {
        "back-file": {**seat.storage, "node-name": f"{back}-file", "filename": str(files.backing), "read-only": True},
        "back": {**seat.format, "node-name": back, "file": f"{back}-file", "read-only": True},
        "standin-file": {**seat.storage, "node-name": f"{top}-file", "filename": str(files.standin)},
        "standin": {**seat.format, "node-name": top, "file": f"{top}-file", "backing": back},
    }


def adding(seat: Seat, seen: Sight) -> list[Step]:
    made = nodes(seat).items()
    return [(f"add-{step}", "blockdev-add", node) for step, node in made if node["node-name"] not in seen.nodes]


def removing(seat: Seat, seen: Sight) -> list[Step]:
    """QEMU refuses it as long as a device has it."""
    made = [(step, node["node-name"]) for step, node in reversed(nodes(seat).items())]
    return [(f"del-{step}", "blockdev-del", {"node-name": name}) for step, name in made if name in seen.nodes]


def has_device(seat: Seat, seen: Sight) -> bool:
    return seen.devices.get(seat.device) == seat.standin


def give_device(seat: Seat, node: str) -> Step:
    """Never the node that it has: QEMU 7.2 aborts of that."""
    step = "set-standin" if node == seat.standin else "set-own"
    return (step, "qom-set", {"path": seat.device, "property": "drive", "value": node})


def is_exchanged(plan: Plan, seen: Sight) -> bool:
    """Whether the guest has what the disk goes back to, on the stand-in or in the disk's own place."""
    return has_device(plan.seat, seen) or identity(Path(plan.seat.path)) == plan.spare
