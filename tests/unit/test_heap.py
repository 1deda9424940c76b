"""Another process's heap, brought into its page table: no page is missing afterwards, and no byte is another one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl.adapters.qemu import heap

# Blocks below the size that gets a mapping of its own, most of them given back from the middle of the heap.
CHILD = """
import ctypes, hashlib, sys
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [libc.malloc(100_000) for _ in range(80)]
for n, block in enumerate(blocks):
    ctypes.memset(block, 1 + n, 100_000)
for block in blocks[10:70]:
    libc.free(ctypes.c_void_p(block))
libc.malloc_trim(0)
kept = blocks[:10] + blocks[70:]
for line in sys.stdin:
    print(hashlib.sha256(b"".join(ctypes.string_at(b, 100_000) for b in kept)).hexdigest(), flush=True)
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def digest(child: subprocess.Popen[str]) -> str:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return child.stdout.readline()


def absent(pid: int) -> int:
    """Pages of the heap without memory of their own: a page that was only read has the kernel's zeros for all, and
    writing it is a fault all the same."""
    lines = Path(f"/proc/{pid}/smaps").read_text().split("[heap]")[1].splitlines()
    size, resident = (int(next(x for x in lines if x.startswith(f"{key}:")).split()[1]) for key in ("Size", "Rss"))
    return (size - resident) // 4


def test_the_heap_is_there_and_says_what_it_said(child: subprocess.Popen[str]) -> None:
    before = digest(child)
    assert absent(child.pid) > 100
    heap.foresee(child.pid)
    assert absent(child.pid) == 0
    assert digest(child) == before


def test_what_cannot_be_done_is_let_pass(child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    digest(child)
    missing = absent(child.pid)
    monkeypatch.setattr(heap, "_LARGEST", 1 << 20)
    heap.foresee(child.pid)
    assert absent(child.pid) == missing
    child.kill()
    child.wait()
    heap.foresee(child.pid)
