"""Why something was done, or was not: an operation with its plan and reasons, and the decision of the guard that it was
done for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hvctl.adapters.store.store import Store
from hvctl.errors import UsageError
from hvctl.model.guard import Decided
from hvctl.model.operation import Operation
from hvctl.settings import Settings


@dataclass(frozen=True, slots=True)
class Explained:
    """One of them may be absent: an operator needs no decision of a guard, and most of those are to do nothing."""

    operation: Operation | None
    decision: Decided | None


def explained(settings: Settings, ident: str) -> Explained:
    """Of an operation by its number, or of a guard's decision by d and its number; NotFoundError."""
    match = re.fullmatch(r"(d?)([0-9]{1,18})", ident)
    if not match:
        raise UsageError(f"{ident!r} is no number of an operation or of a decision.", "hvctl explain 12, or d12")
    number = int(match[2])
    with Store(settings.database) as store:
        store.migrate()
        if not match[1]:
            return Explained(store.operation(number), store.guards.of_operation(number))
        decision = store.guards.decision(number)
        return Explained(None if decision.operation is None else store.operation(decision.operation), decision)
