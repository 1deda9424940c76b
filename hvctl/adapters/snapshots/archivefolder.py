"""The folder of a saved snapshot: made beside its name and renamed when it is whole, its manifest written last.

What is in it are guest secrets, so folder and files are the owner's alone, and nothing here follows a symlink.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hvctl import codec
from hvctl.adapters.atomicfile import replace_file
from hvctl.adapters.disks.diskfiles import sync
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.archive import FORMAT, Archive, SavedFile

MANIFEST: Final = "manifest.json"
RAM: Final = "ram.zst"
STATE: Final = "state.qcow2"
_CHUNK: Final = 1 << 20
_TARGET: Final = re.compile(r"[A-Za-z0-9]{1,32}")


def disk_name(target: str) -> str:
    if not _TARGET.fullmatch(target):
        raise RefusedError(f"{target!r} is not a disk that can be saved.")
    return f"disk-{target}.qcow2"


def partial(folder: Path, identity: str) -> Path:
    """Where the snapshot `identity` is saved until it is whole: nobody else's, so it may be removed."""
    return folder.with_name(f".{folder.name}.{identity}.partial")


def free_place(folder: Path) -> Path:
    """The folder that the archive is made in. RefusedError: there is something of its name already, its parent is not
    there, or somebody else could put another archive into its place."""
    if os.path.lexists(folder):
        raise RefusedError(f"{folder} is there already.", "name a folder that is not there yet")
    parent = folder.parent
    try:
        status = parent.stat()
    except OSError as e:
        raise RefusedError(f"{parent} cannot be used: {e.strerror}.", f"mkdir -p {parent}") from e
    open_to_others = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (0, os.geteuid()) or open_to_others:
        raise RefusedError(f"{parent} is not a folder that only this user can change.", f"chmod go-w {parent}")
    return parent


def make(folder: Path, identity: str) -> Path:
    """An empty folder for the parts; RefusedError as free_place."""
    free_place(folder)
    part = partial(folder, identity)
    remove(part)
    try:
        part.mkdir(mode=0o700)
        part.chmod(0o700)
    except OSError as e:
        raise RefusedError(f"{part} cannot be made: {e.strerror}.", f"df -h {folder.parent}") from e
    return part


def publish(folder: Path, identity: str) -> None:
    """Give the parts their name; done already is fine. They reach the disk before their name does."""
    part = partial(folder, identity)
    if not part.exists() and published(folder, identity):
        return
    if os.path.lexists(folder):
        raise RefusedError(f"{folder} is there already.", "name a folder that is not there yet")
    sync(part)
    part.rename(folder)
    sync(folder.parent)


def remove(part: Path) -> None:
    try:
        shutil.rmtree(part)
    except FileNotFoundError:
        return
    except OSError as e:
        raise HvctlError(f"{part} cannot be removed: {e.strerror}.", f"rm -r {part}") from e


def published(folder: Path, identity: str) -> bool:
    """Whether the whole archive of this snapshot is there."""
    try:
        return _manifest(folder).snapshot.id == identity
    except (HvctlError, OSError):
        return False


class Hashed:
    """A new file that is written from its start to its end, and its digest."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, content: bytes, /) -> int:
        self._digest.update(content)
        left = memoryview(content)
        while left:
            left = left[os.write(self._fd, left) :]
        self._size += len(content)
        return len(content)

    def close(self, *, durable: bool = False) -> SavedFile:
        if self._fd >= 0:
            if durable:
                os.fsync(self._fd)
            os.close(self._fd)
        self._fd = -1
        return SavedFile(self._path.name, self._size, self._digest.hexdigest())


def saved_file(path: Path) -> SavedFile:
    """The entry of a file that somebody else wrote; it is durable after it."""
    with opened(path) as fd:
        os.fsync(fd)
        size, digest = _digest(fd)
    return SavedFile(path.name, size, digest)


def write_manifest(part: Path, archive: Archive) -> None:
    """The last file: without it, the others are nothing."""
    content = codec.dump_json(archive).decode()
    whole = {"sha256": hashlib.sha256(content.encode()).hexdigest(), "archive": content}
    replace_file(part / MANIFEST, json.dumps(whole, indent=1) + "\n")


def read(folder: Path) -> Archive:
    """The manifest, after every file was compared with it. NotFoundError: there is no archive; RefusedError: it is
    damaged, another one's, or not this user's alone. All files are read."""
    archive = _manifest(folder)
    for file in archive.files:
        with opened(folder / file.name) as fd:
            size = os.fstat(fd).st_size
            if size != file.size:
                raise _damaged(folder, f"{file.name} has {size} bytes and not {file.size}")
            if _digest(fd)[1] != file.sha256:
                raise _damaged(folder, f"the content of {file.name} is another one than when it was saved")
    return archive


def _manifest(folder: Path) -> Archive:
    try:
        status = folder.lstat()
    except FileNotFoundError as e:
        raise NotFoundError(f"there is no saved snapshot at {folder}.", "hvctl snapshot save makes one") from e
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise RefusedError(f"{folder} is not a folder of this user alone.", f"look at it, then: chmod go= {folder}")
    with opened(folder / MANIFEST) as fd, os.fdopen(os.dup(fd), "rb") as stream:
        text = stream.read()
    try:
        whole = json.loads(text)
        content, digest = str(whole["archive"]), str(whole["sha256"])
        if hashlib.sha256(content.encode()).hexdigest() != digest:
            raise _damaged(folder, "its manifest was changed")
        version = int(json.loads(content)["format"])
    except (ValueError, KeyError, TypeError) as e:
        raise _damaged(folder, "its manifest cannot be read") from e
    if version != FORMAT:
        raise RefusedError(f"{folder} has format {version}, and this hvctl reads {FORMAT}.", "hvctl --version")
    try:
        archive = codec.load_json(Archive, content)
    except HvctlError as e:
        raise _damaged(folder, e.message.rstrip(".")) from e
    _check_names(folder, archive)
    return archive


def _check_names(folder: Path, archive: Archive) -> None:
    """The files are those of the format and no others: no name leads out of the folder."""
    wanted = {RAM, STATE, *(disk_name(d.target) for d in archive.disks)}
    names = [f.name for f in archive.files]
    if (
        set(names) != wanted
        or len(names) != len(wanted)
        or any(d.file != disk_name(d.target) or "/" in d.file for d in archive.disks)
        or {d.target for d in archive.disks} != set(archive.snapshot.targets)
    ):
        raise _damaged(folder, "its manifest does not fit its files")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor for reading; RefusedError if it is not a plain file of this user alone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise _damaged(path.parent, f"{path.name} is not there") from e
    except OSError as e:
        raise RefusedError(f"{path} cannot be opened: {e.strerror}.", f"ls -l {path.parent}") from e
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise RefusedError(f"{path} is not a file of this user alone.", f"look at it, then: chmod go= {path}")
        yield fd
    finally:
        os.close(fd)


def _digest(fd: int) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while piece := os.pread(fd, _CHUNK, size):
        digest.update(piece)
        size += len(piece)
    return size, digest.hexdigest()


def _damaged(folder: Path, how: str) -> RefusedError:
    return RefusedError(f"the saved snapshot {folder} is damaged: {how}.", "it cannot be loaded; use another one")
