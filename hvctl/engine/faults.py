"""Fault points: places where a test may kill, stop or fail hvctl, before and after every step of every operation.

HVCTL_FAULT="allocate:set_memory:after=kill" arms one, "reset:restore_ram#2:before=kill" one at the second time that it
is passed; several are separated by commas. Without it a point costs a dictionary lookup.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from enum import StrEnum

from hvctl.errors import HvctlError, UsageError


class Fault(StrEnum):
    KILL = "kill"
    STOP = "stop"
    RAISE = "raise"
    ENOSPC = "enospc"
    HANG = "hang"


class Faults:
    """The armed points of this process: (kind, step, when) to what happens there."""

    def __init__(self, text: str | None = None) -> None:
        self._armed: dict[tuple[str, str, str], tuple[Fault, int]] = {}
        for item in filter(None, (os.environ.get("HVCTL_FAULT", "") if text is None else text).split(",")):
            try:
                point, action = item.split("=")
                kind, step, when = point.split(":")
                step, _, number = step.partition("#")
                self._armed[kind, step, when] = Fault(action), int(number or 1)
            except ValueError as e:
                raise UsageError(
                    f"HVCTL_FAULT {item!r} is not KIND:STEP:WHEN=ACTION.", f"actions: {', '.join(Fault)}"
                ) from e

    def point(self, kind: str, step: str, when: str) -> None:
        armed = self._armed.get((kind, step, when))
        if armed is None:
            return
        fault, number = armed
        self._armed[kind, step, when] = fault, number - 1
        if number > 1:
            return
        match fault:
            case Fault.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Fault.STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
            case Fault.RAISE:
                raise HvctlError(f"fault injected {when} {step}.")
            case Fault.ENOSPC:
                raise OSError(errno.ENOSPC, f"fault injected {when} {step}")
            case Fault.HANG:
                threading.Event().wait()
