"""Where a snapshot's files are: one folder each, below root-owned folders on a tmpfs, its manifest written last.

What is in them are guest secrets, and QEMU, which may be hostile, must be able to open one of the files. So nothing
here follows a symlink or enters a folder that somebody else could have made.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final

from hvctl import codec
from hvctl.adapters.atomicfile import replace_file
from hvctl.adapters.qemu.blockgraph import disk_nodes
from hvctl.adapters.ram.layers import INDEX, RAM
from hvctl.adapters.ram.pages import PAGE
from hvctl.adapters.ram.ramfile import wipe
from hvctl.decide.rebind import rebound, renamed
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.snapshot import Binding, Snapshot

MANIFEST: Final = "manifest.json"
VMSTATE: Final = "vmstate.qcow2"
_MODE: Final = 0o711  # QEMU passes through to its file, and lists nothing.
_PART: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def folder_of(root: Path, snapshot: Snapshot) -> Path:
    """The snapshot's folder. RefusedError if what the snapshot says is not below `root` in its own place."""
    place = root / snapshot.vm_uuid / snapshot.id
    if not (_PART.fullmatch(snapshot.vm_uuid) and _PART.fullmatch(snapshot.id)) or snapshot.folder != str(place):
        raise RefusedError(f"snapshot {snapshot.name} does not live in {root}.", "hvctl config show")
    return place


def make(root: Path, folder: Path) -> None:
    """Make the folder and those between it and `root`; those that are there must be ours alone."""
    for step in (root.parent, root, folder.parent, folder):
        try:
            if new := not os.path.lexists(step):
                step.mkdir(parents=step == root.parent, exist_ok=True)
            _check_ours(step)
            step.chmod(_MODE if new else stat.S_IMODE(step.stat().st_mode) | 0o011)
        except OSError as e:
            raise RefusedError(f"{step} cannot be made: {e.strerror}.", "hvctl host prepare") from e


def stored(folder: Path) -> int:
    """Bytes that the snapshot's files take on the host: holes take nothing."""
    return sum(file.lstat().st_blocks * 512 for file in folder.iterdir())


def publish(folder: Path, snapshot: Snapshot) -> None:
    _check_ours(folder)
    try:
        replace_file(folder / MANIFEST, codec.dump_json(snapshot).decode())
    except OSError as e:
        raise HvctlError(f"the manifest of {snapshot.name} cannot be written: {e.strerror}.", "hvctl doctor") from e


def rebind(root: Path, uuid: str, was: Binding, now: Binding) -> int:
    """The VM's snapshots of this process have the new names of its block nodes; how many of them changed. Done in part,
    it can be done again."""
    names, changed = renamed(was, now), 0
    for snapshot in published(root, uuid):
        new = rebound(snapshot, names)
        if snapshot.binding.process == now.process and new != snapshot:
            publish(folder_of(root, snapshot), new)
            changed += 1
    return changed


def unpublish(folder: Path) -> None:
    """From here on the snapshot does not exist, whatever is left of its files."""
    (folder / MANIFEST).unlink(missing_ok=True)


def vm_folder(root: Path, uuid: str) -> Path:
    """Where what belongs to all snapshots of a VM lies."""
    if not _PART.fullmatch(uuid):
        raise RefusedError(f"{uuid!r} is not the UUID of a VM.")
    return root / uuid


def remove_vm_folder(root: Path, uuid: str) -> None:
    """What is left when a VM has no snapshot any more; absent already is fine, and so is one that still has some."""
    folder = vm_folder(root, uuid)
    try:
        _check_ours(folder)
    except FileNotFoundError:
        return
    if any(f.is_dir() for f in folder.iterdir()):
        return
    for file in folder.iterdir():
        wipe(file)
    folder.rmdir()


def remove_unpublished(root: Path, uuid: str) -> None:
    """Of a VM: the folders without a manifest."""
    folder = vm_folder(root, uuid)
    for inner in folder.iterdir() if folder.is_dir() else ():
        if inner.is_dir() and not (inner / MANIFEST).exists():
            remove(inner)


def remove(folder: Path) -> None:
    """Wipe and remove the files and the folder; absent already is fine."""
    try:
        _check_ours(folder)
    except FileNotFoundError:
        return
    for file in folder.iterdir():
        wipe(file)
    folder.rmdir()


def published(root: Path, uuid: str | None) -> Iterator[Snapshot]:
    """Whole snapshots with a sound manifest, of one VM or of all, hidden ones too; damaged ones are left out, so that
    nobody pauses a guest for them."""
    for manifest in root.glob(f"{uuid or '*'}/*/{MANIFEST}"):
        try:
            snapshot = _load(root, manifest)
        except (HvctlError, OSError, ValueError, IndexError):
            continue
        yield snapshot


def _load(root: Path, manifest: Path) -> Snapshot:
    for step in (root.parent, root, manifest.parent.parent, manifest.parent):
        _check_ours(step)
    fd = os.open(manifest, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as stream:
        snapshot = _parsed(stream.read())
    if folder_of(root, snapshot) != manifest.parent:
        raise RefusedError(f"{manifest} is of another snapshot.")
    _check_whole(manifest.parent, snapshot)
    return snapshot


@lru_cache(64)
def _parsed(manifest: bytes) -> Snapshot:
    """Refused here is whatever the text alone tells, since the same text is parsed many times. RefusedError: the
    manifest leaves out a node, whose disk would stay as it is under RAM of another time."""
    snapshot = codec.load_json(Snapshot, manifest)
    if snapshot.nodes != disk_nodes(snapshot.binding.blocks) and not snapshot.hidden:
        raise RefusedError(f"snapshot {snapshot.name} is damaged.", "take a new one")
    return snapshot


def _check_whole(folder: Path, snapshot: Snapshot) -> None:
    """What a reset would find out only after it paused the guest, or not at all."""
    files = [(folder / name).lstat() for name in (RAM, INDEX, *(() if snapshot.hidden else (VMSTATE,)))]
    names = (snapshot.tag, snapshot.vmstate_node)
    if (
        not all(stat.S_ISREG(f.st_mode) for f in files)
        or files[1].st_size != snapshot.ram_size // PAGE * 4
        or names != (f"hvctl-{snapshot.id}", f"hvctl-{snapshot.id[:8]}")
    ):
        raise RefusedError(f"snapshot {snapshot.name} is damaged.", "take a new one")


def _check_ours(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise RefusedError(
            f"{folder} is not a folder that only {'root' if not os.geteuid() else 'this user'} can change.",
            "look at who made it, then remove it: hvctl doctor",
        )
