"""The files beside one overlay that a reset of its disk needs: their names, copies of them, and whose they are."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hvctl.errors import RefusedError

_TAG = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FICLONE: Final = 0x40049409
_CHUNK: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Files:
    """Where the files of one overlay's resets are. `spare` is what takes the overlay's place, `old` the overlay that
    goes: it is there from the moment QEMU is touched until the reset is over. The guest works on `standin` meanwhile, a
    thin image over `backing`, which has the spare's content and is never written."""

    overlay: Path

    def _beside(self, suffix: str) -> Path:
        return self.overlay.with_name(f"{self.overlay.name}.{suffix}")

    @property
    def plan(self) -> Path:
        return self._beside("reset")

    @property
    def spare(self) -> Path:
        return self._beside("spare")

    @property
    def old(self) -> Path:
        return self._beside("old")

    # What QEMU opens by a name that no definition of a VM has: `host prepare` has AppArmor let every QEMU do that, so
    # they are given to one for the time of a reset only.
    @property
    def standin(self) -> Path:
        return self._beside("hvctl-standin")

    @property
    def backing(self) -> Path:
        return self._beside("hvctl-backing")

    def pristine(self, tag: str) -> Path:
        if not _TAG.fullmatch(tag):
            raise RefusedError(f"{tag!r} is not the name of a snapshot of hvctl.")
        return self._beside(f"{tag}.pristine")

    def places(self) -> tuple[tuple[int, int], ...]:
        """The identities of the overlay and the spare, as far as they are there."""
        return tuple(identity(f) for f in (self.overlay, self.spare) if f.exists())

    def keep_old(self) -> None:
        """A second name for the overlay, so that it is not lost when the spare takes its first one."""
        if self.old.exists() and identity(self.old) != identity(self.overlay):
            self.old.unlink()
        if not self.old.exists():
            os.link(self.overlay, self.old, follow_symlinks=False)

    def lend(self) -> None:
        """Have the QEMU that can open the overlay write the stand-in, and read what is below it: that stays ours, since
        whoever has taken a QEMU over could write there what every later reset puts in. Its group is the overlay's,
        which libvirt gives to QEMU's."""
        take_after(self.overlay, self.standin)
        with _opened(self.backing, os.O_RDONLY) as fd:
            for name in os.listxattr(self.overlay):
                if name.startswith("security."):  # labels; libvirt's own notes tell whose a file was
                    os.setxattr(fd, name, os.getxattr(self.overlay, name))
            os.fchown(fd, os.geteuid(), self.overlay.stat().st_gid)
            os.fchmod(fd, 0o640)

    def put_back_old(self) -> None:
        """The overlay from before takes its place again, and the spare, if that has it, its first name."""
        if identity(self.old) != identity(self.overlay):
            os.link(self.overlay, self.spare, follow_symlinks=False)
            again = self._beside("again")
            again.unlink(missing_ok=True)
            os.link(self.old, again, follow_symlinks=False)
            again.replace(self.overlay)

    def over(self, durable: bool) -> None:
        """A reset is over. Its note stays, so that whoever repeats the last step sees that it was done."""
        if durable:
            sync(self.overlay.parent)  # a rename is not durable by itself
        _unlink(self.standin, self.backing, self.old)

    def drop_plan(self) -> None:
        _unlink(self.standin, self.backing, self.old, self.plan)

    def remove(self) -> None:
        names = self.overlay.parent.glob(f"{_literal(self.overlay.name)}.*.pristine*")
        _unlink(self.plan, self.spare, self.standin, self.backing, self.old, self._beside("again"), *names)


def _unlink(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def identity(file: Path) -> tuple[int, int]:
    """What tells a file from another one with its name."""
    status = file.stat(follow_symlinks=False)
    return status.st_dev, status.st_ino


def has_open(pid: int, file: Path) -> bool:
    """Whether a process has the very file open that is at this path now."""
    wanted = identity(file)
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            # A look at the name takes half as long as one at the file, and a guest waits for this.
            if link.readlink().name == file.name:
                status = link.stat()
                if (status.st_dev, status.st_ino) == wanted:
                    return True
    return False


def copy(source: Path, target: Path, durable: bool = False) -> None:
    """A sparse copy that only this user can open."""
    target.unlink(missing_ok=True)
    with _opened(source, os.O_RDONLY) as old, _opened(target, os.O_RDWR | os.O_CREAT | os.O_EXCL) as new:
        try:
            fcntl.ioctl(new, _FICLONE, old)
        except OSError:
            _data(old, new)
        if durable:
            os.fsync(new)


def _data(old: int, new: int) -> None:
    size = os.fstat(old).st_size
    os.ftruncate(new, size)
    end = 0
    while end < size:
        try:
            start = os.lseek(old, end, os.SEEK_DATA)
        except OSError:  # no data behind this
            return
        end = os.lseek(old, start, os.SEEK_HOLE)
        while start < end:
            piece = os.pread(old, min(_CHUNK, end - start), start)
            if not piece:
                return
            start += os.pwrite(new, piece, start)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def sync(file: Path) -> None:
    """Have a file, or what a folder names, reach the host's disk."""
    with _opened(file, os.O_RDONLY) as fd:
        os.fsync(fd)


def take_after(overlay: Path, spare: Path) -> None:
    """Owner, mode and labels: QEMU has to open the one as it could the other, and libvirt finds its notes there."""
    status = overlay.stat()
    with _opened(spare, os.O_RDWR) as fd:
        kept = os.listxattr(overlay)
        for name in set(os.listxattr(fd)).difference(kept):
            os.removexattr(fd, name)
        for name in kept:
            os.setxattr(fd, name, os.getxattr(overlay, name))
        os.fchown(fd, status.st_uid, status.st_gid)
        os.fchmod(fd, stat.S_IMODE(status.st_mode))


def check_folder(folder: Path) -> None:
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise RefusedError(
            f"{folder} can be changed by others: no copy of a disk is put there.", f"chmod go-w {folder}"
        )


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
