"""The compressed stream of a snapshot's RAM: what went in comes out, and what is not whole is refused."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram import ramstream
from hvctl.adapters.ram.layers import Chain, Writer
from hvctl.adapters.ram.pages import PAGE
from hvctl.errors import RefusedError
from unit.ramlab import folder

PAGES = 3 * ramstream.BLOCK + 7
Ram = Mapping[int, bytes]
pages = st.dictionaries(
    st.integers(0, PAGES - 1) | st.integers(ramstream.BLOCK - 3, ramstream.BLOCK + 3),
    st.binary(min_size=1, max_size=8).map(lambda b: (b * PAGE)[:PAGE]),
    max_size=40,
)
# Of each layer what it says of some pages; runs, so that blocks are filled.
layers = st.lists(
    st.tuples(pages, st.integers(0, PAGES - 1), st.integers(0, 2 * ramstream.BLOCK)), min_size=1, max_size=3
)


def _store(place, base: bool, ram: Ram) -> None:  # type: ignore[no-untyped-def]
    writer = Writer(place, PAGES, base=base, limit=1 << 40)
    numbers = np.array(sorted(ram), np.int64)
    content = np.frombuffer(b"".join(ram[n] for n in sorted(ram)) or bytes(PAGE), np.uint8).copy()
    try:
        writer.put(numbers, content.ctypes.data + np.arange(numbers.size, dtype=np.int64) * PAGE)
        writer.finish()
    finally:
        writer.close()


def _stream(layered: Sequence[Ram]) -> tuple[bytes, int]:
    """The newest layer is the last."""
    with folder() as root:
        places = []
        for n, ram in enumerate(layered):
            place = root / str(n)
            place.mkdir()
            _store(place, n > 0, ram)
            places.insert(0, place)
        out = io.BytesIO()
        with Chain(places, PAGES) as chain:
            count = ramstream.write(chain, out)
        return out.getvalue(), count


def _content(stream: bytes, size: int = PAGES) -> dict[int, bytes]:
    found = {}
    for numbers, own in ramstream.read(io.BytesIO(stream), size):
        copy = np.empty((numbers.size, PAGE), np.uint8)
        pg.read(copy.ctypes.data + np.arange(numbers.size, dtype=np.int64) * PAGE, own)
        for number, page in zip(numbers.tolist(), copy, strict=True):
            assert number not in found
            found[number] = page.tobytes()
    return found


@settings(deadline=None, max_examples=40)
@given(layers)
def test_what_went_in_comes_out_flattened_and_without_zeros(layered: list[tuple[Ram, int, int]]) -> None:
    wanted: dict[int, bytes] = {}
    given_layers = []
    for some, first, count in layered:
        ram = {n: bytes([n % 255 + 1]) * PAGE for n in range(first, min(first + count, PAGES))} | dict(some)
        given_layers.append(ram)
        wanted |= ram
    stream, count = _stream(given_layers)
    wanted = {n: page for n, page in wanted.items() if any(page)}
    assert _content(stream) == wanted
    assert count == len(wanted)


RAM = {n: bytes([n % 250 + 1]) * PAGE for n in range(5, 5 + ramstream.BLOCK + 40)}


def _packed(*parts: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(b"".join(parts))


def _numbers(*numbers: int) -> bytes:
    return np.array(numbers, "<u4").tobytes()


@pytest.mark.parametrize("keep", [0, 1, 20, -1000, -40])
def test_a_stream_that_was_cut_is_refused(keep: int) -> None:
    stream, _ = _stream([RAM])
    with pytest.raises(RefusedError, match="damaged"):
        _content(stream[:keep])


@pytest.mark.parametrize("at", [4, 40, -20, -1])
def test_a_stream_in_which_a_bit_flipped_is_refused(at: int) -> None:
    stream = bytearray(_stream([RAM])[0])
    stream[at] ^= 1
    with pytest.raises(RefusedError, match="damaged"):
        _content(bytes(stream))


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"not zstd at all, and long enough to be a header", id="foreign"),
        pytest.param(_packed(_numbers(1, PAGES), bytes(PAGE), _numbers(0)), id="beyond"),
        pytest.param(_packed(_numbers(2, 7, 3), bytes(2 * PAGE), _numbers(0)), id="falling"),
        pytest.param(_packed(_numbers(2, 7, 7), bytes(2 * PAGE), _numbers(0)), id="twice"),
        pytest.param(_packed(_numbers(1, 7), bytes(PAGE), _numbers(1, 7), bytes(PAGE), _numbers(0)), id="block-again"),
        pytest.param(_packed(_numbers(ramstream.BLOCK + 1)), id="too-many"),
        pytest.param(_packed(_numbers(1, 7), bytes(PAGE)), id="no-end"),
        pytest.param(_packed(_numbers(1, 7), bytes(PAGE - 1)), id="half-a-page"),
        pytest.param(_packed(_numbers(0), b"more"), id="more"),
    ],
)
def test_what_is_no_stream_of_this_guest_is_refused(stream: bytes) -> None:
    with pytest.raises(RefusedError, match="damaged"):
        _content(stream)


def test_a_smaller_guest_is_not_filled_with_a_larger_ones_ram() -> None:
    stream, _ = _stream([RAM])
    with pytest.raises(RefusedError):
        _content(stream, max(RAM))
