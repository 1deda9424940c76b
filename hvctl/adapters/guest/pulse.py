"""A guest's first sign of life after a reset, fresh entropy for it, notices, and its word that it is ready, over a
virtio port of its own.

The port's other side are two FIFOs, always connected, so that nothing flaps across a state load and nobody waits for
nobody: QEMU holds both open, what the guest says beyond 64 KiB stays in the guest, and hvctl never blocks.

The words, each a line of ASCII with a newline before it too, since the line before may be half of one:

    host    life NONCE SECONDS.NANOSECONDS ENTROPY
    guest   life NONCE
    guest   done NONCE reseed=ok|no clock=ok|no
    host    notice EVENT HOW AT RETURNS ID REASON
    guest   ready ID

NONCE is 32 and ENTROPY 128 hexadecimal digits; the time is the host's (10 and 9 decimal digits, all 0: leave the clock
alone). A nonce is used once: a guest that goes back to a snapshot may find lines from before it, or repeat an answer,
and neither counts. The second line of the answer tells what became of entropy and time. A notice has the words of
adapters.guest.notice, and is shorter than 512 bytes, which a guest may read at once. Its ID, 32 hexadecimal digits, is
that of one interruption: a guest need not say that it is ready, and what it says of another one does not count.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import struct
import termios
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from hvctl.adapters.guest.guestlines import GuestLines
from hvctl.errors import DeadlineError, HvctlError, UnreachableError

ENTROPY: Final = 64  # bytes
NONCE: Final = 16  # bytes
_DRAINED: Final = 1 << 20
_TELL_SECONDS: Final = 1.0
_TELL_POLL: Final = 0.01


@dataclass(frozen=True, slots=True)
class Done:
    """What the guest says that it did: nothing is known beyond its word."""

    reseeded: bool
    clock_set: bool


def ends(path: str) -> tuple[str, str]:
    """The FIFOs of a port's `path`: the one to the guest, and the one from it. QEMU's pipe chardev names them so."""
    return f"{path}.in", f"{path}.out"


def new_nonce() -> str:
    return secrets.token_hex(NONCE)


def discard(path: str) -> int:
    """Throw away what a paused guest has said, in bytes; before the state of a snapshot is saved, again and again until
    it is 0, with a query of QEMU's monitor in between.

    Of a guest that floods its port QEMU keeps a buffer in hand, and writes into guest RAM, paused or not, as soon as
    there is room for it. Saved like this, such a snapshot would do so after each load: RAM put right after that and
    QEMU would no longer agree on the port's ring.
    """
    end = _fifo(ends(path)[1], os.O_RDONLY)
    try:
        return _drain(end)
    finally:
        os.close(end)


def tell(path: str, words: str) -> bool:
    """A line for a guest that runs; whether its port took it within a second. Else the guest does not listen, and may
    find the line later. Nothing is taken from the FIFO, so that QEMU may look meanwhile.

    UnreachableError: there is no such FIFO, no QEMU, or no room because nobody listens since long.
    """
    end = _fifo(ends(path)[0], os.O_WRONLY)
    try:
        _write(end, f"\n{words}\n".encode("ascii"))
        until = time.monotonic() + _TELL_SECONDS
        # A FIFO has no event for having been emptied.
        while waiting := _waiting(end):
            if time.monotonic() >= until:
                break
            time.sleep(_TELL_POLL)
        return not waiting
    finally:
        os.close(end)


class Pulse:
    """A session with a guest's sign-of-life port: use it in a `with`, which begins while the guest is paused and after
    its RAM was looked at for the last time.

    Entering throws away what lies in the FIFOs. That needs a paused guest: QEMU reads its FIFO blocking, and would hang
    if a byte that it was told of were taken from under it; while its guest is paused it does not look. And it may let
    QEMU take up what a flooding guest has left to say, which shows in guest RAM.
    UnreachableError: there are no such FIFOs, or no QEMU at their other end.
    """

    def __init__(self, path: str) -> None:
        self._paths = ends(path)
        self._in = self._out = -1
        self._sent = 0.0
        self._lines = GuestLines(-1)

    def __enter__(self) -> Pulse:
        try:
            # For reading first: with no other reader, opening it for writing tells that QEMU is gone.
            self._out = _fifo(self._paths[1], os.O_RDONLY)
            self._in = _fifo(self._paths[0], os.O_WRONLY)
            stale = _fifo(self._paths[0], os.O_RDONLY)
            try:
                _drain(stale)
            finally:
                os.close(stale)
            _drain(self._out)
            self._lines = GuestLines(self._out)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for end in (self._in, self._out):
            if end >= 0:
                os.close(end)
        self._in = self._out = -1

    def send(self, nonce: str, entropy: bytes, time_ns: int | None = None) -> None:
        """Ask for a sign of life. A paused guest gets it with its first instructions after it goes on.

        `nonce` is a new_nonce(), `entropy` 64 bytes, `time_ns` the time to set the guest's clock to in nanoseconds
        since 1970, None to leave it. The guest's clock is then behind by what lies between this and the answer at most.
        """
        if len(entropy) != ENTROPY or len(nonce) != 2 * NONCE:
            raise ValueError("a nonce of 16 bytes in hexadecimal digits, and 64 bytes of entropy")
        seconds, nanoseconds = divmod(time_ns or 0, 10**9)
        line = f"\nlife {nonce} {seconds:010}.{nanoseconds:09} {entropy.hex()}\n".encode()
        self._sent = time.monotonic()
        _write(self._in, line)

    def await_life(self, nonce: str, seconds: float) -> float:
        """Seconds from `send` to the guest's answer to this very nonce; DeadlineError if there is none in `seconds`."""
        self._await(f"\nlife {nonce}\n".encode(), seconds, "show a sign of life")
        return time.monotonic() - self._sent

    def await_done(self, nonce: str, seconds: float) -> Done:
        """What the guest made of entropy and time. DeadlineError as above."""
        words = self._await(f"\ndone {nonce} ".encode(), seconds, "say that it is reseeded").split()[2:]
        return Done(b"reseed=ok" in words, b"clock=ok" in words)

    def _await(self, wanted: bytes, seconds: float, what: str) -> bytes:
        line = self._lines.await_line(wanted, seconds)
        if line is None:
            raise DeadlineError(f"the guest did not {what} within {seconds:g} s.")
        return line


class Hearing:
    """What a guest that runs says, heard on one port at a time, from the first call until `close`. Who waits for a line
    in several calls finds it although it came in pieces."""

    def __init__(self) -> None:
        self._path = ""
        self._end = -1
        self._lines = GuestLines(-1)

    def hear(self, path: str, words: str, seconds: float) -> bool:
        """Whether the guest says this very line within `seconds`; it returns as soon as it does. All else that it says
        is thrown away.

        GuestError: it floods its port, and is heard no more. UnreachableError: there is no such FIFO, or no QEMU.
        """
        if path != self._path:
            self.close()
            self._end = _fifo(ends(path)[1], os.O_RDONLY)
            self._path, self._lines = path, GuestLines(self._end)
        return self._lines.await_line(f"\n{words}\n".encode("ascii"), seconds) is not None

    def close(self) -> None:
        if self._end >= 0:
            os.close(self._end)
        self._path, self._end = "", -1


def _fifo(path: str, mode: int) -> int:
    try:
        # O_NONBLOCK: who opens a FIFO waits for the other end otherwise.
        descriptor = os.open(path, mode | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as e:
        why = "there is no QEMU at its other end" if e.errno == errno.ENXIO else e.strerror
        raise UnreachableError(f"{path} cannot be opened: {why}.", "hvctl vm show VM") from e
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise HvctlError(f"{path} is not a FIFO.")
    return descriptor


def _write(descriptor: int, line: bytes) -> None:
    try:
        os.write(descriptor, line)  # whole or not at all: it is shorter than PIPE_BUF
    except BlockingIOError as e:
        raise UnreachableError("the guest does not read its sign-of-life port.") from e
    except BrokenPipeError as e:
        raise UnreachableError("there is no QEMU at the other end of the sign-of-life port.") from e


def _waiting(descriptor: int) -> int:
    """Bytes that lie in a FIFO."""
    (count,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    return int(count)


def _drain(descriptor: int) -> int:
    """Throw away what is there, but not for ever what is still written while we read; how many bytes it was."""
    drained = 0
    while drained < _DRAINED:
        try:
            data = os.read(descriptor, 64 << 10)
        except BlockingIOError:
            break
        if not data:
            break
        drained += len(data)
    return drained
