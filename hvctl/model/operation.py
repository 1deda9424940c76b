"""One execution of a verb on a VM, as the journal keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hvctl.model.allocation import Allocation, Record, Resources
from hvctl.model.pool import Away
from hvctl.model.reset import AS_USUAL, WHOLE, Scope, Wishes
from hvctl.model.snapshot import Snapshot
from hvctl.model.vm import Vm


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
    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_LOAD = "snapshot-load"
    RESET = "reset"
    SET = "set"
    INTERRUPT = "interrupt"
    RESUME = "resume"


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
class Before:
    """What an operation wrote into its row before it touched anything; None where the kind needs none of it.

    vm is None for a VM that did not exist. xml is the definition before an adoption. wanted is the allocation that an
    allocate works towards; goal is what is promised when the operation succeeds, and holds whether it then counts
    against the host. scope, wishes and scratch are those of a reset; archive is the folder of a saved
    snapshot, and load names what a load keeps of the disks before. plugs are libvirt's elements of the disks that a
    reset unplugs, by target: what it takes to plug them again."""

    vm: Vm | None = None
    goal: Record | None = None
    snapshot: Snapshot | None = None
    xml: str | None = None
    was_running: bool = False
    holds: bool = False
    wanted: Allocation | None = None
    scope: Scope = WHOLE
    wishes: Wishes = AS_USUAL
    scratch: Snapshot | None = None
    archive: str = ""
    load: str = ""
    away: Away | None = None
    left: Resources | None = None
    grace: float = 0.0
    plugs: dict[str, str] = field(default_factory=dict)


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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a verb answers: how one operation ended, or, with state None, what it would do (nothing was changed)."""

    kind: Kind
    vm_uuid: str
    vm_name: str
    state: OpState | None
    goal: str
    plan: tuple[tuple[str, str], ...]
    reasons: tuple[str, ...] = ()
    operation: int | None = None
    steps: tuple[StepRecord, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
