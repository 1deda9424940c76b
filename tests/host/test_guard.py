"""Guests that run out of something: kept going by resets of a part, while others with the same load hit a limit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from host.outside import MIB, Guest
from host.site import Site
from hvctl.engine.operate import Engine
from hvctl.engine.runtime import open_engine
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
resident = "{resident}MiB"
[[allow]]
part = "cache"
[[allow]]
part = "disk:scratch"
worth = 0.0
before = [["/bin/sh", "-c", "i=0; until umount /scratch; do i=$((i + 1)); [ $i -lt 100 ] || exit 1; sleep 0.1; done"]]
after = [["/bin/sh", "-c", "mount /dev/vdb /scratch"]]
"""


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


@pytest.fixture(scope="module")
def engine(site: Site) -> Iterator[Engine]:
    roomy = replace(site.settings, cpu_overcommit=1000.0, memory_overcommit=1000.0)
    with open_engine(roomy) as made:
        yield made


def armed(engine: Engine, guest: Guest, folder: Path, resident: int) -> None:
    file = folder / "policy.toml"
    file.write_text(POLICY.format(resident=resident // MIB))
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
    armed(engine, guarded, tmp_path, limit[guarded.uuid])
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
    armed(engine, guarded, tmp_path, 100 << 30)
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
