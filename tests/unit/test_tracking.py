"""What is known of RAM over several hvctl: looked for where RAM is in use, found wherever it was written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from hvctl.adapters.kernel import process
from hvctl.adapters.ram.guestram import GuestRam
from hvctl.adapters.ram.pages import CHUNK, PAGE, Chunks
from hvctl.adapters.ram.tracking import RamTracking
from hvctl.model.tracker import TrackerKind
from hvctl.model.vm import Process, Region
from tests.unit.ramchild import TMPFS, RamChild, ram_child

KERNEL = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
pytestmark = pytest.mark.skipif(KERNEL < (6, 7), reason="this kernel has no PAGEMAP_SCAN")

CHUNKS = 64
UFFD = TrackerKind.UFFD


@contextmanager
def large() -> Iterator[tuple[RamChild, GuestRam, Process]]:
    """A process with 128 MiB of RAM, of which it uses almost nothing."""
    with tempfile.NamedTemporaryFile(dir=TMPFS) as file, ram_child(CHUNKS * CHUNK, file.fileno()) as child:
        started = process.start_time(child.pid)
        assert started is not None
        region = Region("ram", file.name, CHUNKS * CHUNK * PAGE)
        with GuestRam((region,), child.pid) as ram:
            yield child, ram, Process(child.pid, started, process.boot_id())


@contextmanager
def tracked(folder: Path, life: Process, ram: GuestRam, base: Chunks | None = None) -> Iterator[RamTracking]:
    """As one hvctl after the other opens it; base: the chunks that the snapshot uses."""
    tracking = RamTracking(folder, life, ram)
    if base is not None:
        tracking.confine(base)
    try:
        yield tracking
    finally:
        tracking.close()


def tables(child: RamChild) -> int:
    """Bytes of page tables."""
    return int(child.status("VmPTE").split()[0]) * 1024


def test_writes_are_found_wherever_they_are_without_page_tables_for_all_of_ram(tmp_path: Path) -> None:
    first, later, never = 3, 40 * CHUNK + 7, 63 * CHUNK
    with large() as (child, ram, life):
        child("write", first, 5 * CHUNK)
        before = tables(child)
        with tracked(tmp_path, life, ram) as tracking:
            tracking.arm(UFFD)
            tracking.settle("a", inflations=0)
            base = ram.used()
            assert np.flatnonzero(base).tolist() == [0, 5]
            child("write", first, later)
            child("read", first + 1)
        for _ in range(2):
            with tracked(tmp_path, life, ram, base) as tracking:
                foreseen = tracking.expected(UFFD)
                found = tracking.written(UFFD, 0)
                assert foreseen is not None
                assert found is not None
                assert foreseen[0] == found[0] == "a"
                assert foreseen[1].tolist() == found[1].tolist()
                # What was never touched beside it may be told of, once.
                assert {first, later} <= set(found[1].tolist()) <= {first, *range(40 * CHUNK, 41 * CHUNK)}
                assert (again := tracking.again()) is not None
                assert not again.size
                tracking.settle("a", inflations=0)
                child("write", first, later)
        assert tables(child) - before < CHUNKS * PAGE // 4
        with tracked(tmp_path, life, ram, base) as tracking:
            child("write", never)
            found = tracking.written(UFFD, 0)
            assert found is not None
            assert {first, later, never} <= set(found[1].tolist())


def test_what_was_in_use_and_is_gone_altogether_is_found(tmp_path: Path) -> None:
    """The snapshot has something there: that RAM has nothing any more is a difference."""
    with large() as (child, ram, life):
        child("write_run", 5 * CHUNK, 6 * CHUNK)
        with tracked(tmp_path, life, ram) as tracking:
            tracking.arm(UFFD)
            tracking.settle("a", inflations=0)
        base = ram.used()
        child("write_run", 5 * CHUNK, 6 * CHUNK)
        child("punch", 5 * CHUNK, CHUNK)
        assert not ram.used().any()
        with tracked(tmp_path, life, ram, base) as tracking:
            found = tracking.written(UFFD, 0)
            assert found is not None
            assert found[1].tolist() == list(range(5 * CHUNK, 6 * CHUNK))


def test_without_knowing_the_base_all_of_ram_is_looked_at(tmp_path: Path) -> None:
    with large() as (child, ram, life):
        child("write", 0)
        with tracked(tmp_path, life, ram) as tracking:
            tracking.arm(UFFD)
            tracking.settle("a", inflations=0)
        child("write", 20 * CHUNK)
        with tracked(tmp_path, life, ram) as tracking:
            found = tracking.written(UFFD, 0)
            assert found is not None
            assert 20 * CHUNK in found[1]
            assert tracking.again() is not None


def test_an_inflated_balloon_or_another_tracker_makes_it_unknown(tmp_path: Path) -> None:
    with large() as (child, ram, life):
        child("write", 0)
        with tracked(tmp_path, life, ram) as tracking:
            tracking.arm(UFFD)
            tracking.settle("a", inflations=7)
            for wanted, inflations in ((UFFD, 8), (UFFD, None), (TrackerKind.COMPARE, 7)):
                assert tracking.written(wanted, inflations) is None
            assert tracking.expected(TrackerKind.COMPARE) is None
            assert tracking.written(UFFD, 7) is not None
            assert tracking.expected(UFFD) is None, "what RAM is was not said yet"
