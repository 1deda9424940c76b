"""ports.Network: limits on taps, whoever keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl.errors import NotFoundError, RefusedError
from hvctl.model.allocation import NicLimit
from hvctl.model.flows import Forgotten
from hvctl.model.vm import Nic
from tests.contract.outside import BOTH
from tests.contract.taps import FakeTaps, NamespaceTaps, Taps

MAC = "52:54:00:12:34:56"
OWNER = "00000000-0000-4000-8000-000000000001"
OTHER = "00000000-0000-4000-8000-000000000002"
MBIT = 1_000_000


@pytest.fixture(params=BOTH)
def taps(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Taps]:
    if request.param == "fake":
        yield FakeTaps(tmp_path)
        return
    with NamespaceTaps.open() as real:
        yield real


@pytest.fixture
def tap(taps: Taps) -> str:
    taps.add("tap0")
    return "tap0"


def test_a_bridge_is_one_that_is_there_and_no_other_device(taps: Taps, tap: str) -> None:
    assert not taps.network.bridge("br7")
    taps.add_bridge("br7")
    assert taps.network.bridge("br7")
    assert not taps.network.bridge(tap)
    assert not taps.network.bridge("a-name-that-is-too-long-for-a-device")


LIMITS = [
    NicLimit(MAC, 8 * MBIT, None),
    NicLimit(MAC, None, 20 * MBIT),
    NicLimit(MAC, 8 * MBIT, 20 * MBIT),
    NicLimit(MAC, 1000 * MBIT, 1000 * MBIT),
    NicLimit(MAC),
]


def test_a_new_tap_is_unlimited(taps: Taps, tap: str) -> None:
    assert taps.network.limit(tap, MAC) == NicLimit(MAC)
    assert taps.network.foreign(tap) is None
    assert taps.network.owners() == {}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("before", LIMITS)
def test_a_limit_holds_whatever_was_before(taps: Taps, tap: str, before: NicLimit, limit: NicLimit) -> None:
    for wanted in (before, limit, limit):
        taps.network.set_limit(tap, wanted, OWNER)
        assert taps.network.limit(tap, MAC) == wanted
        assert taps.network.foreign(tap) is None
    assert (OWNER in taps.network.owners()) is (limit != NicLimit(MAC))


def test_no_limit_leaves_nothing(taps: Taps, tap: str) -> None:
    before = taps.devices()
    taps.network.set_limit(tap, NicLimit(MAC, 8 * MBIT, 8 * MBIT), OWNER)
    made = taps.network.owners()[OWNER]
    assert set(made) == taps.devices() - before
    taps.network.set_limit(tap, NicLimit(MAC), OWNER)
    assert taps.network.owners() == {}
    assert taps.devices() == before


def test_clearing_takes_only_what_is_the_owners(taps: Taps, tap: str) -> None:
    taps.add("tap1")
    limit = NicLimit(MAC, 8 * MBIT, 8 * MBIT)
    taps.network.set_limit(tap, limit, OWNER)
    taps.network.set_limit("tap1", limit, OTHER)
    for _ in range(2):
        taps.network.clear(OWNER)
        assert taps.network.limit(tap, MAC) == NicLimit(MAC)
        assert taps.network.limit("tap1", MAC) == limit
        assert list(taps.network.owners()) == [OTHER]


def test_clearing_without_the_tap(taps: Taps, tap: str) -> None:
    before = taps.devices()
    taps.network.set_limit(tap, NicLimit(MAC, 8 * MBIT, 8 * MBIT), OWNER)
    taps.remove(tap)
    assert taps.network.limit(tap, MAC) == NicLimit(MAC)
    assert taps.network.foreign(tap) is None
    assert list(taps.network.owners()) == [OWNER]
    taps.network.clear(OWNER)
    assert taps.network.owners() == {}
    assert taps.devices() == before - {tap}


def test_a_new_tap_of_an_old_name_is_unlimited(taps: Taps, tap: str) -> None:
    limit = NicLimit(MAC, 8 * MBIT, 8 * MBIT)
    taps.network.set_limit(tap, limit, OWNER)
    taps.remove(tap)
    taps.add(tap)
    assert taps.network.limit(tap, MAC) == NicLimit(MAC)
    taps.network.set_limit(tap, limit, OTHER)
    assert taps.network.limit(tap, MAC) == limit
    assert list(taps.network.owners()) == [OTHER]


def test_a_tap_that_is_not_there_cannot_be_limited(taps: Taps) -> None:
    with pytest.raises(NotFoundError):
        taps.network.set_limit("tap9", NicLimit(MAC, 8 * MBIT), OWNER)
    assert taps.network.owners() == {}


def test_what_somebody_else_put_there_is_told_and_stays(taps: Taps, tap: str) -> None:
    taps.put_foreign(tap)
    told = taps.network.foreign(tap)
    assert told is not None
    assert told.startswith("htb 1:")
    for limit in (NicLimit(MAC, 8 * MBIT), NicLimit(MAC, None, 8 * MBIT)):
        with pytest.raises(RefusedError):
            taps.network.set_limit(tap, limit, OWNER)
    taps.network.clear(OWNER)
    assert taps.network.foreign(tap) == told
    assert taps.network.limit(tap, MAC) == NicLimit(MAC)
    assert taps.network.owners() == {}


def test_a_limit_somebody_removed_is_not_told_any_more(taps: Taps, tap: str) -> None:
    limit = NicLimit(MAC, 8 * MBIT, 20 * MBIT)
    taps.network.set_limit(tap, limit, OWNER)
    taps.wipe(tap)
    assert taps.network.limit(tap, MAC) == NicLimit(MAC)
    taps.network.set_limit(tap, limit, OWNER)
    assert taps.network.limit(tap, MAC) == limit


@pytest.mark.parametrize("rate", [1, 7999, 8 * MBIT + 1])
def test_a_rate_the_kernel_cannot_keep_is_refused(taps: Taps, tap: str, rate: int) -> None:
    taps.network.set_limit(tap, NicLimit(MAC, 8 * MBIT), OWNER)
    with pytest.raises(RefusedError):
        taps.network.set_limit(tap, NicLimit(MAC, 16 * MBIT, rate), OWNER)
    assert taps.network.limit(tap, MAC) == NicLimit(MAC, 8 * MBIT)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("before", LIMITS)
def test_shaping_is_rebuilt_whatever_is_there(taps: Taps, tap: str, before: NicLimit, limit: NicLimit) -> None:
    devices = taps.devices()
    taps.network.set_limit(tap, before, OWNER)
    for _ in range(2):
        taps.network.rebuild(tap, limit, OWNER)
        assert taps.network.limit(tap, MAC) == limit
        assert taps.network.foreign(tap) is None
    taps.network.rebuild(tap, NicLimit(MAC), OWNER)
    assert taps.devices() == devices


def test_shaping_that_somebody_removed_is_rebuilt(taps: Taps, tap: str) -> None:
    limit = NicLimit(MAC, 8 * MBIT, 20 * MBIT)
    taps.network.set_limit(tap, limit, OWNER)
    taps.wipe(tap)
    taps.network.rebuild(tap, limit, OWNER)
    assert taps.network.limit(tap, MAC) == limit


def test_shaping_is_not_rebuilt_over_what_somebody_else_put_there(taps: Taps, tap: str) -> None:
    taps.put_foreign(tap)
    told = taps.network.foreign(tap)
    with pytest.raises(RefusedError):
        taps.network.rebuild(tap, NicLimit(MAC, 8 * MBIT), OWNER)
    taps.network.rebuild(tap, NicLimit(MAC), OWNER)
    assert taps.network.foreign(tap) == told


def test_what_waits_for_the_guest_is_dropped_and_what_comes_later_arrives(taps: Taps, tap: str) -> None:
    taps.queue(tap, 7)
    assert taps.waiting(tap) == 7
    taps.queue(tap, 7)
    for _ in range(2):
        assert taps.network.drop_queue(tap) == 0
    assert taps.waiting(tap) == 0
    taps.queue(tap, 3)
    assert taps.waiting(tap) == 3


def test_what_waits_in_the_shaper_is_dropped_too_and_counted(taps: Taps, tap: str) -> None:
    limit = NicLimit(MAC, 8000)
    taps.network.set_limit(tap, limit, OWNER)
    taps.queue(tap, 40)
    assert 0 < taps.network.drop_queue(tap) <= 40
    assert taps.network.drop_queue(tap) == 0
    assert taps.waiting(tap) == 0
    assert taps.network.limit(tap, MAC) == limit


def test_the_queue_of_a_tap_that_is_not_there(taps: Taps) -> None:
    with pytest.raises(NotFoundError):
        taps.network.drop_queue("tap9")


OWN = ("192.0.2.10", "2001:db8::10")
OTHERS = ("192.0.2.20", "2001:db8::20")
HOST = ("192.0.2.1", "2001:db8::1")


def test_the_connections_of_a_guest_are_forgotten_and_no_others(taps: Taps, tap: str) -> None:
    taps.add("tap1")
    for mine, other, host in zip(OWN, OTHERS, HOST, strict=True):
        taps.know(tap, MAC, mine)
        taps.know("tap1", "52:54:00:00:00:99", other)
        for pair in ((mine, host), (host, mine), (mine, other), (other, host)):
            taps.connect(*pair)
    nic = Nic(MAC, "virtio", "br0", tap)
    assert taps.network.forget_flows([nic], {}) == Forgotten(6, OWN)
    assert taps.flows() == {frozenset(pair) for pair in zip(OTHERS, HOST, strict=True)}
    assert taps.network.forget_flows([nic], {}) == Forgotten(0, OWN)


def test_a_guest_that_nobody_saw_has_no_connections_whatever_it_claims(taps: Taps, tap: str) -> None:
    taps.connect("192.0.2.10", "192.0.2.1")
    nics = [Nic(MAC, "virtio", "br0", tap), Nic(MAC, "virtio", "br0", None)]
    told = taps.network.forget_flows(nics, {MAC: ["192.0.2.10", "192.0.2.1"]})
    assert (told.deleted, told.addresses) == (0, ())
    assert len(taps.flows()) == 1
