"""The agent's protocol against an honest guest that keeps state, and against guests that lie."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvctl.adapters.guest import agent
from hvctl.errors import DeadlineError, GuestError, HvctlError, UnreachableError


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Guest:
    """An agent as qemu-ga behaves: vCPUs are switched in order, up to the first that cannot be."""

    def __init__(self, online: list[bool], stuck: frozenset[int] = frozenset(), batch: int = 99) -> None:
        self.online = online
        self.stuck = stuck
        self.batch = batch
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.program: Callable[[list[str], bytes], dict[str, Any]] = lambda argv, stdin: {"exited": True, "exitcode": 0}
        self.polls = 0
        self.clock_offset = 0
        self.rtc = True

    def __call__(self, command: str, arguments: dict[str, Any], seconds: float) -> Any:
        self.requests.append((command, arguments))
        method: Callable[..., Any] = getattr(self, command.replace("-", "_"))
        return method(**{k.replace("-", "_"): v for k, v in arguments.items()})

    def guest_ping(self) -> Any:
        return {}

    def guest_get_vcpus(self) -> Any:
        return [{"logical-id": i, "online": on, "can-offline": i != 0} for i, on in enumerate(self.online)]

    def guest_set_vcpus(self, vcpus: list[dict[str, Any]]) -> Any:
        for done, vcpu in enumerate(vcpus[: self.batch]):
            if vcpu["logical-id"] in self.stuck:
                if not done:
                    raise GuestError("the guest agent refuses guest-set-vcpus: Device or resource busy.")
                return done
            self.online[vcpu["logical-id"]] = vcpu["online"]
        return min(len(vcpus), self.batch)

    def guest_exec(self, path: str, arg: list[str], capture_output: bool, input_data: str = "") -> Any:
        self.status = self.program([path, *arg], base64.b64decode(input_data))
        return {"pid": 7}

    def guest_exec_status(self, pid: int) -> Any:
        assert pid == 7
        self.polls -= 1
        return {"exited": False} if self.polls >= 0 else self.status

    def guest_set_time(self, time: int) -> Any:
        self.clock_offset = 0
        if not self.rtc:
            raise GuestError("the guest agent refuses guest-set-time: hwclock failed.")
        return {}

    def guest_get_time(self) -> Any:
        return time.time_ns() + self.clock_offset


# --- vCPUs


def test_the_highest_go_offline_first_and_the_lowest_come_back_first() -> None:
    guest = Guest([True] * 4)
    assert agent.set_online(guest, 2) == 2
    assert guest.online == [True, True, False, False]
    assert agent.set_online(guest, 3) == 3
    assert agent.online_vcpus(guest) == [0, 1, 2]


def test_cpu0_is_never_asked_even_if_the_guest_offers_it() -> None:
    def offers_cpu0(command: str, arguments: dict[str, Any], seconds: float) -> Any:
        assert command == "guest-get-vcpus"
        return [
            {"logical-id": 0, "online": True, "can-offline": True},
            {"logical-id": 1, "online": True, "can-offline": False},
        ]

    with pytest.raises(GuestError, match="2 vCPUs online and none more"):
        agent.set_online(offers_cpu0, 1)


def test_a_guest_that_switches_one_vcpu_at_a_time_is_asked_again() -> None:
    guest = Guest([True] * 5, batch=1)
    assert agent.set_online(guest, 2) == 2
    assert guest.online == [True, True, False, False, False]


def test_partial_success_ends_as_the_guests_refusal() -> None:
    guest = Guest([True] * 4, stuck=frozenset({2}))
    with pytest.raises(GuestError, match="busy"):
        agent.set_online(guest, 1)
    assert guest.online == [True, True, True, False]


def test_a_guest_that_claims_success_and_does_nothing_is_found_out() -> None:
    guest = Guest([True] * 4)
    guest.guest_set_vcpus = lambda vcpus: len(vcpus)  # type: ignore[method-assign]
    with pytest.raises(GuestError, match="does not switch the rest"):
        agent.set_online(guest, 1)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {},
        ["0"],
        [{"logical-id": True, "online": True}],
        [{"logical-id": -1, "online": True}],
        [{"logical-id": 0, "online": "yes"}],
        [{"logical-id": 0, "online": True}] * 2,
        [{"logical-id": i, "online": True} for i in range(5000)],
    ],
)
def test_a_list_of_vcpus_of_another_shape_is_refused(answer: Any) -> None:
    with pytest.raises(GuestError):
        agent.online_vcpus(lambda command, arguments, seconds: answer)


# --- programs


def test_a_program_gets_its_arguments_and_bytes_and_returns_streams_and_status() -> None:
    guest = Guest([True])
    guest.polls = 3

    def program(argv: list[str], stdin: bytes) -> dict[str, Any]:
        return {"exited": True, "exitcode": 3, "out-data": text(stdin[::-1]), "err-data": text(" ".join(argv).encode())}

    guest.program = program
    result = agent.run(guest, ["/bin/x", "a b", "c"], b"\x00\xff1", seconds=5)
    assert result == agent.ExecResult(3, b"1\xff\x00", b"/bin/x a b c", False, None)


def test_a_signal_is_told_apart_from_a_status() -> None:
    guest = Guest([True])
    guest.program = lambda argv, stdin: {"exited": True, "signal": 9}
    result = agent.run(guest, ["x"])
    assert (result.status, result.signal) == (None, 9)


@given(size=st.integers(0, 200), limit=st.integers(0, 100))
def test_output_is_bounded_to_the_byte(size: int, limit: int) -> None:
    data = bytes(range(size))
    guest = Guest([True])
    guest.program = lambda argv, stdin: {"exited": True, "exitcode": 0, "out-data": text(data)}
    result = agent.run(guest, ["x"], max_bytes=limit)
    assert result.stdout == data[:limit]
    assert result.truncated is (size > limit)


def test_what_the_guest_cut_off_is_told() -> None:
    guest = Guest([True])
    guest.program = lambda argv, stdin: {"exited": True, "exitcode": 0, "err-data": "", "err-truncated": True}
    assert agent.run(guest, ["x"]).truncated


def test_a_channel_that_closes_while_a_program_runs_is_waited_for() -> None:
    guest, gone = Guest([True]), iter([True, True])

    def call(command: str, arguments: dict[str, Any], seconds: float) -> Any:
        if command != "guest-exec" and next(gone, False):
            raise UnreachableError("the guest agent is not connected.")
        return guest(command, arguments, seconds)

    assert agent.run(call, ["x"]).status == 0
    assert [command for command, _ in guest.requests].count("guest-exec") == 1


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("guest-exec", DeadlineError("the guest agent did not answer.")),
        ("guest-exec-status", DeadlineError("the guest agent did not answer.")),
        ("guest-exec-status", UnreachableError("the guest agent is not connected.")),
    ],
)
def test_a_program_that_may_have_begun_is_not_begun_again(
    monkeypatch: pytest.MonkeyPatch, command: str, error: HvctlError
) -> None:
    """How it ended is unknown, and says so: what was not reached, its caller would ask for a second time."""
    guest, begun = Guest([True]), []
    monkeypatch.setattr(agent, "GAP", 0.0)

    def call(asked: str, arguments: dict[str, Any], seconds: float) -> Any:
        begun.extend([asked] if asked == "guest-exec" else [])
        if asked in (command, "guest-ping"):
            raise error
        return guest(asked, arguments, seconds)

    with pytest.raises(DeadlineError):
        agent.run(call, ["x"])
    assert begun == ["guest-exec"]


def test_a_program_that_runs_on_meets_the_deadline() -> None:
    guest = Guest([True])
    guest.polls = 10**9
    with pytest.raises(DeadlineError, match="still runs"):
        agent.run(guest, ["x"], seconds=0.05)


@pytest.mark.parametrize(
    "status",
    [
        [],
        None,
        {},
        {"exited": 1, "exitcode": 0},
        {"exited": True},
        {"exited": True, "exitcode": "0"},
        {"exited": True, "exitcode": 2**70},
        {"exited": True, "exitcode": True},
        {"exited": True, "exitcode": 0, "signal": "KILL"},
        {"exited": True, "exitcode": 0, "out-data": 5},
        {"exited": True, "exitcode": 0, "out-data": "no base64!"},
        {"exited": True, "exitcode": 0, "err-data": "ünicode="},
    ],
)
def test_a_status_of_another_shape_is_refused(status: Any) -> None:
    guest = Guest([True])
    guest.program = lambda argv, stdin: status
    with pytest.raises(GuestError):
        agent.run(guest, ["x"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["pid", "exited", "exitcode", "signal", "out-data", "err-data", "logical-id", "online", "can-offline"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@given(answers=st.lists(JSON, min_size=1, max_size=4))
def test_whatever_a_guest_answers_only_errors_of_hvctl_come_out(answers: list[Any]) -> None:
    def hostile(command: str, arguments: dict[str, Any], seconds: float) -> Any:
        return answers[len(command) % len(answers)]

    what: list[Callable[[], object]] = [
        lambda: agent.run(hostile, ["x"], seconds=0),
        lambda: agent.online_vcpus(hostile),
        lambda: agent.set_online(hostile, 2),
        lambda: agent.set_time(hostile),
    ]
    refusals = []
    for act in what:
        try:
            act()
        except HvctlError as e:
            refusals.append(e.message)
    assert all(len(message) < 400 and message.isprintable() for message in refusals)


# --- clock, entropy, sync


def test_the_clock_counts_as_set_only_if_the_guest_shows_it() -> None:
    guest = Guest([True])
    guest.clock_offset = -3600 * 10**9
    agent.set_time(guest)
    guest.guest_set_time = lambda time: {}  # type: ignore[method-assign]
    guest.clock_offset = -3600 * 10**9
    with pytest.raises(GuestError, match="not the host's"):
        agent.set_time(guest)


def test_a_guest_without_a_hardware_clock_still_has_its_time_set() -> None:
    guest = Guest([True])
    guest.clock_offset, guest.rtc = -3600 * 10**9, False
    agent.set_time(guest)


def test_reseed_hands_over_64_new_bytes_each_time() -> None:
    guest = Guest([True])
    seen: list[bytes] = []

    def program(argv: list[str], stdin: bytes) -> dict[str, Any]:
        assert argv == ["/usr/libexec/hvctl-reseed"]
        seen.append(stdin)
        return {"exited": True, "exitcode": 0}

    guest.program = program
    assert agent.reseed(guest)
    assert agent.reseed(guest)
    assert [len(s) for s in seen] == [64, 64]
    assert seen[0] != seen[1]


def test_reseed_is_false_where_the_program_fails_or_is_missing() -> None:
    guest = Guest([True])
    guest.program = lambda argv, stdin: {"exited": True, "exitcode": 1}
    assert not agent.reseed(guest)

    def missing(command: str, arguments: dict[str, Any], seconds: float) -> Any:
        raise GuestError("the guest agent refuses guest-exec: No such file or directory.")

    assert not agent.reseed(missing)
