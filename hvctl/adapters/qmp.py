"""One conversation with a QEMU process over its second QMP monitor, as plain blocking calls.

The one door to qemu.qmp and the one asyncio loop of hvctl: the loop lives as long as the session and runs only inside
a call. Events that arrive between two calls wait in the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Final, Literal, TypeVar, get_args

from qemu.qmp import ExecuteError, QMPClient, QMPError

from hvctl.errors import DeadlineError, GuestError, RefusedError, UnreachableError

Query = Literal[
    "balloon",
    "blockdev-add",
    "blockdev-del",
    "job-dismiss",
    "migrate-set-capabilities",
    "qom-list",
    "query-balloon",
    "query-block",
    "query-hotpluggable-cpus",
    "query-jobs",
    "query-memdev",
    "query-memory-devices",
    "query-migrate",
    "query-named-block-nodes",
    "query-status",
]
Job = Literal["snapshot-save", "snapshot-load", "snapshot-delete"]
Event = Literal["JOB_STATUS_CHANGE", "BALLOON_CHANGE"]
COMMANDS: Final = frozenset(get_args(Query) + get_args(Job))
JOB_ID: Final = "hvctl-job"

_CLOSE_SECONDS = 1.0
_T = TypeVar("_T")

# qemu.qmp logs what it also raises; without a handler of its own, logging would print that to stderr.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Qmp:
    """A session with the monitor at `path`: use it in a `with`.

    Every call answers within `deadline` seconds or raises DeadlineError, and then the session is over. `pid`: the
    process that must own the socket, so that a monitor path taken over by another process is found out.
    """

    def __init__(self, path: str, deadline: float, pid: int | None = None) -> None:
        self._path = path
        self._deadline = deadline
        self._pid = pid
        self._loop: asyncio.AbstractEventLoop
        self._socket: socket.socket
        self._client: QMPClient

    def __enter__(self) -> Qmp:
        self._socket = _connected(self._path, self._deadline, self._pid)
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient()
        try:
            self._run(lambda: self._client.connect(self._socket), "greet", self._deadline)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session; never waits for QEMU and never raises. Doing it again is fine."""
        if self._loop.is_closed():
            return
        # The socket goes first: with it gone, the client's tasks end by themselves instead of flushing to a dead peer.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(Exception):
            self._loop.run_until_complete(asyncio.wait_for(self._client.disconnect(), _CLOSE_SECONDS))
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        with contextlib.suppress(Exception):
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        self._socket.close()

    def execute(self, command: Query, arguments: Mapping[str, object] | None = None) -> Any:
        """The command's return value. GuestError: QEMU says no, in its words."""
        return self._execute(command, arguments, self._deadline)

    def job(self, command: Job, arguments: Mapping[str, object], seconds: float) -> None:
        """Run a job to its end and dismiss it. GuestError: it failed, in QEMU's words. DeadlineError: not over after
        `seconds`, the result is unknown."""
        self.dismiss_jobs()
        self._execute(command, {"job-id": JOB_ID, **arguments}, seconds)
        # QEMU answers nothing while such a job runs in its main loop, so the first look mostly sees the end.
        if not self.until("JOB_STATUS_CHANGE", lambda: self._own_job(seconds)["status"] == "concluded", seconds):
            raise DeadlineError(
                f"QEMU's {command} is not over after {seconds:g} s.", "virsh qemu-monitor-event shows it"
            )
        error = self._own_job(seconds).get("error")
        self.execute("job-dismiss", {"id": JOB_ID})
        if error is not None:
            raise GuestError(f"QEMU's {command} failed: {error}.")

    def dismiss_jobs(self) -> None:
        """Clear what a killed hvctl left: a concluded job keeps its id until it is dismissed."""
        for job in self.execute("query-jobs"):
            if job["id"] == JOB_ID and job["status"] == "concluded":
                self.execute("job-dismiss", {"id": JOB_ID})

    def until(self, event: Event, done: Callable[[], bool], seconds: float) -> bool:
        """Whether `done` becomes true in time; it is asked at once, and again whenever the event arrives."""
        end = time.monotonic() + seconds
        with self._client.listener(event) as arrived:
            while not done():
                left = end - time.monotonic()
                if left <= 0:
                    return False
                if arrived.empty():
                    with contextlib.suppress(DeadlineError):
                        self._run(arrived.get, event, left)
                arrived.clear()
            return True

    def _own_job(self, seconds: float) -> Mapping[str, Any]:
        for job in self._execute("query-jobs", None, seconds):
            if job["id"] == JOB_ID:
                return dict(job)
        raise GuestError("QEMU's job vanished: somebody else dismissed it, its result is unknown.")

    def _execute(self, command: Query | Job, arguments: Mapping[str, object] | None, seconds: float) -> Any:
        if command not in COMMANDS:
            raise RefusedError(f"{command!r} is not a monitor command that hvctl uses.")
        return self._run(lambda: self._client.execute(command, arguments), command, seconds)

    def _run(self, call: Callable[[], Awaitable[_T]], what: str, seconds: float) -> _T:
        if self._loop.is_closed():
            raise _unreachable(self._path, "the session is over")
        try:
            return self._loop.run_until_complete(asyncio.wait_for(call(), seconds))
        except TimeoutError as e:
            raise DeadlineError(
                f"QEMU did not answer {what} on {self._path} within {seconds:g} s.",
                "another program may hold the monitor, or QEMU hangs: virsh domstate shows it",
            ) from e
        except ExecuteError as e:
            raise GuestError(f"QEMU refuses {what}: {e}.") from e
        except (QMPError, EOFError, OSError, AssertionError) as e:
            # AssertionError: what qemu.qmp raises when the peer goes away right after the negotiation.
            raise _unreachable(self._path, str(e) or type(e).__name__) from e


def _unreachable(path: str, why: str) -> UnreachableError:
    return UnreachableError(
        f"the QEMU monitor {path} cannot be used: {why}.", "is the VM running? hvctl vm list shows it"
    )


def _connected(path: str, deadline: float, pid: int | None) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(deadline)
        connection.connect(path)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        owner = struct.unpack("3i", credentials)[0]
        if pid is not None and owner != pid:
            raise _unreachable(path, f"it belongs to process {owner}, not to the VM's QEMU ({pid})")
        connection.setblocking(False)
    except OSError as e:
        connection.close()
        if isinstance(e, TimeoutError | BlockingIOError):
            raise DeadlineError(f"the QEMU monitor {path} accepts no connection within {deadline:g} s.") from e
        raise _unreachable(path, e.strerror or str(e)) from e
    except BaseException:
        connection.close()
        raise
    return connection
