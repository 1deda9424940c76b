"""A host's pool as one table: what it has, what is promised, used, predicted, reserved, and what a newcomer may have.

`free` is what admission would grant a VM without a reservation that stays: the same functions work it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hvctl.decide.admission import capacity_of
from hvctl.decide.reservations import COUNTED, FOREVER, Holders, kept_by_others
from hvctl.model.allocation import Resources
from hvctl.model.host import HostFacts, Ledger
from hvctl.settings import Settings

NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Line:
    """One resource. total is what the host has, capacity what of it may be promised (None: it is not counted);
    allocated what is promised, used what is observed (None: nobody looks), forecast what those that run are predicted
    to need, reserved what reservations keep now on top of allocated, free what is left for ever."""

    resource: str
    total: int | None
    overcommit: float | None
    reserve: int | None
    capacity: int | None
    allocated: int
    used: int | None
    forecast: int | None
    reserved: int
    free: int | None


def lines(
    facts: HostFacts,
    settings: Settings,
    held: Holders,
    ledger: Ledger,
    used: Mapping[str, int],
    forecast: Resources | None,
    now: float,
) -> tuple[Line, ...]:
    capacity = capacity_of(facts, settings)
    allocated = sum((r for _, r in held.values()), Resources())
    kept = kept_by_others(ledger.reservations, held, NOBODY, now, now)
    ever = kept_by_others(ledger.reservations, held, NOBODY, now, FOREVER)
    has = {
        "cpu": (facts.cpus * 100, settings.cpu_overcommit, settings.reserve_cpus * 100),
        "memory": (facts.memory, settings.memory_overcommit, settings.reserve_memory),
        "network": (settings.network_capacity, None, None),
        "iops": (settings.iops_capacity, None, None),
    }
    found = []
    for name in COUNTED:
        total, overcommit, reserve = has[name]
        most = getattr(capacity, name)
        promised = getattr(allocated, name)
        found.append(
            Line(
                name, total, overcommit, reserve, most, promised, used.get(name),
                None if forecast is None else getattr(forecast, name), getattr(kept, name),
                None if most is None else max(0, most - promised - getattr(ever, name)),
            )
        )  # fmt: skip
    return tuple(found)


def used_by(owner: str, held: Holders, used: Mapping[str, Resources]) -> Resources:
    """What the owner of a reservation uses, as observed; nothing where it is no VM that runs."""
    uuid = next((u for u, (name, _) in held.items() if owner in (u, name)), owner)
    return used.get(uuid, Resources())
