"""qemu.qmp's client as hvctl needs it, and the socket of a monitor that is known to be the right QEMU's."""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections.abc import Mapping

from qemu.qmp import Message, QMPClient

from hvctl.errors import DeadlineError, UnreachableError

# qemu.qmp logs what it also raises; without a handler of its own, logging would print that to stderr.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class _Beginning(Message):
    """A command of which all but the end is sent."""


class Client(QMPClient):
    """Without its log of every message: that is formatted whether or not anybody reads it, and takes most of the time
    of an exchange. And with shorter names of commands: QEMU reads byte by byte, at some microseconds each."""

    _begun = b""
    resumed: float | None = None  # when the guest was last said to go on, in seconds of the monotonic clock

    async def begin(self, command: str, arguments: Mapping[str, object]) -> None:
        """Send a command but for its end, which comes with the same command as the next that is executed; any other
        one ends the session instead."""
        await self._outgoing.put(_Beginning(self.make_execute_msg(command, arguments)))
        await self._outgoing.join()

    def _do_send(self, msg: Message) -> None:
        order = bytes(msg)
        if isinstance(msg, _Beginning):
            order = self._begun = order[:-1]
        elif not order.startswith(self._begun):
            raise ConnectionError("another command was begun")
        else:
            order, self._begun = order[len(self._begun) :], b""
        assert self._writer is not None
        self._writer.write(order)

    def _get_exec_id(self) -> str:
        return str(super()._get_exec_id()).removeprefix("__qmp#").lstrip("0") or "0"

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        if msg.get("event") == "RESUME":
            self.resumed = time.monotonic()
        return msg


def unreachable(path: str, why: str) -> UnreachableError:
    return UnreachableError(
        f"the QEMU monitor {path} cannot be used: {why}.", "is the VM running? hvctl vm list shows it"
    )


def connected(path: str, deadline: float, pid: int | None) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(deadline)
        connection.connect(path)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        owner = struct.unpack("3i", credentials)[0]
        if pid is not None and owner != pid:
            raise unreachable(path, f"it belongs to process {owner}, not to the VM's QEMU ({pid})")
        connection.setblocking(False)
    except OSError as e:
        connection.close()
        if isinstance(e, TimeoutError | BlockingIOError):
            raise DeadlineError(f"the QEMU monitor {path} accepts no connection within {deadline:g} s.") from e
        raise unreachable(path, e.strerror or str(e)) from e
    except BaseException:
        connection.close()
        raise
    return connection
