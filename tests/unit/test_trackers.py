"""Dirty trackers on a process that maps memory as QEMU maps a guest's RAM, and soft-dirty on a page table on paper."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hvctl.adapters.ram import ramfile
from hvctl.adapters.ram.trackers import (
    Span,
    Tracker,
    end_tracker,
    open_tracker,
    resume_tracker,
    self_probe,
    spans,
    userfault,
)
from hvctl.adapters.ram.trackers.injection import system_call
from hvctl.adapters.ram.trackers.mappings import MappedSpans
from hvctl.adapters.ram.trackers.pagemap import PAGE, Pagemap, merged, runs
from hvctl.adapters.ram.trackers.softdirty import SoftDirty
from hvctl.errors import RefusedError, UnreachableError, UsageError
from tests.unit.ramchild import PAGES, TMPFS, RamChild, pages_of, ram_child

KERNEL = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
pytestmark = pytest.mark.skipif(KERNEL < (6, 7), reason="this kernel has no PAGEMAP_SCAN")

MADV_REMOVE = 9
LOST = "lost its hold"
untimed = settings(deadline=None, max_examples=60)


@pytest.fixture
def child() -> Iterator[RamChild]:
    with ram_child() as process:
        yield process


@contextmanager
def tracked(child: RamChild) -> Iterator[Tracker]:
    tracker = open_tracker("uffd", child.pid, child.spans)
    try:
        tracker.arm()
        yield tracker
    finally:
        tracker.close()


@pytest.fixture
def tracker(child: RamChild) -> Iterator[Tracker]:
    with tracked(child) as made:
        yield made


def seen(tracker: Tracker) -> list[int]:
    return pages_of(tracker.collect())


# --- where the RAM is


def test_a_split_mapping_is_found_in_all_its_parts(child: RamChild) -> None:
    (whole,) = child.spans
    assert whole.length == PAGES * PAGE
    child("advise", 100, 10, mmap.MADV_DONTDUMP)
    parts = child.spans
    assert [(s.offset // PAGE, s.length // PAGE) for s in parts] == [(0, 100), (100, 10), (110, PAGES - 110)]
    assert all(s.address - s.offset == whole.address for s in parts)
    with tracked(child) as tracker:
        child("write", 0, 99, 100, 109, 110, PAGES - 1)
        assert (tracker.collect() // PAGE).tolist() == [[0, 1], [99, 101], [109, 111], [PAGES - 1, PAGES]]


def test_only_shared_mappings_count() -> None:
    with tempfile.TemporaryFile(dir=TMPFS) as file:
        file.truncate(PAGE)
        with mmap.mmap(file.fileno(), PAGE, mmap.MAP_PRIVATE):
            assert spans(os.getpid(), os.fstat(file.fileno())) == ()
        with mmap.mmap(file.fileno(), PAGE, mmap.MAP_SHARED):
            assert [s.length for s in spans(os.getpid(), os.fstat(file.fileno()))] == [PAGE]


@pytest.mark.parametrize("text", [False, True], ids=["by ioctl", "by text"])
def test_a_mapping_that_changed_is_seen(child: RamChild, text: bool, tmp_path: Path) -> None:
    """By text: on a kernel before 6.11, in whose place a plain file refuses the ioctl."""
    real, copy = Path(f"/proc/{child.pid}/maps"), tmp_path / str(child.pid) / "maps"
    copy.parent.mkdir()

    def whole() -> bool:
        copy.write_bytes(real.read_bytes() if real.exists() else b"")
        return mapped.whole()

    copy.write_bytes(real.read_bytes())
    mapped = MappedSpans(child.pid, child.spans, tmp_path if text else real.parent.parent)
    try:
        assert whole()
        child("advise", 5, 5, mmap.MADV_DONTDUMP)
        assert whole()
        child("unmap", 700, 1)
        assert not whole()
        child("remap", 700, 1)
        assert whole()
        child.kill()
        assert not whole()
    finally:
        mapped.close()


# --- ranges


pieces = st.lists(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=6), max_size=4)


@untimed
@given(pieces)
def test_merging_keeps_exactly_the_pages(pieces: list[list[tuple[int, int]]]) -> None:
    arrays = [np.array([(a * PAGE, (a + n) * PAGE) for a, n in piece], np.int64).reshape(-1, 2) for piece in pieces]
    ranges = merged(arrays)
    assert pages_of(ranges) == sorted({p for piece in pieces for a, n in piece for p in range(a, a + n)})


@untimed
@given(st.lists(st.booleans(), max_size=40))
def test_runs_of_a_table(which: list[bool]) -> None:
    assert pages_of(runs(7 * PAGE, np.array(which, bool))) == [7 + i for i, is_set in enumerate(which) if is_set]


# --- userfaultfd: what is seen


step = st.one_of(
    st.tuples(st.sampled_from(["write", "read", "ours"]), st.integers(0, PAGES - 1), st.just(1)),
    st.tuples(
        st.sampled_from(["write_run", "punch", "balloon", "remove", "ours_punch"]),
        st.integers(0, PAGES - 1),
        st.integers(1, 1200),
    ),
    st.tuples(st.sampled_from(["collect", "collect", "resume", "arm"]), st.just(0), st.just(0)),
)


@pytest.fixture(scope="module")
def lasting() -> Iterator[RamChild]:
    with ram_child() as process:
        yield process


@untimed
@given(steps=st.lists(step, max_size=25))
def test_exactly_the_written_pages_are_seen(lasting: RamChild, steps: list[tuple[str, int, int]]) -> None:
    """Whatever is done beside it: reads, writes of other processes, pages punched out by us or by the process. A page
    that is discarded stays what it was, clean or written, and what is written into it afterwards is seen."""
    tracker = open_tracker("uffd", lasting.pid, lasting.spans)
    written: set[int] = set()
    try:
        tracker.arm()
        for name, page, count in [*steps, ("collect", 0, 0)]:
            count = min(count, PAGES - page)
            match name:
                case "write" | "read":
                    lasting(name, page)
                    written |= {page} if name == "write" else set()
                case "write_run":
                    lasting(name, page, page + count)
                    written |= set(range(page, page + count))
                case "ours":
                    os.pwrite(lasting.fd, b"x" * PAGE, page * PAGE)
                case "ours_punch":
                    ramfile.clear(lasting.fd, page * PAGE, count * PAGE)
                case "punch" | "balloon":
                    lasting(name, page, count)
                case "remove":
                    lasting("advise", page, count, MADV_REMOVE)
                case "arm":
                    tracker.arm()
                    written.clear()
                case "resume":
                    tracker.close()
                    tracker = resume_tracker("uffd", lasting.pid, lasting.spans, tracker.token())
                case "collect":
                    assert seen(tracker) == sorted(written)
                    written.clear()
    finally:
        tracker.close()


def test_a_full_vector_is_gone_on_with(child: RamChild, tracker: Tracker) -> None:
    pages = [*range(1, 1000, 2), *range(1500, 1600)]
    child("write", *pages)
    (span,) = child.spans
    small = Pagemap(child.pid, regions=3)
    try:
        answers = list(small.take_written(span.address, span.address + span.length))
    finally:
        small.close()
    assert len(answers) > len(pages) // 2 // 3
    assert max(map(len, answers)) == 3
    assert pages_of(merged(answers) - span.address) == pages
    assert seen(tracker) == []


def test_nothing_is_lost_while_the_process_runs(child: RamChild, tracker: Tracker) -> None:
    """Every page that was written is in one of the answers, also when written in the middle of a collect."""
    child("sweep", 0, PAGES, 7)
    found: set[int] = set()
    while PAGES - 1 not in found:
        found |= set(seen(tracker))
    child("end_sweep")
    found |= set(seen(tracker))
    assert found == set(range(PAGES))


@pytest.mark.parametrize("folder", [TMPFS, "/var/tmp"])
def test_writes_of_the_kernel_are_seen(child: RamChild, tracker: Tracker, folder: str) -> None:
    """As when QEMU reads a disk into guest RAM; with O_DIRECT the device writes pages that the kernel has pinned."""
    with tempfile.NamedTemporaryFile(dir=folder) as disk:
        disk.write(b"sector" * PAGE)
        disk.flush()
        for page, direct in ((5, False), (9, folder != TMPFS)):
            assert child("receive", page, disk.name, direct) == PAGE
            assert os.pread(child.fd, 6, page * PAGE) == b"sector"
            assert seen(tracker) == [page]


def test_a_fork_takes_nothing_away(child: RamChild, tracker: Tracker) -> None:
    """The fork is another process, with page tables of its own: what it writes is not seen, and QEMU cannot fork."""
    child("fork_write", 3)
    child("write", 4)
    assert seen(tracker) == [4]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a tmpfs")
def test_huge_pages_of_tmpfs_are_tracked_page_by_page(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=always", "hvctl-test", tmp_path], check=True)
    try:
        fd = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT)
    finally:
        # The open file keeps the file system, which nobody else can reach.
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
    try:
        with ram_child(fd=fd) as child:
            child("advise", 0, PAGES, mmap.MADV_HUGEPAGE)
            child("write_run", 0, PAGES)
            assert huge_bytes(child) == PAGES * PAGE
            with tracked(child) as tracker:
                assert seen(tracker) == []
                child("write", 0, 513, 600)
                child("read", 700)
                assert seen(tracker) == [0, 513, 600]
                child("write_run", 512, 1024)
                child("balloon", 1024, 512)
                child("write", 1030)
                assert seen(tracker) == [*range(512, 1024), 1030]
    finally:
        os.close(fd)


def huge_bytes(child: RamChild) -> int:
    lines = Path(f"/proc/{child.pid}/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("ShmemPmdMapped", "FilePmdMapped"))) << 10


# --- userfaultfd: its life in the process


def test_another_process_goes_on_by_the_token(child: RamChild) -> None:
    with tracked(child) as tracker:
        token = tracker.token()
    script = """
import json, os, sys
from hvctl.adapters.ram.trackers import resume_tracker, spans, userfault
userfault.system_call = None  # no tracing
pid, fd, token = json.loads(sys.argv[1])
tracker = resume_tracker("uffd", pid, spans(pid, os.fstat(fd)), token)
print((tracker.collect() // 4096).tolist())
tracker.close()
"""
    argument = json.dumps([child.pid, child.fd, token])
    for page in (3, 8):
        child("write", page)
        command = [sys.executable, "-c", script, argument]
        done = subprocess.run(command, pass_fds=[child.fd], check=True, capture_output=True, text=True)
        assert json.loads(done.stdout) == [[page, page + 1]]
    assert child.userfaults() == [int(token.split(":")[0])]


def test_one_descriptor_while_tracked_and_none_afterwards(child: RamChild) -> None:
    def descriptors() -> tuple[int, int]:
        return len(list(Path(f"/proc/{child.pid}/fd").iterdir())), len(list(Path("/proc/self/fd").iterdir()))

    theirs, ours = descriptors()
    for _ in range(3):
        tracker = open_tracker("uffd", child.pid, child.spans)
        token = tracker.token()
        # Opened twice, as after an hvctl that died before it could note the token.
        again = open_tracker("uffd", child.pid, child.spans)
        assert again.token() == token
        again.close()
        tracker.close()
        assert descriptors() == (theirs + 1, ours)
        resume_tracker("uffd", child.pid, child.spans, token).close()
        assert descriptors() == (theirs + 1, ours)
        for _ in range(2):
            end_tracker("uffd", child.pid, child.spans, token)
            assert descriptors() == (theirs, ours)
        with pytest.raises(RefusedError, match="not the userfaultfd of an earlier hvctl"):
            resume_tracker("uffd", child.pid, child.spans, token)
    flags = [line for line in Path(f"/proc/{child.pid}/smaps").read_text().splitlines() if line.startswith("VmFlags")]
    assert not any(" uw" in line for line in flags)


def test_what_a_killed_hvctl_left_is_used_and_the_rest_ended(child: RamChild) -> None:
    """It may have died right after the system call that made the descriptor."""
    left = [system_call(child.pid, 323, os.O_CLOEXEC | os.O_NONBLOCK | 1) for _ in range(3)]
    assert child.userfaults() == left
    with tracked(child) as tracker:
        assert child.userfaults() == left[:1]
        child("write", 2)
        assert seen(tracker) == [2]


def test_the_descriptor_does_not_survive_an_exec(child: RamChild, tracker: Tracker) -> None:
    info = Path(f"/proc/{child.pid}/fdinfo/{tracker.token().split(':')[0]}").read_text()
    flags = next(int(line.split()[1], 8) for line in info.splitlines() if line.startswith("flags"))
    assert flags & os.O_CLOEXEC


def test_a_process_with_a_userfaultfd_of_its_own_is_refused(child: RamChild) -> None:
    own = child("own_userfault", 10, 1)
    with pytest.raises(RefusedError, match="uses userfaultfd itself"):
        open_tracker("uffd", child.pid, child.spans)
    assert child.userfaults() == [own]


def test_a_kernel_that_cannot_is_seen_before_the_process_is_touched(
    child: RamChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(userfault, "_FEATURES", 1 << 60)
    monkeypatch.setattr(userfault, "system_call", None)
    with pytest.raises(RefusedError, match=r"takes 6\.7 or newer"):
        open_tracker("uffd", child.pid, child.spans)


def test_the_tracker_of_another_life_is_refused(child: RamChild, tracker: Tracker) -> None:
    number, inode, started = tracker.token().split(":")
    others = [f"{number}:{inode}:{int(started) + 1}", f"{number}:{int(inode) + 1}:{started}", "0:1:2", "nonsense", ""]
    for token in others:
        with pytest.raises(RefusedError, match="not the userfaultfd of an earlier hvctl"):
            resume_tracker("uffd", child.pid, child.spans, token)
        end_tracker("uffd", child.pid, child.spans, token)
    assert child.userfaults() == [int(number)]


# --- userfaultfd: its hold


def lost(child: RamChild, tracker: Tracker) -> None:
    for ask in (tracker.collect, tracker.arm, tracker.collect):
        with pytest.raises(RefusedError, match=LOST):
            ask()


def test_part_of_the_ram_unmapped(child: RamChild, tracker: Tracker) -> None:
    child("unmap", 1000, 24)
    lost(child, tracker)


def test_part_of_the_ram_mapped_anew(child: RamChild, tracker: Tracker) -> None:
    """As QEMU does with a page that the hardware gave up. The new mapping is not tracked."""
    before = child.spans
    child("remap", 1000, 1)
    lost(child, tracker)
    for parts in (before, child.spans):
        with pytest.raises(RefusedError, match=LOST):
            _resume_whole(child, parts, tracker.token())


def _resume_whole(child: RamChild, parts: tuple[Span, ...], token: str) -> None:
    tracker = resume_tracker("uffd", child.pid, parts, token)
    try:
        tracker.collect()
    finally:
        tracker.close()


def test_the_descriptor_closed_inside(child: RamChild, tracker: Tracker) -> None:
    token = tracker.token()
    other = resume_tracker("uffd", child.pid, child.spans, token)
    end_tracker("uffd", child.pid, child.spans, token)
    lost(child, tracker)
    lost(child, other)
    other.close()


def test_the_process_gone(child: RamChild, tracker: Tracker) -> None:
    token, parts = tracker.token(), child.spans
    child("write", 5)
    child.kill()
    lost(child, tracker)
    with pytest.raises(RefusedError):
        resume_tracker("uffd", child.pid, parts, token)
    with pytest.raises(UnreachableError, match="is gone"):
        open_tracker("uffd", child.pid, parts)
    end_tracker("uffd", child.pid, parts, token)


# --- the probe


def test_the_probe_passes_and_changes_nothing(child: RamChild, tracker: Tracker) -> None:
    child("write", 3, 4, 5, 100, 101, 1900, 1901, PAGES - 1)
    content, blocks = os.pread(child.fd, PAGES * PAGE, 0), os.fstat(child.fd).st_blocks
    self_probe(tracker, child.pid, child.spans)
    assert os.pread(child.fd, PAGES * PAGE, 0) == content
    assert os.fstat(child.fd).st_blocks == blocks
    tracker.arm()
    assert seen(tracker) == []


def test_the_probe_finds_the_only_page(child: RamChild, tracker: Tracker) -> None:
    with pytest.raises(RefusedError, match="nothing to try a tracker on"):
        self_probe(tracker, child.pid, child.spans)
    child("write", 1234)
    self_probe(tracker, child.pid, child.spans)


class Liar:
    """What a tracker says, changed."""

    kind = "uffd"

    def __init__(self, tracker: Tracker, change: str) -> None:
        self._tracker, self._change, self._answers = tracker, change, 0

    def arm(self, where: NDArray[np.int64] | None = None) -> None:
        self._tracker.arm(where)

    def collect(self, where: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        answer, self._answers = self._tracker.collect(where), self._answers + 1
        match self._change:
            case "all clean":
                return answer[:0]
            case "misses the last":
                return answer[:-1]
            case "all written":
                return np.array([[0, PAGES * PAGE]], np.int64)
            case "one too many":
                return merged([answer, np.array([[100 * PAGE, 101 * PAGE]], np.int64)])
            case "never armed again" if self._answers > 1:
                return answer[:0]
            case "absent pages too":
                return merged([answer, np.array([[200 * PAGE, 1900 * PAGE]], np.int64)])
        return answer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("all clean", "misses writes: 3 of 3"),
        ("misses the last", "misses writes: 1 of 3"),
        ("never armed again", "misses writes"),
        ("all written", "sees writes where there are none"),
        ("one too many", "sees writes where there are none"),
        ("absent pages too", None),
        ("nothing", None),
    ],
)
def test_a_tracker_that_lies_does_not_pass(child: RamChild, tracker: Tracker, change: str, reason: str | None) -> None:
    child("write", 3, 4, 5, 100, 101, 1900, 1901, PAGES - 1)
    if reason is None:
        self_probe(Liar(tracker, change), child.pid, child.spans)
    else:
        with pytest.raises(RefusedError, match=reason):
            self_probe(Liar(tracker, change), child.pid, child.spans)


def test_soft_dirty_passes_its_probe_exactly_where_the_kernel_has_it(child: RamChild) -> None:
    """Without it clear_refs succeeds and every page is clean for ever."""
    child("write_run", 0, PAGES)
    has_it = any(
        " sd" in line for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("VmFlags")
    )
    tracker = open_tracker("soft-dirty", child.pid, child.spans)
    try:
        if has_it:
            self_probe(tracker, child.pid, child.spans)
        else:
            with pytest.raises(RefusedError, match="soft-dirty misses writes: 3 of 3"):
                self_probe(tracker, child.pid, child.spans)
    finally:
        tracker.close()
    resume_tracker("soft-dirty", child.pid, child.spans, tracker.token()).close()
    with pytest.raises(RefusedError, match="not the one that was tracked"):
        resume_tracker("soft-dirty", child.pid, child.spans, "1")


def test_a_tracker_that_does_not_exist_is_a_usage_error(child: RamChild) -> None:
    for act in (lambda: open_tracker("magic", 1, ()), lambda: resume_tracker("magic", 1, (), "")):
        with pytest.raises(UsageError, match="magic"):
            act()


# --- soft-dirty on paper

PID = 77
PRESENT, SOFT_DIRTY = 1 << 63, 1 << 55
PARTS = (Span(100 * PAGE, 0, 30 * PAGE), Span(300 * PAGE, 30 * PAGE, 10 * PAGE))


class Paper:
    """/proc of a process whose page table the test writes."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc
        (proc / str(PID)).mkdir()
        stat = f"{PID} (qemu) " + " ".join(map(str, range(3, 53)))
        for name, content in {"maps": self.maps(), "clear_refs": "", "pagemap": "", "stat": stat}.items():
            (proc / str(PID) / name).write_text(content)
        self.fill({})

    def maps(self) -> str:
        lines = [f"{s.address:x}-{s.address + s.length:x} rw-s {s.offset:x} 00:13 55 /dev/shm/ram\n" for s in PARTS]
        return "1000-2000 r-xp 00000000 00:10 4 /bin/a b\n" + "".join(lines)

    def fill(self, entries: dict[int, int], pages: int = 400) -> None:
        table: NDArray[Any] = np.zeros(pages, np.uint64)
        for span in PARTS:
            table[span.address // PAGE :][: span.length // PAGE] = PRESENT
        for page, entry in entries.items():
            table[page] = entry
        (self.proc / str(PID) / "pagemap").write_bytes(table[:pages].tobytes())

    def cleared(self) -> str:
        text = (self.proc / str(PID) / "clear_refs").read_text()
        (self.proc / str(PID) / "clear_refs").write_text("")
        return text


@pytest.fixture
def paper(tmp_path: Path) -> Paper:
    return Paper(tmp_path)


@pytest.mark.parametrize("entries", [1, 7, 65536])
def test_soft_dirty_bits_are_read_and_cleared(paper: Paper, entries: int) -> None:
    tracker = SoftDirty(PID, PARTS, paper.proc)
    tracker._pagemap._entries = entries
    tracker.arm()
    assert paper.cleared() == "4"
    assert seen(tracker) == []
    assert paper.cleared() == "4"
    dirty = PRESENT | SOFT_DIRTY
    paper.fill({99: dirty, 100: dirty, 101: dirty, 129: dirty, 130: dirty, 300: dirty, 309: dirty, 310: dirty})
    # 129 and 300 are neighbours in the file.
    assert (tracker.collect() // PAGE).tolist() == [[0, 2], [29, 31], [39, 40]]
    # A page whose entry is gone may have been written before.
    paper.fill({105: 0, 106: SOFT_DIRTY, 107: 1 << 62})
    assert seen(tracker) == [5, 6, 7]
    tracker.close()


def test_soft_dirty_of_a_dead_process_is_an_error(paper: Paper) -> None:
    tracker = SoftDirty(PID, PARTS, paper.proc)
    paper.fill({}, pages=309)
    with pytest.raises(RefusedError, match=LOST):
        tracker.collect()
    assert paper.cleared() == ""
    paper.fill({})
    assert seen(tracker) == []
    for name, content in (("maps", ""), ("maps", paper.maps().replace(" 55 ", " 56 "))):
        (paper.proc / str(PID) / name).write_text(content)
        with pytest.raises(RefusedError, match=LOST):
            tracker.collect()
    (paper.proc / str(PID) / "maps").write_text(paper.maps())
    (paper.proc / str(PID) / "clear_refs").unlink()
    (paper.proc / str(PID) / "clear_refs").mkdir()
    with pytest.raises(RefusedError, match=LOST):
        tracker.collect()
    tracker.close()
