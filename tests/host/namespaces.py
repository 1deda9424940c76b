"""Network namespaces that a test makes for itself, and a TCP stream whose rate is measured between two of them."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from itertools import count
from statistics import mean
from typing import Any, TypeVar

from pyroute2 import netns

T = TypeVar("T")
_numbers = count()


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def namespace() -> Iterator[str]:
    name = f"hvt{os.getpid()}-{next(_numbers)}"
    run("ip", "netns", "add", name)
    try:
        yield name
    finally:
        run("ip", "netns", "del", name)


def within(name: str | None, make: Callable[[], T]) -> T:
    """What `make` returns when it is called inside a namespace (None: this process's own)."""

    def enter() -> T:
        if name is not None:
            netns.setns(name, flags=0)
        return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter).result()


def qdiscs(name: str, device: str) -> list[dict[str, Any]]:
    """With statistics."""
    found: list[dict[str, Any]] = json.loads(run("tc", "-n", name, "-s", "-j", "qdisc", "show", "dev", device))
    return found


def dump(name: str) -> str:
    """Every device, qdisc and filter of a namespace, without what changes by itself."""
    links = json.loads(run("ip", "-n", name, "-j", "-d", "link"))
    texts = [run("ip", "-n", name, "-d", "link"), run("tc", "-n", name, "qdisc")]
    for link in links:
        texts += [run("tc", "-n", name, "filter", "show", "dev", link["ifname"], p) for p in ("root", "ingress")]
        texts += [run("tc", "-n", name, "class", "show", "dev", link["ifname"])]
    return "\n".join(texts)


class End:
    """The receiving or the sending end of a TCP stream that is always full. What it counts is the kernel's own count,
    which a busy machine cannot delay as it delays a thread."""

    # Of struct tcp_info: 8 bytes of flags, 24 counters of 4 bytes, 2 of 8, then these.
    _BYTES_ACKED, _BYTES_RECEIVED = 120, 128

    def __init__(self, stream: socket.socket, sends: bool) -> None:
        self._stream = stream
        self._sends = sends
        self._thread = threading.Thread(target=self._send if sends else self._receive)
        self._thread.start()

    def _send(self) -> None:
        with suppress(OSError):
            while True:
                self._stream.sendall(bytes(1 << 18))

    def _receive(self) -> None:
        with suppress(OSError):
            while self._stream.recv(1 << 20):
                pass

    def _count(self) -> int:
        """Bytes that the receiving end has."""
        info = self._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
        return int(struct.unpack_from("Q", info, self._BYTES_ACKED if self._sends else self._BYTES_RECEIVED)[0])

    def rate(self, seconds: float) -> float:
        """Bits per second that arrive from now on, for that long."""
        before, start = self._count(), time.monotonic()
        time.sleep(seconds)
        return (self._count() - before) * 8 / (time.monotonic() - start)

    def close(self) -> None:
        # Wakes the thread out of its call, which closing alone does not.
        with suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._stream.close()


@contextmanager
def stream(sender: str | None, receiver: str | None, address: str) -> Iterator[End]:
    """A full TCP stream from one namespace to an address in another."""
    with closing(within(receiver, lambda: socket.create_server((address, 0)))) as server:
        out = within(sender, lambda: socket.create_connection(server.getsockname(), 10))
        arrived, _ = server.accept()
    with closing(End(arrived, sends=False)) as end, closing(End(out, sends=True)):
        yield end


def assert_settles_at(cap: int, end: End, windows: int = 12) -> None:
    """The stream comes within 20 % of a cap and does not pass it. A busy machine may be too slow to fill the cap for a
    while, so the best of some windows has to reach it; it is the mean that may not pass it, since a receiver that was
    held up catches up later."""
    end.rate(1)
    rates: list[float] = []
    while len(rates) < windows and max(rates, default=0) < 0.8 * cap:
        rates.append(end.rate(3))
    assert max(rates) >= 0.8 * cap, rates
    assert mean(rates) <= 1.2 * cap, rates


def assert_exceeds(rate: int, end: End, windows: int = 12) -> None:
    end.rate(0.5)
    assert any(end.rate(1) > rate for _ in range(windows))
