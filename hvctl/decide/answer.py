"""How recovery ends an operation."""

from __future__ import annotations

from dataclasses import dataclass

from hvctl.model.operation import OpState
from hvctl.model.plan import Step


@dataclass(frozen=True, slots=True)
class Answer:
    """How the operation ends, after these steps. goal_holds: what it wanted is then promised (else: as before)."""

    state: OpState
    steps: tuple[Step, ...] = ()
    reason: str = ""
    goal_holds: bool = False
    forget: bool = False
