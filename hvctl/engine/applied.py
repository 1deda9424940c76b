"""What a hand gives back, and what all hands share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hvctl.adapters.guest import agent as guest
from hvctl.model import plan as p
from hvctl.model.snapshot import Snapshot
from hvctl.ports import Host

AGENT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Applied:
    """What a step did: its inverse (None: nothing to undo), what the operator should know, facts for the journal.

    mended: something was wrong and is right again, which must not pass for success. bound: the snapshot that later
    steps name, as it is now that its process is known. stopped and continued: of the monotonic clock, right before the
    guest was paused, and when QEMU let it go on."""

    inverse: p.Step | None = None
    warning: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    mended: str | None = None
    bound: Snapshot | None = None
    stopped: float | None = None
    continued: float | None = None


def agent_call(host: Host, uuid: str) -> guest.Call:
    """The guest agent of one VM as adapters/guest/agent.py wants it."""
    return lambda command, arguments, seconds: host.domains.agent(uuid, command, arguments, seconds)
