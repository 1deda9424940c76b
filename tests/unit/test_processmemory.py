"""Memory of another process, moved by the kernel: all of it, a part of it, or an error that says why none."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from hvctl.adapters.kernel import processmemory
from hvctl.adapters.kernel.processmemory import Vector
from hvctl.adapters.ram.guestram import address_of

CHILD = """
import ctypes, sys
buffer = ctypes.create_string_buffer(b"what the child says", 64)
print(ctypes.addressof(buffer), flush=True)
sys.stdin.readline()
print(buffer.value.decode(), flush=True)
"""


@dataclass(frozen=True)
class Child:
    pid: int
    address: int
    ask: Callable[[], str]
    """What is in its buffer; once."""
    kill: Callable[[], None]


@pytest.fixture
def child() -> Iterator[Child]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        out = process.stdout

        def kill() -> None:
            process.kill()
            process.wait()

        def ask() -> str:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return out.readline()

        yield Child(process.pid, int(out.readline()), ask, kill)
        kill()


def test_several_vectors_are_one_after_the_other_on_both_sides(child: Child) -> None:
    own = ctypes.create_string_buffer(19)
    base = ctypes.addressof(own)
    ours = (Vector * 2)(Vector(base + 10, 9), Vector(base, 10))
    theirs = (Vector * 2)(Vector(child.address, 5), Vector(child.address + 5, 14))
    assert processmemory.read(child.pid, ctypes.addressof(ours), ctypes.addressof(theirs), 2) == 19
    assert own.raw == b"child says" + b"what the "
    own.raw = b"child sang" + b"what our "
    assert processmemory.write(child.pid, ctypes.addressof(ours), ctypes.addressof(theirs), 2) == 19
    assert child.ask() == "what our child sang\n"


def test_what_can_be_had_before_what_cannot_is_moved(child: Child) -> None:
    own = ctypes.create_string_buffer(8)
    ours = (Vector * 2)(Vector(ctypes.addressof(own), 4), Vector(ctypes.addressof(own) + 4, 4))
    theirs = (Vector * 2)(Vector(child.address, 4), Vector(1 << 46, 4))
    assert processmemory.read(child.pid, ctypes.addressof(ours), ctypes.addressof(theirs), 2) == 4
    assert own.raw == b"what\0\0\0\0"


@pytest.mark.parametrize("move", [processmemory.read, processmemory.write])
def test_why_nothing_was_moved(child: Child, move: Callable[[int, int, int], int]) -> None:
    own = ctypes.create_string_buffer(8)
    ours, theirs, nowhere = Vector(ctypes.addressof(own), 8), Vector(child.address, 8), Vector(1 << 46, 8)
    with pytest.raises(OSError) as refused:
        move(child.pid, ctypes.addressof(ours), ctypes.addressof(nowhere))
    assert refused.value.errno == errno.EFAULT
    child.kill()
    with pytest.raises(OSError) as refused:
        move(child.pid, ctypes.addressof(ours), ctypes.addressof(theirs))
    assert refused.value.errno == errno.ESRCH


def test_a_page_that_the_process_itself_may_not_write_is_not_written() -> None:
    own = ctypes.create_string_buffer(b"new", 4)
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ) as page:
        ours, theirs = Vector(ctypes.addressof(own), 4), Vector(address_of(page), 4)
        with pytest.raises(OSError):
            processmemory.write(os.getpid(), ctypes.addressof(ours), ctypes.addressof(theirs))
        assert page[:4] == bytes(4)
