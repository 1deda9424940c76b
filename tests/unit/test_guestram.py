"""The compare tracker on RAM that this process maps: the snapshot comes back, byte for byte and page for page."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram import ramcompare, ramfile
from hvctl.adapters.ram.guestram import GuestRam
from hvctl.adapters.ram.layers import INDEX, RAM, Chain, Layer, Writer
from hvctl.adapters.ram.pages import PAGE
from hvctl.errors import HvctlError, NotFoundError, RefusedError
from hvctl.model.vm import Region
from unit.ramlab import PAGES, SIZES, Lab, Layout, folder, lab, layouts, unlike

UNLIMITED = 1 << 40
untimed = settings(deadline=None, max_examples=60)


@contextmanager
def stored(guest: Lab) -> Iterator[Chain]:
    """All of RAM as it is now, as a snapshot without a parent has it."""
    with folder() as place:
        store(guest, place)
        with Chain([place], guest.ram.pages) as chain:
            yield chain


def store(guest: Lab, place: Path) -> int:
    writer = Writer(place, guest.ram.pages, base=False, limit=UNLIMITED)
    try:
        data = guest.ram.data()
        writer.store(guest.ram, pg.union(*(pg.span(first, last) for first, last in data)))
        return writer.finish()
    finally:
        writer.close()


def holds(chain: Chain) -> bytes:
    """Everything that a snapshot says RAM is."""
    own = np.zeros((chain.pages, PAGE), np.uint8)
    source = chain.locate(pg.span(0, chain.pages))
    filled = np.flatnonzero(source)
    pg.read(own.ctypes.data + filled * PAGE, source[filled])
    return own.tobytes()


@untimed
@given(layouts)
def test_a_copy_is_equal_and_as_sparse(layout: Layout) -> None:
    with lab() as guest, folder() as place:
        guest.lay(layout)
        before, content = guest.allocated(), guest.everything()
        filled = unlike(content, bytes(PAGES * PAGE))
        assert store(guest, place) == len(filled) * PAGE == (place / RAM).stat().st_size
        assert guest.allocated() == before, "reading RAM made pages of its holes"
        with Chain([place], PAGES) as chain:
            assert holds(chain) == content
            assert np.flatnonzero(chain.nonzero()).tolist() == filled


@untimed
@given(layouts, layouts)
def test_restore_makes_the_guest_equal(now: Layout, then: Layout) -> None:
    with lab() as guest:
        guest.lay(then)
        wanted = guest.everything()
        with stored(guest) as chain:
            guest.lay(now)
            old = guest.everything()
            pages = unlike(old, wanted)
            assert ramcompare.difference(guest.ram, chain).tolist() == pages
            assert guest.everything() == old
            assert ramcompare.restore(guest.ram, chain).tolist() == pages
            assert guest.everything() == wanted == holds(chain)
            assert ramcompare.difference(guest.ram, chain).size == 0
            assert ramcompare.restore(guest.ram, chain).size == 0


@untimed
@given(layouts, layouts, st.sets(st.integers(0, PAGES - 1)))
def test_writing_the_pages_that_a_tracker_found_is_a_restore_of_them(
    now: Layout, then: Layout, found: set[int]
) -> None:
    with lab() as guest:
        guest.lay(then)
        wanted = guest.everything()
        with stored(guest) as chain:
            guest.lay(now)
            old = guest.everything()
            pages = np.array(sorted(found), np.int64)
            assert ramcompare.write(guest.ram, chain, pages) == len(found) * PAGE
            got = guest.everything()
            assert unlike(got, old) == [p for p in unlike(old, wanted) if p in found]
            assert not set(unlike(got, wanted)) & found


def test_a_page_that_the_snapshot_has_not_is_given_back_by_a_compare() -> None:
    with lab() as guest:
        guest.lay([(100, 1, 2)])
        with stored(guest) as chain:
            guest.fill([(3, PAGES, 1)])
            assert guest.allocated() > 100 * PAGE
            ramcompare.restore(guest.ram, chain)
            assert guest.allocated() == PAGE


@pytest.mark.parametrize(("kept", "left"), [(136, 1 + 136), (135, 1 + 40)])
def test_zero_pages_stay_unless_they_are_many_and_in_a_row(
    kept: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what never existed nothing is made but right behind what did, whatever a tracker says of it."""
    monkeypatch.setattr(ramcompare, "_KEPT", kept)
    with lab() as guest:
        guest.lay([(100, 1, 2)])
        wanted = guest.everything()
        with stored(guest) as chain:
            guest.fill([(60, 40, 1), (110, 70, 1)])
            ramcompare.write(guest.ram, chain, pg.span(0, PAGES))
            assert guest.everything() == wanted
            assert guest.allocated() == left * PAGE


def test_what_is_foreseen_is_not_touched() -> None:
    with lab() as guest:
        guest.lay([(0, 50, 1), (120, 40, 2)])
        with stored(guest) as chain:
            guest.fill([(10, 30, 2), (60, 5, 1)])
            before, size = guest.everything(), guest.allocated()
            ramcompare.foresee(guest.ram, chain, np.array([*range(10, 40), *range(60, 65), 150], np.int64))
            ramcompare.foresee(guest.ram, chain, pg.NONE)
            assert (guest.everything(), guest.allocated()) == (before, size)


@pytest.mark.parametrize("sizes", [(3 * pg.CHUNK,), (700, 1300), (pg.CHUNK + 256, 256, 2 * pg.CHUNK + 1)])
def test_outside_the_chunks_in_use_everything_is_zero(sizes: tuple[int, ...]) -> None:
    last = sum(sizes) - 1
    with lab(sizes) as guest:
        assert not guest.ram.used().any()
        for page in (0, pg.CHUNK - 1, pg.CHUNK, sizes[0] - 1, min(sizes[0], last), last):
            guest.lay([(page, 1, 1)])
            (first, end), *more = (pg.chunk_ranges(guest.ram.used()) // PAGE).tolist()
            assert first <= page < end <= first + 2 * pg.CHUNK
            assert not more
            for known in (guest.ram.used(), ~guest.ram.used(), np.zeros_like(guest.ram.used())):
                assert (guest.ram.used(known) == (guest.ram.used() | known)).all()
            with stored(guest) as chain:
                assert np.flatnonzero(chain.used()).tolist() == [page // pg.CHUNK]


def test_the_chunks_in_use_are_asked_about_when_ram_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = ramfile.used
    monkeypatch.setattr(ramfile, "used", lambda fd, *rest: asked.append(fd) or real(fd, *rest))

    def used(known: list[int] | None) -> tuple[list[int], bool]:
        asked.clear()
        given = None
        if known is not None:
            given = np.zeros(4, np.bool_)
            given[known] = True
        return np.flatnonzero(guest.ram.used(given)).tolist(), bool(asked)

    with lab((4 * pg.CHUNK,)) as guest:
        guest.put(0, b"a")
        assert used([]) == ([0], True)
        assert used([]) == ([0], False)
        assert used([3]) == ([0, 3], False)
        guest.put(1, b"b")
        guest.put(2 * pg.CHUNK, b"c")
        assert used([]) == ([0, 2], True)
        # As much as before, elsewhere: who knows nothing asks, and whoever cleared pages, too.
        guest.punch(2 * pg.CHUNK)
        guest.put(3 * pg.CHUNK, b"d")
        assert used(None) == ([0, 3], True)
        guest.ram.clear(np.array([1], np.int64))
        guest.put(pg.CHUNK, b"e")
        assert used([]) == ([0, 1, 3], True)


def test_one_changed_byte_is_one_page() -> None:
    last = SIZES[0] - 1, PAGES - 1
    with lab() as guest:
        guest.lay([(0, PAGES, 1)])
        content = guest.everything()
        with stored(guest) as chain:
            for page in last:
                guest.put(page, b"\xff", PAGE - 1)
            assert ramcompare.difference(guest.ram, chain).tolist() == list(last)
            assert ramcompare.restore(guest.ram, chain).tolist() == list(last)
            assert guest.everything() == content


@settings(untimed, max_examples=25)
@given(layouts, layouts, st.integers(700, 3 * PAGE))
def test_short_reads_and_writes_are_finished(now: Layout, then: Layout, most: int) -> None:
    real_read, real_write = os.preadv, os.pwrite
    with lab() as guest, pytest.MonkeyPatch.context() as patch:
        guest.lay(then)
        wanted = guest.everything()
        with stored(guest) as chain:
            guest.lay(now)
            patch.setattr(os, "preadv", lambda fd, into, at: real_read(fd, [into[0][: 7 * most]], at))
            patch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, data[:most], at))
            ramcompare.restore(guest.ram, chain)
            patch.undo()
        assert guest.everything() == wanted


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_a_kernel_that_moves_nothing_is_an_error(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with lab() as guest:
        guest.lay([(0, 9, 2)])
        with stored(guest) as chain:
            guest.lay([(0, 9, 1)])
            monkeypatch.setattr(os, call, lambda *_: 0)
            with pytest.raises(HvctlError):
                ramcompare.restore(guest.ram, chain)


def test_layers_of_another_size_are_refused() -> None:
    with lab() as guest, folder() as place:
        guest.lay([])
        store(guest, place)
        for pages in (PAGES - 1, PAGES + 1, 0):
            with pytest.raises(RefusedError, match="damaged"):
                Chain([place], pages)


def test_a_full_file_system_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with lab() as guest, folder() as place:
        guest.lay([(0, 9, 1)])
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(RefusedError, match="no space"):
            store(guest, place)


# --- opening


def open_files() -> set[str]:
    return {p.name for p in Path("/proc/self/fd").iterdir()}


def opened(*regions: Region) -> GuestRam:
    return GuestRam(regions, os.getpid())


def test_the_mapped_files_are_opened_and_let_go() -> None:
    before = open_files()
    with lab() as guest:
        held = open_files()
        assert (guest.ram.pages, guest.ram.regions) == (PAGES, guest.regions)
        with opened(*guest.regions) as again:
            assert again.regions == guest.regions
        assert open_files() == held
    assert open_files() == before


def test_where_the_process_has_it_is_told_in_pages_of_the_row() -> None:
    with lab() as guest:
        for page in (0, SIZES[0] - 1, SIZES[0], PAGES - 1):
            span = next(s for s in guest.ram.spans() if s.offset <= page * PAGE < s.offset + s.length)
            address = span.address + page * PAGE - span.offset
            assert guest.ram.pages_at(address, address + PAGE).tolist() == [page]
            assert guest.ram.pages_at(address + 1, address + 2).tolist() == [page]
        first = guest.ram.spans()[0]
        with pytest.raises(RefusedError, match="not guest RAM"):
            guest.ram.pages_at(first.address + first.length - PAGE, first.address + first.length + PAGE)
        with pytest.raises(RefusedError, match="not guest RAM"):
            guest.ram.pages_at(0, PAGE)


def test_a_file_that_was_put_in_its_place_is_refused(tmp_path: Path) -> None:
    with lab() as guest, tempfile.NamedTemporaryFile(dir="/dev/shm") as other:
        (first, *_) = guest.regions
        other.truncate(first.size)
        with pytest.raises(RefusedError, match="does not map"):
            opened(Region(first.name, other.name, first.size))
        link = tmp_path / "link"
        link.symlink_to(first.path)
        with pytest.raises(RefusedError):
            opened(Region(first.name, str(link), first.size))


def test_a_file_that_is_mapped_only_in_part_is_refused() -> None:
    with lab() as guest:
        (first, *_) = guest.regions
        guest.files[0].truncate(first.size + PAGE)
        with pytest.raises(RefusedError, match="does not map"):
            opened(Region(first.name, first.path, first.size + PAGE))


def test_files_of_other_sizes_are_refused() -> None:
    with lab() as guest:
        first, second = guest.regions
        for size in (first.size - PAGE, first.size + PAGE, 0):
            with pytest.raises(RefusedError, match="bytes of RAM"):
                opened(Region(first.name, first.path, size))
        held = open_files()
        with pytest.raises(RefusedError):
            opened(first, Region(second.name, second.path, PAGE))
        assert open_files() == held, "the first one stayed open"


def test_a_stored_copy_is_ours_alone_and_of_the_right_size(tmp_path: Path) -> None:
    with lab() as guest, folder() as place:
        with pytest.raises(NotFoundError):
            Layer(place, PAGES)
        guest.lay([(0, 5, 1)])
        store(guest, place)
        assert [(place / name).stat().st_mode & 0o777 for name in (RAM, INDEX)] == [0o600, 0o600]
        (place / RAM).replace(place / "elsewhere")
        (place / RAM).symlink_to(place / "elsewhere")
        with pytest.raises(RefusedError):
            Layer(place, PAGES)


def test_what_lay_in_the_place_of_a_copy_is_replaced() -> None:
    with lab() as guest, folder() as place:
        (place / RAM).write_bytes(b"x" * 7)
        (place / RAM).chmod(0o644)
        guest.lay([(0, 5, 1)])
        store(guest, place)
        assert (place / RAM).stat().st_mode & 0o777 == 0o600
        with Chain([place], PAGES) as chain:
            assert holds(chain) == guest.everything()


def test_wiping_frees_the_pages_of_a_file_that_is_still_open() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm", delete=False) as file:
        file.write(b"secret" * 10_000)
        file.flush()
        ramfile.wipe(Path(file.name))
        assert os.fstat(file.fileno()).st_blocks == 0
        assert not Path(file.name).exists()
        ramfile.wipe(Path(file.name))
