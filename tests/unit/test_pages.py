"""Sets of pages as numpy arrays, against Python's own sets; and moving many pages through the kernel."""

from __future__ import annotations

import itertools
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram.guestram import address_of
from hvctl.adapters.ram.pages import CHUNK, PAGE
from hvctl.errors import HvctlError

sets = st.sets(st.integers(0, 300)).map(sorted)


def array(pages: list[int]) -> np.ndarray:
    return np.array(pages, np.int64)


@given(sets)
def test_runs_are_what_neighbours_make(pages: list[int]) -> None:
    runs = pg.runs(array(pages)).tolist()
    assert [p for first, count in runs for p in range(first, first + count)] == pages
    assert all(one[0] + one[1] < two[0] for one, two in itertools.pairwise(runs)), "no two that touch"
    assert all(count > 0 for _, count in runs)


@given(st.lists(st.tuples(st.integers(1, 9 * PAGE), st.integers(1, 9 * PAGE)), max_size=12))
def test_spans_of_bytes_are_the_pages_that_they_touch(parts: list[tuple[int, int]]) -> None:
    """Sorted and disjoint, as a kernel tells them; a page in two of them comes once in each."""
    spans, at = [], 0
    for gap, length in parts:
        start = -(-(at + gap) // PAGE) * PAGE
        spans.append((start, start + length))
        at = start + length
        at = -(-at // PAGE) * PAGE
    found = pg.of_spans(np.array(spans, np.int64).reshape(-1, 2))
    assert found.tolist() == [p for a, b in spans for p in range(a // PAGE, -(-b // PAGE))]
    assert found.dtype == np.int64


@given(st.lists(sets, max_size=4))
def test_a_union_is_sorted_and_has_each_once(some: list[list[int]]) -> None:
    assert pg.union(*map(array, some)).tolist() == sorted({p for pages in some for p in pages})


@given(st.lists(st.booleans(), max_size=20))
def test_ranges_of_chunks_are_whole_and_joined(chunks: list[bool]) -> None:
    ranges = pg.chunk_ranges(np.array(chunks, np.bool_)).tolist()
    size = CHUNK * PAGE
    assert [n for a, b in ranges for n in range(a // size, b // size)] == [n for n, on in enumerate(chunks) if on]
    assert all(one[1] < two[0] for one, two in itertools.pairwise(ranges))


# --- moving


@contextmanager
def memory(pages: int) -> Iterator[tuple[mmap.mmap, int]]:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(pages * PAGE)
        with mmap.mmap(file.fileno(), pages * PAGE, mmap.MAP_SHARED) as there:
            yield there, address_of(there)


ROW = 500


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, ROW - 1), unique=True, max_size=ROW), st.randoms())
def test_pages_come_from_and_go_to_where_they_should(places: list[int], random: object) -> None:
    """As numpy itself would copy them, in any order and with any neighbours."""
    own = np.random.default_rng(random.randrange(1 << 30)).integers(0, 256, (ROW, PAGE), np.uint8)  # type: ignore[attr-defined]
    into = places.copy()
    random.shuffle(into)  # type: ignore[attr-defined]
    with memory(ROW) as (there, base):
        seen = np.frombuffer(there, np.uint8).reshape(ROW, PAGE)
        model = seen.copy()
        pg.write(own.ctypes.data + array(places) * PAGE, base + array(into) * PAGE)
        model[into] = own[places]
        assert (seen == model).all()
        back = np.zeros_like(own)
        pg.read(back.ctypes.data + array(into) * PAGE, base + array(into) * PAGE)
        assert (back[into] == own[places]).all()
        assert not np.delete(back, into, axis=0).any()
        del seen


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("pages", [1, 63, 64, 65, 1023, 1024, 1025, 2048, 2049, 5000])
def test_more_pages_than_one_call_takes(pages: int, step: int) -> None:
    """One by one (a vector each), and neighbours (long vectors, which are cut): no page is moved twice or left out."""
    size = pages * step
    places = np.arange(0, size, step, dtype=np.int64)
    own = np.arange(pages, dtype=np.int64).repeat(PAGE // 8).reshape(pages, -1) + 1
    with memory(size) as (there, base):
        seen = np.frombuffer(there, np.int64).reshape(size, -1)
        addresses = own.ctypes.data + np.arange(pages, dtype=np.int64) * PAGE
        pg.write(addresses, base + places * PAGE)
        assert (seen[places] == own).all()
        assert seen.sum(axis=1).astype(bool).sum() == pages, "and nothing between them"
        back = np.zeros_like(own)
        pg.read(back.ctypes.data + np.arange(pages, dtype=np.int64) * PAGE, base + places * PAGE)
        assert (back == own).all()
        pg.touch(base + places * PAGE)
        assert (seen[places] == own).all(), "a touch leaves what is there"
        del seen


@pytest.mark.parametrize("pages", [8, 3000])
@pytest.mark.parametrize("left", [0, 1, 5])
def test_a_file_that_was_cut_is_an_error_and_not_a_signal(pages: int, left: int) -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(pages * PAGE)
        with mmap.mmap(file.fileno(), pages * PAGE, mmap.MAP_SHARED) as there:
            base = address_of(there)
            own = np.zeros((pages, PAGE), np.uint8)
            addresses = own.ctypes.data + np.arange(pages, dtype=np.int64) * PAGE
            file.truncate(left * PAGE)
            for move in (pg.read, pg.write):
                with pytest.raises(HvctlError, match="cut"):
                    move(addresses, base + np.arange(pages, dtype=np.int64) * PAGE)
            with pytest.raises(HvctlError, match="cut"):
                pg.touch(base + np.arange(pages, dtype=np.int64) * PAGE)


def test_addresses_that_are_nowhere_are_an_error() -> None:
    own = np.zeros(PAGE, np.uint8)
    for address in (0, 4096, 1 << 46):
        with pytest.raises(HvctlError):
            pg.read(np.array([own.ctypes.data]), np.array([address]))
        with pytest.raises(HvctlError):
            pg.write(np.array([own.ctypes.data]), np.array([address]))


def test_nothing_is_moved_for_nothing() -> None:
    for move in (pg.read, pg.write):
        move(pg.NONE, pg.NONE)
    pg.touch(pg.NONE)
