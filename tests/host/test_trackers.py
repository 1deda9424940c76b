"""The trackers on a real QEMU under libvirt, with its sandbox on, held against a full compare of its guest's RAM."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hvctl.adapters.ram import ramfile
from hvctl.adapters.ram.trackers import Span, Tracker, end_tracker, open_tracker, resume_tracker, self_probe, spans
from hvctl.adapters.ram.trackers.pagemap import PAGE
from hvctl.errors import DeadlineError, HvctlError, RefusedError
from hvctl.model.vm import Vm
from tests.contract.outside import made
from tests.contract.real import RealOutside, await_true, real_outside

pytestmark = pytest.mark.host

CYCLES = 4
BLOCK = 16 << 20
# What a guest does: memory written, freed and written again, files through the page cache, the disk read into RAM.
WORK = (
    "head -c 6m /dev/urandom > /run/a; rm /run/a",
    "head -c 8m /dev/urandom > /data/b; sync; echo 3 > /proc/sys/vm/drop_caches; cat /data/b > /dev/null",
    "head -c 3m /dev/zero > /run/c; cat /proc/*/maps > /run/d; i=0; while [ $i -lt 300 ]; do i=$((i+1)); done",
    "ip link set eth0 up; ping -c 1 -W 1 192.0.2.1; dd if=/dev/vda of=/dev/null bs=1M count=16 iflag=direct; true",
)


@pytest.fixture(scope="module")
def outside(scrubbed_environment: None) -> Iterator[RealOutside]:
    with real_outside() as real:
        yield real


@pytest.fixture(scope="module")
def shared(outside: RealOutside) -> Iterator[str]:
    spec = outside.spec()
    with made(outside, spec, start=True) as uuid:
        # A guest that has just booted is still being brought down to its size.
        await_true(lambda: outside.host.domains.balloon(uuid).actual == spec.memory, "the balloon has its size")
        yield uuid


class Traced:
    """A guest's RAM file and its QEMU, seen by the test alone."""

    def __init__(self, outside: RealOutside, vm: Vm) -> None:
        assert vm.process is not None
        (region,) = vm.ram
        self.outside, self.uuid, self.pid = outside, vm.uuid, vm.process.pid
        self.file, self.size = region.path, region.size

    @property
    def spans(self) -> tuple[Span, ...]:
        return spans(self.pid, Path(self.file).stat())

    def run(self, script: str) -> str:
        return self.outside._run(self.uuid, script)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.outside.host.domains.pause(self.uuid)
        try:
            yield
        finally:
            self.outside.host.domains.resume(self.uuid)

    def content(self) -> list[bytes]:
        """All RAM, by reads that make no pages of holes."""
        with Path(self.file).open("rb", buffering=0) as stream:
            return [os.pread(stream.fileno(), BLOCK, at) for at in range(0, self.size, BLOCK)]

    def descriptors(self) -> list[str]:
        return sorted(str(p.readlink()) for p in Path(f"/proc/{self.pid}/fd").iterdir())

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))


@pytest.fixture
def guest(outside: RealOutside, shared: str) -> Traced:
    return Traced(outside, outside.host.domains.get(shared))


@pytest.fixture
def doomed(outside: RealOutside) -> Iterator[Traced]:
    with made(outside, outside.spec(), start=True) as uuid:
        yield Traced(outside, outside.host.domains.get(uuid))


@contextmanager
def tracked(guest: Traced) -> Iterator[Tracker]:
    tracker = open_tracker("uffd", guest.pid, guest.spans)
    token = tracker.token()
    try:
        yield tracker
    finally:
        tracker.close()
        end_tracker("uffd", guest.pid, guest.spans, token)


def changed(before: list[bytes], now: list[bytes]) -> set[int]:
    """Pages that differ, by a full compare."""
    found: set[int] = set()
    for n, (a, b) in enumerate(zip(before, now, strict=True)):
        if a != b:
            words = (np.frombuffer(a, np.uint64) != np.frombuffer(b, np.uint64)).reshape(-1, PAGE // 8).any(axis=1)
            found.update((np.flatnonzero(words) + n * (BLOCK // PAGE)).tolist())
    return found


def pages_of(ranges: NDArray[np.int64]) -> set[int]:
    return {p for start, end in (ranges // PAGE).tolist() for p in range(start, end)}


def zero(content: list[bytes], page: int) -> bool:
    block, at = divmod(page * PAGE, BLOCK)
    return not any(content[block][at : at + PAGE])


def test_a_working_guest_against_a_full_compare(guest: Traced) -> None:
    """None missed, in any pass, by another tracker in every second one. Not many are reported without need: pages that
    were written and came out as they were, such as those that the guest's kernel clears."""
    with tracked(guest) as tracker:
        with guest.paused():
            before = guest.content()
            self_probe(tracker, guest.pid, guest.spans)
            tracker.arm()
            assert guest.content() == before
        differing = reported = 0
        for n in range(CYCLES):
            guest.run(WORK[n % len(WORK)])
            if n % 2:
                tracker.close()
                tracker = resume_tracker("uffd", guest.pid, guest.spans, tracker.token())
            with guest.paused():
                seen, now = pages_of(tracker.collect()), guest.content()
                assert pages_of(tracker.collect()) == set()
            differ = changed(before, now)
            assert differ - seen == set()
            assert len(differ) > 100
            before, differing, reported = now, differing + len(differ), reported + len(seen)
        assert reported < 3 * differing, f"{reported} pages reported, {differing} differ"
        print(f"{differing} pages differed, {reported} were reported")


def test_a_guest_that_runs_while_it_is_collected(guest: Traced) -> None:
    """As when RAM is copied while the guest runs: what all the answers name together is enough."""
    with tracked(guest) as tracker:
        with guest.paused():
            before = guest.content()
            tracker.arm()
        seen: set[int] = set()
        for script in WORK[:2]:
            guest.run(f"({script}) > /dev/null 2>&1 & echo $! > /run/work")
            while guest.run("kill -0 $(cat /run/work) 2> /dev/null && echo busy; true").strip():
                seen |= pages_of(tracker.collect())
        with guest.paused():
            seen |= pages_of(tracker.collect())
            assert changed(before, guest.content()) - seen == set()


def test_pages_that_hvctl_gives_back(guest: Traced) -> None:
    """Zero pages are punched out of the file while the guest is paused; what it writes there later is seen."""
    guest.run("head -c 16m /dev/zero > /run/zeros; sync; rm /run/zeros; sync")
    with tracked(guest) as tracker, Path(guest.file).open("r+b") as file:
        with guest.paused():
            before = guest.content()
            tracker.arm()
            given = [p for p in range(guest.size // PAGE) if zero(before, p)]
            blocks = os.fstat(file.fileno()).st_blocks
            for page in given:
                ramfile.clear(file.fileno(), page * PAGE, PAGE)
            assert os.fstat(file.fileno()).st_blocks < blocks
            assert pages_of(tracker.collect()) == set()
            assert guest.content() == before
        guest.run("head -c 16m /dev/urandom > /run/noise; rm /run/noise")
        with guest.paused():
            differ = changed(before, guest.content())
            assert len(differ & set(given)) > 1000
            assert differ - pages_of(tracker.collect()) == set()


def test_pages_that_the_balloon_gives_back(guest: Traced) -> None:
    """What is missed can only be the zeros of the discard, and what the guest writes there later is seen.

    A guest whose kernel clears pages before it hands them out (init_on_alloc, as Debian's) writes what it puts into the
    balloon, and nothing at all is missed."""
    domains = guest.outside.host.domains
    size = domains.balloon(guest.uuid).actual

    def resize(to: int) -> None:
        wanted = domains.set_balloon(guest.uuid, to)
        await_true(lambda: domains.balloon(guest.uuid).actual == wanted, "the balloon has its size")

    # Pages that are not zero and that the balloon will take.
    guest.run("head -c 30m /dev/urandom > /run/noise; rm /run/noise")
    with tracked(guest) as tracker:
        with guest.paused():
            before = guest.content()
            tracker.arm()
        resize(size - (64 << 20))
        try:
            with guest.paused():
                seen, now = pages_of(tracker.collect()), guest.content()
        finally:
            resize(size)
        differ = changed(before, now)
        taken = {p for p in differ if zero(now, p)}
        assert len(taken) > 1000
        assert differ - seen <= taken
        guest.run("head -c 40m /dev/urandom > /run/noise; rm /run/noise")
        with guest.paused():
            later = changed(now, guest.content())
            assert later & taken
            assert later - pages_of(tracker.collect()) == set()


def test_qemu_is_left_as_it_was(guest: Traced) -> None:
    """Its sandbox is on and lets it through; the guest works all the time."""
    status = Path(f"/proc/{guest.pid}/status").read_text()
    assert "Seccomp:\t2\n" in status
    guest.run("(while :; do echo x > /run/tick; done) > /dev/null 2>&1 & echo $! > /run/loop")
    before = guest.descriptors()
    mappings = len(Path(f"/proc/{guest.pid}/maps").read_text().splitlines())
    for _ in range(30):
        tracker = open_tracker("uffd", guest.pid, guest.spans)
        assert sorted([*before, "anon_inode:[userfaultfd]"]) == guest.descriptors()
        tracker.close()
        end_tracker("uffd", guest.pid, guest.spans, tracker.token())
        assert before == guest.descriptors()
    assert len(Path(f"/proc/{guest.pid}/maps").read_text().splitlines()) <= mappings
    guest.run("kill $(cat /run/loop)")
    assert guest.outside.host.domains.get(guest.uuid).state.active


def test_soft_dirty_is_refused_where_the_kernel_has_it_not(guest: Traced) -> None:
    flags = [line for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("VmFlags")]
    tracker = open_tracker("soft-dirty", guest.pid, guest.spans)
    try:
        with guest.paused():
            if any(" sd" in line for line in flags):
                self_probe(tracker, guest.pid, guest.spans)
            else:
                with pytest.raises(RefusedError, match="soft-dirty misses writes"):
                    self_probe(tracker, guest.pid, guest.spans)
    finally:
        tracker.close()


def test_a_machine_reset_is_seen(doomed: Traced) -> None:
    """QEMU itself puts firmware, tables, kernel and initrd into RAM, and the guest boots over what was there."""
    doomed.run("touch /run/before")
    with tracked(doomed) as tracker:
        with doomed.paused():
            before = doomed.content()
            tracker.arm()
            subprocess.run(["virsh", "qemu-monitor-command", doomed.uuid, '{"execute":"system_reset"}'], check=True)
        await_true(lambda: booted_again(doomed), "the guest has booted again")
        with doomed.paused():
            differ = changed(before, doomed.content())
            assert len(differ) > 1000
            assert differ - pages_of(tracker.collect()) == set()


def booted_again(guest: Traced) -> bool:
    try:
        return "before" not in guest.run("ls /run").split()
    except HvctlError:  # The agent is not up yet.
        return False


def test_a_stopped_qemu_and_a_dead_one(doomed: Traced) -> None:
    parts = doomed.spans
    os.kill(doomed.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DeadlineError, match="is stopped"):
            open_tracker("uffd", doomed.pid, parts)
    finally:
        os.kill(doomed.pid, signal.SIGCONT)
    tracker = open_tracker("uffd", doomed.pid, parts)
    tracker.arm()
    doomed.outside.kill(doomed.outside.host.domains.get(doomed.uuid))
    with pytest.raises(RefusedError, match="lost its hold"):
        tracker.collect()
    tracker.close()
    end_tracker("uffd", doomed.pid, parts, tracker.token())
