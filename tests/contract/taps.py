"""Taps to limit: of the fake host, and of the kernel in a network namespace of their own."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from hvctl.adapters.fake import FakeWorld, open_fake
from hvctl.adapters.traffic import TrafficControl
from hvctl.ports import Network

_numbers = itertools.count()


class Taps(Protocol):
    network: Network

    def add(self, tap: str) -> None: ...

    def remove(self, tap: str) -> None: ...

    def put_foreign(self, tap: str) -> None:
        """Somebody's `htb 1:` as root qdisc."""
        ...

    def wipe(self, tap: str) -> None:
        """Somebody removes every qdisc."""
        ...

    def devices(self) -> set[str]: ...


class FakeTaps:
    def __init__(self, folder: Path) -> None:
        self._world = FakeWorld(folder / "state.json")
        self.network = open_fake(self._world.uri).network

    def add(self, tap: str) -> None:
        self._world.add_tap(tap)

    def remove(self, tap: str) -> None:
        self._world.remove_tap(tap)

    def put_foreign(self, tap: str) -> None:
        self._world.put_foreign_qdisc(tap)

    def wipe(self, tap: str) -> None:
        self._world.drop_qdisc(tap)

    def devices(self) -> set[str]:
        world = self._world.read()
        return {*world.taps, *world.ifbs}


class NamespaceTaps:
    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self.network = TrafficControl(namespace)

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[NamespaceTaps]:
        name = f"hvc{os.getpid()}-{next(_numbers)}"
        _run("ip", "netns", "add", name)
        try:
            yield cls(name)
        finally:
            _run("ip", "netns", "del", name)

    def add(self, tap: str) -> None:
        _run("ip", "-n", self._namespace, "tuntap", "add", tap, "mode", "tap")
        _run("ip", "-n", self._namespace, "link", "set", tap, "up")

    def remove(self, tap: str) -> None:
        _run("ip", "-n", self._namespace, "link", "del", tap)

    def put_foreign(self, tap: str) -> None:
        _run("tc", "-n", self._namespace, "qdisc", "replace", "dev", tap, "root", "handle", "1:", "htb")

    def wipe(self, tap: str) -> None:
        for which in ("root", "ingress"):
            _run("tc", "-n", self._namespace, "qdisc", "del", "dev", tap, which)

    def devices(self) -> set[str]:
        return {link["ifname"] for link in json.loads(_run("ip", "-n", self._namespace, "-j", "link"))}


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
