"""One conversation with a QEMU process over its second QMP monitor, as plain blocking calls.

The one door to qemu.qmp and the one asyncio loop of hvctl: the loop lives as long as the session and runs only inside
a call. Events that arrive between two calls wait in the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Literal, TypeVar, get_args

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError

from hvctl.errors import DeadlineError, GuestError, RefusedError, UnreachableError

Query = Literal[
    "balloon",
    "block-set-write-threshold",
    "blockdev-add",
    "blockdev-del",
    "blockdev-mirror",
    "job-complete",
    "job-dismiss",
    "migrate-set-capabilities",
    "qom-get",
    "qom-list",
    "qom-set",
    "query-balloon",
    "query-block",
    "query-blockstats",
    "query-hotpluggable-cpus",
    "query-iothreads",
    "query-jobs",
    "query-memdev",
    "query-memory-devices",
    "query-migrate",
    "query-migrate-capabilities",
    "query-named-block-nodes",
    "query-status",
    "query-version",
    "cont",
    "human-monitor-command",
    "stop",
    "x-query-virtio",
    "x-query-virtio-queue-status",
]
Job = Literal["snapshot-save", "snapshot-load", "snapshot-delete"]
Event = Literal["JOB_STATUS_CHANGE", "BALLOON_CHANGE"]
Command = tuple[Query, Mapping[str, object]]
# The guest stands still or goes on; a device was given back, which takes a guest that runs.
UNASKED: Final = ("STOP", "RESUME", "DEVICE_DELETED")
COMMANDS: Final = frozenset(get_args(Query) + get_args(Job))
JOB_ID: Final = "hvctl-job"

# The one question that only the monitor for people answers.
_FOR_PEOPLE: Final = re.compile(r"gpa2hva 0x[0-9a-f]{1,16}")
_DISMISS: Final[Command] = ("job-dismiss", {"id": JOB_ID})
_CLOSE_SECONDS = 1.0
_T = TypeVar("_T")

# qemu.qmp logs what it also raises; without a handler of its own, logging would print that to stderr.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class _Beginning(Message):
    """A command of which all but the end is sent."""


class _Client(QMPClient):
    """Without its log of every message: that is formatted whether or not anybody reads it, and takes most of the time
    of an exchange. And with shorter names of commands: QEMU reads byte by byte, at some microseconds each."""

    _begun = b""

    async def begin(self, command: str, arguments: Mapping[str, object]) -> None:
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
        return msg


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
        self._client: _Client
        self._unasked = EventListener(UNASKED)
        self._concluded = False
        self._ahead: list[asyncio.Future[object]] | None = None  # of a job that is begun

    def __enter__(self) -> Qmp:
        self._socket = _connected(self._path, self._deadline, self._pid)
        self._loop = asyncio.new_event_loop()
        self._client = _Client()
        self._client.register_listener(self._unasked)
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

    def execute_all(self, commands: Sequence[Command]) -> list[Any]:
        """Several commands in one go, in order: the answers. GuestError: QEMU says no to one of them; it has done the
        others."""
        return self._exchange(commands, self._deadline)

    def begin(self, command: Job, arguments: Mapping[str, object], before: Sequence[Command] = ()) -> None:
        """Have QEMU do what comes before a job, and read all of the command but its end, while the caller does
        something else; `job` with these arguments must be what is called next, and gives the end. Until then the
        command is none: if nobody gives it, nothing happens. UnreachableError: the session is over."""

        async def send() -> None:
            commands = [*self._dismissal(), *map(_checked, before)]
            self._ahead = [asyncio.ensure_future(self._client.execute(c, a)) for c, a in commands]
            await asyncio.sleep(0)  # one turn, in which each of them takes its place in the queue
            await self._client.begin(*_checked(_start(command, arguments)))

        self._run(send, command, self._deadline)

    def job(
        self,
        command: Job,
        arguments: Mapping[str, object],
        seconds: float,
        before: Sequence[Command] = (),
        after: Sequence[Command] = (),
    ) -> list[Any]:
        """Run a job to its end. GuestError: it failed, in QEMU's words. DeadlineError: not over after `seconds`, the
        result is unknown.

        Commands for right before, unless the job was begun with them, and for right after may be given, the answers to
        the latter are returned: all of it is one exchange with QEMU. Each command waits for a turn of QEMU's main loop,
        in which such a job runs and is queued first; so what comes second after its start comes after its end."""
        first = [*self._dismissal(), *before] if self._ahead is None else []
        answers = self._exchange([*first, _start(command, arguments), ("query-jobs", {}), *after], seconds)
        answers = answers[-len(after) - 1 :]
        job = _own(answers[0])
        if job["status"] != "concluded":
            if not self.until("JOB_STATUS_CHANGE", lambda: self._own_job(seconds)["status"] == "concluded", seconds):
                raise DeadlineError(
                    f"QEMU's {command} is not over after {seconds:g} s.", "virsh qemu-monitor-event shows it"
                )
            job = self._own_job(seconds)
        self._concluded = True
        if "error" in job:
            raise GuestError(f"QEMU's {command} failed: {job['error']}.")
        return answers[1:]

    def dismiss(self) -> None:
        """Have QEMU forget the job that was run last; when nothing waits for it."""
        if self._concluded:
            self._concluded = False
            self.execute(*_DISMISS)

    def dismiss_jobs(self) -> None:
        """Clear what a killed hvctl left: a concluded job keeps its id until it is dismissed."""
        self._concluded = False
        for job in self.execute("query-jobs"):
            if job["id"] == JOB_ID and job["status"] == "concluded":
                self.execute(*_DISMISS)

    def heard(self) -> frozenset[str]:
        """Which of UNASKED happened, by whomever, since this was asked last, as of QEMU's latest answer: QEMU tells of
        what happened before it answers what it is asked later."""
        return frozenset(str(event["event"]) for event in self._unasked.clear())

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

    def _dismissal(self) -> Sequence[Command]:
        concluded, self._concluded = self._concluded, False
        return [_DISMISS] if concluded else []

    def _own_job(self, seconds: float) -> Mapping[str, Any]:
        return _own(self._execute("query-jobs", None, seconds))

    def _exchange(self, commands: Sequence[tuple[str, Mapping[str, object]]], seconds: float) -> list[Any]:
        checked = [*map(_checked, commands)]

        async def ask() -> list[Any]:
            # Empty arguments are more to read, and say nothing.
            sent = (self._client.execute(c, a or None) for c, a in checked)
            ahead, self._ahead = self._ahead or [], None
            answers = await asyncio.gather(*ahead, *sent, return_exceptions=True)
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
            return answers[len(ahead) :]

        return self._run(ask, commands[0][0], seconds)

    def _execute(self, command: Query | Job, arguments: Mapping[str, object] | None, seconds: float) -> Any:
        _checked((command, arguments or {}))
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


def _start(command: Job, arguments: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
    return command, {"job-id": JOB_ID, **arguments}


def _checked(command: tuple[str, Mapping[str, object]]) -> tuple[str, Mapping[str, object]]:
    name, arguments = command
    line = str(arguments.get("command-line", ""))
    if name not in COMMANDS or (name == "human-monitor-command" and not _FOR_PEOPLE.fullmatch(line)):
        raise RefusedError(f"{name!r} is not a monitor command that hvctl uses.")
    return command


def _own(jobs: list[dict[str, Any]]) -> Mapping[str, Any]:
    for job in jobs:
        if job["id"] == JOB_ID:
            return job
    raise GuestError("QEMU's job vanished: somebody else dismissed it, its result is unknown.")


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
