"""Calls into libvirt that end: a deadline for each, one connection that is opened again when it died, one event loop.

libvirt may block for ever on a daemon that is stopped, so every call runs in a daemon thread which is abandoned when it
overruns; what such a call did is unknown, and says so. libvirt's errors leave here as errors of hvctl.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import libvirt

from hvctl.errors import BusyError, DeadlineError, HvctlError, NotFoundError, RefusedError, UnreachableError
from hvctl.model.vm import State

T = TypeVar("T")

_KEEPALIVE_INTERVAL = 5
_KEEPALIVE_COUNT = 3

_DENIED = {
    libvirt.VIR_ERR_ACCESS_DENIED,
    libvirt.VIR_ERR_AUTH_CANCELLED,
    libvirt.VIR_ERR_AUTH_FAILED,
    libvirt.VIR_ERR_AUTH_UNAVAILABLE,
}
# Where access is decided: a host without polkit's bus denies everybody but root there.
_DENIERS = {libvirt.VIR_FROM_ACCESS, libvirt.VIR_FROM_AUTH, libvirt.VIR_FROM_DBUS, libvirt.VIR_FROM_POLKIT}
_NO_CONNECTION = {
    libvirt.VIR_ERR_INVALID_CONN,
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_RPC,
    libvirt.VIR_ERR_UNKNOWN_HOST,
}
# The second one is newer than libvirt 9.0.
_AGENT_SILENT = {libvirt.VIR_ERR_AGENT_UNRESPONSIVE, getattr(libvirt, "VIR_ERR_AGENT_COMMAND_TIMEOUT", 112)}
_REFUSED = {
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
    libvirt.VIR_ERR_DOM_EXIST,
    libvirt.VIR_ERR_INVALID_ARG,
    libvirt.VIR_ERR_NO_SUPPORT,
    libvirt.VIR_ERR_OPERATION_DENIED,
    libvirt.VIR_ERR_OPERATION_INVALID,
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
    libvirt.VIR_ERR_XML_DETAIL,
    libvirt.VIR_ERR_XML_ERROR,
    libvirt.VIR_ERR_XML_INVALID_SCHEMA,
}

_loop_lock = threading.Lock()
_loop_started = False


# libvirt's virDomainState, and its reasons for each state, by number.
STATES: dict[int, tuple[State, tuple[str, ...]]] = {
    libvirt.VIR_DOMAIN_NOSTATE: (State.OFF, ("unknown",)),
    libvirt.VIR_DOMAIN_RUNNING: (
        State.RUNNING,
        ("unknown", "booted", "migrated", "restored", "from-snapshot", "unpaused", "migration-canceled",
         "save-canceled", "wakeup", "crashed", "postcopy", "postcopy-failed"),
    ),
    libvirt.VIR_DOMAIN_BLOCKED: (State.RUNNING, ("unknown",)),
    libvirt.VIR_DOMAIN_PAUSED: (
        State.PAUSED,
        ("unknown", "user", "migration", "save", "dump", "io-error", "watchdog", "from-snapshot", "shutting-down",
         "snapshot", "crashed", "starting-up", "postcopy", "postcopy-failed", "api-error"),
    ),
    libvirt.VIR_DOMAIN_SHUTDOWN: (State.STOPPING, ("unknown", "user")),
    libvirt.VIR_DOMAIN_SHUTOFF: (
        State.OFF,
        ("unknown", "shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from-snapshot", "daemon"),
    ),
    libvirt.VIR_DOMAIN_CRASHED: (State.CRASHED, ("unknown", "panicked")),
    libvirt.VIR_DOMAIN_PMSUSPENDED: (State.SUSPENDED, ("unknown",)),
}  # fmt: skip


def _start_event_loop() -> None:
    """Once per process and before any connection, as libvirt asks; the thread ends with the process."""
    global _loop_started
    with _loop_lock:
        if _loop_started:
            return
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()

        def run() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        threading.Thread(target=run, name="libvirt-events", daemon=True).start()
        _loop_started = True


def clean(text: object, limit: int = 300) -> str:
    """Text of others, fit for one line of a terminal: no control characters, bounded, no full stop at the end."""
    line = "".join(c if c.isprintable() else " " for c in str(text)[: 4 * limit])
    return " ".join(line.split())[:limit].rstrip(". ")


def with_deadline(what: str, seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises, or DeadlineError after `seconds`; its thread is then left to itself."""
    done = threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as e:  # whatever it was, it belongs to the caller's thread
            errors.append(e)
        finally:
            done.set()

    threading.Thread(target=run, name=f"libvirt: {what}", daemon=True).start()
    if not done.wait(seconds):
        raise DeadlineError(
            f"libvirt did not {what} within {seconds:g} s; the result is unknown.",
            "hvctl doctor tells whether libvirt answers",
        )
    if errors:
        raise errors[0]
    return results[0]


def code_of(error: libvirt.libvirtError) -> int:
    return int(error.get_error_code() or 0)


def state_of(domain: Any) -> State:
    return STATES.get(domain.state()[0], (State.OFF, ()))[0]


def text_of(error: libvirt.libvirtError) -> str:
    return clean(error.get_error_message() or error)


def went_away(error: libvirt.libvirtError) -> bool:
    """Whether it was libvirt itself that could not be reached any more: what it was asked for may have been done."""
    code = code_of(error)
    transport = error.get_error_domain() in (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE)
    return code in _NO_CONNECTION or (
        transport and code in (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_INTERNAL_ERROR)
    )


def translate(error: libvirt.libvirtError, uri: str, what: str) -> HvctlError:
    """The error of hvctl's tree for one of libvirt's; `what` is what was tried, as in "start web"."""
    code, text = code_of(error), text_of(error)
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return NotFoundError(f"libvirt could not {what}: there is no such VM.", "hvctl vm list shows the VMs there are")
    local = urlsplit(uri).hostname is None
    if code in _DENIED or error.get_error_domain() in _DENIERS:
        hint = "run as root or as a member of the group libvirt" if local else f"check your access to {uri}"
        return UnreachableError(f"libvirt at {uri} denies access: {text}.", hint)
    if went_away(error):
        hint = "hvctl host prepare --yes starts libvirt" if local else f"check the URI {uri} and that its host is up"
        return UnreachableError(f"libvirt at {uri} cannot be reached: {text}.", hint)
    if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        return BusyError(
            f"libvirt could not {what}: another job holds the VM ({text}).", "try again; virsh domjobinfo shows the job"
        )
    if code in _AGENT_SILENT:
        if "not connected" in text or "not available" in text:
            hint = "wait until the guest has booted: hvctl vm show VM tells whether its agent is connected"
            return UnreachableError("the guest agent is not connected.", hint)
        return DeadlineError(f"the guest agent did not answer: {text}; the result is unknown.")
    if code in _REFUSED:
        return RefusedError(f"libvirt refuses to {what}: {text}.")
    return HvctlError(f"libvirt could not {what}: {text}.")


class Connection:
    """One connection to libvirt, shared by all threads, opened at the first call."""

    def __init__(self, uri: str, deadline: float) -> None:
        self.uri = uri
        self._deadline = deadline
        self._lock = threading.Lock()
        self._connection: Any = None

    @property
    def local(self) -> bool:
        """Whether /proc here is that of the hypervisor."""
        return urlsplit(self.uri).hostname is None

    def call(self, what: str, work: Callable[[Any], T], seconds: float | None = None) -> T:
        """`work` with the connection, within the deadline. It runs a second time if the connection died under it, so it
        looks its domains up itself and is idempotent. libvirtError leaves as an error of hvctl."""

        def attempt() -> T:
            connection = self._alive()
            try:
                return work(connection)
            except libvirt.libvirtError:
                if self._is_alive(connection):
                    raise
            return work(self._alive())

        try:
            return with_deadline(what, self._deadline if seconds is None else seconds, attempt)
        except libvirt.libvirtError as e:
            raise translate(e, self.uri, what) from e
        except DeadlineError:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """A call that hangs, for its QEMU does, makes later ones on its connection hang (seen with libvirt 9.0): the
        next call opens another. The one that hangs has the old one as long as it takes."""
        if self._lock.acquire(blocking=False):  # held, the connection is not there yet
            self._connection = None
            self._lock.release()

    @contextlib.contextmanager
    def events(self, uuid: str, kind: int) -> Iterator[threading.Event]:
        """A flag that is set at every event of a domain. Register first, then look: an event is only a hint, and after
        a reconnection none comes."""
        flag = threading.Event()
        registered: list[tuple[Any, int]] = []

        def register(connection: Any) -> None:
            domain = connection.lookupByUUIDString(uuid)
            number = connection.domainEventRegisterAny(domain, kind, lambda *_: flag.set(), None)
            registered.append((connection, number))

        self.call("watch a VM", register)
        try:
            yield flag
        finally:
            connection, number = registered[-1]
            with contextlib.suppress(libvirt.libvirtError, DeadlineError):
                with_deadline("stop watching a VM", self._deadline, lambda: connection.domainEventDeregisterAny(number))

    def close(self) -> None:
        """Idempotent; a later call opens it again."""
        with contextlib.suppress(libvirt.libvirtError, DeadlineError):
            with_deadline("close the connection", self._deadline, self._close)

    def _close(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def _alive(self) -> Any:
        with self._lock:
            if self._connection is None or not self._is_alive(self._connection):
                _start_event_loop()
                self._connection = libvirt.open(self.uri)
                # Without keepalive a peer that went silent is found only by the deadline, never by isAlive.
                with contextlib.suppress(libvirt.libvirtError):
                    self._connection.setKeepAlive(_KEEPALIVE_INTERVAL, _KEEPALIVE_COUNT)
            return self._connection

    @staticmethod
    def _is_alive(connection: Any) -> bool:
        try:
            return bool(connection.isAlive())
        except libvirt.libvirtError:
            return False


def named(connection: Any, ref: str) -> Any:
    """A UUID first: a foreign domain may bear another's UUID as its name."""
    for lookup in (connection.lookupByUUIDString, connection.lookupByName):
        try:
            return lookup(ref)
        except libvirt.libvirtError as e:
            # A text that is no UUID at all is an invalid argument, which says no more than "not found".
            if code_of(e) not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_INVALID_ARG):
                raise
    raise NotFoundError(f"there is no VM {clean(ref, 80)!r}.", "hvctl vm list shows the VMs there are")


def tolerant(act: Callable[[], Any], done: Callable[[], bool]) -> None:
    """Do it, and take an error for success if what was wanted holds: somebody else was quicker."""
    try:
        act()
    except libvirt.libvirtError as e:
        if code_of(e) == libvirt.VIR_ERR_NO_DOMAIN or not done():
            raise
