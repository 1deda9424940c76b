"""A guest with a mark in each part of it that can go back by itself: RAM, a file system, a disk that it has released,
and memory of its own that an application would declare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from host.copies import page_with, ram_files
from host.outside import Guest
from host.site import Site

# The first disk is free, the other one is mounted at /data: the image mounts the disk with this serial.
DISKS = ("--disk", "results:32MiB", "--disk", "data:32MiB")
SMALL = ("--memory", "128MiB", "--max-memory", "128MiB")
OWN = 2 << 20
RANGE = "0-64KiB"
_SECTORS = (0, 2048)  # of the released disk: within RANGE, and beyond it
_ARENA = """
mkdir -p /own
mount -t tmpfs -o huge=always,size=4m own /own
awk 'BEGIN { for (i = 0; i < 512; i++) printf "own-%04d %4087s", i, "" }' > /own/arena
"""


@dataclass(frozen=True)
class Marks:
    """What each place holds; beyond is on the released disk, outside of RANGE."""

    ram: str
    file: str
    released: str
    beyond: str
    own: str


def everywhere(word: str) -> Marks:
    return Marks(word, word, word, word, word)


@dataclass(frozen=True)
class Marked:
    """base: the guest-physical address of OWN bytes in one piece."""

    guest: Guest
    base: int

    @property
    def own(self) -> str:
        return f"{self.base:#x}-{self.base + OWN:#x}"

    def mark(self, word: str) -> Marks:
        """Write it everywhere; what is there now."""
        lines = [f"for f in /run/mark /data/mark; do echo {word} > $f; done", "sync"]
        lines += [f"echo {word} | dd of=/dev/vda bs=512 seek={n} conv=sync,fsync" for n in _SECTORS]
        lines += [f"echo {word} | dd of=/own/arena bs=4096 seek=7 conv=notrunc"]
        self.guest.run(f"{{ {'; '.join(lines)}; }} 2> /dev/null")
        return everywhere(word)

    def marks(self) -> Marks:
        """Of disks what is on them, and not what the guest keeps of them."""
        lines = ["sync", "echo 3 > /proc/sys/vm/drop_caches", "blockdev --flushbufs /dev/vda"]
        lines += ["cat /run/mark /data/mark"]
        lines += [f"dd if=/dev/vda bs=512 skip={n} count=1 2> /dev/null | head -n 1" for n in _SECTORS]
        lines += ["dd if=/own/arena bs=4096 skip=7 count=1 2> /dev/null | head -n 1"]
        return Marks(*self.guest.run("; ".join(lines)).split())


@contextmanager
def marked(site: Site, *options: str) -> Iterator[Marked]:
    with site.created(*SMALL, *DISKS, *options, "--start") as guest:
        yield with_own(guest)


def with_own(guest: Guest) -> Marked:
    """A page of 2 MiB of a tmpfs is one piece of guest RAM, and where it is only the host can tell."""
    guest.run(_ARENA)
    (ram,) = ram_files(guest.pid)
    base = page_with(ram, b"own-0000 ")
    assert page_with(ram, b"own-0511 ") == base + 511 * 4096
    return Marked(guest, base)
