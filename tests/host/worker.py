"""tests/guest/worker.c in a guest, spoken to over the guest's serial console: no agent, no polling."""

from __future__ import annotations

import os
import select
import subprocess
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from host.outside import Guest, virsh

GUEST = Path(__file__).parents[1] / "guest"
SECONDS = 60.0


@cache
def program(folder: Path, name: str = "worker") -> bytes:
    """A program of tests/guest, linked whole, so that it runs in any guest."""
    target, source = folder / name, GUEST / f"{name}.c"
    subprocess.run(["gcc", "-static", "-s", "-O2", "-Wall", "-Werror", "-o", target, source], check=True)
    return target.read_bytes()


@dataclass
class Worker:
    """The host's end of a console on which the program speaks."""

    fd: int
    _text: bytes = field(default=b"")

    def say(self, line: str) -> None:
        os.write(self.fd, line.encode() + b"\n")

    def hear(self, word: str, seconds: float = SECONDS) -> str:
        """The next line that begins with this word; what is said before it is left out."""
        until = time.monotonic() + seconds
        while True:
            while b"\n" in self._text:
                line, _, self._text = self._text.partition(b"\n")
                found = line.decode(errors="replace").strip()
                if found.startswith(f"{word} ") or found == word:
                    return found
            left = until - time.monotonic()
            assert left > 0, f"the guest did not say {word!r}; it said {self._text[-200:]!r}"
            if select.select([self.fd], [], [], left)[0]:
                self._text += os.read(self.fd, 65536)

    def show(self) -> str:
        self.say("show")
        return self.hear("state")

    def work(self, seed: int, per_mille: int) -> str:
        """What it showed before it dirtied everything."""
        self.say(f"work {seed:x} {per_mille}")
        state = self.hear("state")
        self.hear("dirty")
        return state

    def random(self) -> str:
        self.say("random")
        return self.hear("random").split()[1]


@contextmanager
def console(path: str) -> Iterator[Worker]:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield Worker(fd)
    finally:
        os.close(fd)


def plant(guest: Guest, folder: Path, name: str = "worker") -> None:
    """Put a program on the first disk of a VM that is off: an agent would read it in character by character."""
    overlay = guest.overlays()[0]
    raw = folder / "planted"
    raw.write_bytes(program(folder, name))
    os.truncate(raw, 32 << 20)
    owner = overlay.stat()
    subprocess.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, overlay], check=True)
    os.chown(overlay, owner.st_uid, owner.st_gid)


@contextmanager
def working(guest: Guest, mib: int, disks: Sequence[str]) -> Iterator[Worker]:
    """The planted program in a guest that has booted; it takes the place of the console's shell."""
    guest.run("dd if=/dev/vda of=/run/worker bs=1M count=2; chmod 755 /run/worker")
    with console(virsh("ttyconsole", guest.uuid).strip()) as worker:
        worker.say("")
        worker.say("stty raw -echo; exec /run/worker " + " ".join([str(mib), *(f"/dev/{d}" for d in disks)]))
        worker.hear("ready")
        yield worker
