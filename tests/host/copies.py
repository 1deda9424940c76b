"""Guest RAM and disks at a moment, kept and compared by plain means: nothing of hvctl's own format takes part."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from host.outside import Guest

PAGE = 4096
_PIECE = 1 << 20


def ram_files(pid: int) -> list[Path]:
    """The files that QEMU maps shared and writable for its guest's RAM, by address."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if words[1] == "rw-s" and len(words) == 6 and "/guests/libvirt/qemu/" in words[5]:
            found.append(Path(words[5]))
    return list(dict.fromkeys(found))


def unequal_pages(now: Path, then: Path) -> list[int]:
    """Pages in which two files of one size differ. Where both have a hole, both are zero."""
    size = now.stat().st_size
    assert size == then.stat().st_size
    found = []
    with now.open("rb") as one, then.open("rb") as other:
        for at in sorted({*_pieces(one.fileno(), size), *_pieces(other.fileno(), size)}):
            a, b = (os.pread(f.fileno(), _PIECE, at) for f in (one, other))
            if a != b:
                found += [(at + i) // PAGE for i in range(0, len(a), PAGE) if a[i : i + PAGE] != b[i : i + PAGE]]
    return found


def page_with(file: Path, start: bytes) -> int:
    """Where the one page that begins with `start` lies in a file, in bytes."""
    found = []
    with file.open("rb") as stream:
        for at in _pieces(stream.fileno(), file.stat().st_size):
            piece = os.pread(stream.fileno(), _PIECE, at)
            found += [at + i for i in range(0, len(piece), PAGE) if piece.startswith(start, i)]
    (only,) = dict.fromkeys(found)
    return only


def _pieces(fd: int, size: int) -> Iterator[int]:
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield from range(start // _PIECE * _PIECE, end, _PIECE)


@dataclass(frozen=True)
class Copies:
    """What a paused guest had: by the file in use, the copy of it."""

    ram: dict[Path, Path]
    disks: dict[Path, Path]

    def unequal(self) -> dict[str, list[int]]:
        """The pages of RAM that are not as they were, by the RAM file's name, and the disks; the guest is paused."""
        apart = {now.name: unequal_pages(now, then) for now, then in self.ram.items()}
        apart |= {now.name: [0] for now, then in self.disks.items() if not same_disk(now, then)}
        return {name: pages for name, pages in apart.items() if pages}


def same_disk(now: Path, then: Path) -> bool:
    command = ["qemu-img", "compare", "-q", "-U", "-f", "qcow2", "-F", "qcow2", str(now), str(then)]
    return subprocess.run(command, check=False).returncode == 0


_numbers = itertools.count()


def copies(guest: Guest, folder: Path) -> Copies:
    """The guest is paused, which has QEMU write what it holds of the disks."""
    assert guest.state == "paused"
    made: tuple[dict[Path, Path], dict[Path, Path]] = {}, {}
    for kind, paths in zip(made, (ram_files(guest.pid), guest.overlays()), strict=True):
        for path in paths:
            kind[path] = folder / f"{path.name}.{next(_numbers)}"
            subprocess.run(["cp", "--sparse=always", path, kind[path]], check=True)
    return Copies(*made)


def remove(kept: Copies) -> None:
    for copy in (*kept.ram.values(), *kept.disks.values()):
        copy.unlink()
