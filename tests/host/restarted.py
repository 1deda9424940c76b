"""A real guest that is interrupted and comes back while its libvirtd is restarted between the notice and the save.

Run as a program where libvirtd is its own; prints what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from host import connection
from host.outside import MIB, Guest
from host.site import copy_image
from hvctl.adapters.node.hostprep import apply, changes
from hvctl.engine.faults import Faults
from hvctl.engine.runtime import open_engine
from hvctl.model.pool import Rung
from hvctl.operations import comeback, interrupt
from hvctl.operations import vm as vms
from hvctl.settings import Settings

SETTINGS = Settings(state_dir="/run/room/state", memory_overcommit=1000.0, cpu_overcommit=1000.0)


def prepare() -> None:
    for change in changes(SETTINGS):
        apply(change)


def libvirtd() -> int:
    return int(Path("/run/libvirtd.pid").read_text())


class Restart(Faults):
    """At the one point: a configuration that is newer than the daemon has it restarted."""

    def point(self, kind: str, step: str, when: str) -> None:
        if (kind, step, when) == ("interrupt", "notify_guest", "after"):
            os.utime("/etc/libvirt/qemu.conf")
            prepare()


def main(name: str) -> dict[str, object]:
    prepare()
    copy_image(SETTINGS, "micro")
    with open_engine(SETTINGS) as engine:
        vms.create(
            engine,
            vms.NewVm(
                name=name, image="micro", vcpus=1, max_vcpus=1, memory=160 * MIB, max_memory=160 * MIB, disks=None,
                bridges=(), labels={}, start=True,
            ),
        )  # fmt: skip
        guest = Guest(name, connection.uuid(name))
        try:
            guest.await_boot()
            guest.mark("kept")
            vms.configure(engine, name, interruptible=True)
            before = libvirtd()
            engine.faults = Restart()
            (gone,) = interrupt.vms(engine, [name], Rung.SAVE, back=0.0, grace=0.0, reason="a test")
            seen: dict[str, object] = {
                "another libvirtd": libvirtd() != before,
                "steps": [s.name for s in gone.steps],
                "state": guest.state,
            }
            comeback.resume(engine, [name])
            guest.await_answer()
            seen |= {"after": guest.state, "marks": guest.marks()}
            seen["open"] = len(engine.store.open_operations(engine.facts.name))
        finally:
            vms.delete(engine, name, force=True)
    return seen


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
