"""Guest RAM of a VM that is this very process: files on a tmpfs that it maps shared, as QEMU would."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hypothesis import strategies as st

from hvctl.adapters.ram import ramfile
from hvctl.adapters.ram.guestram import GuestRam
from hvctl.adapters.ram.pages import PAGE
from hvctl.adapters.ram.ramcompare import PIECE
from hvctl.model.vm import Region

TMPFS = "/dev/shm"
# Two regions whose border lies within a piece of the compare, and neither of which is whole pieces.
SIZES = (2 * PIECE + 11, PIECE + 3)
PAGES = sum(SIZES)
# A page is a hole, zeros that are there, or one of a few contents: few, so that guest and snapshot often agree.
HOLE, ZEROS = None, 0
Layout = Sequence[tuple[int, int, int | None]]
contents = st.sampled_from([HOLE, HOLE, ZEROS, 1, 2])
layouts = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 90), contents), max_size=12)


def page_of(page: int, content: int) -> bytes:
    return bytes([content]) * (PAGE - 1) + bytes([content and page % 251])


class Lab:
    """One VM's RAM from both sides: `ram` as hvctl has it, the files as the guest fills them."""

    def __init__(self, sizes: Sequence[int], stack: ExitStack) -> None:
        self.sizes = sizes
        self.files = [stack.enter_context(tempfile.NamedTemporaryFile(dir=TMPFS)) for _ in sizes]  # noqa: SIM115
        for file, pages in zip(self.files, sizes, strict=True):
            file.truncate(pages * PAGE)
            stack.enter_context(mmap.mmap(file.fileno(), pages * PAGE, mmap.MAP_SHARED))
        self.regions = tuple(
            Region(f"ram{n}", f.name, pages * PAGE) for n, (f, pages) in enumerate(zip(self.files, sizes, strict=True))
        )
        self.ram = stack.enter_context(GuestRam(self.regions, os.getpid()))

    def put(self, page: int, content: bytes, at: int = 0) -> None:
        """The guest writes into one of its pages."""
        fd, page = self._place(page)
        os.pwrite(fd, content, page * PAGE + at)

    def punch(self, page: int) -> None:
        """The guest gives one of its pages back."""
        fd, page = self._place(page)
        ramfile.clear(fd, page * PAGE, PAGE)

    def lay(self, layout: Layout) -> None:
        """Nothing is left of what was before."""
        for file, pages in zip(self.files, self.sizes, strict=True):
            file.truncate(0)
            file.truncate(pages * PAGE)
        self.fill(layout)

    def fill(self, layout: Layout) -> None:
        for first, pages, content in layout:
            for page in range(first, min(first + pages, sum(self.sizes))):
                if content is not HOLE:
                    self.put(page, page_of(page, content))

    def everything(self) -> bytes:
        return b"".join(os.pread(f.fileno(), n * PAGE + 1, 0) for f, n in zip(self.files, self.sizes, strict=True))

    def page(self, page: int) -> bytes:
        fd, page = self._place(page)
        return os.pread(fd, PAGE, page * PAGE)

    def allocated(self) -> int:
        return sum(os.fstat(f.fileno()).st_blocks * 512 for f in self.files)

    def _place(self, page: int) -> tuple[int, int]:
        for file, pages in zip(self.files, self.sizes, strict=True):
            if page < pages:
                return file.fileno(), page
            page -= pages
        raise IndexError(page)


@contextmanager
def lab(sizes: Sequence[int] = SIZES) -> Iterator[Lab]:
    with ExitStack() as stack:
        yield Lab(sizes, stack)


@contextmanager
def folder() -> Iterator[Path]:
    """On the tmpfs, where snapshots live."""
    with tempfile.TemporaryDirectory(dir=TMPFS) as path:
        yield Path(path)


def unlike(one: bytes, other: bytes) -> list[int]:
    """The pages in which they differ."""
    assert len(one) == len(other)
    return [i for i in range(len(one) // PAGE) if one[i * PAGE : i * PAGE + PAGE] != other[i * PAGE : i * PAGE + PAGE]]
