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
_PROCMAP_QUERY: Final = 0xC0686611  # kernel 6.11
_QUERY: Final = struct.Struct("=8Q2I5Q")  # struct procmap_query with an empty name; the query ends before the name
_QUERY_SIZE: Final = 104
_VMA_SHARED: Final = 0x08


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
    path: str


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
