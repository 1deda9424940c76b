"""Guests that run out of something: kept going by resets of a part, while the same load without a guard hits its limit."""

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
from hvctl.model.guard import Decided
from hvctl.operations import guard, guardpolicy

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("nothing_left")]

SECONDS = 120.0
CYCLE = 1.5
"""Seconds between two looks."""
ROOM = 300 * MIB
"""What the page cache may take of the host before a guest is at its limit."""

# Holes are read as fast as the guest can, and are in its page cache all the same.
LEAK = "i=0; while :; do dd if=/data/holes of=/dev/null bs=1M skip=$((i * 6 % 396)) count=6; i=$((i+1)); sleep 0.5; done"
# The folder is on the disk, so nothing is written while it is not mounted; what does not fit is noted.
FILL = """
i=0
while :; do
    i=$((i + 1))
    dd if=/run/piece of=/scratch/work/$i bs=1M conv=fsync || { [ -d /scratch/work ] && touch /run/full; }
    sleep 0.3
done
"""
PREPARE = """
dd if=/dev/urandom of=/run/piece bs=1M count=2
dd if=/dev/zero of=/data/holes bs=1M seek=400 count=0
/sbin/mke2fs -q -t ext4 -m 0 -L scratch /dev/vdb && mkdir /scratch && mount /dev/vdb /scratch && mkdir /scratch/work
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
    options = ("--start", "--memory", "512MiB", "--disk", "data:420MiB", "--disk", "scratch:64MiB")
    with site.created(*options) as guarded, site.created(*options) as alone:
        for guest in (guarded, alone):
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


def started(guest: Guest, script: str) -> None:
    guest.run(f"cat > /run/load << 'END'\n{script}\nEND\nsh /run/load > /run/load.log 2>&1 & echo $! > /run/load.pid")


def stopped(guest: Guest) -> None:
    guest.run("kill $(cat /run/load.pid)")


def resident(guest: Guest) -> int:
    status = Path(f"/proc/{guest.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def decisions(engine: Engine, guest: Guest) -> list[Decided]:
    return [d for d in engine.store.guards.of_vm(engine.facts.name, guest.uuid) if d.decision.chosen]


def test_page_cache_that_leaks(site: Site, engine: Engine, pair: tuple[Guest, Guest], tmp_path: Path) -> None:
    guarded, alone = pair
    limit = {g.uuid: resident(g) + ROOM for g in pair}
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY.format(resident=limit[guarded.uuid] // MIB))
    guard.arm(engine, guarded.uuid, guardpolicy.load(str(policy)))
    until, most = time.monotonic() + SECONDS, 0
    for guest in pair:
        started(guest, LEAK)
    t0=time.monotonic()
    while resident(alone) < limit[alone.uuid]:
        assert time.monotonic() < until
        print(round(time.monotonic()-t0,1), guard.cycle(engine), resident(guarded)//MIB-limit[guarded.uuid]//MIB, resident(alone)//MIB-limit[alone.uuid]//MIB)
        most = max(most, resident(guarded))
        time.sleep(CYCLE)
    print(time.monotonic()-t0)
    from hvctl.cli.decision import lines
    for d in engine.store.guards.of_vm(engine.facts.name, guarded.uuid)[:4]:
        print(*lines(d),sep="\n")
    for guest in pair:
        stopped(guest)
    done = decisions(engine, guarded)
    assert [d.decision.chosen.part for d in done if d.decision.chosen and d.outcome == "done"]
    assert most < limit[guarded.uuid]


def test_a_scratch_disk_that_fills(site: Site, engine: Engine, pair: tuple[Guest, Guest], tmp_path: Path) -> None:
    guarded, alone = pair
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY.format(resident=100_000))
    guard.arm(engine, guarded.uuid, guardpolicy.load(str(policy)))
    site.ok("snapshot", "take", guarded.name, "clean")
    until = time.monotonic() + SECONDS
    for guest in pair:
        started(guest, FILL)
    t0=time.monotonic()
    while "full" not in alone.run("ls /run"):
        assert time.monotonic() < until
        print(round(time.monotonic()-t0,1), guard.cycle(engine), guarded.run("df /scratch | tail -1; ls /run/full || true"), alone.run("df /scratch | tail -1"))
    for guest in pair:
        stopped(guest)
    print(guarded.run("tail -5 /run/load.log"))
    assert "full" not in guarded.run("ls /run")
    done = decisions(engine, guarded)
    assert [d.decision.chosen.part for d in done if d.decision.chosen and d.outcome == "done"]
    site.ok("snapshot", "delete", guarded.name, "clean")
