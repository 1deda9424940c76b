"""The compare tracker on files in place of guest RAM: the snapshot comes back, byte for byte and hole for hole."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvctl.adapters import guestram
from hvctl.adapters.guestram import PAGE, PIECE
from hvctl.errors import HvctlError, NotFoundError, RefusedError

TMPFS = "/dev/shm"
PAGES = 3 * PIECE // PAGE + 5
# A page is a hole, zeros that are there, or one of a few contents: few, so that guest and copy often agree.
HOLE, ZEROS = None, 0
contents = st.sampled_from([HOLE, HOLE, ZEROS, 1, 2])
ram = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 90), contents), max_size=12)
untimed = settings(deadline=None, max_examples=60)
Layout = Sequence[tuple[int, int, int | None]]


@contextmanager
def files(count: int) -> Iterator[list[int]]:
    with ExitStack() as stack:
        made = [stack.enter_context(tempfile.TemporaryFile(dir=TMPFS)) for _ in range(count)]
        yield [f.fileno() for f in made]


def lay(fd: int, layout: Layout) -> None:
    os.ftruncate(fd, PAGES * PAGE)
    for first, pages, content in layout:
        for page in range(first, min(first + pages, PAGES)):
            if content is not HOLE:
                os.pwrite(fd, bytes([content]) * (PAGE - 1) + bytes([content and page % 251]), page * PAGE)


def everything(fd: int) -> bytes:
    return os.pread(fd, PAGES * PAGE + 1, 0)


def allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


@untimed
@given(ram)
def test_a_copy_is_equal_and_as_sparse(layout: Layout) -> None:
    with files(2) as (guest, stored):
        lay(guest, layout)
        os.ftruncate(stored, PAGES * PAGE)
        before = allocated(guest)
        assert guestram.copy(guest, stored) == before == allocated(stored)
        assert everything(stored) == everything(guest)
        assert allocated(guest) == before


@untimed
@given(ram, ram)
def test_restore_makes_the_guest_equal(now: Layout, then: Layout) -> None:
    with files(2) as (guest, stored):
        lay(guest, now)
        lay(stored, then)
        old, wanted, stored_size = everything(guest), everything(stored), allocated(stored)
        pages = [i for i in range(PAGES) if old[i * PAGE : i * PAGE + PAGE] != wanted[i * PAGE : i * PAGE + PAGE]]
        assert guestram.difference(guest, stored) == len(pages)
        assert everything(guest) == old
        assert guestram.restore(guest, stored) == len(pages) * PAGE
        assert everything(guest) == everything(stored) == wanted
        assert allocated(stored) == stored_size
        assert guestram.difference(guest, stored) == 0
        assert guestram.restore(guest, stored) == 0


def test_a_page_that_the_snapshot_has_not_is_given_back() -> None:
    with files(2) as (guest, stored):
        lay(guest, [(3, 200, 1)])
        lay(stored, [(100, 1, 2)])
        guestram.restore(guest, stored)
        assert allocated(guest) == PAGE


def test_one_changed_byte_is_one_page() -> None:
    with files(2) as (guest, stored):
        for fd in (guest, stored):
            lay(fd, [(0, PAGES, 1)])
        last = PAGES * PAGE - 1
        os.pwrite(guest, b"\xff", last)
        assert guestram.difference(guest, stored) == 1
        assert guestram.restore(guest, stored) == PAGE
        assert everything(guest) == everything(stored)


@settings(untimed, max_examples=25)
@given(ram, ram, st.integers(700, 3 * PAGE))
def test_short_reads_and_writes_are_finished(now: Layout, then: Layout, most: int) -> None:
    real_read, real_write = os.preadv, os.pwrite
    with files(2) as (guest, stored), pytest.MonkeyPatch.context() as patch:
        lay(guest, now)
        lay(stored, then)
        patch.setattr(os, "preadv", lambda fd, into, at: real_read(fd, [into[0][: 7 * most]], at))
        patch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, data[:most], at))
        guestram.restore(guest, stored)
        patch.undo()
        assert everything(guest) == everything(stored)


@pytest.mark.parametrize(("call", "answer"), [("pwrite", 0), ("preadv", 0)])
def test_a_kernel_that_moves_nothing_is_an_error(call: str, answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with files(2) as (guest, stored):
        lay(guest, [(0, 9, 1)])
        lay(stored, [(0, 9, 2)])
        monkeypatch.setattr(os, call, lambda *_: answer)
        with pytest.raises(HvctlError):
            guestram.restore(guest, stored)


def test_files_of_other_sizes_are_refused() -> None:
    with files(2) as (guest, stored):
        lay(guest, [])
        os.ftruncate(stored, PAGE)
        for act in (guestram.copy, guestram.restore, guestram.difference):
            with pytest.raises(RefusedError, match="bytes"):
                act(guest, stored)


def test_a_full_file_system_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with files(2) as (guest, stored):
        lay(guest, [(0, 9, 1)])
        os.ftruncate(stored, PAGES * PAGE)
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(RefusedError, match="no space"):
            guestram.copy(guest, stored)


# --- opening


@pytest.fixture
def mapped() -> Iterator[Path]:
    """A RAM file that this very process maps, as QEMU would."""
    with tempfile.NamedTemporaryFile(dir=TMPFS) as file:
        file.truncate(4 * PAGE)
        with mmap.mmap(file.fileno(), 4 * PAGE, mmap.MAP_SHARED):
            yield Path(file.name)


def test_the_mapped_file_is_opened(mapped: Path) -> None:
    with guestram.guest_ram(str(mapped), os.getpid()) as fd:
        assert os.fstat(fd).st_ino == mapped.stat().st_ino
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_file_that_was_put_in_its_place_is_refused(mapped: Path, tmp_path: Path) -> None:
    other = mapped.with_name(mapped.name + "-other")
    other.write_bytes(bytes(4 * PAGE))
    try:
        with pytest.raises(RefusedError, match="does not map"), guestram.guest_ram(str(other), os.getpid()):
            pass
    finally:
        other.unlink()
    link = tmp_path / "link"
    link.symlink_to(mapped)
    with pytest.raises(RefusedError), guestram.guest_ram(str(link), os.getpid()):
        pass


def test_a_file_that_is_mapped_only_in_part_is_refused(mapped: Path) -> None:
    os.truncate(mapped, 8 * PAGE)
    with pytest.raises(RefusedError, match="does not map"), guestram.guest_ram(str(mapped), os.getpid()):
        pass


def test_a_stored_copy_is_ours_alone_and_of_the_right_size(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    with pytest.raises(NotFoundError), guestram.stored_ram(path, PAGE):
        pass
    with guestram.stored_ram(path, 2 * PAGE, create=True):
        assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(RefusedError), guestram.stored_ram(path, 2 * PAGE, create=True):
        pass
    with pytest.raises(RefusedError, match="damaged"), guestram.stored_ram(path, PAGE):
        pass
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(RefusedError), guestram.stored_ram(link, 2 * PAGE):
        pass


def test_wiping_frees_the_pages_of_a_file_that_is_still_open() -> None:
    with tempfile.NamedTemporaryFile(dir=TMPFS, delete=False) as file:
        file.write(b"secret" * 10_000)
        file.flush()
        guestram.wipe(Path(file.name))
        assert allocated(file.fileno()) == 0
        assert not Path(file.name).exists()
        guestram.wipe(Path(file.name))
