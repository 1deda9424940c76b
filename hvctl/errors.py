"""The one tree of errors, each with an exit status and a hint; adapters translate into it, faces render it.

HvctlError 1
├── UsageError 2           bad input
├── NotFoundError 3        no such VM, snapshot, image, operation
├── UnreachableError 4     libvirt, QEMU or the database cannot be reached, or denies
├── RefusedError 5         infeasible or against a policy; nothing was changed
├── DeadlineError 6        no answer in time: the result is unknown, not failed
├── BusyError 7            another operation owns the VM
├── UndoneError 8          failed, and everything is as it was
├── NotUndoneError 9       failed, and something is not as it was
├── GuestError 1           the guest or its agent refused, or answered nonsense
└── OutputError 11         what was asked for is done, but standard output takes nothing
Interrupted 130            Ctrl-C, which is no error of hvctl's
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses of every command."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNREACHABLE = 4
    REFUSED = 5
    TIMEOUT = 6
    BUSY = 7
    UNDONE = 8
    NOT_UNDONE = 9
    CHANGES_PENDING = 10
    OUTPUT_LOST = 11


class HvctlError(Exception):
    """Base of all errors: one sentence, and a hint that names the command that helps."""

    exit = Exit.FAILED

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(HvctlError):
    exit = Exit.USAGE


class NotFoundError(HvctlError):
    exit = Exit.NOT_FOUND


class UnreachableError(HvctlError):
    exit = Exit.UNREACHABLE


class RefusedError(HvctlError):
    exit = Exit.REFUSED


class InUseError(RefusedError):
    """An image that a VM needs: `vm` is its UUID, which is all that its folder tells, `how` what it needs of it."""

    def __init__(self, vm: str, how: str) -> None:
        super().__init__(f"the VM {vm} {how}.", f"delete the VM first: hvctl vm delete {vm}")
        self.vm = vm
        self.how = how


class DeadlineError(HvctlError):
    exit = Exit.TIMEOUT


class BusyError(HvctlError):
    exit = Exit.BUSY


class UndoneError(HvctlError):
    exit = Exit.UNDONE


class NotUndoneError(HvctlError):
    exit = Exit.NOT_UNDONE


class GuestError(HvctlError):
    exit = Exit.FAILED


class OutputError(HvctlError):
    exit = Exit.OUTPUT_LOST


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of an operation, which stays open: no error, so that nobody takes it for one and goes on."""

    def __init__(self, told: HvctlError) -> None:
        super().__init__(told.message)
        self.told = told
