"""Reading the journal, and recovery by hand."""

from __future__ import annotations

import re

from hvctl.adapters.store.store import Store
from hvctl.engine.lock import tidy
from hvctl.engine.operate import Engine
from hvctl.errors import NotFoundError
from hvctl.model.operation import Operation, OpState
from hvctl.model.pool import Held
from hvctl.operations.inspect import vms
from hvctl.settings import Settings


def operations(settings: Settings, vm: str | None, state: OpState | None, limit: int) -> tuple[Operation, ...]:
    """Newest first. vm is a name or UUID as the journal has it, so that deleted VMs are found too; NotFoundError where
    neither the journal nor the host knows it."""
    with Store(settings.database) as store:
        store.migrate()
        by_uuid = vm is not None and re.fullmatch(r"[0-9a-f-]{36}", vm) is not None
        uuid, name = (vm, None) if by_uuid else (None, vm)
        found = store.operations(vm_uuid=uuid, vm_name=name, state=state, limit=limit)
        known = vm is None or found or store.operations(vm_uuid=uuid, vm_name=name, limit=1)
    if not known and vm not in {word for row in vms(settings) for word in (row["name"], row["uuid"])}:
        raise NotFoundError(
            f"there is no VM {vm!r}, and no operation of one in the journal.", "hvctl vm list; hvctl operation list"
        )
    return found


def operation(settings: Settings, number: int) -> Operation:
    with Store(settings.database) as store:
        store.migrate()
        return store.operation(number)


def recover(engine: Engine) -> tuple[list[Operation], tuple[Operation, ...]]:
    """End what dead owners left, and carry on the demands among it; the ended operations, and those that are still
    open (owned, or not observable). Lock files that nobody needs any more go."""
    ended = engine.sweep()
    tidy(engine.settings.locks_dir, lambda uuid, number: _has_ended(engine, uuid, number))
    if any(r.state is Held.WAITING for r in engine.store.pool.reservations(engine.facts.name)):
        from hvctl.operations.demand import Progress, finish

        finish(engine, Progress())
    return ended, engine.store.open_operations(engine.facts.name)


def _has_ended(engine: Engine, uuid: str, number: int) -> bool:
    """Whether it is an operation of this journal, and over: locks of other databases may lie in the same folder."""
    try:
        known = engine.store.operation(number)
    except NotFoundError:
        return False
    return known.vm_uuid == uuid and known.state is not OpState.OPEN
