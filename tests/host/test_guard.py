"""Guests that run out of something: kept going by resets of a part, while others with the same load hit a limit."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.outside import MIB, Guest
from host.site import Site
from host.tuns import add_flow
from hvctl.adapters.network.conntrack import conntrack
from hvctl.engine.operate import Engine
from hvctl.operations import guard, guardpolicy

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]

SECONDS = 120.0
CYCLE = 1.5
"""Seconds between two looks of a guard."""
ROOM = 240 * MIB
"""What the page cache may take of the host before a guest is at its limit."""

# Holes are read as fast as the guest can, and are in its page cache all the same.
LEAK = """
while :; do
    dd if=/data/holes of=/dev/null bs=1M skip=$((i * 6 % 396)) count=6
    i=$((i + 1)); sleep 0.5
done
"""
# The folder is on the disk, so nothing is written while it is not mounted; that something does not fit is noted.
FILL = """
while :; do
    dd if=/run/piece of=/scratch/work/$i bs=1M conv=fsync || { [ -d /scratch/work ] && touch /run/full; }
    i=$((i + 1)); sleep 0.3
done
"""
PREPARE = """
dd if=/dev/urandom of=/run/piece bs=1M count=2
dd if=/dev/zero of=/data/holes bs=1M seek=400 count=0
/sbin/mke2fs -q -t ext4 -m 0 /dev/vdb && mkdir /scratch && mount /dev/vdb /scratch && mkdir /scratch/work && sync
"""
POLICY = """
description = "a guest of a test"
to = "clean"
threshold = "1s"
looks = 1
horizon = "18s"
window = "20s"
cool_down = "2s"
"""
PARTS = """
[[allow]]
part = "cache"
[[allow]]
part = "disk:scratch"
worth = 0.0
before = [["/bin/sh", "-c", "i=0; until umount /scratch; do i=$((i + 1)); [ $i -lt 100 ] || exit 1; sleep 0.1; done"]]
after = [["/bin/sh", "-c", "mount /dev/vdb /scratch"]]
"""
WHOLE = """
[[allow]]
part = "whole"
worth = 0.0
"""
NET = """
connections = {connections}
[[allow]]
part = "net"
"""
TRACKED = Path("/proc/net/nf_conntrack")


@pytest.fixture(scope="module")
def pair(site: Site) -> Iterator[tuple[Guest, Guest]]:
    """The one that is guarded, and the one that is not."""
    options = ("--memory", "512MiB", "--disk", "data:420MiB", "--disk", "scratch:64MiB")
    with site.created(*options) as guarded, site.created(*options) as alone:
        for guest in (guarded, alone):  # they boot at the same time
            site.ok("vm", "start", guest.name)
        for guest in (guarded, alone):
            guest.await_boot()
            guest.run(PREPARE)
        yield guarded, alone


@pytest.fixture
def nothing_left(site: Site, pair: tuple[Guest, Guest]) -> Iterator[None]:
    before = site.inventory()
    yield
    assert site.inventory() == before


def armed(engine: Engine, guest: Guest, folder: Path, parts: str) -> None:
    file = folder / "policy.toml"
    file.write_text(POLICY + parts)
    guard.arm(engine, guest.uuid, guardpolicy.load(str(file)))


def started(guest: Guest, script: str) -> None:
    guest.run(f"cat > /run/load << 'END'\ni=0{script}END\nsh /run/load > /run/load.log 2>&1 & echo $! > /run/load.pid")


def stopped(guest: Guest) -> None:
    guest.run("kill $(cat /run/load.pid)")


def resident(guest: Guest) -> int:
    """What the host's kernel says that QEMU holds."""
    status = Path(f"/proc/{guest.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def acted(engine: Engine, guest: Guest) -> list[str]:
    """The parts that were reset, the last first."""
    made = engine.store.guards.of_vm(engine.facts.name, guest.uuid)
    return [d.decision.chosen.part for d in made if d.decision.chosen and d.outcome == "done"]


def test_page_cache_that_leaks(engine: Engine, pair: tuple[Guest, Guest], tmp_path: Path) -> None:
    guarded, alone = pair
    limit = {g.uuid: resident(g) + ROOM for g in pair}
    armed(engine, guarded, tmp_path, f'resident = "{limit[guarded.uuid] // MIB}MiB"{PARTS}')
    highest, until = 0, time.monotonic() + SECONDS
    for guest in pair:
        started(guest, LEAK)
    while resident(alone) < limit[alone.uuid]:
        assert time.monotonic() < until
        guard.cycle(engine)
        highest = max(highest, resident(guarded))
        time.sleep(CYCLE)
    for guest in pair:
        stopped(guest)
    assert set(acted(engine, guarded)) == {"cache"}
    assert highest < limit[guarded.uuid]
    assert guarded.memory() == guarded.memory("--config"), "it has all of its memory again"


def test_a_scratch_disk_that_fills(site: Site, engine: Engine, pair: tuple[Guest, Guest], tmp_path: Path) -> None:
    guarded, alone = pair
    process = guarded.pid
    site.ok("snapshot", "take", guarded.name, "clean")
    armed(engine, guarded, tmp_path, PARTS)
    until = time.monotonic() + SECONDS
    for guest in pair:
        started(guest, FILL)
    while "full" not in alone.run("ls /run"):
        assert time.monotonic() < until
        guard.cycle(engine)
    for guest in pair:
        stopped(guest)
    assert acted(engine, guarded)[0] == "disk:scratch"
    assert "full" not in guarded.run("ls /run")
    assert guarded.pid == process
    site.ok("snapshot", "delete", guarded.name, "clean")


def test_a_whole_guest_whose_disk_fills(site: Site, engine: Engine, pair: tuple[Guest, Guest], tmp_path: Path) -> None:
    """What fills it goes with all else that it did since, and its process stays."""
    guest, _ = pair
    process = guest.pid
    guest.run("rm -rf /scratch/work; mkdir /scratch/work; rm -f /run/full; sync")
    guest.mark("then")
    site.ok("snapshot", "take", guest.name, "clean")
    guest.mark("since")
    armed(engine, guest, tmp_path, WHOLE)
    before, until = len(acted(engine, guest)), time.monotonic() + SECONDS
    started(guest, FILL)
    while len(acted(engine, guest)) == before:
        assert time.monotonic() < until
        guard.cycle(engine)
    assert acted(engine, guest)[0] == "whole"
    guest.await_answer()
    assert guest.run("ls /scratch/work; ls /run | grep full || true; kill -0 $(cat /run/load.pid) || true") == ""
    assert (guest.marks(), guest.pid) == (("then", "then"), process)
    site.ok("snapshot", "delete", guest.name, "clean")


@pytest.mark.skipif(not TRACKED.exists(), reason="this kernel tracks no connections, or does not show them")
def test_a_guest_of_which_the_host_tracks_more_and_more(
    site: Site, engine: Engine, pair: tuple[Guest, Guest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with none of them, before there are too many, and its neighbour keeps its own. The last test: a second
    passes for the guard from look to look, however quick this machine is."""
    guarded, other = pair
    process, limit, number = guarded.pid, 100, 0
    began = time.time()
    monkeypatch.setattr(engine, "clock", lambda: began + number / 10)
    addresses = {guarded.uuid: "10.213.8.2", other.uuid: "10.213.8.3"}
    subprocess.run(["ip", "addr", "add", "10.213.8.1/24", "dev", site.bridge], check=True)
    try:
        for guest in pair:
            guest.run(f"ip link set eth0 up; ip addr add {addresses[guest.uuid]}/24 dev eth0; ping -c 1 10.213.8.1")
        armed(engine, guarded, tmp_path, NET.format(connections=limit))
        before, until = len(acted(engine, guarded)), time.monotonic() + SECONDS
        while len(acted(engine, guarded)) == before:
            assert time.monotonic() < until
            assert number < limit
            for address in addresses.values():
                for _ in range(5):
                    number += 1
                    add_flow(None, address, f"198.51.100.{number}")
            assert number // 2 <= tracked(addresses[guarded.uuid]) < limit
            guard.cycle(engine)
        assert acted(engine, guarded)[0] == "net"
        assert tracked(addresses[guarded.uuid]) == 0
        assert tracked(addresses[other.uuid]) >= number // 2
        assert guarded.run("ping -c 1 -q 10.213.8.1 > /dev/null && echo connected") == "connected\n"
        assert guarded.pid == process
    finally:
        for guest in pair:
            guest.run(f"ip addr del {addresses[guest.uuid]}/24 dev eth0")
        with conntrack() as table:  # or a second run within five minutes finds the neighbour's there
            for flow in table.flows(addresses.values()):
                table.forget(flow)
        subprocess.run(["ip", "addr", "del", "10.213.8.1/24", "dev", site.bridge], check=True)


def tracked(address: str) -> int:
    """Connections that the host tracks of a guest, without those that it is asked with whether it is there."""
    return sum(f"={address} " in line and " icmp " not in line for line in TRACKED.read_text().splitlines())
