"""The frame that the x86-64 kernel pushes for a signal handler, so that a thread can put its own registers back.

Layout from arch/x86/include/uapi/asm/{sigcontext,ucontext}.h.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

from hvctl.adapters.ram.trackers.ptrace import Registers

RED_ZONE: Final = 128  # below the stack pointer, belongs to the function that runs
_FRAME: Final = struct.Struct("=QQQQQQ 18Q 4H 4Q Q 64x 8s 128x")  # struct rt_sigframe, siginfo unused
_XSTATE, _STRICT_SS = 0x1, 0x2 | 0x4  # UC_FP_XSTATE, UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
# The kernel ignores an alternate stack with flags that do not exist, and leaves the one that is set.
_NO_SUCH_STACK: Final = 0x7F
_SOFTWARE, _XSTATE_BV = 464, 512
_MAGIC1, _MAGIC2 = 0x46505853, 0x46505845
# What a thread has that did not ask the kernel for AMX: without its tiles.
_LARGEST, _TILES = 2696, 3 << 17

_RESTARTED: Final = (512, 513, 514)  # ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND
_RESTART_BLOCK: Final = 516


def build(registers: Registers, extended: bytes, blocked: bytes, restorer: int) -> tuple[int, bytes]:
    """A frame below the stack of a thread that stopped with these registers: its address and content.

    With the stack pointer at that address, `ret` calls the restorer, whose rt_sigreturn makes the thread as it was. A
    system call that the stop broke off is made again; only one that the kernel would have resumed part-way
    (nanosleep, poll) ends with EINTR, because rt_sigreturn forgets how far it was.
    """
    ip, ax = registers.rip, registers.rax
    error = (1 << 64) - ax if registers.orig_rax < 1 << 63 else 0
    if error in _RESTARTED:
        ip, ax = ip - 2, registers.orig_rax
    elif error == _RESTART_BLOCK:
        ax = (1 << 64) - errno.EINTR
    state = _extended(extended)
    fp = (registers.rsp - RED_ZONE - len(state)) & ~63
    at = (fp - _FRAME.size) & ~15
    r = registers
    frame = _FRAME.pack(
        restorer, _XSTATE | _STRICT_SS, 0, 0, _NO_SUCH_STACK, 0,
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15,
        r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, ax, r.rcx, r.rsp, ip, r.eflags,
        r.cs, 0, 0, r.ss, 0, 0, 0, 0, fp, blocked,
    )  # fmt: skip
    return at, frame + bytes(fp - at - len(frame)) + state


def _extended(state: bytes) -> bytes:
    """What ptrace gave, with the marks by which the kernel knows it in a signal frame."""
    size = min(len(state), _LARGEST)
    area = bytearray(state[:size])
    (features,) = struct.unpack_from("=Q", area, _SOFTWARE)
    (used,) = struct.unpack_from("=Q", area, _XSTATE_BV)
    struct.pack_into("=IIQI", area, _SOFTWARE, _MAGIC1, size + 4, features & ~_TILES, size)
    struct.pack_into("=Q", area, _XSTATE_BV, used & ~_TILES)
    return bytes(area) + struct.pack("=I", _MAGIC2)
