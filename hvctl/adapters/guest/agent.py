"""The QEMU guest agent's protocol: run programs, bring vCPUs online, set the clock, reseed, over any call to an agent.

Whatever comes back was written by the guest, so each answer is checked by its shape and bounded before it is used; an
answer of another shape is a GuestError.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hvctl.errors import DeadlineError, GuestError, UnreachableError

RESEED = "/usr/libexec/hvctl-reseed"

_ANSWER_SECONDS = 5.0
_FIRST_POLL = 0.01
_LAST_POLL = 0.2
_CLOCK_TOLERANCE = 2.0
_MAX_VCPUS = 4096
_PING_SECONDS = 1.0
GAP = 3.0
"""Seconds for which libvirt may have the agent's channel for closed after a reset."""
_WAIT_POLL = 0.05


class Call(Protocol):
    """ports.Domains.agent with the VM bound: one command's return value, or an error of hvctl."""

    def __call__(self, command: str, arguments: dict[str, Any], seconds: float) -> Any: ...


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How a program in the guest ended: its exit status, or the number of the signal that killed it. The streams hold
    at most what was asked for; truncated tells that there was more of one of them."""

    status: int | None
    stdout: bytes
    stderr: bytes
    truncated: bool
    signal: int | None


@dataclass(frozen=True, slots=True)
class _Vcpu:
    number: int
    online: bool
    can_offline: bool


def ping(call: Call, seconds: float = _ANSWER_SECONDS) -> None:
    call("guest-ping", {}, seconds)


def wait(call: Call, seconds: float) -> None:
    """Return when the agent answers; DeadlineError after `seconds`. libvirt refuses the agent's channel for a moment
    after a reset and does not tell when it stops to, so this asks again and again."""
    until = time.monotonic() + seconds
    while True:
        try:
            ping(call, _PING_SECONDS)
            return
        except (UnreachableError, DeadlineError) as e:
            if time.monotonic() >= until:
                raise DeadlineError(f"the guest agent did not answer within {seconds:g} s.") from e
            time.sleep(_WAIT_POLL)


def run(
    call: Call, argv: Sequence[str], stdin: bytes = b"", seconds: float = 30.0, max_bytes: int = 1 << 20
) -> ExecResult:
    """Run a program in the guest and wait for its end; DeadlineError if it runs on (it is not killed).

    The agent has no event for the end of a program, so it is asked, at first often and then 5 times a second.
    """
    until = time.monotonic() + seconds
    arguments: dict[str, Any] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
    if stdin:
        arguments["input-data"] = base64.b64encode(stdin).decode()
    pid = _integer(_object(call("guest-exec", arguments, min(seconds, _ANSWER_SECONDS)), "guest-exec"), "pid")
    pause = _FIRST_POLL
    while True:
        left = until - time.monotonic()
        status = _status(call, pid, max(0.1, min(left, _ANSWER_SECONDS)))
        if _boolean(status, "exited"):
            return _result(status, max_bytes)
        left = until - time.monotonic()
        if left <= 0:
            raise DeadlineError(
                f"the program still runs in the guest after {seconds:g} s; it was left running.",
                "give it more time with --timeout",
            )
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LAST_POLL)


def _status(call: Call, pid: int, seconds: float) -> dict[str, Any]:
    """How a program does. libvirt may close the agent's channel once more after a reset, while the program goes on:
    asked again when it is back. DeadlineError if it stays away: what was begun must not look as if it could be begun
    again."""
    try:
        return _object(call("guest-exec-status", {"pid": pid}, seconds), "guest-exec-status")
    except UnreachableError:
        with contextlib.suppress(DeadlineError):
            wait(call, GAP)
    try:
        return _object(call("guest-exec-status", {"pid": pid}, seconds), "guest-exec-status")
    except UnreachableError as e:
        raise DeadlineError(
            f"a program was begun in the guest, and how it ended is unknown: {e.message}", "hvctl vm exec VM -- ps"
        ) from e


def _result(status: dict[str, Any], max_bytes: int) -> ExecResult:
    stdout, more_out = _stream(status, "out", max_bytes)
    stderr, more_err = _stream(status, "err", max_bytes)
    signal = _integer(status, "signal") if "signal" in status else None
    code = _integer(status, "exitcode") if "exitcode" in status else None
    if signal is None and code is None:
        raise GuestError("the guest agent says that a program ended, but not how.")
    return ExecResult(code, stdout, stderr, more_out or more_err, signal)


def _stream(status: dict[str, Any], name: str, max_bytes: int) -> tuple[bytes, bool]:
    encoded = status.get(f"{name}-data", "")
    if not isinstance(encoded, str):
        raise GuestError(f"the guest agent's {name}-data is not text.")
    # Whole groups of four characters, and no more of them than are wanted: an answer is not decoded to be thrown away.
    wanted = (max_bytes // 3 + 1) * 4
    try:
        data = base64.b64decode(encoded[:wanted], validate=True)
    except (binascii.Error, ValueError) as e:
        raise GuestError(f"the guest agent's {name}-data is not base64.") from e
    more = len(data) > max_bytes or len(encoded) > wanted
    return data[:max_bytes], more or status.get(f"{name}-truncated") is True


def online_vcpus(call: Call, seconds: float = _ANSWER_SECONDS) -> list[int]:
    """The numbers of the vCPUs that the guest says are online, ascending."""
    return [v.number for v in _vcpus(call, seconds) if v.online]


def set_online(call: Call, count: int, seconds: float = _ANSWER_SECONDS) -> int:
    """Have `count` vCPUs online: the lowest come online first, the highest go offline first, cpu0 never goes.

    The number that is online after; GuestError if it is not `count`. The agent may do only the first few of what one
    command names, so the rest is asked for again as long as something moves. A guest shows vCPUs a while after they
    were plugged, and the agent tells of no event: they are waited for, `seconds` at most.
    """
    if count < 1:
        raise ValueError("a guest has at least one vCPU online")
    until = time.monotonic() + seconds
    while True:
        vcpus = _vcpus(call, seconds)
        online = [v for v in vcpus if v.online]
        if len(online) == count:
            return count
        if len(online) < count:
            chosen = [v for v in vcpus if not v.online][: count - len(online)]
        else:
            free = [v for v in reversed(online) if v.number != 0 and v.can_offline]
            chosen = free[: len(online) - count]
        if len(vcpus) < count and time.monotonic() < until:
            time.sleep(_LAST_POLL / 4)
            continue
        if not chosen:
            raise GuestError(
                f"the guest has {len(online)} vCPUs online and none more to switch, {count} were asked for."
            )
        bring = len(online) < count
        wanted = [{"logical-id": v.number, "online": bring} for v in chosen]
        done = call("guest-set-vcpus", {"vcpus": wanted}, seconds)
        if not isinstance(done, int) or isinstance(done, bool) or not 0 <= done <= len(wanted):
            raise GuestError("the guest agent's answer to guest-set-vcpus is not a count.")
        after = len([v for v in _vcpus(call, seconds) if v.online])
        # What counts is what it shows, not what it claims; and a guest that shows no progress must not keep us here.
        if abs(after - count) >= abs(len(online) - count):
            raise GuestError(
                f"the guest has {after} vCPUs online, {count} were asked for: it does not switch the rest.",
                "hvctl vm exec VM -- dmesg may tell why",
            )


def _vcpus(call: Call, seconds: float) -> list[_Vcpu]:
    answer = call("guest-get-vcpus", {}, seconds)
    if not isinstance(answer, list) or not 1 <= len(answer) <= _MAX_VCPUS:
        raise GuestError("the guest agent's answer to guest-get-vcpus is not a list of vCPUs.")
    found = []
    for item in answer:
        vcpu = _object(item, "guest-get-vcpus")
        # can-offline is left out where the guest does not know.
        can_offline = _boolean(vcpu, "can-offline") if "can-offline" in vcpu else True
        found.append(_Vcpu(_integer(vcpu, "logical-id"), _boolean(vcpu, "online"), can_offline))
    if len({v.number for v in found}) != len(found):
        raise GuestError("the guest agent names a vCPU twice.")
    return sorted(found, key=lambda v: v.number)


def set_time(call: Call, seconds: float = _ANSWER_SECONDS) -> None:
    """Set the guest's clock to the host's. GuestError if it is not there after."""
    refusal: GuestError | None = None
    try:
        call("guest-set-time", {"time": time.time_ns()}, seconds)
    except GuestError as e:
        # The agent sets the system's clock, then the RTC, and fails for the whole where a guest has no RTC to write.
        refusal = e
    asked = time.time_ns()
    now = call("guest-get-time", {}, seconds)
    if not isinstance(now, int) or isinstance(now, bool):
        raise GuestError("the guest agent's answer to guest-get-time is not a time.")
    if not asked - _CLOCK_TOLERANCE * 1e9 <= now <= time.time_ns() + _CLOCK_TOLERANCE * 1e9:
        raise refusal or GuestError("the guest's clock is not the host's after it was set.")


def reseed(call: Call, seconds: float = 10.0) -> bool:
    """Give the guest's random generator 64 bytes of the host's; whether the guest says it took them."""
    try:
        return run(call, [RESEED], os.urandom(64), seconds, max_bytes=4096).status == 0
    except GuestError:
        return False


def drop_caches(call: Call, seconds: float = 30.0) -> None:
    """Have the guest write back what is dirty, then forget the page cache, dentries and inodes: nothing is lost, and
    what it reads next it reads from its disks. GuestError if it says that it could not; DeadlineError after `seconds`,
    when it may still be writing back. That it did is its own word: count what comes back to the host."""
    done = run(call, ["/bin/sh", "-c", "sync && echo 3 > /proc/sys/vm/drop_caches"], seconds=seconds, max_bytes=4096)
    if done.status != 0:
        ended = f"signal {done.signal}" if done.status is None else f"status {done.status}"
        raise GuestError(f"the guest could not drop its page cache: its shell ended with {ended}.")


def _object(answer: Any, command: str) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise GuestError(f"the guest agent's answer to {command} is not an object.")
    return answer


def _integer(answer: dict[str, Any], key: str) -> int:
    value = answer.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise GuestError(f"the guest agent's {key} is not a whole number.")
    return value


def _boolean(answer: dict[str, Any], key: str) -> bool:
    value = answer.get(key)
    if not isinstance(value, bool):
        raise GuestError(f"the guest agent's {key} is not true or false.")
    return value
