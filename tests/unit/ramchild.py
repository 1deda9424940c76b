"""A process that maps a file as QEMU maps guest RAM, and works on its pages as it is told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvctl.adapters.ram.trackers import Span, spans
from hvctl.adapters.ram.trackers.pagemap import PAGE

PAGES = 2048
TMPFS = "/dev/shm"

# Each line from stdin is a list: the name of a function and its arguments. The answer is what it returned.
_CHILD = f"""
import ctypes, json, mmap, os, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
ram_fd, size, P = int(sys.argv[1]), int(sys.argv[2]), {PAGE}
# At a multiple of 2 MiB, where huge pages fit.
libc.mmap.restype = ctypes.c_void_p
start = libc.mmap(0, ctypes.c_long(size + (2 << 20)), 0, 0x22, -1, 0)
address = (start + (2 << 20) - 1) >> 21 << 21
libc.mmap(*map(ctypes.c_long, (address, size, 3, 0x11, ram_fd, 0)))
ram = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")

def call(name, *arguments):
    result = getattr(libc, name)(*map(ctypes.c_long, arguments))
    assert result >= 0, (name, os.strerror(ctypes.get_errno()))
    return result

def write(*pages):
    for p in pages:
        ram[p * P + 1] = (ram[p * P + 1] + 1) % 256

def write_run(first, last):
    write(*range(first, last))

def read(*pages):
    return sum(ram[p * P] for p in pages)

def punch(page, count):
    call("fallocate", ram_fd, 3, page * P, count * P)

def advise(page, count, advice):
    call("madvise", address + page * P, count * P, advice)

def balloon(page, count):
    # As QEMU's ram_block_discard_range does with a shared file.
    punch(page, count)
    advise(page, count, mmap.MADV_DONTNEED)

def receive(page, path, direct):
    # The kernel writes the page, for a read of this process.
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    got = os.preadv(fd, [ram[page * P : (page + 1) * P]], 0)
    os.close(fd)
    return got

def unmap(page, count):
    call("munmap", address + page * P, count * P)

def remap(page, count):
    libc.mmap(*map(ctypes.c_long, (address + page * P, count * P, 3, 0x11, ram_fd, page * P)))

def fork_write(page):
    pid = os.fork()
    if not pid:
        write(page)
        os._exit(0)
    os.waitpid(pid, 0)

def own_userfault(page, count):
    import fcntl, struct
    fd = libc.syscall(323, 0o2000001)
    fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("=3Q", 0xAA, 0, 0)))
    fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack("=4Q", address + page * P, count * P, 1, 0)))
    return fd

def sweep(first, last, stop):
    # Writes every page once, beside what else is asked, then one page over and over.
    def run():
        write_run(first, last)
        while not stop_sweep.is_set():
            write(stop)
    global sweeper, stop_sweep
    stop_sweep = threading.Event()
    sweeper = threading.Thread(target=run)
    sweeper.start()

def end_sweep():
    stop_sweep.set()
    sweeper.join()

print(json.dumps(address), flush=True)
for line in sys.stdin:
    name, *arguments = json.loads(line)
    print(json.dumps(globals()[name](*arguments)), flush=True)
"""


@dataclass
class RamChild:
    process: subprocess.Popen[bytes]
    fd: int

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def spans(self) -> tuple[Span, ...]:
        return spans(self.pid, os.fstat(self.fd))

    def __call__(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def userfaults(self) -> list[int]:
        folder = Path(f"/proc/{self.pid}/fd")
        return sorted(int(p.name) for p in folder.iterdir() if str(p.readlink()) == "anon_inode:[userfaultfd]")

    def status(self, field: str) -> str:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith(f"{field}:"))


@contextmanager
def ram_child(pages: int = PAGES, fd: int | None = None) -> Iterator[RamChild]:
    """fd: the file to map, instead of a new one on tmpfs."""
    with ExitStack() as stack:
        if fd is None:
            fd = stack.enter_context(tempfile.TemporaryFile(dir=TMPFS)).fileno()
        os.ftruncate(fd, pages * PAGE)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD, str(fd), str(pages * PAGE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=[fd],
        )
        stack.callback(process.communicate)
        stack.callback(process.kill)
        assert process.stdout is not None
        process.stdout.readline()
        yield RamChild(process, fd)


def pages_of(ranges: NDArray[np.int64]) -> list[int]:
    """The pages of what collect answered, which must be in its promised form."""
    assert ranges.dtype == np.int64
    assert ranges.shape[1:] == (2,)
    flat = ranges.ravel()
    assert (np.diff(flat) > 0).all()
    assert not (flat % PAGE).any()
    return [p for start, end in (ranges // PAGE).tolist() for p in range(start, end)]
