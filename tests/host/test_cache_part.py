"""The page cache of a real guest goes back to the host, its memory is all there again, and no data is lost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.outside import MIB, Guest, virsh
from host.site import Site
from hvctl.adapters.guest import agent
from hvctl.engine.applied import agent_call
from hvctl.engine.reclaim import Reclaimed, fresh_balloon, held, reclaim
from hvctl.engine.runtime import open_host
from hvctl.errors import GuestError, RefusedError, UnreachableError
from hvctl.ports import Host

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]

MEMORY, FILE, MARGIN = 384 * MIB, 160 * MIB, 32 * MIB
# One random MiB over and over: an emulated guest makes random bytes slowly.
FILL = f"""
dd if=/dev/urandom of=/run/piece bs=1M count=1
for i in $(seq {FILE // MIB}); do cat /run/piece; done > /data/big
md5sum /data/big > /run/sum
"""


@pytest.fixture(scope="module")
def guest(site: Site) -> Iterator[Guest]:
    with site.created("--start", "--memory", f"{MEMORY // MIB}MiB", "--disk", "data:300MiB") as made:
        made.run(FILL)
        yield made


@pytest.fixture
def nothing_left(site: Site, request: pytest.FixtureRequest) -> Iterator[None]:
    """What is there after a test is what was there before it, the shared guest included."""
    if "guest" in request.fixturenames:
        request.getfixturevalue("guest")
    before = site.inventory()
    yield
    assert site.inventory() == before


@pytest.fixture(scope="module")
def host(site: Site) -> Iterator[Host]:
    opened = open_host(site.settings)
    yield opened
    opened.domains.close()


def reclaimed(host: Host, guest: Guest, margin: int = MARGIN) -> Reclaimed:
    return reclaim(host, host.domains.get(guest.uuid), margin)


def test_the_cache_goes_back_to_the_host_and_the_guest_has_its_memory_and_its_data(host: Host, guest: Guest) -> None:
    guest.run("cat /data/big > /dev/null; dd if=/run/piece of=/data/dirty bs=1M")
    total, before = guest.mem_total(), held(host.domains.get(guest.uuid))
    done = reclaimed(host, guest)
    assert done.won is not None
    assert done.won > FILE * 3 // 4
    assert done.target == done.reached < MEMORY - FILE
    after = held(host.domains.get(guest.uuid))
    assert before is not None
    assert after is not None
    assert before - after > FILE * 3 // 4
    assert guest.mem_total() == total
    assert (guest.memory(), guest.memory("--config")) == (MEMORY, MEMORY)
    guest.run("md5sum -c /run/sum && cmp /run/piece /data/dirty")


def test_without_a_cache_there_is_little_to_win_and_nothing_is_lost(host: Host, guest: Guest) -> None:
    reclaimed(host, guest)
    total = guest.mem_total()
    done = reclaimed(host, guest)
    assert done.won is not None
    assert abs(done.won) < FILE // 4
    assert (guest.memory(), guest.mem_total()) == (MEMORY, total)


def test_a_margin_that_leaves_nothing_to_take_leaves_the_balloon_alone(host: Host, guest: Guest) -> None:
    done = reclaimed(host, guest, margin=MEMORY)
    assert (done.target, done.reached, guest.memory()) == (MEMORY, MEMORY, MEMORY)


def test_a_squeeze_that_the_guest_does_not_follow_ends_with_its_memory_given_back(host: Host, guest: Guest) -> None:
    """Asked for what it uses, it gives what it can and keeps running."""
    total = guest.mem_total()
    done = reclaimed(host, guest, margin=-MEMORY)
    assert done.target < done.reached < MEMORY
    assert (guest.memory(), guest.mem_total()) == (MEMORY, total)
    guest.run("md5sum -c /run/sum")


def test_a_guest_that_cannot_drop_its_cache_says_so_and_keeps_its_memory(host: Host, guest: Guest) -> None:
    # Nobody can write a file that something else is mounted over.
    guest.run(
        "mount -o bind,ro /proc/version /proc/sys/vm/drop_caches && mount -o remount,bind,ro /proc/sys/vm/drop_caches"
    )
    try:
        with pytest.raises(GuestError, match="status 1"):
            reclaimed(host, guest)
    finally:
        guest.run("umount /proc/sys/vm/drop_caches")
    assert guest.memory() == MEMORY


def test_a_report_is_one_that_the_guest_made_after_it_was_asked(host: Host, guest: Guest) -> None:
    """The statistics from before the drop count the cache; those that are waited for show the memory free."""
    guest.run("cat /data/big > /dev/null")
    vm = host.domains.get(guest.uuid)
    filled = fresh_balloon(host, vm).unused
    agent.drop_caches(agent_call(host, guest.uuid))
    dropped = fresh_balloon(host, vm).unused
    assert filled is not None
    assert dropped is not None
    assert dropped - filled > FILE * 3 // 4


def started_without(guest: Guest, pattern: str, instead: str, path: Path) -> None:
    """Define a VM anew without a device, and start it."""
    xml, count = re.subn(pattern, instead, virsh("dumpxml", guest.uuid, "--inactive"), flags=re.DOTALL)
    assert count == 1
    path.write_text(xml)
    virsh("define", str(path))
    virsh("start", guest.uuid)


@pytest.mark.parametrize(
    ("pattern", "instead", "word"),
    [
        (r"<channel type='unix'>.*?guest_agent.*?</channel>", "", "no guest agent"),
        (r"<memballoon .*?</memballoon>", "<memballoon model='none'/>", "no balloon device"),
    ],
    ids=["agent", "balloon"],
)
def test_a_guest_without_what_it_takes_is_refused(
    site: Site, host: Host, tmp_path: Path, pattern: str, instead: str, word: str
) -> None:
    with site.created() as guest:
        with pytest.raises(RefusedError, match="only a guest that runs"):
            reclaimed(host, guest)
        started_without(guest, pattern, instead, tmp_path / "domain.xml")
        with pytest.raises(RefusedError, match=word):
            reclaimed(host, guest)


def test_a_guest_whose_agent_is_not_there_yet_keeps_its_memory(site: Site, host: Host) -> None:
    with site.created() as guest:
        virsh("start", guest.uuid)
        memory = guest.memory()
        with pytest.raises(UnreachableError, match="not connected"):
            reclaimed(host, guest)
        assert guest.memory() == memory
