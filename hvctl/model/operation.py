"""One execution of a verb on a VM, as the journal keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    CREATE = "create"
    START = "start"
    STOP = "stop"
    DELETE = "delete"
    ADOPT = "adopt"
    PROTECT = "protect"
    ALLOCATE = "allocate"
    SNAPSHOT_TAKE = "snapshot-take"
    SNAPSHOT_DELETE = "snapshot-delete"
    RESET = "reset"


class OpState(StrEnum):
    OPEN = "open"
    DONE = "done"
    UNDONE = "undone"
    FAILED = "failed"
    QUARANTINED = "quarantined"


class Phase(StrEnum):
    """begun: nothing irreversible yet. touching: half done. committed: the result is valid, only clean up."""

    BEGUN = "begun"
    TOUCHING = "touching"
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as it went: seconds it took, and facts that it reported (bytes, pages, counts)."""

    name: str
    detail: str
    seconds: float
    outcome: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Operation:
    """A row of the journal; request, before and result are plain JSON values. Times are RFC 3339 UTC."""

    id: int
    vm_uuid: str
    vm_name: str
    kind: Kind
    state: OpState
    request: dict[str, Any]
    before: dict[str, Any]
    who: str
    host: str
    boot_id: str
    opened_at: str
    closed_at: str | None = None
    reason: str | None = None
    key: str | None = None
    result: dict[str, Any] | None = None
    steps: tuple[StepRecord, ...] = ()
