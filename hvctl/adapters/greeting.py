"""Greets a guest with the very moment it goes on after a reset: a nonce for its sign of life, entropy, the time."""

from __future__ import annotations

import os
import time

from hvctl.adapters.pulse import ENTROPY, Pulse, new_nonce
from hvctl.errors import DeadlineError, GuestError, UnreachableError
from hvctl.model.tracker import Life


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
