"""Memory of a process, this one or another, moved by the kernel from and to vectors of it (process_vm_readv(2)): with
the rights that the process itself has to its pages, and an error in place of a signal where there is nothing."""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final

MOST: Final = 1024  # vectors of one call: IOV_MAX
_libc = ctypes.CDLL(None, use_errno=True)
_SIDE: Final = (ctypes.c_void_p, ctypes.c_ulong)
for _call in (_libc.process_vm_readv, _libc.process_vm_writev):
    _call.argtypes = (ctypes.c_int, *_SIDE, *_SIDE, ctypes.c_ulong)
    _call.restype = ctypes.c_ssize_t


class Vector(ctypes.Structure):
    """struct iovec: where, and how many bytes."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read(pid: int, own: int, there: int, count: int = 1) -> int:
    """Bytes moved from memory of the process to our own; own, there: addresses of `count` vectors each.

    Fewer than asked for if one of its pages, or of ours, cannot be had after some that could. OSError: none could
    (EFAULT), the process is gone (ESRCH), or it is not ours to touch (EPERM).
    """
    return _move(_libc.process_vm_readv, pid, own, there, count)


def write(pid: int, own: int, there: int, count: int = 1) -> int:
    """Bytes moved from our own memory to that of the process; see read."""
    return _move(_libc.process_vm_writev, pid, own, there, count)


def _move(call: Any, pid: int, own: int, there: int, count: int) -> int:
    done: int = call(pid, own, count, there, count, 0)
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return done
