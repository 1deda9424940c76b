"""Puts saved disks into the place of a VM's overlays, and takes them back as long as the load is not valid.

One note names what is kept of before. While it is there, the VM has not run with the new disks and all can be taken
back; its removal, one step, is where the load becomes valid for all disks at once.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hvctl import codec
from hvctl.adapters.atomicfile import replace_file
from hvctl.adapters.disks import diskspare
from hvctl.adapters.disks.diskfiles import check_folder, copy, sync, take_after
from hvctl.errors import HvctlError, RefusedError
from hvctl.model.archive import Placement


@dataclass(frozen=True, slots=True)
class Note:
    """load names the operation that keeps the old overlays."""

    load: str
    overlays: tuple[str, ...]


def place(note: Path, load: str, disks: Sequence[Placement]) -> None:
    """Every overlay is the saved one, and the one before is kept beside it; done already is fine. Nothing is changed
    before all copies are there. RefusedError: an overlay is not what can be replaced; HvctlError: no room."""
    known = _read(note)
    if known is not None and known.load != load:
        raise RefusedError("another load of this VM was interrupted.", "hvctl recover")
    overlays = [Path(d.overlay) for d in disks]
    try:
        for disk, overlay in zip(disks, overlays, strict=True):
            if known is None:
                _check(overlay)
            if not _old(overlay, load).exists():
                _stage(Path(disk.source), overlay, load)
        if known is None:
            note.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            replace_file(note, codec.dump_json(Note(load, tuple(map(str, overlays)))).decode())
        for overlay in overlays:
            _swap(overlay, load)
    except (OSError, HvctlError) as e:
        take_back(note, load, map(str, overlays))
        if isinstance(e, OSError):
            raise HvctlError(f"the saved disks cannot be put in place: {e.strerror}.", "df -h") from e
        raise


def take_back(note: Path, load: str, overlays: Iterable[str]) -> None:
    """The overlays from before the load are there again, and nothing else is; done already is fine."""
    known = _read(note)
    if known is not None and known.load == load:
        for overlay in map(Path, known.overlays):
            if _old(overlay, load).exists():
                _old(overlay, load).replace(overlay)
                # Two names of one file: then the rename did nothing.
                _remove([_old(overlay, load)])
                sync(overlay.parent)
        _forget(note)
    _remove(_new(Path(o), load) for o in overlays)


def release(note: Path, load: str, overlays: Iterable[str]) -> None:
    """The load is valid; what is kept of before goes. Done already is fine."""
    known = _read(note)
    if known is not None and known.load == load:
        _forget(note)
    for overlay in map(Path, overlays):
        _remove((_old(overlay, load), _new(overlay, load)))
        # What was made ready for resets is of the disk before.
        with suppress(HvctlError, OSError):
            diskspare.forget(overlay)


def kept(note: Path) -> str | None:
    """The load that keeps overlays now."""
    known = _read(note)
    return None if known is None else known.load


def _check(overlay: Path) -> None:
    if diskspare.begun(overlay):
        raise RefusedError(f"a reset of the disk {overlay} was interrupted.", "hvctl recover")
    if not stat.S_ISREG(overlay.lstat().st_mode):
        raise RefusedError(f"{overlay} is not a plain file: no other disk is put in its place.")
    check_folder(overlay.parent)


def _stage(source: Path, overlay: Path, load: str) -> None:
    new = _new(overlay, load)
    copy(source, new)
    take_after(overlay, new)
    sync(new)


def _swap(overlay: Path, load: str) -> None:
    if not _old(overlay, load).exists():
        os.link(overlay, _old(overlay, load), follow_symlinks=False)
    with suppress(FileNotFoundError):  # it has its place already
        _new(overlay, load).replace(overlay)
    sync(overlay.parent)


def _old(overlay: Path, load: str) -> Path:
    return overlay.with_name(f"{overlay.name}.{load}.old")


def _new(overlay: Path, load: str) -> Path:
    return overlay.with_name(f"{overlay.name}.{load}.new")


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _read(note: Path) -> Note | None:
    try:
        return codec.load_json(Note, note.read_bytes())
    except FileNotFoundError:
        return None


def _forget(note: Path) -> None:
    note.unlink()
    sync(note.parent)
