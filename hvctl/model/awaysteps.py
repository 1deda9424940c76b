"""The steps of interrupting a VM and of letting it come back; what each does stands in engine/awayhands.py."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hvctl.model.pool import Rung


class Event(StrEnum):
    INTERRUPTION = "interruption"
    WITHDRAWN = "withdrawn"
    RETURNED = "returned"


@dataclass(frozen=True, slots=True)
class Notice:
    """What the guest is told. Times are RFC 3339; how is the rung; id, 32 hexadecimal digits, is that of one
    interruption of one VM, whatever becomes of it and however often the guest is told."""

    id: str
    event: Event
    how: Rung
    at: str
    returns: str
    reason: str


@dataclass(frozen=True, slots=True)
class NotifyGuest:
    """Tell the guest, and give it `seconds`; it may say earlier that it is ready."""

    uuid: str
    notice: Notice
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SuspendGuest:
    """libvirt's pause: works for VMs of others, too."""

    uuid: str


@dataclass(frozen=True, slots=True)
class ContinueGuest:
    uuid: str


@dataclass(frozen=True, slots=True)
class SaveGuest:
    """RAM and devices to a file that libvirt starts the VM from the next time; its process ends."""

    uuid: str


@dataclass(frozen=True, slots=True)
class EndGuest:
    """Ask the guest to power off; after `seconds` its process is ended."""

    uuid: str
    seconds: float


AwayStep = NotifyGuest | SuspendGuest | ContinueGuest | SaveGuest | EndGuest
