"""What goes with a connection to libvirt, as when libvirtd is started anew: an event is a hint, and a program that may
have begun in a guest is not begun again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from hvctl.adapters.libvirt import agentcall as libvirt_agent
from hvctl.adapters.libvirt import host as adapter
from hvctl.adapters.libvirt import tuning
from hvctl.adapters.libvirt.host import LibvirtDomains
from hvctl.errors import DeadlineError, UnreachableError
from hvctl.model.vm import State
from hvctl.settings import Settings

HOUR = 3600.0


class Flag:
    """That is never set; waits are noted and over at once."""

    def __init__(self) -> None:
        self.waited: list[float] = []

    def clear(self) -> None: ...

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        return False


class Deaf:
    """A connection on which no event comes, to a VM that goes off after it was looked at three times."""

    def __init__(self) -> None:
        self.flag = Flag()
        self.looks = 0

    @contextlib.contextmanager
    def events(self, uuid: str, kind: int) -> Iterator[Flag]:
        yield self.flag

    def call(self, what: str, work: Callable[[Any], Any], seconds: float | None = None) -> State:
        self.looks += 1
        return State.OFF if self.looks > 3 else State.RUNNING


def test_a_wait_looks_again_by_itself() -> None:
    domains, deaf = LibvirtDomains(Settings()), Deaf()
    domains._connection = deaf  # type: ignore[assignment]
    assert domains.wait_state("u", frozenset({State.OFF}), HOUR) is State.OFF
    assert len(deaf.flag.waited) == 3
    assert max(deaf.flag.waited) <= adapter._REREAD < 5


class Opened:
    """A connection with one VM, which runs."""

    def call(self, what: str, work: Callable[[Any], Any], seconds: float | None = None) -> Any:
        return work(self)

    def lookupByUUIDString(self, uuid: str) -> Any:
        return self

    def state(self) -> tuple[int, int]:
        return libvirt.VIR_DOMAIN_RUNNING, 0


@pytest.mark.parametrize(
    ("code", "domain", "text", "command", "begun"),
    [
        (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC, "client socket is closed", "guest-exec", True),
        (libvirt.VIR_ERR_RPC, libvirt.VIR_FROM_RPC, "connection closed", "guest-exec", True),
        (libvirt.VIR_ERR_RPC, libvirt.VIR_FROM_RPC, "connection closed", "guest-exec-status", False),
        (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_FROM_QEMU, "QEMU guest agent is not connected", "guest-exec",
         False),
        (libvirt.VIR_ERR_ACCESS_DENIED, libvirt.VIR_FROM_ACCESS, "access denied", "guest-exec", False),
    ],
)  # fmt: skip
def test_a_program_that_may_have_begun_is_unknown_and_not_unreachable(
    monkeypatch: pytest.MonkeyPatch, code: int, domain: int, text: str, command: str, begun: bool
) -> None:
    """Unreachable is what its caller asks for a second time."""

    def lost(*_: object) -> None:
        error = libvirt.libvirtError("lost")
        error.err = (code, domain, text)
        raise error

    monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", lost)
    with pytest.raises(DeadlineError if begun else UnreachableError):
        libvirt_agent.ask(Opened(), "qemu:///system", "u", command, {}, 1.0)  # type: ignore[arg-type]


class GoingOff:
    """A domain that goes off between two questions."""

    def __init__(self) -> None:
        self.active = [True, False]

    def isActive(self) -> bool:
        return self.active.pop(0)

    def memoryStats(self) -> dict[str, int]:
        raise libvirt.libvirtError("domain is not running")

    def XMLDesc(self, _flags: int) -> str:
        return "<domain><name>a</name><uuid>11111111-2222-3333-4444-555555555555</uuid><memory>262144</memory></domain>"


def test_a_domain_that_goes_off_while_it_is_looked_at_has_no_balloon() -> None:
    domain = GoingOff()
    found = tuning.balloon(domain)
    assert (found.actual, found.reported) == (256 << 20, False)
    domain.active = [True, True]
    with pytest.raises(libvirt.libvirtError):
        tuning.balloon(domain)
