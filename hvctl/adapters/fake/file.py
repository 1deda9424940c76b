"""The file a fake host lives in: read whole, changed under a lock, replaced atomically. A process killed at any point
leaves the state before or after a change, never half of one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvctl import codec, errors
from hvctl.adapters.fake import life
from hvctl.adapters.fake.state import FakeVm, Script, World
from hvctl.errors import DeadlineError, HvctlError, UnreachableError
from hvctl.model.vm import State

_ERRORS = {e.__name__: e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, HvctlError)}


class WorldFile:
    """A world on disk. Nobody there yet is an empty host, as long as its folder exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[tuple[int, int, int], bytes, World] | None = None

    def read(self) -> World:
        """A copy of the world as it is, for looking only."""
        with self._lock():
            return self._parse(self._bytes())

    @contextmanager
    def change(self, *, looks: bool = False) -> Iterator[World]:
        """The world, written back when the block ends. What happened before an HvctlError has happened."""
        with self._lock():
            world, before = self._load()
            if looks and not world.scripts:
                self._known = (self._signature(), before, world)
                yield world
                return
            self._known = None
            try:
                yield world
            except HvctlError:
                self._save(world, before)
                raise
            self._save(world, before)

    @contextmanager
    def call(self, name: str, uuid: str | None = None, *, looks: bool = False) -> Iterator[World]:
        """change(), as one call of a port: what is scripted for it happens. looks: the call itself changes nothing."""
        with self.change(looks=looks) as world:
            script = _due(world, name, uuid)
            if script and script.outside and uuid in world.vms:
                _outside(world, world.vms[uuid], script.outside)
            if script and script.error and not script.after:
                raise _error(script)
            yield world
            if script and script.error and script.after:
                raise _error(script)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            fd = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as e:
            raise UnreachableError(
                f"the fake host {self.path} cannot be reached: {e.strerror}.", "make its folder first"
            ) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b"{}"

    def _load(self) -> tuple[World, bytes]:
        """The world and its bytes; parsed again only if somebody else wrote since."""
        if self._known and self._known[0] == self._signature():
            return self._known[2], self._known[1]
        data = self._bytes()
        return self._parse(data), data

    def _parse(self, data: bytes) -> World:
        try:
            return codec.load_json(World, data)
        except HvctlError as e:
            raise UnreachableError(f"{self.path} is not the state of a fake host.", "remove it to start anew") from e

    def _save(self, world: World, before: bytes) -> None:
        data = codec.dump_json(world)
        if data != before:
            new = self.path.with_name(self.path.name + ".new")
            new.write_bytes(data)
            new.replace(self.path)
        self._known = (self._signature(), data, world)

    def _signature(self) -> tuple[int, int, int]:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return (0, 0, 0)
        return (stat.st_ino, stat.st_mtime_ns, stat.st_size)


def _due(world: World, name: str, uuid: str | None) -> Script | None:
    """The script that fires at this call; all that wait for it count it."""
    due = None
    for script in list(world.scripts):
        if script.call != name or script.uuid not in (None, uuid):
            continue
        if script.nth > 1:
            script.nth -= 1
        elif due is None:
            due = script
            script.times -= 1
            if script.times == 0:
                world.scripts.remove(script)
    return due


def _error(script: Script) -> HvctlError:
    if script.error == "enospc":
        return HvctlError(f"{script.call} failed: No space left on device.", "free space on the host, then try again")
    error = _ERRORS[script.error or "HvctlError"]
    if error is DeadlineError:
        return DeadlineError(f"{script.call} got no answer in time.", "hvctl recover")
    return error(f"{script.call} failed as scripted.", "hvctl doctor")


def _outside(world: World, vm: FakeVm, event: str) -> None:
    if event == "destroy" and vm.state is not State.OFF:
        life.halt(world, vm, "destroyed")
    elif event == "pause" and vm.state is State.RUNNING:
        life.pause(vm)
    elif event == "resume" and vm.state is State.PAUSED:
        life.resume(world, vm)
