"""Traffic control on the real kernel, in network namespaces that the tests make."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host.namespaces import assert_exceeds, assert_settles_at, dump, namespace, qdiscs, run, stream
from hvctl.adapters.network import netlink
from hvctl.adapters.network.shaping import HANDLES, ifb_name
from hvctl.adapters.network.traffic import TrafficControl
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.allocation import NicLimit

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

MAC = "52:54:00:00:00:01"
VM = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
MBIT = 1_000_000


def limit(inbound: int | None = None, outbound: int | None = None) -> NicLimit:
    return NicLimit(MAC, inbound, outbound)


def add_tap(ns: str, tap: str, libvirt: bool = False) -> None:
    run("ip", "-n", ns, "tuntap", "add", tap, "mode", "tap")
    if libvirt:
        run("tc", "-n", ns, "qdisc", "add", "dev", tap, "root", "noqueue")


@contextmanager
def two_taps() -> Iterator[str]:
    with namespace() as ns:
        add_tap(ns, "tap0")
        add_tap(ns, "vnet1", libvirt=True)
        yield ns


@pytest.fixture
def ns() -> Iterator[str]:
    with two_taps() as name:
        yield name


@pytest.fixture(scope="module")
def shared() -> Iterator[str]:
    """One namespace for many examples."""
    with two_taps() as name:
        yield name


@pytest.fixture
def control(ns: str) -> TrafficControl:
    return TrafficControl(ns)


def without_numbers(text: str) -> str:
    """A dump without the numbers that the kernel gives to qdiscs and actions by itself, anew each time."""
    return re.sub(r"(?<=index )\d+|\b[89a-f][0-9a-f]{3}:", "…", text)


rates = st.none() | st.integers(1_000, 2**32 - 1).map(lambda n: n * 8)


@settings(max_examples=25, deadline=None)
@given(tap=st.sampled_from(["tap0", "vnet1"]), changes=st.lists(st.tuples(rates, rates), min_size=1, max_size=4))
def test_the_kernel_shows_exactly_what_was_set_and_nothing_after_it_was_taken_away(
    shared: str, tap: str, changes: list[tuple[int | None, int | None]]
) -> None:
    control = TrafficControl(shared)
    before = without_numbers(dump(shared))
    for inbound, outbound in changes:
        control.set_limit(tap, limit(inbound, outbound), VM)
        assert control.limit(tap, MAC) == limit(inbound, outbound)
        assert control.foreign(tap) is None
    control.set_limit(tap, limit(), VM)
    assert control.limit(tap, MAC) == limit()
    assert without_numbers(dump(shared)) == before


def test_the_root_qdisc_that_was_there_comes_back(ns: str, control: TrafficControl) -> None:
    for tap, kind in (("tap0", None), ("vnet1", "noqueue")):
        control.set_limit(tap, limit(8 * MBIT), VM)
        assert [q["kind"] for q in qdiscs(ns, tap)] == ["tbf"]
        control.set_limit(tap, limit(9 * MBIT), VM)
        control.clear(VM)
        # What the kernel itself puts on a tap that is down is not shown.
        assert [q["kind"] for q in qdiscs(ns, tap) if q["handle"] != "0:"] == ([kind] if kind else [])


def test_setting_twice_is_setting_once(ns: str, control: TrafficControl) -> None:
    control.set_limit("vnet1", limit(8 * MBIT, 16 * MBIT), VM)
    once = dump(ns)
    control.set_limit("vnet1", limit(8 * MBIT, 16 * MBIT), VM)
    assert dump(ns) == once


@pytest.mark.parametrize("rate", [8_000_001, 7_992, 2**32 * 8, 0])
def test_a_rate_that_the_kernel_cannot_keep_exactly_is_refused(ns: str, control: TrafficControl, rate: int) -> None:
    before = dump(ns)
    for wanted in (limit(rate), limit(None, rate), limit(8 * MBIT, rate)):
        with pytest.raises(RefusedError):
            control.set_limit("tap0", wanted, VM)
    assert dump(ns) == before


U32 = ("protocol", "all", "u32", "match", "u32", "0", "0")
FOREIGN = {
    "root": ([("qdisc", "add", "dev", "tap0", "root", "handle", "1:", "htb")], "htb 1: root"),
    "tbf": (
        [
            (
                "qdisc",
                "add",
                "dev",
                "tap0",
                "root",
                "handle",
                "5:",
                "tbf",
                "rate",
                "1mbit",
                "burst",
                "16kb",
                "limit",
                "64kb",
            )
        ],
        "tbf 5: root",
    ),
    "ingress": ([("qdisc", "add", "dev", "tap0", "ingress")], "ingress ffff:"),
    "filter": (
        [
            ("qdisc", "add", "dev", "tap0", "ingress"),
            ("filter", "add", "dev", "tap0", "ingress", "pref", "5", *U32, "flowid", "1:1"),
        ],
        "u32 filter pref 5",
    ),
    "filter with our preference": (
        [
            ("qdisc", "add", "dev", "tap0", "ingress"),
            (
                *("filter", "add", "dev", "tap0", "ingress", "pref", "26742", *U32),
                *("action", "mirred", "egress", "redirect", "dev", "vnet1"),
            ),
        ],
        "u32 filter pref 26742",
    ),
    "clsact": ([("qdisc", "add", "dev", "tap0", "clsact")], "clsact ffff:"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_somebody_else_put_there_is_named_and_left_alone(ns: str, control: TrafficControl, case: str) -> None:
    commands, name = FOREIGN[case]
    for command in commands:
        run("tc", "-n", ns, *command)
    before = dump(ns)
    assert name in (control.foreign("tap0") or "")
    for wanted in (limit(8 * MBIT), limit(None, 8 * MBIT), limit(8 * MBIT, 8 * MBIT)):
        with pytest.raises(RefusedError, match=name):
            control.set_limit("tap0", wanted, VM)
        assert dump(ns) == before
    control.set_limit("tap0", limit(), VM)
    control.clear(VM)
    assert dump(ns) == before


def test_a_device_that_only_has_our_ifbs_name_is_left_alone(ns: str, control: TrafficControl) -> None:
    name = ifb_name("tap0")
    run("ip", "-n", ns, "link", "add", name, "type", "ifb")
    run("ip", "-n", ns, "link", "set", name, "alias", "somebody's")
    before = dump(ns)
    with pytest.raises(RefusedError, match=name):
        control.set_limit("tap0", limit(8 * MBIT), VM)
    control.clear(VM)
    control.clear("")
    assert dump(ns) == before
    assert control.owners() == {}


@pytest.mark.parametrize("preference", ["5", "26743"])
def test_a_foreign_filter_beside_ours_outlives_ours(ns: str, control: TrafficControl, preference: str) -> None:
    def theirs() -> list[str]:
        shown = run("tc", "-n", ns, "filter", "show", "dev", "tap0", "ingress")
        return [line for line in shown.splitlines() if f"pref {preference} " in line]

    control.set_limit("tap0", limit(8 * MBIT, 8 * MBIT), VM)
    run("tc", "-n", ns, "filter", "add", "dev", "tap0", "ingress", "pref", preference, *U32, "flowid", "1:1")
    before = theirs()
    assert control.foreign("tap0") == f"u32 filter pref {preference} on ingress ffff:"
    assert control.limit("tap0", MAC) == limit(8 * MBIT, 8 * MBIT)
    with pytest.raises(RefusedError):
        control.set_limit("tap0", limit(8 * MBIT, 9 * MBIT), VM)
    control.clear(VM)
    assert control.limit("tap0", MAC) == limit()
    assert before
    assert theirs() == before
    assert "26742" not in run("tc", "-n", ns, "filter", "show", "dev", "tap0", "ingress")


def test_a_limit_to_the_guest_alone_leaves_no_ingress(ns: str, control: TrafficControl) -> None:
    control.set_limit("tap0", limit(8 * MBIT, 8 * MBIT), VM)
    control.set_limit("tap0", limit(8 * MBIT), VM)
    assert [q["kind"] for q in qdiscs(ns, "tap0")] == ["tbf"]
    assert control.owners() == {VM: (ifb_name("tap0"),)}


def test_clear_removes_every_device_of_one_vm_and_none_of_another(ns: str, control: TrafficControl) -> None:
    add_tap(ns, "tap2")
    control.set_limit("tap2", limit(8 * MBIT, 8 * MBIT), OTHER)
    before = without_numbers(dump(ns))
    control.set_limit("tap0", limit(8 * MBIT), VM)
    control.set_limit("vnet1", limit(None, 8 * MBIT), VM)
    assert control.owners() == {
        VM: tuple(sorted((ifb_name("tap0"), ifb_name("vnet1")))),
        OTHER: (ifb_name("tap2"),),
    }
    control.clear(VM)
    assert without_numbers(dump(ns)) == before
    assert control.limit("tap2", MAC) == limit(8 * MBIT, 8 * MBIT)


def test_a_tap_that_is_gone(ns: str, control: TrafficControl) -> None:
    run("ip", "-n", ns, "link", "del", "vnet1")
    without = dump(ns)
    add_tap(ns, "vnet1")
    control.set_limit("vnet1", limit(8 * MBIT, 8 * MBIT), VM)
    run("ip", "-n", ns, "link", "del", "vnet1")
    assert control.limit("vnet1", MAC) == limit()
    assert control.foreign("vnet1") is None
    with pytest.raises(NotFoundError):
        control.set_limit("vnet1", limit(8 * MBIT), VM)
    assert control.owners() == {VM: (ifb_name("vnet1"),)}
    control.clear(VM)
    control.clear(VM)
    assert dump(ns) == without


def test_a_taps_name_used_again_by_another_vm(ns: str, control: TrafficControl) -> None:
    control.set_limit("vnet1", limit(8 * MBIT, 8 * MBIT), VM)
    run("ip", "-n", ns, "link", "del", "vnet1")
    add_tap(ns, "vnet1", libvirt=True)
    assert control.limit("vnet1", MAC) == limit()
    assert control.foreign("vnet1") is None
    control.set_limit("vnet1", limit(None, 16 * MBIT), OTHER)
    control.clear(VM)
    assert control.limit("vnet1", MAC) == limit(None, 16 * MBIT)
    assert control.owners() == {OTHER: (ifb_name("vnet1"),)}


def test_what_somebody_removed_is_seen_and_mended(ns: str, control: TrafficControl) -> None:
    control.set_limit("tap0", limit(8 * MBIT, 8 * MBIT), VM)
    whole = without_numbers(dump(ns))
    for command, left in (
        (("tc", "-n", ns, "qdisc", "del", "dev", "tap0", "root"), limit(None, 8 * MBIT)),
        (("tc", "-n", ns, "qdisc", "del", "dev", "tap0", "ingress"), limit(8 * MBIT)),
        (("tc", "-n", ns, "filter", "del", "dev", "tap0", "ingress"), limit(8 * MBIT)),
        (("tc", "-n", ns, "qdisc", "del", "dev", ifb_name("tap0"), "root"), limit(8 * MBIT)),
    ):
        run(*command)
        assert control.limit("tap0", MAC) == left
        control.set_limit("tap0", limit(8 * MBIT, 8 * MBIT), VM)
        assert without_numbers(dump(ns)) == whole
    run("ip", "-n", ns, "link", "del", ifb_name("tap0"))
    assert control.limit("tap0", MAC) == limit(8 * MBIT)
    control.set_limit("tap0", limit(8 * MBIT, 8 * MBIT), VM)
    assert control.limit("tap0", MAC) == limit(8 * MBIT, 8 * MBIT)
    assert control.owners() == {VM: (ifb_name("tap0"),)}


class Killed(BaseException):
    pass


def interrupted(monkeypatch: pytest.MonkeyPatch, control: TrafficControl, wanted: NicLimit, requests: int) -> bool:
    """set_limit, killed after that many requests to the kernel; False if it was done before."""
    ask, asked = netlink._ask, 0

    def counted(*args: Any, **kwargs: Any) -> list[Any]:
        nonlocal asked
        if asked == requests:
            raise Killed
        asked += 1
        return ask(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(netlink, "_ask", counted)
        try:
            control.set_limit("vnet1", wanted, VM)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("undo", ["set", "clear"])
@pytest.mark.parametrize(
    ("start", "wanted"), [(limit(), limit(8 * MBIT, 8 * MBIT)), (limit(8 * MBIT, 8 * MBIT), limit())]
)
def test_killed_between_any_two_requests_it_converges(
    ns: str, control: TrafficControl, monkeypatch: pytest.MonkeyPatch, start: NicLimit, wanted: NicLimit, undo: str
) -> None:
    pristine = without_numbers(dump(ns))
    requests = 0
    while True:
        control.set_limit("vnet1", start, VM)
        killed = interrupted(monkeypatch, control, wanted, requests)
        assert control.foreign("vnet1") is None
        if undo == "set":
            control.set_limit("vnet1", wanted, VM)
            assert control.limit("vnet1", MAC) == wanted
            control.set_limit("vnet1", limit(), VM)
        else:
            control.clear(VM)
            control.clear("")
        assert without_numbers(dump(ns)) == pristine
        if not killed:
            break
        requests += 1
    assert requests > 10


@pytest.fixture
def guest(ns: str) -> Iterator[str]:
    """A namespace that stands for a guest at the end of nic0, which stands for its tap: 10.9.0.1 and 10.9.0.2."""
    with namespace() as name:
        run("ip", "-n", ns, "link", "add", "nic0", "type", "veth", "peer", "name", "eth0", "netns", name)
        for where, device, address in ((ns, "nic0", "10.9.0.1/24"), (name, "eth0", "10.9.0.2/24")):
            run("ip", "-n", where, "address", "add", address, "dev", device)
            run("ip", "-n", where, "link", "set", device, "up")
        yield name


def test_tcp_reaches_the_cap_in_both_directions_and_not_more(ns: str, guest: str, control: TrafficControl) -> None:
    with stream(ns, guest, "10.9.0.2") as to_guest, stream(guest, ns, "10.9.0.1") as from_guest:
        assert_exceeds(200 * MBIT, to_guest)
        assert_exceeds(200 * MBIT, from_guest)
        for inbound, outbound in ((64 * MBIT, 16 * MBIT), (8 * MBIT, 32 * MBIT)):
            control.set_limit("nic0", limit(inbound, outbound), VM)
            assert_settles_at(inbound, to_guest)
            assert_settles_at(outbound, from_guest)
        control.set_limit("nic0", limit(), VM)
        assert_exceeds(200 * MBIT, to_guest)
        assert_exceeds(200 * MBIT, from_guest)


def test_more_bandwidth_keeps_the_qdiscs_and_what_waits_in_them(ns: str, guest: str, control: TrafficControl) -> None:
    def sent() -> list[int]:
        return [q["bytes"] for d in ("nic0", ifb_name("nic0")) for q in qdiscs(ns, d) if q["kind"] == "tbf"]

    control.set_limit("nic0", limit(32 * MBIT, 16 * MBIT), VM)
    with stream(ns, guest, "10.9.0.2") as to_guest, stream(guest, ns, "10.9.0.1") as from_guest:
        assert_exceeds(MBIT, to_guest)
        assert_exceeds(MBIT, from_guest)
    before = sent()
    assert min(before) > 100_000
    control.set_limit("nic0", limit(64 * MBIT, 17 * MBIT), VM)
    assert all(now >= then for now, then in zip(sent(), before, strict=True))


def test_less_bandwidth_never_stops_a_stream(ns: str, guest: str, control: TrafficControl) -> None:
    """In place, a tbf would: a packet larger than the new bucket, taken in under the old one, waits for ever."""
    with stream(ns, guest, "10.9.0.2") as to_guest, stream(guest, ns, "10.9.0.1") as from_guest:
        for _ in range(4):
            control.set_limit("nic0", limit(400 * MBIT, 400 * MBIT), VM)
            assert_exceeds(8 * MBIT, to_guest)
            assert_exceeds(8 * MBIT, from_guest)
            control.set_limit("nic0", limit(4 * MBIT, 4 * MBIT), VM)
            assert_exceeds(MBIT, to_guest)
            assert_exceeds(MBIT, from_guest)


def test_without_the_right_to_change_the_network() -> None:
    program = (
        "from hvctl.adapters.network.traffic import TrafficControl as T\n"
        "from hvctl.errors import UnreachableError\n"
        "from hvctl.model.allocation import NicLimit\n"
        "try: T().set_limit('lo', NicLimit('', 8000000), 'nobody')\n"
        "except UnreachableError as e: print(e.hint)\n"
    )
    drop = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    shown = subprocess.run([*drop, sys.executable, "-c", program], capture_output=True, text=True)
    assert "CAP_NET_ADMIN" in shown.stdout, shown.stderr


def test_a_busy_kernel_is_asked_again_and_not_for_ever() -> None:
    answers = [16, 105, None]

    def flaky() -> tuple[str, ...]:
        if code := answers.pop(0):
            raise netlink.NetlinkError(code)
        return ("done",)

    assert netlink._ask(flaky) == ["done"]
    answers[:] = [16] * 5
    with pytest.raises(netlink.NetlinkError):
        netlink._ask(flaky)
    assert len(answers) == 2
    answers[:] = [17, None]
    with pytest.raises(netlink.NetlinkError):
        netlink._ask(flaky)
    assert answers == [None]


def test_a_namespace_that_does_not_exist_is_not_made() -> None:
    with pytest.raises(HvctlError):
        TrafficControl("hvt-absent").owners()
    assert "hvt-absent" not in run("ip", "netns", "list")


def test_the_handle_stays_out_of_the_numbers_that_the_kernel_gives_away() -> None:
    assert max(HANDLES) >> 16 < 0x8000
