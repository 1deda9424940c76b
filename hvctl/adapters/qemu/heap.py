"""The heap of a QEMU process, had in its page table before the guest is paused: after every change of its map of memory
QEMU gives free memory back (malloc_trim), and loading device state takes a thousand pages of it again, one fault each.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from hvctl.adapters.kernel import processmemory
from hvctl.adapters.kernel.processmemory import Vector

_PIECE: Final = 4 << 20  # bytes: what the kernel looks up at a time, 1,024 pages
_LARGEST: Final = 64 << 20  # bytes: with more, looking through it would cost what it saves
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)


def foresee(pid: int) -> None:
    """Have every page of the heap writable without a fault; nothing in it changes. Only a matter of speed, so whatever
    is against it (rights, a process that ended) is let pass. The memory, some MiB, is QEMU's to give back again."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            if line.endswith("[heap]"):
                start, end = (int(x, 16) for x in line.split(maxsplit=1)[0].split("-"))
                if end - start <= _LARGEST:
                    for at in range(start, end, _PIECE):
                        _touch(pid, at, min(_PIECE, end - at))
                return


def _touch(pid: int, start: int, length: int) -> None:
    """The kernel looks the pages up for writing, and then finds nothing to write: our own side cannot be read."""
    ours, theirs = Vector(_unreadable(), length), Vector(start, length)
    with suppress(OSError):
        processmemory.write(pid, ctypes.addressof(ours), ctypes.addressof(theirs))


@cache
def _unreadable() -> int:
    """Where this process has addresses and nothing else, as long as it lives."""
    address: int | None = _libc.mmap(None, _PIECE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    assert address is not None
    return address
