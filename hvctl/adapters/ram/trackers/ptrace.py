"""One thread of another process, held by ptrace: its stops, its registers, its memory. x86-64."""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from typing import Any, Final

from hvctl.adapters.kernel import processmemory
from hvctl.adapters.kernel.processmemory import Vector
from hvctl.errors import DeadlineError

# linux/ptrace.h, linux/elf.h, bits/waitflags.h
_DETACH, _SYSCALL, _SEIZE, _INTERRUPT = 17, 24, 0x4206, 0x4207
_GETREGSET, _SETREGSET, _GETSIGMASK = 0x4204, 0x4205, 0x420A
_TRACESYSGOOD: Final = 1
_EVENT_STOP: Final = 128
_NT_PRSTATUS, _NT_X86_XSTATE = 1, 0x202
_WALL: Final = 0x40000000
_SIGTRAP: Final = 5
# Most stops come within microseconds; the pauses are for those that do not.
_SHORTEST, _LONGEST = 20e-6, 5e-3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Registers(ctypes.Structure):
    """struct user_regs_struct."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
            *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    ]

    def copy(self) -> Any:
        return type(self).from_buffer_copy(self)


class Stop:
    """Why a thread stopped."""

    def __init__(self, status: int) -> None:
        self.ended = not os.WIFSTOPPED(status)
        self.signal = 0 if self.ended else os.WSTOPSIG(status)
        event = status >> 16
        self.in_system_call = self.signal == _SIGTRAP | 0x80
        self.asked_for = event == _EVENT_STOP and self.signal == _SIGTRAP
        # SIGSTOP and its like have stopped all threads of the process.
        self.of_the_process = event == _EVENT_STOP and self.signal != _SIGTRAP


class Tracee:
    """A seized thread. Only the thread that seized it may call this; when that one ends, in whatever way, the kernel
    lets the tracee go on with the registers that it has."""

    def __init__(self, tid: int, until: float) -> None:
        """OSError ESRCH: it is gone. EPERM: it may not be traced, or is already."""
        self.tid, self._until = tid, until
        _call(_SEIZE, tid, 0, _TRACESYSGOOD)

    def interrupt(self) -> Stop:
        """Stop it where it is, also in a system call, which the kernel breaks off as for a signal."""
        _call(_INTERRUPT, self.tid)
        return self._await_stop()

    def resume(self) -> Stop:
        """Let it go on to where it next enters or leaves a system call."""
        _call(_SYSCALL, self.tid)
        return self._await_stop()

    def detach(self, signal: int = 0) -> None:
        """Let it go. A system call that was broken off, and whose registers are still so, is taken up again."""
        _call(_DETACH, self.tid, 0, signal)

    def _await_stop(self) -> Stop:
        pause = _SHORTEST
        while True:
            try:
                pid, status = os.waitpid(self.tid, os.WNOHANG | _WALL)
            except ChildProcessError as e:
                raise ProcessLookupError(e.errno, e.strerror) from e
            if pid:
                stop = Stop(status)
                if stop.ended:
                    raise ProcessLookupError(f"thread {self.tid} ended")
                return stop
            if time.monotonic() > self._until:
                raise DeadlineError(f"thread {self.tid} does not stop.")
            # No event tells of it: SIGCHLD may go to any thread of hvctl.
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    # --- its state

    @property
    def registers(self) -> Registers:
        registers = Registers()
        if self._regset(_GETREGSET, _NT_PRSTATUS, registers) != ctypes.sizeof(registers):
            raise OSError("it is not a 64-bit process")
        return registers

    @registers.setter
    def registers(self, registers: Registers) -> None:
        self._regset(_SETREGSET, _NT_PRSTATUS, registers)

    def extended_state(self) -> bytes:
        """Floating point and vector registers as the XSAVE instruction lays them out."""
        area = (ctypes.c_char * 16384)()
        size = self._regset(_GETREGSET, _NT_X86_XSTATE, area)
        return area.raw[:size]

    def blocked_signals(self) -> bytes:
        mask = (ctypes.c_char * 8)()
        _call(_GETSIGMASK, self.tid, len(mask), ctypes.addressof(mask))
        return mask.raw

    def _regset(self, request: int, kind: int, area: Any) -> int:
        vector = Vector(ctypes.addressof(area), ctypes.sizeof(area))
        _call(request, self.tid, kind, ctypes.addressof(vector))
        return int(vector.length)

    def write(self, address: int, content: bytes) -> bool:
        """Whether all of it could be written, with the rights of the process itself: into no guard page."""
        own = ctypes.create_string_buffer(content, len(content))
        local, remote = Vector(ctypes.addressof(own), len(content)), Vector(address, len(content))
        try:
            return processmemory.write(self.tid, ctypes.addressof(local), ctypes.addressof(remote)) == len(content)
        except OSError:
            return False


def _call(request: int, tid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, tid, address, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def let_go(tracee: Tracee) -> None:
    """Detach in a clean-up. If it is not stopped this does nothing, and the end of the tracing thread does it."""
    with suppress(OSError):
        tracee.detach()
