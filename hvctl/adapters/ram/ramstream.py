"""Guest RAM of a snapshot as one compressed stream: page numbers and pages, those of zeros left out. The one door to
zstandard.

The stream is blocks of a count (uint32), that many page numbers (uint32, rising over the whole stream) and their pages;
a count of 0 ends it. Little-endian, in one zstd frame with a checksum.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final, Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from hvctl.adapters.ram import pages as pg
from hvctl.adapters.ram.layers import Chain
from hvctl.adapters.ram.pages import PAGE, Pages
from hvctl.errors import RefusedError

LEVEL: Final = 3
BLOCK: Final = 1024  # pages
_THREADS: Final = 4
_NUMBER: Final = np.dtype("<u4")
# The largest window that this level ever uses: a stream that asks for more memory is none of ours.
_WINDOW: Final = 1 << 27


class Sink(Protocol):
    def write(self, content: bytes, /) -> int: ...


class Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


def write(chain: Chain, to: Sink) -> int:
    """Compress all pages that hold anything; how many they are. The sink is written to in order."""
    filled = np.flatnonzero(chain.nonzero())
    threads = min(_THREADS, len(os.sched_getaffinity(0)))
    compressor = zstandard.ZstdCompressor(level=LEVEL, threads=threads, write_checksum=True)
    buffer = np.empty((BLOCK, PAGE), np.uint8)
    with compressor.stream_writer(to, closefd=False) as stream:  # type: ignore[arg-type]
        for at in range(0, filled.size, BLOCK):
            some = filled[at : at + BLOCK]
            content = buffer[: some.size]
            pg.read(_addresses(content), chain.locate(some))
            stream.write(np.array([some.size, *some], _NUMBER).tobytes())
            stream.write(content.data)
        stream.write(np.zeros(1, _NUMBER).tobytes())
    return int(filled.size)


def read(source: Source, pages: int) -> Iterator[tuple[Pages, NDArray[np.int64]]]:
    """The blocks of a stream of a guest with so many pages: their numbers, and where each page lies in this process
    until the next block is asked for. RefusedError: it is damaged, cut, or of another guest."""
    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        with decompressor.stream_reader(source, closefd=False) as stream:  # type: ignore[arg-type]
            yield from _blocks(stream, pages)
    except zstandard.ZstdError as e:
        raise _damaged(str(e)) from e


def _blocks(stream: zstandard.ZstdDecompressionReader, pages: int) -> Iterator[tuple[Pages, NDArray[np.int64]]]:
    buffer = np.empty((BLOCK, PAGE), np.uint8)
    next_page = 0
    while count := int(_numbers(stream, 1)[0]):
        if count > BLOCK:
            raise _damaged(f"a block of {count} pages")
        numbers = _numbers(stream, count)
        if numbers[0] < next_page or numbers[-1] >= pages or (np.diff(numbers) <= 0).any():
            raise _damaged("page numbers that do not rise, or are beyond the guest's RAM")
        next_page = int(numbers[-1]) + 1
        content = buffer[:count]
        _fill(stream, content.data.cast("B"))
        yield numbers, _addresses(content)
    # Reading to the end of the frame has its checksum compared.
    if stream.read(1):
        raise _damaged("something behind its end")


def _numbers(stream: zstandard.ZstdDecompressionReader, count: int) -> Pages:
    raw = bytearray(count * _NUMBER.itemsize)
    _fill(stream, memoryview(raw))
    return np.frombuffer(raw, _NUMBER).astype(np.int64)


def _fill(stream: zstandard.ZstdDecompressionReader, into: memoryview) -> None:
    done = 0
    while done < len(into):
        got = stream.readinto(into[done:])
        if not got:
            raise _damaged("it ends too early")
        done += got


def _addresses(content: NDArray[np.uint8]) -> NDArray[np.int64]:
    return content.ctypes.data + np.arange(len(content), dtype=np.int64) * PAGE


def _damaged(how: str) -> RefusedError:
    return RefusedError(f"the RAM of the saved snapshot is damaged: {how}.", "it cannot be loaded; use another one")
