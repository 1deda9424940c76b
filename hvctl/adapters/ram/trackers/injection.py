"""One system call made inside another process, by one of its own threads.

The thread is made to look as if it were in a signal handler that consists of `syscall; ret`: its registers are in a
signal frame on its stack, to which that `ret` leads. It is stopped after the system call and gets its registers back
from here; but if hvctl dies in between, in whatever moment, the thread goes on, returns from that handler, and is as
it was. What the system call made (a descriptor) is then left in the process, for the next one to find.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hvctl.adapters.ram.trackers import sigframe
from hvctl.adapters.ram.trackers.mappings import Mapping, mappings
from hvctl.adapters.ram.trackers.ptrace import Registers, Tracee, let_go
from hvctl.errors import DeadlineError, RefusedError, UnreachableError

SECONDS: Final = 2.0
_PAUSE: Final = 0.001
_STOP: Final = 0.1  # s that any stop is given, also one that was asked for at the last moment
_CALL: Final = b"\x0f\x05\xc3"  # syscall; ret
_RESTORER: Final = b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05"  # mov $15, %rax; syscall: every libc has it for its handlers
_LIBC: Final = r"/(libc[.-]|ld-musl)"  # looked at first


@dataclass(frozen=True, slots=True)
class _Code:
    """Addresses of instructions that are in the process already: nothing of its code is changed."""

    call: int
    restorer: int


def system_call(pid: int, number: int, *arguments: int, seconds: float = SECONDS) -> int:
    """What the system call returned. It must not block.

    OSError: the call's own error. UnreachableError: the process is gone. RefusedError: it cannot be traced, or has not
    the code that it takes. DeadlineError: it is stopped, or no thread of it could be stopped in a system call
    in time; nothing was done, unless the thread was lost in the middle, where the call may be made still.
    """
    if platform.machine() != "x86_64":
        raise RefusedError(f"system calls inside QEMU are not known for {platform.machine()}.", "use --tracker compare")
    until = time.monotonic() + seconds
    # The kernel ends the tracing when the tracing thread ends, even if the tracee does not stop.
    with ThreadPoolExecutor(1) as tracer:
        result = tracer.submit(_in_some_thread, pid, (number, *arguments), until).result()
    if -4096 < result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _in_some_thread(pid: int, call: tuple[int, ...], until: float) -> int:
    code = _find_code(pid)
    while True:
        for tid in _threads(pid):
            try:
                result = _attempt(pid, tid, call, code, until)
            except ProcessLookupError:
                continue
            if result is not None:
                return result
        if time.monotonic() > until:
            raise DeadlineError(f"no thread of process {pid} could be stopped in a system call.", "try again")
        time.sleep(_PAUSE)


def _attempt(pid: int, tid: int, call: tuple[int, ...], code: _Code, until: float) -> int | None:
    """None: not this thread, or not now. A thread in the middle of a system call has no half-done work in user mode
    (a restartable sequence); QEMU's first thread nearly always is."""
    try:
        tracee = Tracee(tid, max(until, time.monotonic() + _STOP))
    except PermissionError as e:
        tracer = int(_field(pid, tid, "TracerPid") or 0)
        # It is a zombie, or died in the attempt before and could not be let go.
        if _field(pid, tid, "State").startswith("Z") or tracer == threading.get_native_id():
            return None
        reason = f"is traced by process {tracer}" if tracer else f"may not be traced: {e.strerror}"
        raise RefusedError(f"process {pid} {reason}.", "end the debugger" if tracer else "run hvctl as root") from e
    try:
        stop = tracee.interrupt()
        if stop.of_the_process:
            raise _stopped(pid)
        if not stop.asked_for:
            tracee.detach(stop.signal)
            return None
        before = tracee.registers
        if before.orig_rax >= 1 << 63:
            return None
        frame, content = sigframe.build(before, tracee.extended_state(), tracee.blocked_signals(), code.restorer)
        if not tracee.write(frame, content):
            return None
        return _detour(pid, tracee, before, _entry(before, call, code, frame))
    finally:
        let_go(tracee)


def _detour(pid: int, tracee: Tracee, before: Registers, entry: Registers) -> int | None:
    """From the first line on the thread finds its way back by itself."""
    tracee.registers = entry
    stop = tracee.resume()
    if not stop.in_system_call:
        # A signal came first. The thread takes it where it was.
        tracee.registers = before
        if stop.of_the_process:
            raise _stopped(pid)
        tracee.detach(stop.signal)
        return None
    stop = tracee.resume()
    result = tracee.registers.rax
    tracee.registers = before
    tracee.detach(0 if stop.in_system_call else stop.signal)
    return int(result) - (1 << 64 if result >= 1 << 63 else 0)


def _entry(before: Registers, call: tuple[int, ...], code: _Code, stack: int) -> Registers:
    entry: Registers = before.copy()
    number, *arguments = call
    entry.rip, entry.rsp, entry.rax = code.call, stack, number
    entry.orig_rax = (1 << 64) - 1  # no system call to take up again
    for register, argument in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
        setattr(entry, register, argument)
    return entry


def _threads(pid: int) -> list[int]:
    """The first one first: it is QEMU's main loop, which waits in poll."""
    try:
        found = sorted(int(p.name) for p in Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError) as e:
        raise _gone(pid) from e
    state = _field(pid, pid, "State")
    if not state or (state[0] in "ZX" and len(found) == 1):
        raise _gone(pid)
    return sorted(found, key=lambda tid: tid != pid)


def _find_code(pid: int) -> _Code:
    code = [m for m in mappings(pid) if m.rights[2] == "x" and m.path.startswith("/")]
    try:
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for mapping in sorted(code, key=lambda m: not re.search(_LIBC, m.path)):
                found = _in_mapping(memory.fileno(), mapping)
                if found:
                    return found
    except (FileNotFoundError, ProcessLookupError) as e:
        raise _gone(pid) from e
    except PermissionError as e:
        raise RefusedError(f"process {pid} may not be traced: {e.strerror}.", "run hvctl as root") from e
    if not code:
        raise _gone(pid)
    raise RefusedError(f"process {pid} has no C library that hvctl knows.", "use --tracker compare")


def _in_mapping(memory: int, mapping: Mapping) -> _Code | None:
    try:
        content = os.pread(memory, mapping.end - mapping.start, mapping.start)
    except OSError as e:
        if e.errno != errno.EIO:
            raise
        return None
    call, restorer = content.find(_CALL), content.find(_RESTORER)
    return _Code(mapping.start + call, mapping.start + restorer) if call >= 0 and restorer >= 0 else None


def _field(pid: int, tid: int, name: str) -> str:
    """A line of a thread's status; empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/task/{tid}/status").read_text(errors="replace")
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(name + ":")), "")


def _gone(pid: int) -> UnreachableError:
    return UnreachableError(f"process {pid} is gone.", "hvctl vm list")


def _stopped(pid: int) -> DeadlineError:
    return DeadlineError(f"process {pid} is stopped: it makes no system calls.", f"kill -CONT {pid}")
