"""One conversation with a QEMU process over its second QMP monitor, as plain blocking calls.

With qmpclient the door to qemu.qmp, and the one asyncio loop of hvctl: the loop lives as long as the session and runs
only inside a call. Events that arrive between two calls wait in the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, TypeVar, get_args

from qemu.qmp import EventListener, ExecuteError, QMPError

from hvctl.adapters.qemu.qmpclient import Client, connected, unreachable
from hvctl.errors import DeadlineError, GuestError, RefusedError

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
_Named = tuple[str, Mapping[str, object]]
# The guest stands still or goes on; a device was given back, which takes a guest that runs.
UNASKED: Final = ("STOP", "RESUME", "DEVICE_DELETED")
COMMANDS: Final = frozenset(get_args(Query) + get_args(Job))
JOB_ID: Final = "hvctl-job"

# The two questions that only the monitor for people answers.
_FOR_PEOPLE: Final = re.compile(r"gpa2hva 0x[0-9a-f]{1,16}|i /w 0x(ae04|cc4)")
_DISMISS: Final[Command] = ("job-dismiss", {"id": JOB_ID})
_CLOSE_SECONDS = 1.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Ahead:
    """A job that will be run with these arguments: what goes before it, and what takes that back if it is not run."""

    job: Job
    arguments: Mapping[str, object]
    before: Sequence[Command]
    instead: Sequence[Command]


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
        self._client: Client
        self._unasked = EventListener(UNASKED)
        self._concluded = False
        self._ahead: Ahead | None = None
        self._before: list[asyncio.Future[object]] = []  # of that, without answer yet
        self._missed = False

    def __enter__(self) -> Qmp:
        self._socket = connected(self._path, self._deadline, self._pid)
        self._loop = asyncio.new_event_loop()
        self._client = Client()
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
        for answer in self._before:  # asyncio would print an error that nobody looked at
            if answer.done() and not answer.cancelled():
                answer.exception()
        self._loop.close()
        self._socket.close()

    def execute(self, command: Query, arguments: Mapping[str, object] | None = None) -> Any:
        """The command's return value. GuestError: QEMU says no, in its words."""
        self._give_up()
        return self._execute(command, arguments, self._deadline)

    def execute_all(self, commands: Sequence[Command], ahead: Ahead | None = None) -> list[Any]:
        """Several commands in one go, in order: the answers. GuestError: QEMU says no to one of them; it has done the
        others. ahead: after them QEMU does what comes before a job, and reads that but for its end, while the caller
        does something else. If not `job` with the same arguments is what is called next, it is not run."""
        self._give_up()
        if ahead is not None:
            _checked(_start(ahead.job, ahead.arguments))
        return self._exchange(commands, self._deadline, ahead)

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

        Commands for right before (unless it is ahead with them) and for right after may be given, the answers to the
        latter are returned: all of it is one exchange with QEMU. Each command waits for a turn of QEMU's main loop, in
        which such a job runs and is queued first; so what comes second after its start comes after its end."""
        if self._ahead is not None and (command, arguments) != (self._ahead.job, self._ahead.arguments):
            self._give_up()
        first = [*self._dismissal(), *before] if self._ahead is None else []
        self._ahead = None
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

    def go_on(self) -> float:
        """Let the guest go on; when QEMU said that it does, in seconds of the monotonic clock. Its answer comes later:
        for that it stands in line with the guest, which has begun already."""
        self._client.resumed = None
        self.execute("cont")
        return self._client.resumed or time.monotonic()

    def dismiss(self) -> None:
        """Have QEMU forget the job that was run last, or that was ahead; when nothing waits for it."""
        self._give_up()
        if self._concluded:
            self._concluded = False
            self.execute(*_DISMISS)

    def dismiss_jobs(self) -> None:
        """Clear what a killed hvctl left: a concluded job keeps its id until it is dismissed."""
        self._concluded = False
        job = own_job(self.execute("query-jobs"))
        if job is not None and job["status"] == "concluded":
            self.execute(*_DISMISS)

    def heard(self) -> frozenset[str]:
        """Which of UNASKED happened, by whomever, since this was asked last, as of QEMU's latest answer: QEMU tells of
        what happened before it answers what it is asked later. After a session that had to be opened anew, as if a
        device had been given back: that has to be asked."""
        missed = {"DEVICE_DELETED"} if self._missed else set()
        self._missed = False
        return frozenset(str(event["event"]) for event in self._unasked.clear()) | missed

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

    def _give_up(self) -> None:
        """What is ahead is not given after all: in another session, since the one has its beginning."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self.close()
            self.__enter__()
            self._before, self._missed = [], True
            self._exchange(ahead.instead, self._deadline)

    def _dismissal(self) -> Sequence[Command]:
        concluded, self._concluded = self._concluded, False
        return [_DISMISS] if concluded else []

    def _own_job(self, seconds: float) -> Mapping[str, Any]:
        return _own(self._execute("query-jobs", None, seconds))

    def _exchange(self, commands: Sequence[_Named], seconds: float, ahead: Ahead | None = None) -> list[Any]:
        def sent(commands: Sequence[_Named]) -> list[asyncio.Future[object]]:
            # Empty arguments are more to read, and say nothing.
            return [asyncio.ensure_future(self._client.execute(c, a or None)) for c, a in commands]

        checked = [*map(_checked, commands)]
        first = [*self._dismissal(), *map(_checked, ahead.before)] if ahead is not None else []

        async def ask() -> list[Any]:
            before, self._before = self._before, []
            pending = [*before, *sent(checked)]
            heard = asyncio.gather(*pending, return_exceptions=True)  # of each, also if what comes now fails
            if ahead is not None:
                # Not before the first is done: QEMU would read all of it before it does that.
                await asyncio.wait([first_done := pending[len(before)]])
                if first_done.exception() is None:
                    self._before = sent(first)
                    await asyncio.sleep(0)  # one turn, in which each of them takes its place in the queue
                    self._ahead = ahead
                    await self._client.begin(*_start(ahead.job, ahead.arguments))
            answers = await heard
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
            return answers[len(before) :]

        return self._run(ask, commands[0][0], seconds)

    def _execute(self, command: Query | Job, arguments: Mapping[str, object] | None, seconds: float) -> Any:
        _checked((command, arguments or {}))
        return self._run(lambda: self._client.execute(command, arguments), command, seconds)

    def _run(self, call: Callable[[], Awaitable[_T]], what: str, seconds: float) -> _T:
        if self._loop.is_closed():
            raise unreachable(self._path, "the session is over")
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
            raise unreachable(self._path, str(e) or type(e).__name__) from e


def _start(command: Job, arguments: Mapping[str, object]) -> _Named:
    return command, {"job-id": JOB_ID, **arguments}


def _checked(command: _Named) -> _Named:
    name, arguments = command
    line = str(arguments.get("command-line", ""))
    if name not in COMMANDS or (name == "human-monitor-command" and not _FOR_PEOPLE.fullmatch(line)):
        raise RefusedError(f"{name!r} is not a monitor command that hvctl uses.")
    return command


def own_job(jobs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The job of hvctl in an answer to query-jobs."""
    return next((job for job in jobs if job["id"] == JOB_ID), None)


def _own(jobs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    job = own_job(jobs)
    if job is not None:
        return job
    raise GuestError("QEMU's job vanished: somebody else dismissed it, its result is unknown.")
