"""The lines that a guest says on a port of its own, of which hvctl waits for one it knows the beginning of.

What a guest says is hostile: it is read in bounded pieces, kept in bounded memory, compared with what is awaited, and
thrown away; no word of it is shown or acted on.
"""

from __future__ import annotations

import os
import select
import time
from typing import Final

from hvctl.errors import GuestError, UnreachableError

# What is read at most: an answer has 96 bytes, and what the guest said before it has room in its port's ring.
_MOST: Final = 1 << 20
_LINE: Final = 128
_PIECE: Final = 4096


class GuestLines:
    """What comes out of one descriptor, which is not blocking and stays its opener's."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._read = 0
        self._text = b"\n"

    def await_line(self, wanted: bytes, seconds: float) -> bytes | None:
        """The line that begins with `wanted`, a newline first, without its end; None if it does not come in `seconds`.
        What is before it is gone, what is behind it stays for the next call.

        GuestError: the guest said more than a MiB, and is not read any more. UnreachableError: nobody has the other
        end open any more."""
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        while True:
            at = self._text.find(wanted)
            end = self._text.find(b"\n", at + 1)
            if 0 <= at < end:
                line, self._text = self._text[at:end], self._text[end:]
                return line
            # Of a line that is longer than any answer the rest is noise, too.
            self._text = self._text[-_LINE:]
            left = until - time.monotonic()
            if poll.poll(max(0.0, left) * 1000):
                self._more()
            elif left <= 0:
                return None

    def _more(self) -> None:
        if self._read > _MOST:
            raise GuestError("the guest floods its sign-of-life port.")
        try:
            data = os.read(self._descriptor, _PIECE)
        except BlockingIOError:
            return
        if not data:
            raise UnreachableError("QEMU ended.", "hvctl vm show VM")
        self._read += len(data)
        self._text += data
