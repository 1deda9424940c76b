"""Tags that snapshots left in a VM's disks when their RAM went with its tmpfs or its QEMU process: nothing can be reset
to them any more, and the clusters that they alone hold are not free.

They are read from the files, which a QEMU may have open: what belongs to a tag never changes while it is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from hvctl.adapters.disks import diskpart
from hvctl.adapters.qemu import qcow2, qemuimg
from hvctl.adapters.qemu.statejob import delete_tag
from hvctl.adapters.snapshots import snapshotfolder
from hvctl.adapters.snapshots.opened import Opened
from hvctl.errors import HvctlError
from hvctl.model.snapshot import StrayTag
from hvctl.model.vm import Vm

_TAG: Final = re.compile(r"hvctl-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def stray(root: Path, opened: Opened, vm: Vm) -> list[StrayTag]:
    """Those without a folder below `root` whose device state no QEMU has. A disk that cannot be read is left out, and
    so is a running VM whose QEMU cannot be asked: unknown is not gone."""
    found: dict[str, int] = {}
    for path in _overlays(vm):
        try:
            with qcow2.opened(path) as image:
                if any(_TAG.fullmatch(s.name) for s in image.snapshots):
                    for name, size in qcow2.held_alone(image).items():
                        found[name] = found.get(name, 0) + size
        except HvctlError:
            continue
    folder = snapshotfolder.vm_folder(root, vm.uuid)
    found = {
        tag: size
        for tag, size in found.items()
        if _TAG.fullmatch(tag) and not (folder / tag.removeprefix("hvctl-")).exists()
    }
    if found and vm.state.active:
        try:
            graph = opened.inside(vm).graph
        except HvctlError:
            return []
        # The node of its device state (hvctl- and 8 digits) lives as long as the process, wherever its file is or was.
        nodes = {n.name for n in graph.nodes} | graph.own
        found = {tag: size for tag, size in found.items() if tag[:14] not in nodes}
    return [StrayTag(tag, size) for tag, size in sorted(found.items())]


def drop(root: Path, opened: Opened, vm: Vm, tags: frozenset[str]) -> list[StrayTag]:
    """Remove those of the tags that are still stray; which they were."""
    gone = [t for t in stray(root, opened, vm) if t.tag in tags]
    if not gone:
        return []
    diskpart.forget(_overlays(vm), vm.process)
    for one in gone:
        if vm.state.active:
            held = opened.inside(vm)
            delete_tag(held, one.tag)
            held.forget()
            continue
        for path in _overlays(vm):
            qemuimg.delete_internal_snapshot(path, one.tag)
    return gone


def _overlays(vm: Vm) -> Iterator[Path]:
    return (Path(d.path) for d in vm.disks if d.writable and d.format == "qcow2" and d.path)
