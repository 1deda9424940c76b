"""Greets a guest with the very moment it goes on after a reset: a nonce for its sign of life, entropy, the time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from hvctl.adapters.guest.pulse import ENTROPY, Pulse, discard, new_nonce
from hvctl.errors import DeadlineError, GuestError, UnreachableError
from hvctl.model.tracker import Life

_QUIET_TRIES: Final = 64  # a port holds as much as a few FIFOs


class Greeting:
    """One greeting at a time, between the pause and the guest's answer."""

    def __init__(self) -> None:
        self._pulse: Pulse | None = None
        self._nonce = ""

    def send(self, path: str, *, clock: bool) -> None:
        """The guest is paused and finds the line with its first instructions; UnreachableError: there is no port."""
        self.close()
        pulse = Pulse(path)
        self._pulse = pulse.__enter__()
        self._nonce = new_nonce()
        pulse.send(self._nonce, os.urandom(ENTROPY), time.time_ns() if clock else None)

    def await_life(self, seconds: float) -> Life:
        """Seconds from the greeting to the guest's answer; all None from a guest that was not greeted."""
        if self._pulse is None:
            return Life()
        try:
            life = self._pulse.await_life(self._nonce, seconds)
            done = self._pulse.await_done(self._nonce, seconds)
        except (DeadlineError, GuestError, UnreachableError):
            self.close()
            raise
        self.close()
        return Life(life, done.reseeded, done.clock_set)

    def close(self) -> None:
        if self._pulse is not None:
            self._pulse.close()
        self._pulse = None


def quiet(path: str, wait: Callable[[], object]) -> None:
    """Take what a flooding guest left in its port, until nothing more comes after `wait` (one exchange with QEMU). The
    guest is paused. Otherwise QEMU, as soon as there is room, goes on with the port while the guest is paused, and
    writes into its RAM: the snapshot would hold a device of one moment and RAM of another."""
    for _ in range(_QUIET_TRIES):
        if not discard(path):
            return
        wait()
    raise GuestError("the guest does not stop to write to its sign-of-life port.", "hvctl vm show VM")
