"""Puts the thread that holds a guest paused before all others of the host: where that is busy, a pause of some
milliseconds of work would be mostly waiting for a processor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# What it starts meanwhile is not urgent, whatever it is.
_POLICY: Final = os.SCHED_RR | os.SCHED_RESET_ON_FORK
_LOWEST: Final = os.sched_param(1)


@contextmanager
def urgent() -> Iterator[None]:
    """Of this thread; where that is not allowed, it waits for its turn as before."""
    try:
        policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setscheduler(0, _POLICY, _LOWEST)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def is_urgent() -> bool:
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR
