"""Where a process maps a file, and whether it still does. From /proc/PID/maps, by its ioctl where the kernel has it:
that takes a microsecond, the text of a QEMU process 170."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
_PROCMAP_QUERY: Final = 0xC0686611  # linux/fs.h of kernel 6.11
_QUERY: Final = struct.Struct("=9Q4I2Q")  # struct procmap_query
_SHARED: Final = 0x08


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of a RAM file as the process maps it."""

    address: int  # in the process
    offset: int  # in the file
    length: int  # bytes, whole pages


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps."""

    start: int
    end: int
    rights: str
    offset: int
    device: tuple[int, int]
    inode: int
    path: str = ""

    @property
    def origin(self) -> tuple[tuple[int, int], int, int] | None:
        """The file, and the address that its first byte would have; None if it is not a shared mapping of one."""
        return (self.device, self.inode, self.start - self.offset) if self.rights[3] == "s" and self.inode else None


def mappings(pid: int, proc: Path = PROC) -> Iterator[Mapping]:
    """All of a process; none if it is gone."""
    try:
        lines = (proc / str(pid) / "maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        place, rights, offset, device, inode, *path = line.split(maxsplit=5)
        start, end = (int(x, 16) for x in place.split("-"))
        major, minor = (int(x, 16) for x in device.split(":"))
        yield Mapping(start, end, rights, int(offset, 16), (major, minor), int(inode), path[0] if path else "")


def spans(pid: int, file: os.stat_result) -> tuple[Span, ...]:
    """The shared mappings of that file in the process, sorted by offset; QEMU may have split them (madvise)."""
    identity = (os.major(file.st_dev), os.minor(file.st_dev)), file.st_ino
    found = (m for m in mappings(pid) if (m.device, m.inode) == identity and m.rights[3] == "s")
    return tuple(sorted((Span(m.start, m.offset, m.end - m.start) for m in found), key=lambda s: s.offset))


class MappedSpans:
    """Remembers which file each span maps, and tells later whether all of it is still mapped. The kernel's scan of a
    range says nothing about parts that are not mapped any more, and so not of a process that has ended."""

    def __init__(self, pid: int, spans: tuple[Span, ...], proc: Path = PROC) -> None:
        """OSError: the process is gone or not ours to look at."""
        self._pid, self._proc = pid, proc
        self._fd = os.open(proc / str(pid) / "maps", os.O_RDONLY | os.O_CLOEXEC)
        self._text = False
        self._spans = tuple((s.address, s.address + s.length, self._origin(s.address)) for s in spans)

    def whole(self) -> bool:
        return all(origin is not None and self._covers(start, end, origin) for start, end, origin in self._spans)

    def close(self) -> None:
        os.close(self._fd)

    def _origin(self, address: int) -> object:
        found = self._at(address)
        return found.origin if found else None

    def _covers(self, start: int, end: int, origin: object) -> bool:
        while start < end:
            found = self._at(start)
            if found is None or found.origin != origin:
                return False
            start = found.end
        return True

    def _at(self, address: int) -> Mapping | None:
        if not self._text:
            query = bytearray(_QUERY.pack(_QUERY.size, 0, address, *[0] * 12))
            try:
                fcntl.ioctl(self._fd, _PROCMAP_QUERY, query, True)
            except OSError as e:
                if e.errno not in (errno.ENOTTY, errno.EINVAL):
                    return None
                self._text = True
            else:
                start, end, flags, _, offset, inode, major, minor = _QUERY.unpack(query)[3:11]
                return Mapping(start, end, "---s" if flags & _SHARED else "---p", offset, (major, minor), inode)
        return next((m for m in mappings(self._pid, self._proc) if m.start <= address < m.end), None)
